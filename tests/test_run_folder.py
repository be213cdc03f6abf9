"""The folder of a run: one process at a time, nothing lost that others put there, read while it is written."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch
from checkpoint_writer import state_of_a_model
from command_line import everything_in, training
from datafakes import entries, no_space
from forked import in_fork, run_ranks
from tiny_run import make_config

import mapet.training.checkpoint as checkpoint
from mapet.distributed import StopRequest, World
from mapet.errors import CheckpointError, DataError, MapetError
from mapet.folders import LOCK, locked, set_aside
from mapet.training import budget
from mapet.training.checkpoint import CheckpointStore, load_weights
from mapet.training.learner import Learner
from mapet.training.loop import pretrain

THESIS = "years of work"


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
    def test_a_stopped_run_says_what_goes_on_with_it(self, number, tiny, tmp_path, monkeypatch, capsys, request):
        step = Learner.step

        def step_and_stop(learner, done, *arguments, **options):
            step(learner, done, *arguments, **options)
            if done == 1:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Learner, "step", step_and_stop)
        before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
        request.addfinalizer(lambda: signal.signal(number, before))
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
        monkeypatch.setattr(budget, "measure", lambda *arguments: 0.01)
        with monkeypatch.context() as patch:
            patch.setattr("mapet.files.os.fsync", no_space)
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
    def test_a_checkpoint_that_goes_while_it_is_read(self, tmp_path, monkeypatch):
        store, verify, gone = CheckpointStore(tmp_path / "checkpoints", keep=1), checkpoint.verify, []
        store.save(1, state_of_a_model(1))

        def verify_and_go_on(folder):
            step = verify(folder)
            if step < 5:
                gone.append(step)
                store.save(step + 1, state_of_a_model(step + 1))
            return step

        monkeypatch.setattr(checkpoint, "verify", verify_and_go_on)
        _, _, found = load_weights(tmp_path)
        assert gone == [1, 2, 3, 4] and torch.equal(found["norm.weight"], torch.full((8,), 5.0))

    def test_one_that_goes_before_it_is_looked_at(self, tmp_path, monkeypatch):
        store, verify = CheckpointStore(tmp_path / "checkpoints", keep=1), checkpoint.verify
        store.save(1, state_of_a_model(1))

        def go_on_and_verify(folder):
            if folder.name.endswith("1"):
                store.save(2, state_of_a_model(2))
            return verify(folder)

        monkeypatch.setattr(checkpoint, "verify", go_on_and_verify)
        assert torch.equal(load_weights(tmp_path)[2]["norm.weight"], torch.full((8,), 2.0))

    def test_a_run_that_is_too_fast_is_an_error_of_one_line(self, tmp_path, monkeypatch):
        store, verify = CheckpointStore(tmp_path / "checkpoints", keep=1), checkpoint.verify
        store.save(1, state_of_a_model(1))

        def verify_and_go_on(folder):
            step = verify(folder)
            store.save(step + 1, state_of_a_model(step + 1))
            return step

        monkeypatch.setattr(checkpoint, "verify", verify_and_go_on)
        with pytest.raises(CheckpointError, match=r"its checkpoints go before they are read: raise train.keep"):
            load_weights(tmp_path)

    def test_a_damaged_one_is_still_named(self, tmp_path):
        folder = CheckpointStore(tmp_path / "checkpoints").save(1, state_of_a_model(1))
        (folder / "task.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"task.safetensors has 0 bytes"):
            load_weights(folder)
