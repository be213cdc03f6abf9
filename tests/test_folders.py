"""Folders: one process at a time, nothing lost that others put there, nothing half-made left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from checkpoint_writer import make_state
from command_line import FIT, PROBE, SIZES, TRAINING, everything_in, pictures, training
from datafakes import description, entries, random_rows, write_cache
from forked import FORK, killed_at_sync, run_ranks
from safetensors.torch import save_file
from tiny_run import make_cache, make_config

import mapet.training.checkpoint as checkpoint
from mapet.cli import main
from mapet.config import ModelConfig
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import CacheWriter
from mapet.distributed import StopRequest, World
from mapet.errors import CheckpointError, ConfigError, DataError, MapetError
from mapet.files import NpyWriter
from mapet.folders import LOCK, BusyFolder, FolderLock, Staging, check_apart, check_place, claim, locked, set_aside
from mapet.model.export import export
from mapet.model.vit import MaskedTokenViT
from mapet.tokenizers import load_tokenizer, make_tokenizer
from mapet.tokenizers.base import Tokenizer
from mapet.training import budget
from mapet.training.checkpoint import CheckpointStore, load_weights
from mapet.training.learner import Learner
from mapet.training.loop import pretrain

MODEL = ModelConfig(image_size=16, patch_size=4, width=32, depth=1, heads=2, vocabulary=16)
THESIS = "years of work"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "labelled")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("tiny") / "cache")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A finished run of two steps."""
    output = tmp_path_factory.mktemp("run") / "run"
    pretrain(make_config(tiny, output, **{"train.max_steps": 2}))
    return output


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MaskedTokenViT(MODEL).state_dict()


def in_fork(task) -> object:
    """What `task` returns in a process of its own, or the error it raises."""
    ours, theirs = FORK.Pipe(duplex=False)

    def call() -> None:
        torch.set_num_threads(1)
        try:
            theirs.send(task())
        except BaseException as error:
            theirs.send((type(error).__name__, str(error), getattr(error, "exit_code", None)))
        os._exit(0)

    process = FORK.Process(target=call)
    process.start()
    answer = ours.recv()
    process.join()
    return answer


def waiting(task, ready: Path):
    """A process that runs `task`, when that has made the file `ready`."""
    process = FORK.Process(target=task)
    process.start()
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def sleep_at(ready: Path) -> None:
    ready.write_text("")
    time.sleep(600)


class TestLock:
    def test_the_second_process_is_refused_and_the_folder_named(self, tmp_path):
        with locked(tmp_path / "here", "run"):
            kind, text, code = in_fork(lambda: FolderLock(tmp_path / "here", "run"))
        assert (kind, code) == ("BusyFolder", 1) and f"at work on the run in {tmp_path / 'here'}" in text
        assert not everything_in(tmp_path), "nor is anything left"

    def test_a_killed_holder_s_lock_is_taken_over_while_its_workers_live(self, tmp_path):
        pids = tmp_path / "pids"

        def hold() -> None:
            lock = FolderLock(tmp_path / "there", "run")
            worker = FORK.Process(target=time.sleep, args=(600,))
            worker.start()
            pids.with_suffix(".new").write_text(str(worker.pid))
            pids.with_suffix(".new").rename(pids)
            time.sleep(600)
            lock.release()

        holder = waiting(hold, pids)
        with pytest.raises(BusyFolder):
            FolderLock(tmp_path / "there", "run")
        holder.kill()
        holder.join()
        try:
            with locked(tmp_path / "there", "run"):
                assert os.kill(int(pids.read_text()), 0) is None, "its worker is alive"
        finally:
            os.kill(int(pids.read_text()), signal.SIGKILL)

    def test_a_fork_does_not_give_back_the_lock_of_its_parent(self, tmp_path):
        with locked(tmp_path, "run"):
            lock = FolderLock(tmp_path / "other", "run")
            in_fork(lock.release)
            assert (tmp_path / "other" / LOCK).exists()
            with pytest.raises(BusyFolder):
                FolderLock(tmp_path / "other", "run")
            lock.release()

    def test_a_file_in_the_way_is_an_error_of_one_line(self, tmp_path):
        (tmp_path / "file").write_text("")
        for place in (tmp_path / "file", tmp_path / "file/below"):
            with pytest.raises(DataError, match=r"cannot write the run in .*file"), locked(place, "run"):
                pass

    def test_a_folder_of_other_things_is_not_claimed(self, tmp_path):
        (tmp_path / LOCK).write_text("")
        (tmp_path / "thesis.tex").write_text(THESIS)
        with pytest.raises(DataError, match=r"holds no work of mapet; move it away \(thesis.tex\)"):
            claim(tmp_path, "cache", ("*.npy",))

    def test_a_folder_with_the_name_of_a_file_is_not_claimed(self, tmp_path):
        (tmp_path / "plan.json").mkdir()
        (tmp_path / "plan.json/thesis.tex").write_text(THESIS)
        with pytest.raises(DataError, match=r"holds no work of mapet; move it away \(plan.json/\)"):
            claim(tmp_path, "cache", ("plan.json", "cache"))


