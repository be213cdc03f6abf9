"""What an attention kernel with its tiles costs at least on an H200, compiled now, for what a harvest measured."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

from bench.harvest_advice import TABLE
from bench.harvest_data import Config, Shape

KERNELS = {"forward": "forward_kernel", "dq": "query_gradient_kernel", "dkdv": "key_gradient_kernel"}
"""Op -> kernel."""
GPU = "H200"
Find = Callable[[str, Config, Shape, str], dict[str, float]]
"""(op, configuration, shape, dtype) -> microseconds by unit."""


def finder(device: str) -> Find:
    """Floors of this checkout's kernels for a device: none of another than an H200, whose rates they are."""
    unable = GPU not in device

    def find(op: str, config: Config, shape: Shape, dtype: str) -> dict[str, float]:
        nonlocal unable
        try:
            return {} if unable else compiled(op, config, shape, dtype)
        except ImportError:  # no torch or Triton here
            unable = True
        except Exception as error:  # whatever a compiler raises: the page goes on without these floors
            print(f"no floors of {op}, {config}, {shape}: {type(error).__name__}: {error}")
        return {}

    return find


def compiled(op: str, config: Config, shape: Shape, dtype: str) -> dict[str, float]:
    """Compile the kernel with this configuration and work out its floors; none where its loops are not understood.

    Raises:
        ImportError: torch or Triton is missing.
    """
    from bench import aot
    from bench.aot_cases import Attention
    from mapet_kernels import launch

    case = Attention(**shape._asdict(), dtype=dtype)
    with patch.object(launch, TABLE[op], lambda *_: launch.LaunchConfig(**config._asdict())):
        part = next(x for x in case.launches(launch.TARGETS[90]) if x.kernel.__name__ == KERNELS[op])
    return aot.cost_of("measured", case, part, launch.TARGETS[90]).floors
