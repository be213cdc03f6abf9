"""Checkpoints that survive kills, full disks and damaged bytes.

    <run>/checkpoints/step_000000123/
        task.safetensors    the whole task: weights and buffers
        ema.safetensors     the moving average of its trained weights, where the run keeps one
        trainer.pt          optimizer, loss scale and random states; read with weights_only=True
        config.json         the RunConfig
        manifest.json       step, and bytes and SHA-256 of every other file; written last

A save fills a hidden folder beside the target, flushes it to the disk and renames it, so that a folder under its final
name is always complete. A load checks the SHA-256 of every file before it reads one, and goes back to the previous
checkpoint with a warning when something is damaged.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor

from mapet.checked import at_least
from mapet.config import MAY_CHANGE, ModelConfig, ObjectiveConfig, RunConfig, field_notes, from_dict, to_dict
from mapet.errors import CheckpointError, MapetError
from mapet.files import (
    FileRecord,
    UnreadableFile,
    move_folder,
    one_line,
    read_pickle,
    read_record,
    read_tensors,
    write_through,
)
from mapet.folders import CHECKPOINT, CHECKPOINTS, a, kind_of
from mapet.objectives import build_task
from mapet.task import Task
from mapet.training.optim import trained

T = TypeVar("T")
FORMAT, EARLIER = 2, 1
FOLDER = "checkpoints"
WANTED = f"give a run folder (with {FOLDER}/ in it) or one of its step_... folders"
REQUIRED = ("task.safetensors", "trainer.pt", "config.json")
PARTIAL, REMOVED = ".partial_", ".removed_"
ATTEMPTS = 20
"""To read weights of a run that goes on, and removes what is being read."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class CheckpointState:
    """What a checkpoint holds. `trainer` consists of tensors, numbers, text, lists and dicts only."""

    task: dict[str, Tensor]
    trainer: dict[str, Any]
    config: dict[str, Any]
    ema: dict[str, Tensor] | None = None