class TestRun:
    def test_a_second_pretrain_is_refused_and_the_first_loses_nothing(self, mapet, tiny, tmp_path, monkeypatch):
        output, step, seen = tmp_path / "run", Learner.step, []

        def step_and_intrude(learner, number, *arguments, **options):
            step(learner, number, *arguments, **options)
            if number == 3:
                before = entries(output)
                for changes in ({}, {"train.resume": False}, {"train.budget": "1h"}):
                    other = make_config(tiny, output, **changes)
                    seen.append(in_fork(lambda other=other: pretrain(other).step))
                assert entries(output) == before

        monkeypatch.setattr(Learner, "step", step_and_intrude)
        assert pretrain(make_config(tiny, output, **{"train.max_steps": 6})).step == 6
        assert [answer[0] for answer in seen] == ["BusyFolder"] * 3
        assert all(f"the run in {output}" in answer[1] and answer[2] == 1 for answer in seen)
        lines = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert lines == [1, 2, 3, 4, 5, 6]
        assert not (output / LOCK).exists()

    def test_a_file_in_place_of_the_checkpoints_costs_no_metrics(self, tiny, tmp_path):
        pretrain(make_config(tiny, tmp_path, **{"train.max_steps": 2}))
        (tmp_path / "checkpoints").rename(tmp_path / "moved")
        (tmp_path / "checkpoints").write_text(THESIS)
        before = entries(tmp_path)
        with pytest.raises(DataError, match="checkpoints is no folder"):
            pretrain(make_config(tiny, tmp_path))
        assert entries(tmp_path) == before

    @pytest.mark.parametrize("content", ['{"note": 1}\n', "mine"])
    def test_metrics_of_others_are_not_replaced(self, content, tiny, tmp_path):
        theirs = tmp_path / "metrics.jsonl"
        theirs.write_text(content)
        with pytest.raises(DataError, match=r"metrics\.jsonl holds no line of a run; it is left as it is"):
            pretrain(make_config(tiny, tmp_path))
        assert entries(tmp_path) == {"metrics.jsonl": content.encode()}
        theirs.write_text("")
        assert pretrain(make_config(tiny, tmp_path, **{"train.max_steps": 1})).step == 1

    def test_under_torchrun_all_ranks_end(self, tiny, tmp_path):
        def rank(number: int) -> int:
            try:
                pretrain(make_config(tiny, tmp_path / "run"))
            except MapetError as error:
                (tmp_path / f"{number}.txt").write_text(str(error))
                return error.exit_code
            return 0

        with locked(tmp_path / "run", "run"):
            assert run_ranks(rank) == [1, 1]
        assert "another process is at work" in (tmp_path / "0.txt").read_text()

    def test_fresh_sets_all_of_the_earlier_run_aside(self, tiny, tmp_path):
        output = tmp_path / "run"
        pretrain(make_config(tiny, output, **{"train.max_steps": 3}))
        (output / "budget.json").write_text("{}")
        (output / "failed_step_2.json").write_text("{}")
        (output / "notes.txt").write_text(THESIS)
        before = entries(output)
        fresh = {"train.max_steps": 1, "train.resume": False}
        pretrain(make_config(tiny, output, **fresh))
        del before["notes.txt"]
        assert entries(output / "before_1") == before, "the checkpoints, the metrics, everything"
        assert (output / "notes.txt").read_text() == THESIS
        assert load_weights(output / "before_1") and CheckpointStore(output / "checkpoints").steps() == [1]
        pretrain(make_config(tiny, output, **fresh))
        assert CheckpointStore(output / "before_2/checkpoints").steps() == [1]
        assert entries(output / "before_1") == before
        going_on = make_config(tiny, output / "before_1", **{"train.max_steps": 4})
        (output / "before_1/budget.json").unlink()
        assert pretrain(going_on).step == 4

    def test_a_restart_by_torchrun_goes_on_with_what_was_begun_afresh(self, tiny, tmp_path, monkeypatch):
        """Also where the first processes die before they have set the earlier run aside."""
        pretrain(make_config(tiny, tmp_path, **{"train.max_steps": 1}))
        for launched, steps, kept, aside in (("a", 2, [2], 1), ("a", 3, [2, 3], 1), ("b", 1, [1], 2)):
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", launched)
            pretrain(make_config(tiny, tmp_path, **{"train.max_steps": steps, "train.resume": False}))
            assert CheckpointStore(tmp_path / "checkpoints").steps() == kept
            assert len(list(tmp_path.glob("before_*"))) == aside

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_a_stopped_run_says_what_goes_on_with_it(self, number, tiny, tmp_path, monkeypatch, capsys):
        step = Learner.step

        def step_and_stop(learner, done, *arguments, **options):
            step(learner, done, *arguments, **options)
            if done == 1:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Learner, "step", step_and_stop)
        for resume, again in ((True, "the same command"), (False, "the same command, without --fresh,")):
            stopped = pretrain(make_config(tiny, tmp_path, **{"train.resume": resume}))
            assert (stopped.step, stopped.exit_code) == (2, 128 + number)
            assert CheckpointStore(tmp_path / "checkpoints").steps() == [2]
            told = capsys.readouterr().out
            assert f"stopped by {number.name} after step 2; {again} goes on from there" in told
        assert f"the earlier run is now in {tmp_path / 'before_1'}" in told

    def test_hangups_that_nohup_has_ignored_stay_ignored(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopRequest(World(torch.device("cpu"))) as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert not stop.received
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_nothing_is_set_aside_through_a_link(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / ".before.partial").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "a.json").write_text("a")
        assert set_aside(tmp_path, ("*.json",)) == tmp_path / "before_1"
        assert everything_in(tmp_path) == {"elsewhere", "before_1", "before_1/a.json"}

    def test_nothing_to_set_aside(self, tmp_path):
        (tmp_path / "notes.txt").write_text(THESIS)
        assert set_aside(tmp_path, ("*.json", "checkpoints")) is None
        assert everything_in(tmp_path) == {"notes.txt"}

    def test_a_call_that_was_killed_is_completed(self, tmp_path):
        (tmp_path / ".before.partial").mkdir()
        (tmp_path / ".before.partial/a.json").write_text("a")
        (tmp_path / "checkpoints").mkdir()
        assert set_aside(tmp_path, ("*.json", "checkpoints")) == tmp_path / "before_1"
        assert everything_in(tmp_path) == {"before_1", "before_1/a.json", "before_1/checkpoints"}
        (tmp_path / ".before.partial").mkdir()
        (tmp_path / ".before.partial/a.json").write_text("a")
        (tmp_path / "a.json").write_text("newer")
        assert set_aside(tmp_path, ("*.json", "checkpoints")) == tmp_path / "before_3"
        assert (tmp_path / "before_2/a.json").read_text() == "a"
        assert (tmp_path / "before_3/a.json").read_text() == "newer"

    @pytest.mark.parametrize("options", [("--fresh",), ("--budget", "1h")])
    def test_a_disk_that_may_only_be_read(self, options, mapet, run, tiny, monkeypatch):
        def refuse(*arguments, **others):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr("mapet.folders.FileLock.acquire", refuse)
        words = training(vocabulary=32)
        if "--budget" in options:
            words[words.index("--epochs") :] = words[words.index("--epochs") + 2 :]
        given = ("--cache", tiny, "--output", run, *words, *options)
        mapet.fail("pretrain", *given, code=1, names=(run, "Read-only file system"))

    def test_the_decision_of_a_budget_is_whole_or_absent(self, tiny, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(budget, "measure", lambda *arguments: 0.01)
        with monkeypatch.context() as patch:
            patch.setattr("mapet.files.os.fsync", full)
            with pytest.raises(CheckpointError, match=r"cannot write .*budget.json: No space left"):
                pretrain(make_config(tiny, tmp_path, **{"train.budget": "1h", "train.max_steps": 1}))
        assert not everything_in(tmp_path)

    def test_a_file_among_the_checkpoints_is_left_alone(self, tiny, tmp_path):
        config = make_config(tiny, tmp_path, **{"train.max_steps": 1})
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/step_777").write_text(THESIS)
        assert pretrain(config).step == 1
        assert (tmp_path / "checkpoints/step_777").read_text() == THESIS


class TestReadingWhileItTrains:
    @pytest.fixture(autouse=True)
    def of_this_model(self, monkeypatch):
        shapes = {name: tuple(tensor.shape) for name, tensor in make_state(1).model.items()}
        monkeypatch.setattr(checkpoint, "pretraining_shapes", lambda model: shapes)

    def test_a_checkpoint_that_goes_while_it_is_read(self, tmp_path, monkeypatch):
        store, verify, gone = CheckpointStore(tmp_path / "checkpoints", keep=1), checkpoint.verify, []
        store.save(1, make_state(1))

        def verify_and_go_on(folder):
            step = verify(folder)
            if step < 5:
                gone.append(step)
                store.save(step + 1, make_state(step + 1))
            return step

        monkeypatch.setattr(checkpoint, "verify", verify_and_go_on)
        _, _, found = load_weights(tmp_path)
        assert gone == [1, 2, 3, 4] and torch.equal(found["weight"], make_state(5).model["weight"])

    def test_one_that_goes_before_it_is_looked_at(self, tmp_path, monkeypatch):
        store, verify = CheckpointStore(tmp_path / "checkpoints", keep=1), checkpoint.verify
        store.save(1, make_state(1))

        def go_on_and_verify(folder):
            if folder.name.endswith("1"):
                store.save(2, make_state(2))
            return verify(folder)

        monkeypatch.setattr(checkpoint, "verify", go_on_and_verify)
        assert torch.equal(load_weights(tmp_path)[2]["weight"], make_state(2).model["weight"])

    def test_a_run_that_is_too_fast_is_an_error_of_one_line(self, tmp_path, monkeypatch):
        store, verify = CheckpointStore(tmp_path / "checkpoints", keep=1), checkpoint.verify
        store.save(1, make_state(1))

        def verify_and_go_on(folder):
            step = verify(folder)
            store.save(step + 1, make_state(step + 1))
            return step

        monkeypatch.setattr(checkpoint, "verify", verify_and_go_on)
        with pytest.raises(CheckpointError, match=r"its checkpoints go before they are read: raise train.keep"):
            load_weights(tmp_path)

    def test_a_damaged_one_is_still_named(self, tmp_path):
        folder = CheckpointStore(tmp_path / "checkpoints").save(1, make_state(1))
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"model.safetensors has 0 bytes"):
            load_weights(folder)


