"""Checkpoints: kills, damage, full disks, order by number, and other configurations. Assertions 2, 3, 4 and 7."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_writer import SMALL, make_state, save_and_die_at_sync, save_for_ever, save_with_limit, state_of_a_model
from tiny_run import latest

from mapet.config import MAY_CHANGE, ModelConfig, OptimConfig, RunConfig, TrainConfig, field_notes, to_dict
from mapet.errors import CheckpointError
from mapet.training.checkpoint import (
    CheckpointState,
    CheckpointStore,
    DamagedCheckpoint,
    config_differences,
    load_weights,
    verify,
)

FILES = ("task.safetensors", "ema.safetensors", "trainer.pt", "config.json", "manifest.json")


def assert_equal(state: CheckpointState, expected: CheckpointState) -> None:
    assert state.config == expected.config
    for name, value in expected.task.items():
        assert torch.equal(state.task[name], value)
        assert torch.equal(state.ema[name], expected.ema[name])
    assert torch.equal(state.trainer["optimizer"]["moment"], expected.trainer["optimizer"]["moment"])
    assert state.trainer["optimizer"]["lr"] == expected.trainer["optimizer"]["lr"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def processes():
    """Starts real processes quickly: one clean server imports torch once and forks for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mapet.training.checkpoint"])
    return context


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    folder = store.save(7, make_state(7))
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    loaded = latest(store)
    assert (loaded.step, loaded.folder) == (7, folder)
    assert_equal(loaded.state, make_state(7))


