"""Several processes: the same run as one process, and stop signals that all agree on. Assertion 17."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_run import IMAGES, latest, make_cache, make_config

from mapet.data.loader import step_ids
from mapet.distributed import StopRequest, World, connect, pick_device
from mapet.errors import ConfigError, DataError
from mapet.training.checkpoint import CheckpointStore
from mapet.training.loop import pretrain

SCRIPT = Path(__file__).parent / "rank_run.py"
# A large epsilon keeps Adam from blowing up the rounding of gradients that are zero but for rounding.
CHANGES = {"train.ema_decay": 0.9, "optim.eps": 1e-3, "train.max_steps": 4, "train.micro_batch": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def start_ranks(*arguments: object, size: int = 2, script: Path = SCRIPT) -> list[subprocess.Popen]:
    """What torchrun does on one machine, without its own seconds of start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def test_assertion_17_two_ranks_are_one_process(cache, tmp_path):
    """Four steps with accumulation under torchrun; DDP itself reports an unused parameter at the second step."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [cache, tmp_path / "two", json.dumps(CHANGES)]
    done = subprocess.run(
        [sys.executable, *command, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    ranks = [safetensors.torch.load_file(tmp_path / f"two/rank_{rank}.safetensors") for rank in range(2)]
    assert [name for name in ranks[0] if not torch.equal(ranks[0][name], ranks[1][name])] == []
    single = pretrain(make_config(cache, tmp_path / "one", **CHANGES))
    one, two = (latest(CheckpointStore(tmp_path / name / "checkpoints")) for name in ("one", "two"))
    assert one.step == two.step == 4
    for ours, theirs in ((two.state.task, one.state.task), (two.state.ema, one.state.ema)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4], "only one process logs"
    assert lines[-1]["loss"] == pytest.approx(single.loss, rel=1e-5)
    assert lines[-1]["accuracy"] == pytest.approx(single.metrics["accuracy"])
    check_steps(tmp_path / "two", size=2, steps=4)


def check_steps(output: Path, *, size: int, steps: int) -> list[dict[str, int]]:
    """Each step's images are shared out whole, in order, none twice; the collectives of every rank and step."""
    ranks = [
        [json.loads(line) for line in (output / f"steps_{rank}.jsonl").read_text().splitlines()] for rank in range(size)
    ]
    assert [[line["step"] for line in rank] for rank in ranks] == [list(range(steps))] * size
    for step in range(steps):
        ids = [image for rank in ranks for image in rank[step]["ids"]]
        assert ids == step_ids(IMAGES, seed=0, step=step, global_batch=8).tolist()
        assert len(set(ids)) == len(ids)
    return [line["collectives"] for rank in ranks for line in rank]


@pytest.mark.long
def test_four_ranks_are_one_process_and_wait_for_each_other_once_a_step(cache, tmp_path):
    changes = {**CHANGES, "train.micro_batch": 1}
    processes = start_ranks(cache, tmp_path / "four", json.dumps(changes), size=4)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    single = pretrain(make_config(cache, tmp_path / "one", **CHANGES))
    one, four = (latest(CheckpointStore(tmp_path / name / "checkpoints")).state for name in ("one", "four"))
    for ours, theirs in ((four.task, one.task), (four.ema, one.ema)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    ranks = [safetensors.torch.load_file(tmp_path / f"four/rank_{rank}.safetensors") for rank in range(4)]
    assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks for name in rank)
    lines = [json.loads(line) for line in (tmp_path / "four/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] == pytest.approx(single.loss, rel=1e-5)
    # All gradients are one bucket here: one reduction of it, and one of loss and accuracy, however many micro-batches.
    collectives = check_steps(tmp_path / "four", size=4, steps=4)
    assert [counts["allreduce_"] for counts in collectives] == [2] * 16


def test_a_run_of_one_process_goes_on_with_two_and_stops_when_one_is_told(cache, tmp_path):
    pretrain(make_config(cache, tmp_path, **CHANGES))
    changes = json.dumps({**CHANGES, "train.max_steps": 0})
    processes = start_ranks(cache, tmp_path, changes, f"1:6:{int(signal.SIGTERM)}")
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "going on from step 4" in outputs[0][0] and outputs[1][0] == ""
    newest = latest(CheckpointStore(tmp_path / "checkpoints"))
    assert newest.step in (7, 8), "the step in which the signal came, or the next"
    ranks = [safetensors.torch.load_file(tmp_path / f"rank_{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    whole = pretrain(make_config(cache, tmp_path / "whole", **{**CHANGES, "train.max_steps": newest.step}))
    expected = latest(CheckpointStore(whole.checkpoint.parent)).state.task
    torch.testing.assert_close(newest.state.task, expected, rtol=1e-4, atol=1e-6)


def test_a_failure_of_the_main_process_ends_all(cache, tmp_path):
    result = pretrain(make_config(cache, tmp_path, **CHANGES))
    (result.checkpoint / "trainer.pt").write_bytes(b"")
    processes = start_ranks(cache, tmp_path, json.dumps(CHANGES))
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "no valid checkpoint is left" in outputs[0][1]
    assert "the main process could not go on" in outputs[1][1]


def test_a_single_process_needs_no_environment(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with connect("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        layer, values = torch.nn.Linear(2, 2), torch.tensor([1.0, 2.0])
        assert world.wrap(layer) is layer
        assert world.mean(values) is values
        assert world.on_main(lambda: "result") == "result"
        with pytest.raises(DataError, match="as it is"):
            world.on_main(lambda: (_ for _ in ()).throw(DataError("as it is")))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}])
def test_half_an_environment_is_refused(environment, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="start them with torchrun"), connect("cpu"):
        pass


@pytest.mark.parametrize(
    ("gpus", "name", "local_rank", "expected"),
    [
        (0, "auto", None, "cpu"),
        (0, "cpu", 3, "cpu"),
        (4, "auto", None, "cuda:0"),
        (4, "auto", 3, "cuda:3"),
        (4, "cuda", 1, "cuda:1"),
        (4, "cuda:2", None, "cuda:2"),
        (4, "cpu", None, "cpu"),
    ],
)
def test_devices(gpus, name, local_rank, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert pick_device(name, local_rank) == torch.device(expected)


@pytest.mark.parametrize(
    ("gpus", "name", "local_rank", "message"),
    [
        (0, "cuda", None, "torch sees 0"),
        (2, "cuda", 2, "torch sees 2"),
        (2, "cuda:5", None, "GPU 5 is asked for"),
        (2, "cuda:1", 0, "torchrun gives each process its own"),
        (2, "cuda:x", None, "auto, cpu, cuda or cuda:N, got 'cuda:x'"),
        (2, "gpu", None, "got 'gpu'"),
    ],
)
def test_devices_that_are_refused(gpus, name, local_rank, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=message):
        pick_device(name, local_rank)


def test_a_stop_request_notes_signals_and_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(World(torch.device("cpu"))) as stop:
        stop.post()
        assert stop.agreed().signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed().signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
