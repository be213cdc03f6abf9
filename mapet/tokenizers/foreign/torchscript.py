"""Weights out of a TorchScript archive without running anything in it.

`torch.jit.load` compiles and keeps the archive's code, and OpenAI published CLIP in that form. An archive is a zip with
a pickle of nested modules and one raw record per tensor; here the pickle is read with every name it may ask for listed
below, and its code is never opened.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapet.errors import DataError
from mapet.files import unreadable
from mapet_kernels.regular import check_backed, open_regular

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip with the records of a TorchScript archive. UnreadableFile where it is no file."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception:  # no zip, or a damaged one
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor attribute of the archive's modules by dotted name, on the CPU. DataError names a file unfit."""
    try:
        with open_regular(path) as opened, zipfile.ZipFile(opened) as archive:
            root = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            with archive.open(_stored(archive, root)) as file:
                module = _Unpickler(file, archive, root.removesuffix(".pkl")).load()
            return dict(_tensors(module, "", set()))
    except Exception as error:  # A damaged pickle fails in as many ways as it has bytes.
        raise DataError(f"{path} is no readable TorchScript archive: {type(error).__name__}: {error}") from error


class _Module:
    """Holds the attributes of a pickled module."""


class _Unpickler(pickle.Unpickler):
    """Reads modules, tensors and plain values; any other name in the pickle is refused."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.module_class = type("Module", (_Module,), {})
        self.records: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self.module_class
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")

    def persistent_load(self, key: Any) -> Tensor:
        kind, dtype, record, _, numel = key
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown record {kind!r}")
        if record not in self.records:
            content = bytearray(self.archive.read(_stored(self.archive, f"{self.folder}/{record}")))
            if len(content) != numel * dtype.itemsize:
                raise ValueError(f"record {record} has {len(content)} bytes, not {numel * dtype.itemsize}")
            self.records[record] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.records[record]


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The member, refused if compressed: TorchScript stores weights as they are; only a trap would unpack to more."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"member {name} is compressed")
    return info


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    tensor = storage.as_strided(size, stride, offset)
    check_backed(tensor)
    return tensor


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _Module):
        raise TypeError(f"{prefix or 'the root'} is a {type(module).__name__}, not a module")
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module) and id(value) not in seen:
            yield from _tensors(value, f"{prefix}{name}.", seen)
