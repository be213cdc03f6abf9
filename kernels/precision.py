"""Matrix products and convolutions in full fp32, whatever the caller has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_fp32(device_type: str) -> Iterator[None]:
    """Inside, fp32 matrix products and convolutions are IEEE fp32: no TF32, no bf16 passes, no autocast.

    The process-wide settings are put back after.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    settings = (cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
