"""Memory that runs out, and the cap on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_distributed import start_ranks
from test_learner import CPU, batches, make_learner, run, snapshot
from tiny_run import latest, make_cache, make_config

from mapet.data.cache import TokenCache
from mapet.errors import ConfigError, OutOfMemory
from mapet.training.checkpoint import CheckpointStore
from mapet.training.learner import Learner
from mapet.training.limits import cap_memory, halved, memory_limit
from mapet.training.loop import pretrain

AUTO = {"train.auto_batch": True, "optim.eps": 1e-3, "train.ema_decay": 0.9}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> TokenCache:
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("data") / "cache"))


@pytest.fixture
def run_out(monkeypatch):
    """run_out(limit, call): more than `limit` images do not fit, from the `call`-th forward pass of an attempt on."""

    def inject(limit: int, call: int = 1) -> list[int]:
        forward, accumulate, sizes = Learner._forward_backward, Learner._accumulate, []
        calls = []

        def counted(self, *arguments, **options):
            calls.clear()
            return accumulate(self, *arguments, **options)

        def limited(self, batch, *arguments):
            calls.append(len(batch["tokens"]))
            sizes.append(calls[-1])
            if calls[-1] > limit and len(calls) >= call:
                raise torch.OutOfMemoryError("injected")
            return forward(self, batch, *arguments)

        monkeypatch.setattr(Learner, "_accumulate", counted)
        monkeypatch.setattr(Learner, "_forward_backward", limited)
        return sizes

    return inject


@pytest.mark.parametrize(("micro", "call"), [(0, 1), (4, 2)], ids=["first_pass", "middle_of_accumulation"])
def test_auto_batch_repeats_the_same_step_with_half_the_micro_batch(cache, run_out, micro, call):
    expected = make_learner(cache, **AUTO, **{"train.micro_batch": 2})
    run(expected, cache, 0, 3)
    sizes = run_out(2, call)
    learner = make_learner(cache, **AUTO, **{"train.micro_batch": micro})
    with pytest.warns(UserWarning, match=r"out of memory with micro-batch 4: going on with 2, same batch"):
        run(learner, cache, 0, 3)
    assert sizes == ([8, 4] if micro == 0 else [4, 4]) + 12 * [2], "then it stays with what fits"
    ours, theirs = snapshot(learner), snapshot(expected)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert learner.read() == expected.read()


def test_memory_may_run_out_later_too(cache, run_out):
    expected = make_learner(cache, **AUTO, **{"train.micro_batch": 4})
    run(expected, cache, 0, 2)
    learner = make_learner(cache, **AUTO, **{"train.micro_batch": 4})
    run(learner, cache, 0, 1)
    run_out(2)
    with pytest.warns(UserWarning, match="going on with 2"):
        run(learner, cache, 1, 2)
    for name, value in snapshot(learner).items():
        torch.testing.assert_close(value, snapshot(expected)[name], rtol=1e-4, atol=1e-6)


def test_without_auto_batch_the_error_says_what_to_change(cache, run_out):
    run_out(2)
    learner = make_learner(cache, **{"train.micro_batch": 8})
    before = snapshot(learner)
    with pytest.raises(
        OutOfMemory, match=r"micro-batch 8 and recompute none.*MiB; set train.micro_batch=4.*recompute=cheap"
    ):
        run(learner, cache, 0, 1)
    after = snapshot(learner)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_one_image_that_does_not_fit_is_an_error(cache, run_out):
    run_out(0)
    learner = make_learner(cache, **AUTO, **{"train.recompute": "blocks"})
    with (
        pytest.warns(UserWarning, match="going on with 1"),
        pytest.raises(OutOfMemory, match="smaller model or more memory"),
    ):
        run(learner, cache, 0, 1)


def test_memory_for_the_update_is_not_a_matter_of_the_micro_batch(cache, monkeypatch):
    learner = make_learner(cache, **AUTO)

    def no_memory(*arguments):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(learner, "_update", no_memory)
    with pytest.raises(OutOfMemory, match="out of memory with micro-batch 8"):
        learner.step(0, next(batches(cache, learner.config)), metrics=False)


def test_two_ranks_halve_together_where_one_runs_out_in_the_middle_of_accumulation(cache, tmp_path):
    changes = {**AUTO, "train.max_steps": 3, "train.micro_batch": 2}
    script = Path(__file__).parent / "memory_rank.py"
    ranks = start_ranks(cache.path, tmp_path / "two", json.dumps(changes), "1:1:2", script=script)
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert "micro-batch 2: going on with 1" in outputs[0][1] and "going on" not in outputs[1][1]
    weights = [safetensors.torch.load_file(tmp_path / f"two/rank_{rank}.safetensors") for rank in range(2)]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    pretrain(make_config(cache.path, tmp_path / "one", **{**changes, "train.micro_batch": 1}))
    one, two = (latest(CheckpointStore(tmp_path / name / "checkpoints")) for name in ("one", "two"))
    torch.testing.assert_close(two.state.task, one.state.task, rtol=1e-4, atol=1e-6)


def test_halves_divide_the_share():
    assert [halved(micro, 96) for micro in (96, 48, 32, 3, 2, 1)] == [48, 24, 16, 1, 1, 0]


def test_a_cap_needs_a_gpu(cache, tmp_path):
    cap_memory("", CPU.device)
    config = make_config(cache.path, tmp_path, **{"train.gpu_memory": "16GB"})
    with pytest.raises(ConfigError, match=r"train.gpu_memory 16GB caps the memory of a GPU, and this run is on cpu"):
        pretrain(config)
    assert memory_limit(config, CPU.device) == 16 * 10**9
    with pytest.raises(ConfigError, match="memory is a number with"):
        make_config(cache.path, tmp_path, **{"train.gpu_memory": "16"})


def test_the_cap_is_the_fraction_of_the_gpu(monkeypatch):
    class Properties:
        total_memory = 64 * 2**30

    calls = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *call: calls.append(call))
    cap_memory("16GiB", torch.device("cuda", 0))
    assert calls == [(0.25, torch.device("cuda", 0))]
    with pytest.raises(ConfigError, match=r"100GiB is more than cuda:0 has, 64.00 GiB"):
        cap_memory("100GiB", torch.device("cuda", 0))