def not_finite(state: CheckpointState) -> str:
    """The first tensor with a NaN or an infinity, in words; empty where there is none. A device is waited for once."""
    tensors = {f"weight {name}": tensor for name, tensor in state.task.items()}
    tensors |= {f"the moving average of {name}": tensor for name, tensor in (state.ema or {}).items()}
    moments = state.trainer.get("optimizer", {}).get("state", {})
    tensors |= {f"the optimizer's {name} of weight {i}": t for i, part in moments.items() for name, t in part.items()}
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            by_device.setdefault(tensor.device, {})[name] = torch.isfinite(tensor).all()
    for finite in by_device.values():
        for name, is_finite in zip(finite, torch.stack(list(finite.values())).tolist(), strict=True):
            if not is_finite:
                return name
    return ""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint as read: `step` optimizer steps were done when it was saved."""

    step: int
    folder: Path
    state: CheckpointState


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    format: int
    step: Annotated[int, at_least(0)]
    files: dict[str, FileRecord]


class DamagedCheckpoint(CheckpointError):
    """One checkpoint folder that does not match its manifest."""


class CheckpointStore:
    """The checkpoints of one run, in `folder`; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a folder, complete or damaged, in rising order of the number."""
        return sorted(number for number, _ in self._folders())

    def path(self, step: int) -> Path:
        """The folder of a step: the existing one, whatever its zero padding, or the one a save would make."""
        found = (folder for number, folder in self._folders() if number == step)
        return next(found, self.folder / f"step_{step:09d}")

    def _folders(self) -> Iterator[tuple[int, Path]]:
        """Step and folder of every checkpoint; a file that is called like one is none."""
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            if (match := re.fullmatch(r"step_(\d+)", entry.name)) and entry.is_dir():
                yield int(match[1]), entry

    def save(self, step: int, state: CheckpointState) -> Path:
        """Write the checkpoint of `step`; then remove those older than the newest `keep`, and those of later steps.

        Later steps exist only where the run went back past a damaged checkpoint; they are no longer its future.
        Raises CheckpointError when it cannot be written (disk full, no permission); the partial folder is then gone
        and the earlier checkpoints are as they were.
        """
        target = self.path(step)
        partial = self.folder / f"{PARTIAL}{target.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            partial.mkdir()
            _write_files(partial, step, state)
            _rename_over(partial, target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(self._save_failure(target, error)) from error
        current = [existing for existing in self.steps() if existing <= step][-self.keep :]
        for other in set(self.steps()) - set(current):
            try:
                _remove(self.path(other))
            except OSError as error:
                warnings.warn(f"could not remove {self.path(other)}: {error.strerror or error}", stacklevel=2)
        return target

    def newest_valid(self) -> int | None:
        """The newest step whose files match their manifest; None where there is no checkpoint at all.

        A damaged checkpoint is passed over with a warning that names its folder and file. CheckpointError when every
        checkpoint is damaged.
        """
        damages = []
        for step in reversed(self.steps()):
            try:
                self._verify_step(step)
            except DamagedCheckpoint as damage:
                if not self.path(step).exists():  # the run that this belongs to has replaced it by a newer one
                    return self.newest_valid()
                damages.append(str(damage))
                warnings.warn(f"{damage}; going back to the checkpoint before it", stacklevel=2)
            else:
                return step
        if damages:
            raise CheckpointError(
                f"no valid checkpoint is left in {self.folder}: " + "; ".join(damages) + ". "
                "To start afresh, remove that folder or run `mapet pretrain --fresh`"
            )
        return None

    def load(
        self, step: int, config: RunConfig | None = None, notes: Mapping[str, str] | None = None
    ) -> LoadedCheckpoint:
        """Read the verified checkpoint of `step`; CheckpointError if it belongs to a run configured unlike `config`.

        `notes` say of fields, by dotted name, how they got their present value.
        """
        folder = self.path(step)
        saved = _read(folder, "config.json", read_record, dict[str, dict[str, Any]])
        if config is not None and (differences := config_differences(saved, to_dict(config), notes)):
            raise CheckpointError(
                f"checkpoint {folder} belongs to another configuration: " + "; ".join(differences) + ". Give the run "
                "another train.output, restore these values, or start afresh with `mapet pretrain --fresh`"
            )
        ema = folder / "ema.safetensors"
        state = CheckpointState(
            task=_read(folder, "task.safetensors", read_tensors, finite=True),
            trainer=_read(folder, "trainer.pt", _read_trainer),
            config=saved,
            ema=_read(folder, ema.name, read_tensors, finite=True) if ema.exists() else None,
        )
        return LoadedCheckpoint(step, folder, state)

    def _verify_step(self, step: int) -> None:
        folder = self.path(step)
        if (written := verify(folder)) != step:
            raise _damaged(folder, f"its manifest.json is that of step {written}")

    def _remove_leftovers(self) -> None:
        for entry in self.folder.iterdir():
            if re.fullmatch(r"\.(partial|removed)_step_\d+", entry.name):
                _delete(entry)

    def _save_failure(self, target: Path, error: OSError) -> str:
        reason = f"{error.strerror or error}"
        if error.errno in NO_SPACE:
            free = shutil.disk_usage(self.folder).free
            fewer = ", or lower train.keep" if len(self.steps()) > 1 else ""
            reason = f"the disk is full ({reason}; {free / 2**20:.1f} MiB free); make room{fewer}"
        complete = [self.path(step).name for step in self.steps()]
        kept = (
            f"the earlier checkpoints are untouched ({', '.join(complete)})" if complete else "there is no earlier one"
        )
        return f"could not write checkpoint {target}: {reason}. The partial files were removed; {kept}"


def verify(folder: Path) -> int:
    """The step of the checkpoint in `folder`; DamagedCheckpoint names the first file that differs from the manifest."""
    manifest = _read_manifest(folder)
    for name, expected in manifest.files.items():
        try:
            found = FileRecord.of(folder / name, expected)
        except UnreadableFile as error:
            raise _damaged(folder, f"{name} cannot be read ({error.reason})") from error
        if found.bytes != expected.bytes:
            raise _damaged(folder, f"{name} has {found.bytes} bytes, {expected.bytes} were written")
        if found.sha256 != expected.sha256:
            raise _damaged(folder, f"{name} does not match its SHA-256")
    return manifest.step


def config_differences(
    saved: dict[str, Any], current: dict[str, Any], notes: Mapping[str, str] | None = None
) -> list[str]:
    """Fields that differ and may not change; each as "section.field was A, is B", with a note in brackets."""
    before, now, marks = _flatten(saved), _flatten(current), field_notes()
    fields = [name for name in sorted(before | now) if MAY_CHANGE not in marks.get(name, ())]
    return [
        f"{name} was {one_line(before.get(name, 'absent'))}, is {now.get(name, 'absent')}"
        + (f" ({notes[name]})" if notes and name in notes else "")
        for name in fields
        if before.get(name) != now.get(name)
    ]


def load_task(path: Path | str, *, ema: bool = False) -> Task:
    """The task of a run folder or of one checkpoint folder, with its weights, on the CPU.

    A run folder gives its newest valid checkpoint, also while the run goes on and replaces it. `ema` takes the moving
    average of the weights that learn.
    CheckpointError when the path holds no checkpoint, the checkpoint is damaged, or it has no average.
    """
    for _ in range(ATTEMPTS):
        folder = _checkpoint_folder(Path(path))
        try:
            return _task_in(folder, ema)
        except (OSError, MapetError):
            if folder.exists():
                raise
    raise CheckpointError(f"{path} is being trained, and its checkpoints go before they are read: raise train.keep")


def load_weights(path: Path | str, *, ema: bool = False) -> tuple[ModelConfig, ObjectiveConfig, dict[str, Tensor]]:
    """What `load_task` gives, as the backbone's configuration, the method's options and the backbone's weights."""
    task = load_task(path, ema=ema)
    model, weights = task.backbone()
    return model, task.options, weights