class TestCache:
    @pytest.mark.parametrize("name", ["notes.txt", "run"])
    def test_overwriting_takes_nothing_else_along(self, name, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        mapet.succeed(*command)
        if name == "run":
            (tmp_path / "cache/run/checkpoints").mkdir(parents=True)
            (tmp_path / "cache/run/metrics.jsonl").write_text("{}\n")
        else:
            (tmp_path / "cache/notes.txt").write_text(THESIS)
        before = entries(tmp_path)
        mapet.fail(*command, "--overwrite", code=1, names=(tmp_path / "cache", name, "left as it is"))
        assert entries(tmp_path) == before and (tmp_path / "cache" / name).exists()

    def test_what_came_while_the_new_one_was_made_stays(self, tmp_path):
        path = tmp_path / "cache"
        write_cache(path)
        with CacheWriter(path, description(), capacity=4, overwrite=True) as writer:
            with writer.shard(0) as shard:
                shard.append(*random_rows(4))
                shard.finish()
            (path / "notes.txt").write_text(THESIS)
            with pytest.raises(DataError, match=r"holds other things than a token cache: notes.txt"):
                writer.finish(list("abcd"))
        assert (path / "notes.txt").read_text() == THESIS and len(TokenCache.open(path)) == 10
        (path / "notes.txt").unlink()
        with CacheWriter(path, description(), capacity=4, overwrite=True) as writer:
            writer.finish(list("abcd"))
        assert len(TokenCache.open(path)) == 4 and everything_in(tmp_path) & {".cache.partial"} == set()

    def test_a_damaged_manifest_is_no_leave_to_delete(self, tmp_path):
        write_cache(tmp_path / "cache")
        (tmp_path / "cache/manifest.json").write_text("[]")
        before = entries(tmp_path)
        with pytest.raises(DataError, match=r"is no token cache; it is left as it is"):
            write_cache(tmp_path / "cache", overwrite=True)
        assert entries(tmp_path) == before

    def test_a_kill_at_any_moment_of_replacing_loses_neither(self, tmp_path):
        """SIGKILL before every flush: either cache is there in the end, whole, and nothing beside it."""
        kills = 0
        for sync in range(1, 40):
            path = tmp_path / str(sync) / "cache"
            write_cache(path, 4)
            old = entries(path)
            if not killed_at_sync(lambda path=path: write_cache(path, 10, overwrite=True, seed=1), sync):
                break
            kills += 1
            if path.exists() and entries(path) != old:
                assert len(TokenCache.open(path)) == 10
            write_cache(path, 10, overwrite=True, seed=1)
            assert len(TokenCache.open(path)) == 10
            assert [found.name for found in path.parent.iterdir()] == ["cache"]
        assert kills > 8

    def test_the_one_that_stepped_aside_comes_back(self, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        mapet.succeed(*command)
        before = entries(tmp_path)
        (tmp_path / "cache").rename(tmp_path / ".cache.replaced")
        assert "images, unchanged" in mapet.succeed(*command).out or entries(tmp_path) == before
        assert entries(tmp_path) == before
        shutil.copytree(tmp_path / "cache", tmp_path / ".cache.replaced")
        mapet.succeed(*command)
        assert entries(tmp_path) == before, "and one that was replaced is swept"

    def test_what_is_not_ours_is_not_swept(self, tmp_path):
        write_cache(tmp_path / "cache")
        (tmp_path / ".cache.replaced").mkdir()
        (tmp_path / ".cache.replaced/thesis.tex").write_text(THESIS)
        with pytest.raises(DataError, match=r"\.cache\.replaced is no token cache; it is left as it is"):
            write_cache(tmp_path / "cache", overwrite=True)
        assert (tmp_path / ".cache.replaced/thesis.tex").read_text() == THESIS
        assert len(TokenCache.open(tmp_path / "cache")) == 10


class TestTokenizer:
    def test_two_at_once(self, mapet, images, tmp_path, monkeypatch):
        """The second is refused while the first fits, and while it tokenises; the first is unharmed."""
        fit, encode, seen = Tokenizer.fit, Tokenizer.encode, []
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)

        def intrude(*options):
            if os.getpid() == process and len(seen) < 4:
                seen.append(in_fork(lambda: main([*map(str, command), *options])))

        def fit_and_intrude(*arguments, **options):
            intrude()
            intrude("--overwrite")
            return fit(*arguments, **options)

        def encode_and_intrude(*arguments):
            intrude()
            intrude("--overwrite")
            return encode(*arguments)

        process = os.getpid()
        monkeypatch.setattr(Tokenizer, "fit", fit_and_intrude)
        monkeypatch.setattr(Tokenizer, "encode", encode_and_intrude)
        assert mapet(*command).code == 0
        assert seen == [1, 1, 1, 1]
        cache = TokenCache.open(tmp_path / "cache")
        cache.verify()
        tokenizer = load_tokenizer(tmp_path / "cache_tokenizer")
        assert cache.manifest.description.tokenizer_fingerprint == tokenizer.fingerprint()
        assert {path.name for path in tmp_path.iterdir()} == {"cache", "cache_tokenizer"}

    def test_the_refusal_names_the_folder(self, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        process = waiting(lambda: hold(tmp_path / "cache_tokenizer", tmp_path / "ready"), tmp_path / "ready")
        try:
            mapet.fail(*command, code=1, names=("another process is at work", tmp_path / "cache_tokenizer"))
        finally:
            process.kill()
            process.join()
        mapet.succeed(*command)

    def test_several_may_use_one_tokenizer(self, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--codebook", tmp_path / "tokenizer", *SIZES, *FIT)
        mapet.succeed(*command, "--output", tmp_path / "one")
        process = waiting(lambda: hold(tmp_path / "tokenizer", tmp_path / "ready"), tmp_path / "ready")
        try:
            mapet.succeed(*command, "--output", tmp_path / "two")
        finally:
            process.kill()
            process.join()

    @pytest.mark.parametrize("name", ["codebook.safetensors", "tokenizer.json"])
    def test_files_of_others_are_not_overwritten(self, name, mapet, images, tmp_path):
        folder = tmp_path / "cache_tokenizer"
        folder.mkdir()
        if name == "tokenizer.json":
            (folder / name).write_text('{"version": "1.0", "model": {"type": "BPE"}}')
        else:
            save_file({"codebook": torch.ones(3)}, folder / name)
        before = entries(tmp_path)
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT, "--overwrite")
        outcome = mapet(*command)
        assert outcome.code in (1, 2) and "Traceback" not in outcome.err and str(folder) in outcome.err
        assert entries(tmp_path) == before
        tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=16)
        tokenizer.set_codebook(torch.rand(16, 48), "test")
        with pytest.raises(DataError, match="of something else, which is left as it is"):
            tokenizer.save(folder)
        assert entries(tmp_path) == before

    def test_what_others_put_where_a_fit_is_stays(self, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        thesis = tmp_path / "cache_tokenizer/fit/thesis.tex"
        thesis.parent.mkdir(parents=True)
        thesis.write_text(THESIS)
        mapet.fail(*command, code=1, names=(thesis.parent, "holds no work of mapet", "thesis.tex"))
        assert everything_in(tmp_path / "cache_tokenizer") == {"fit", "fit/thesis.tex"}
        thesis.rename(tmp_path / "thesis.tex")
        mapet.succeed(*command)
        thesis.parent.mkdir()
        (tmp_path / "thesis.tex").rename(thesis)
        mapet.succeed(*command)
        assert [path.name for path in thesis.parent.iterdir()] == ["thesis.tex"] and thesis.read_text() == THESIS

    def test_a_full_disk_leaves_no_half_of_a_sample(self, mapet, images, tmp_path, monkeypatch):
        def full(self, rows):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(NpyWriter, "append", full)
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        mapet.fail(*command, code=1, names=("the disk is full", tmp_path / "cache_tokenizer/fit"))
        assert not everything_in(tmp_path)

    @pytest.mark.parametrize("where", ["cache_tokenizer", "cache"])
    def test_a_folder_that_cannot_be_written_is_told_before_the_fit(self, where, mapet, images, tmp_path, monkeypatch):
        monkeypatch.setattr(Tokenizer, "fit", lambda *arguments, **options: pytest.fail("fitted"))
        (tmp_path / "file").write_text("")
        output = tmp_path / "out/cache"
        if where == "cache":
            output = tmp_path / "file/cache"
            given = ("--codebook", tmp_path / "tokenizer")
        else:
            given = ("--codebook", tmp_path / "file/tokenizer")
        command = ("tokenize", "--images", images, "--output", output, *SIZES, *FIT, *given)
        mapet.fail(*command, code=1, names=(tmp_path / "file", "cannot write"))


def hold(folder: Path, ready: Path) -> None:
    with locked(folder, "tokenizer"):
        sleep_at(ready)


class TestExport:
    def test_a_model_of_others_is_not_replaced(self, weights, tmp_path):
        folder = tmp_path / "theirs"
        folder.mkdir()
        (folder / "config.json").write_text('{"architecture": "vit_base_patch16_224", "num_classes": 5}')
        save_file({"head.weight": torch.ones(5)}, folder / "model.safetensors")
        before = entries(tmp_path)
        with pytest.raises(ConfigError, match=r"theirs is no exported model.*config.json does not say"):
            export(MODEL, weights, folder)
        export(MODEL, weights, tmp_path / "ours")
        shutil.copy(tmp_path / "ours/config.json", folder / "config.json")
        with pytest.raises(ConfigError, match=r"model.safetensors does not say"):
            export(MODEL, weights, folder)
        shutil.rmtree(tmp_path / "ours")
        assert entries(tmp_path)["theirs/model.safetensors"] == before["theirs/model.safetensors"]

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_folder_with_the_name_of_a_file_is_not_deleted(self, name, weights, tmp_path):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / "thesis.tex").write_text(THESIS)
        with pytest.raises(ConfigError, match=r"model is no exported model"):
            export(MODEL, weights, tmp_path / "model")
        assert (tmp_path / "model" / name / "thesis.tex").read_text() == THESIS

    def test_a_link_stays_and_nothing_is_left_beside_it(self, weights, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk/model").mkdir()
        (tmp_path / "link").symlink_to("disk/model")
        for _ in range(2):
            export(MODEL, weights, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/model/config.json").exists()
        assert {path.name for path in tmp_path.rglob("*")} == {
            "disk",
            "model",
            "link",
            "config.json",
            "model.safetensors",
        }

    def test_what_a_killed_one_left_is_swept(self, weights, tmp_path):
        export(MODEL, weights, tmp_path / "e")
        kills = 0
        for sync in range(1, 20):
            if not killed_at_sync(lambda: export(MODEL, weights, tmp_path / "e"), sync):
                break
            kills += 1
            export(MODEL, weights, tmp_path / "e")
            assert {path.name for path in tmp_path.iterdir()} == {"e"}
            assert {path.name for path in (tmp_path / "e").iterdir()} == {"config.json", "model.safetensors"}
        assert kills >= 3

    def test_the_one_that_stepped_aside_comes_back_before_anything_else(self, weights, tmp_path, monkeypatch):
        export(MODEL, weights, tmp_path / "e")
        before = entries(tmp_path / "e")
        (tmp_path / "e").rename(tmp_path / ".e.replaced")
        monkeypatch.setattr("mapet.model.export.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(MapetError, match="full"):
            export(MODEL, weights, tmp_path / "e")
        assert entries(tmp_path / "e") == before and [path.name for path in tmp_path.iterdir()] == ["e"]

    def test_two_at_once(self, weights, tmp_path):
        with Staging(tmp_path / "e", "exported model", lambda folder: ()).making():
            kind, text, code = in_fork(lambda: export(MODEL, weights, tmp_path / "e"))
        assert (kind, code) == ("BusyFolder", 1) and f"exported model in {tmp_path / 'e'}" in text
        assert not everything_in(tmp_path)


class TestReports:
    @pytest.mark.parametrize("name", ["report.md", "usage.png", "classes.csv", "photo.jpg"])
    def test_a_report_of_the_user_stays(self, name, mapet, tmp_path):
        write_cache(tmp_path / "cache")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / name).write_text(THESIS)
        given = ("codebook", "--cache", tmp_path / "cache", "--output", tmp_path / "mine")
        mapet.fail(*given, code=1, names=(tmp_path / "mine" / name, "was not written by mapet codebook"))
        assert everything_in(tmp_path / "mine") == {name} and (tmp_path / "mine" / name).read_text() == THESIS

    def test_ours_is_replaced_also_where_it_was_not_done(self, mapet, tmp_path, monkeypatch):
        write_cache(tmp_path / "cache")
        given = ("codebook", "--cache", tmp_path / "cache", "--output", tmp_path / "r")
        with monkeypatch.context() as patch:
            patch.setattr("mapet.report.codebook._usage_csv", lambda found: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                mapet(*given)
        assert (tmp_path / "r/usage.png").exists()
        for _ in range(2):
            mapet.succeed(*given)
        assert "Codebook of cache" in (tmp_path / "r/report.md").read_text()
        assert not [name for name in everything_in(tmp_path / "r") if name.startswith(".")]

    def test_scores_of_the_user_stay(self, mapet, run, images, tmp_path):
        (tmp_path / "scores.json").write_text('{"me": 1, "you": 0}')
        given = ("probe", "--checkpoint", run, "--images", images, "--output", tmp_path, *PROBE)
        mapet.fail(*given, code=1, names=(tmp_path / "scores.json", "was not written by mapet probe"))
        assert everything_in(tmp_path) == {"scores.json"}

    def test_a_probe_is_alone_and_sweeps(self, mapet, run, images, tmp_path):
        (tmp_path / "features").mkdir()
        (tmp_path / "features/.features_0123456789abcdef.npy.partial").write_text("half")
        given = ("probe", "--checkpoint", run, "--images", images, "--output", tmp_path, *PROBE, "--methods", "knn")
        with locked(tmp_path, "probe"):
            mapet.fail(*given, code=1, names=(tmp_path, "another process is at work"))
        mapet.succeed(*given)
        mapet.succeed(*given)
        assert not [name for name in everything_in(tmp_path) if "/." in name or name.startswith(".")]

    def test_two_demos(self, mapet, tmp_path):
        with locked(tmp_path, "demo"):
            mapet.fail("demo", "--quick", "--output", tmp_path, code=1, names=(tmp_path, "another process is at work"))
        assert not everything_in(tmp_path)


class TestPlaces:
    @pytest.fixture(scope="class")
    @classmethod
    def outputs(cls, tmp_path_factory, images, run):
        """One of each kind of output, by name."""
        folder = tmp_path_factory.mktemp("outputs")
        command = ["tokenize", "--images", images, "--output", folder / "cache", "--features-dir", folder / "sample"]
        assert main([*map(str, (*command, *SIZES, *FIT))]) == 0
        shutil.copytree(run, folder / "run")
        torch.manual_seed(0)
        export(MODEL, MaskedTokenViT(MODEL).state_dict(), folder / "run/timm")
        return folder

    @pytest.mark.parametrize(
        ("around", "kind"),
        [
            ("cache", "token cache"),
            ("cache_tokenizer", "tokenizer"),
            ("sample", "feature sample"),
            ("run/timm", "exported model"),
            ("run/checkpoints/step_000000002", "checkpoint"),
            ("run/checkpoints", "folder of checkpoints"),
            (".cache.partial", "folder of unfinished work"),
            (".cache.replaced", "folder of unfinished work"),
        ],
    )
    def test_no_output_lies_inside_another(self, around, kind, mapet, outputs, images, run):
        before = everything_in(outputs)
        for output in (outputs / around / "deep/new", outputs / around / "new", outputs / around):
            named = (output, outputs / around, f"{kind}, and nothing else may be")
            cache, place = outputs / "cache", ("--output", output)
            mapet.fail("pretrain", "--cache", cache, *place, *TRAINING, code=2, names=named)
            mapet.fail("codebook", "--cache", cache, *place, code=2, names=named)
            mapet.fail("probe", "--checkpoint", run, "--images", images, *place, code=2, names=named)
            if output != outputs / around or kind != "token cache":
                command = ("tokenize", "--images", images, *place, *SIZES, *FIT, "--overwrite")
                mapet.fail(*command, code=2, names=named)
            if output != outputs / around or kind != "exported model":
                mapet.fail("export", "--checkpoint", run, *place, code=2, names=named)
        assert everything_in(outputs) == before

    def test_an_export_and_a_run_may_be_in_a_run(self, outputs):
        check_place(outputs / "run/timm_2", "exported model", staged=True)
        check_place(outputs / "run/second", "run")
        check_place(outputs / "run/timm", "exported model", staged=True)
        check_place(outputs / "run", "run")

    def test_a_link_hides_nothing(self, outputs, tmp_path):
        (tmp_path / "link").symlink_to(outputs / "cache")
        with pytest.raises(ConfigError, match="cache is a token cache"):
            check_place(tmp_path / "link/run", "run")

    @pytest.mark.parametrize(
        ("given", "names"),
        [
            (("--codebook", "cache"), ("--codebook", "--output")),
            (("--codebook", "cache/tokenizer"), ("--codebook", "--output")),
            (("--codebook", "t", "--features-dir", "cache"), ("--features-dir", "--output")),
            (("--codebook", "t", "--features-dir", "t/f"), ("--features-dir", "--codebook")),
            (("--codebook", "."), ("--codebook",)),
        ],
    )
    def test_the_folders_of_one_command_are_apart(self, given, names, mapet, images, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        mapet.fail("tokenize", "--images", images, "--output", "cache", *SIZES, *FIT, *given, code=2, names=names)
        assert not everything_in(tmp_path)

    def test_apart(self, tmp_path):
        check_apart({"--output": tmp_path / "a", "--codebook": tmp_path / "ab", "--features-dir": None})
        with pytest.raises(ConfigError, match=r"--codebook .* is --output"):
            check_apart({"--output": tmp_path / "a", "--codebook": tmp_path / "b/../a/c"})

    @pytest.mark.parametrize("output", ["", ".", "/", "..", "a/.."])
    def test_a_path_without_a_name(self, output, mapet, images, run, tiny, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for command in commands(images, run, tiny):
            mapet.fail(*command, f"--output={output}", code=2, names=("--output", "names no folder"))
        assert not everything_in(tmp_path)

    @pytest.mark.parametrize("length", [250, 300])
    def test_a_long_name(self, length, mapet, images, run, tiny, tmp_path):
        for command in commands(images, run, tiny):
            output = tmp_path / ("n" * length)
            if length == 250 and command[0] not in ("tokenize", "export"):
                check_place(output, "run")
                continue
            mapet.fail(*command, "--output", output, code=2, names=(f"has {length} bytes", "at most 2"))
            outcome = mapet(*command, "--output", tmp_path / ("n" * 300) / "below")
            assert outcome.code in (1, 2) and "Traceback" not in outcome.err and "too long" in outcome.err
        assert not everything_in(tmp_path)

    def test_a_name_of_245_bytes_will_do(self, weights, tmp_path):
        export(MODEL, weights, tmp_path / ("é" * 122 + "n"))
        export(MODEL, weights, tmp_path / ("é" * 122 + "n"))
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_nul(self):
        with pytest.raises(ConfigError, match="names no folder"):
            check_place("a\0b", "run")


def commands(images: Path, run: Path, cache: Path) -> list[tuple[object, ...]]:
    """Every command with an output, without that."""
    return [
        ("tokenize", "--images", images, *SIZES, *FIT),
        ("pretrain", "--cache", cache, *training(vocabulary=32)),
        ("export", "--checkpoint", run),
        ("codebook", "--cache", cache),
        ("probe", "--checkpoint", run, "--images", images),
        ("demo", "--quick"),
    ]