def test_no_checkpoint_and_no_average_are_no_errors(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert latest(store) is None
    store.save(1, dataclasses.replace(make_state(1), ema=None))
    assert latest(store).state.ema is None


def test_only_the_newest_stay(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (5, 10, 15, 20):
        store.save(step, make_state(step))
        assert store.steps() == [s for s in (5, 10, 15, 20) if step - 5 <= s <= step]
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_000000015", "step_000000020"]


def test_checkpoints_may_be_links_to_another_disk(tmp_path):
    """A link goes, and what it names stays; other things called like leftovers do not stop a run either."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    kept = store.save(1, make_state(1)).rename(tmp_path / "elsewhere")
    before = contents(kept)
    store.path(1).symlink_to(kept)
    (store.folder / ".partial_step_000000007").symlink_to(kept)
    (store.folder / ".partial_note").write_text("mine")
    (store.folder / "xpartial_step_000000007").write_text("mine")
    for step in (1, 2, 3):
        store.save(step, make_state(step))
    left = [".partial_note", "step_000000003", "xpartial_step_000000007"]
    assert sorted(path.name for path in store.folder.iterdir()) == left
    assert contents(kept) == before


def test_an_older_checkpoint_that_cannot_be_removed_does_not_end_a_run(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(1, make_state(1))

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("mapet.training.checkpoint._remove", refuse)
    with pytest.warns(UserWarning, match=r"could not remove .*step_000000001: Permission denied"):
        store.save(2, make_state(2))
    assert store.newest_valid() == 2


@pytest.mark.parametrize("name", ["task.safetensors", "trainer.pt"])
def test_an_endless_file_is_not_hashed(name, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    os.truncate(store.save(1, make_state(1)) / name, 2**43)
    with pytest.warns(UserWarning, match="has 8796093022208 bytes"), pytest.raises(CheckpointError):
        store.newest_valid()


def test_assertion_07_checkpoints_are_picked_by_number(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=10)
    for step in (9, 10):
        store.save(step, make_state(step)).rename(store.folder / f"step_{step}")
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_10", "step_9"], "as text, 9 would be newer"
    assert latest(store).step == 10
    store.save(100, make_state(100))
    assert store.steps() == [9, 10, 100]
    store.keep = 2
    store.save(101, make_state(101))
    assert store.steps() == [100, 101]


@pytest.mark.parametrize("sync", range(1, 22))
def test_assertion_02_killed_at_every_point_of_a_save(sync, tmp_path, processes):
    """Seven flushes make a save (five files, the folder, the one above), so 21 kills cover three saves with pruning."""
    folder = tmp_path / "checkpoints"
    writer = processes.Process(target=save_and_die_at_sync, args=(folder, 1, sync))
    writer.start()
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL
    store = CheckpointStore(folder, keep=2)
    loaded = latest(store)
    renamed = sync // 7  # the seventh flush comes after the rename
    assert (loaded.step if loaded else 0) == renamed
    if loaded:
        assert_equal(loaded.state, make_state(renamed))
    store.save(renamed + 1, make_state(renamed + 1))
    assert store.steps() == [step for step in (renamed, renamed + 1) if step]
    assert not list(folder.glob(".*")), "what the killed process left is cleaned up"


def test_assertion_02_twenty_kills_at_any_time(tmp_path, processes):
    folder, moment = tmp_path / "checkpoints", random.Random(0)
    store, newest = CheckpointStore(folder, keep=2), 0
    for _ in range(20):
        writer = processes.Process(target=save_for_ever, args=(folder, newest + 1))
        writer.start()
        deadline = time.monotonic() + 60
        while max(store.steps(), default=0) <= newest and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moment.random() * 0.02)
        writer.kill()
        writer.join(60)
        assert writer.exitcode == -signal.SIGKILL
        loaded = latest(store)
        assert loaded.step > newest, "the run must get on between two kills"
        assert_equal(loaded.state, make_state(loaded.step))
        newest = loaded.step


def flip_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def zero_page(data: bytes) -> bytes:
    page = min(4096, len(data) // 2)
    return data[: -page - 1] + bytes(page) + data[-1:]


DAMAGES = {"bit flip": flip_bit, "zeroed page": zero_page, "truncation": lambda d: d[:-1], "empty": lambda d: b""}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["task.safetensors", "ema.safetensors", "trainer.pt", "config.json"])
def test_assertion_03_damage_falls_back_with_a_warning(name, damage, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        store.save(step, make_state(step, numbers=5000))
    broken = store.path(2) / name
    broken.write_bytes(DAMAGES[damage](broken.read_bytes()))
    with pytest.warns(UserWarning, match=rf"step_000000002 is damaged: {name} .*going back"):
        loaded = latest(store)
    assert loaded.step == 1
    assert_equal(loaded.state, make_state(1, numbers=5000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "manifest.json is missing"),
        (b"", "manifest.json cannot be read"),
        (b"[1]", "manifest.json cannot be read"),
        (b'{"format": 2, "step": 2, "files": {}}', "does not list the files"),
        (b"\xff\xfe{", "manifest.json cannot be read"),
    ],
)
def test_assertion_03_a_damaged_manifest_is_damage(text, message, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        store.save(step, make_state(step))
    manifest = store.path(2) / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_bytes(text)
    with pytest.warns(UserWarning, match=message):
        assert latest(store).step == 1


def test_assertion_03_every_bit_of_a_manifest_may_flip(tmp_path):
    """A flip is found, or changes nothing that is read (white space, say): the state is never a wrong one."""
    store = CheckpointStore(tmp_path / "checkpoints")
    manifest = store.save(2, make_state(2, numbers=4)) / "manifest.json"
    good, found = manifest.read_bytes(), 0
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        manifest.write_bytes(flipped)
        try:
            with pytest.warns(UserWarning, match="damaged"):
                store.newest_valid()
        except CheckpointError:
            found += 1
        except pytest.fail.Exception:
            assert store.newest_valid() == 2
            assert_equal(store.load(2).state, make_state(2, numbers=4))
    assert found > len(good) * 0.8


def test_assertion_03_none_left_is_an_error_that_names_them(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        (store.save(step, make_state(step)) / "trainer.pt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no valid checkpoint is left") as caught:
        latest(store)
    assert "step_000000001" in str(caught.value) and "step_000000002" in str(caught.value)
    assert "trainer.pt" in str(caught.value)
    assert caught.value.exit_code == 1


def test_the_run_that_went_back_does_not_prune_its_only_valid_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(10, make_state(10))
    store.keep = 2
    (store.save(20, make_state(20)) / "trainer.pt").write_bytes(b"")
    store.keep = 1
    with pytest.warns(UserWarning, match="step_000000020"):
        assert latest(store).step == 10
    store.save(15, make_state(15))
    assert store.steps() == [15] and latest(store).step == 15


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    (store.save(3, make_state(3)) / "trainer.pt").write_bytes(b"")
    store.save(3, make_state(3))
    assert_equal(latest(store).state, make_state(3))


def test_a_copied_folder_is_not_another_step(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    shutil.copytree(store.save(3, make_state(3)), store.folder / "step_000000008")
    with pytest.warns(UserWarning, match="is that of step 3"):
        assert latest(store).step == 3


def test_assertion_04_a_file_that_cannot_grow(tmp_path, processes):
    folder = tmp_path / "checkpoints"
    CheckpointStore(folder).save(1, make_state(1))
    before = contents(folder)
    writer = processes.Process(target=save_with_limit, args=(folder, 2, 6000))
    writer.start()
    writer.join(60)
    assert writer.exitcode == 1
    message = (tmp_path / "error.txt").read_text()
    for part in ("step_000000002", "File too large", "step_000000001", "untouched"):
        assert part in message
    assert contents(folder) == before
    assert latest(CheckpointStore(folder)).step == 1


FULL_DISK = """
set -e
mount -t tmpfs -o size=256k tmpfs "$1"
shift
exec "$@"
"""
SAVE_TWICE = """
import sys, pathlib
sys.path[:0] = sys.argv[2:]
from checkpoint_writer import make_state
from test_checkpoint import contents
from mapet.training.checkpoint import CheckpointStore
from mapet.errors import CheckpointError
store = CheckpointStore(pathlib.Path(sys.argv[1]) / "checkpoints", keep=1)
store.save(1, make_state(1, numbers=5000))
before = contents(store.folder)
try:
    store.save(2, make_state(2, numbers=30000))
except CheckpointError as error:
    print(error)
assert contents(store.folder) == before
assert [path.name for path in store.folder.iterdir()] == ["step_000000001"]
store.save(3, make_state(3, numbers=5000))
"""


def test_assertion_04_a_disk_that_is_full(tmp_path):
    mounting = ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", str(tmp_path)]
    try:
        allowed = subprocess.run([*mounting, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this machine lets no user mount a small file system; the size limit above stands in for it")
    script = [sys.executable, "-c", SAVE_TWICE, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run([*mounting, *script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout and "the disk is full" in done.stdout


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, r"the disk is full \(said the system; .* MiB free\)"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EIO, "said the system"),
    ],
)
def test_assertion_04_write_errors_name_their_reason(code, text, tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, make_state(1))
    before = contents(store.folder)

    def refuse(descriptor):
        raise OSError(code, "said the system")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(CheckpointError, match=rf"step_000000002: {text}.*untouched"):
        store.save(2, make_state(2))
    assert contents(store.folder) == before


def test_fields_that_may_change_exist_and_the_others_are_refused(tmp_path):
    config = to_dict(RunConfig())
    fields = {f"{section}.{name}" for section, values in config.items() for name in values}
    may_change = {name for name, notes in field_notes().items() if MAY_CHANGE in notes}
    assert {"data.cache", "train.output", "train.micro_batch", "speed.compile"} < may_change < fields
    learned = {field for field in fields if field.split(".")[0] in ("model", "objective", "optim")}
    learned |= {"speed.fp8", "train.seed", "train.precision", "train.ema_decay", "data.color_jitter"}
    assert not may_change & learned


def test_a_checkpoint_of_another_configuration_is_refused_field_by_field(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, make_state(1))
    same = RunConfig(train=TrainConfig(output=tmp_path, micro_batch=4, max_steps=9, log_every=3))
    assert latest(store, same).step == 1
    other = RunConfig(model=ModelConfig(width=384, heads=6), optim=OptimConfig(lr=1.0), train=TrainConfig(seed=3))
    with pytest.raises(CheckpointError) as caught:
        latest(store, other)
    for part in ("model.width was 192, is 384", "model.heads", "optim.lr was 0.0015, is 1.0", "train.seed was 0, is 3"):
        assert part in str(caught.value)
    assert "micro_batch" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "said"), [(1, r"is of an earlier version of mapet.*--fresh"), (3, "is of a later version of mapet")]
)
def test_a_checkpoint_of_another_version_is_refused_by_name(number, said, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    folder = store.save(1, make_state(1))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": number}))
    with pytest.raises(CheckpointError, match=rf"step_000000001 {said}"):
        latest(store)


def test_a_field_that_one_of_two_configurations_lacks_is_a_difference():
    now = to_dict(RunConfig())
    before = json.loads(json.dumps(now))
    del before["optim"]["clip"]
    assert config_differences(before, now) == ["optim.clip was absent, is 3.0"]


def test_load_weights_takes_a_run_folder_or_a_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    folders = [store.save(step, state_of_a_model(step)) for step in (1, 2)]
    model, objective, weights = load_weights(tmp_path)
    assert model == SMALL and objective.name == "mapet"
    assert torch.equal(weights["norm.weight"], torch.full((8,), 2.0))
    assert torch.equal(load_weights(folders[0])[2]["norm.weight"], torch.full((8,), 1.0))
    assert torch.equal(load_weights(str(tmp_path), ema=True)[2]["norm.weight"], torch.full((8,), 102.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.task.pop("model.norm.bias"), "task.safetensors: it lacks model.norm.bias"),
        (lambda s: s.task.update(more=torch.ones(2)), "has no place for, more"),
        (lambda s: s.task.update({"model.norm.bias": torch.ones(9)}), r"norm.bias is \(9,\), must be \(8,\)"),
        (lambda s: s.task.update({"model.norm.bias": torch.full((8,), torch.nan)}), "norm.bias has NaN"),
        (
            lambda s: s.task.update({"model.norm.bias": torch.ones(8).int()}),
            "norm.bias is I32, must be of float",
        ),
        (lambda s: s.config.pop("model"), "config.json: config lacks 'model'"),
        (lambda s: s.config["model"].update(depth="1"), "config.json: model.depth must be a whole number"),
        (lambda s: s.config["model"].update(deep=1), "config.json: model has an unknown entry 'deep'"),
        (
            lambda s: s.config["objective"].update(name="x"),
            "config.json: unknown objective 'x'; choose one of",
        ),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_an_error(change, message, tmp_path):
    state = state_of_a_model(1)
    change(state)
    CheckpointStore(tmp_path / "checkpoints").save(1, state)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_files_called_like_checkpoints_are_none(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(5, make_state(5))
    (store.folder / "step_777").write_text("mine")
    assert store.steps() == [5] and latest(store).step == 5
    store.save(777, make_state(777))
    assert store.steps() == [5, 777] and (store.folder / "step_777").read_text() == "mine"


def test_load_weights_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; give a run folder"):
        load_weights(tmp_path)
    folder = CheckpointStore(tmp_path / "checkpoints").save(1, dataclasses.replace(make_state(1), ema=None))
    with pytest.raises(CheckpointError, match="no moving average"):
        load_weights(tmp_path, ema=True)
    (folder / "task.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"task.safetensors has 0 bytes"):
        load_weights(folder)


class Opened:
    """A pickle of this touches a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    """Even under a manifest that fits: whoever writes the file can write its hash."""
    store = CheckpointStore(tmp_path / "checkpoints")
    state = make_state(1)
    state.trainer["optimizer"] = Opened(tmp_path / "code ran")
    store.save(1, state)
    assert verify(store.path(1)) == 1
    with pytest.raises(CheckpointError, match=r"trainer.pt"):
        latest(store)
    assert not (tmp_path / "code ran").exists()


def test_damaged_is_a_checkpoint_error():
    assert issubclass(DamagedCheckpoint, CheckpointError)