def _task_in(folder: Path, ema: bool) -> Task:
    """As `load_task`, of one checkpoint folder."""
    verify(folder)
    config = _read(folder, "config.json", read_record, dict[str, Any])
    try:
        with torch.device("meta"):
            task = build_task(from_dict(config))
    except (ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be used: config.json: {error}") from error
    average = folder / "ema.safetensors"
    if ema and not average.exists():
        raise CheckpointError(f"checkpoint {folder} has no moving average (train.ema_decay was 0); use its weights")
    shapes = {name: tuple(value.shape) for name, value in task.state_dict().items()}
    weights = _read(folder, "task.safetensors", read_tensors, shapes, finite=True)
    if ema:
        shapes = {name: shapes[name] for name in trained(task)}
        weights |= _read(folder, average.name, read_tensors, shapes, finite=True)
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and of no use
        task = build_task(from_dict(config))
    task.load_state_dict(weights)
    return task


def _read(folder: Path, name: str, read: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What `read` makes of a file of a checkpoint; CheckpointError where it cannot be read."""
    try:
        return read(folder / name, *arguments, **options)
    except UnreadableFile as error:
        raise CheckpointError(f"checkpoint {folder} cannot be used: {name}: {error.reason}") from error


def _checkpoint_folder(path: Path) -> Path:
    if (kind := kind_of(path)) and kind not in (CHECKPOINT, CHECKPOINTS):
        raise CheckpointError(f"{path} is {a(kind)}; {WANTED}")
    if (path / "manifest.json").exists():
        return path
    store = CheckpointStore(path / FOLDER)
    step = store.newest_valid()
    if step is None:
        raise CheckpointError(f"{path} holds no checkpoint; {WANTED}")
    return store.path(step)


def _damaged(folder: Path, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"checkpoint {folder} is damaged: {what}")


def _read_manifest(folder: Path) -> Manifest:
    try:
        manifest = read_record(folder / "manifest.json", Manifest, version=FORMAT)
    except UnreadableFile as error:
        if f"it has format {EARLIER}," in error.reason:
            raise CheckpointError(
                f"checkpoint {folder} is of an earlier version of mapet, which kept no whole task: go on with that "
                "version, or start afresh with `mapet pretrain --fresh`"
            ) from error
        if re.search(rf"it has format ({FORMAT + 1}|[1-9]\d+),", error.reason):
            raise CheckpointError(f"checkpoint {folder} is of a later version of mapet: go on with that one") from error
        reason = "is missing" if error.missing else f"cannot be read: {error.reason}"
        raise _damaged(folder, f"manifest.json {reason}") from error
    if not set(REQUIRED) <= set(manifest.files) or any(Path(name).name != name for name in manifest.files):
        raise _damaged(folder, "manifest.json does not list the files of a checkpoint")
    return manifest


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in config.items() for name, value in fields.items()}


def _write_files(folder: Path, step: int, state: CheckpointState) -> None:
    files = {name: write_through(folder / name, payload) for name, payload in _payloads(state)}
    manifest = dataclasses.asdict(Manifest(FORMAT, step, files))
    write_through(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def _payloads(state: CheckpointState) -> Iterator[tuple[str, bytes | memoryview]]:
    """Name and content of each file, made one at a time.

    The bytes are made in memory because torch.save and safetensors hide the errno of a failed write, and so that the
    hash is that of the intended bytes, not of what came back from the disk.
    """
    yield "task.safetensors", _tensor_bytes(state.task)
    if state.ema is not None:
        yield "ema.safetensors", _tensor_bytes(state.ema)
    trainer = io.BytesIO()
    torch.save(state.trainer, trainer)
    yield "trainer.pt", trainer.getbuffer()
    yield "config.json", json.dumps(state.config, indent=1).encode()


def _read_trainer(path: Path) -> dict[str, Any]:
    trainer = read_pickle(path)
    if not isinstance(trainer, dict):
        raise UnreadableFile(path, f"it holds a {type(trainer).__name__}, not the state of a run")
    return trainer


def _tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save  # steps without checkpoints need fewer packages

    return save({name: value.detach().contiguous() for name, value in tensors.items()})


def _rename_over(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`. A folder in the way is a damaged checkpoint of the same step, and goes."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(errno.EEXIST, "a file is in its place; move it away")
    removed = target.with_name(f"{REMOVED}{target.name}")
    if move_folder(partial, target, removed):
        _delete(removed)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a kill halfway leaves a hidden folder for the next save to remove, not half a checkpoint."""
    _delete(folder.rename(folder.with_name(f"{REMOVED}{folder.name}")))


def _delete(entry: Path) -> None:
    """Delete a folder with all that is in it; of a link only the link."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
