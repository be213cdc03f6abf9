"""Weights in parts (train.parallel fsdp) against copies of them and against one process, in 2 or 4 processes."""

from __future__ import annotations

import json
from pathlib import Path

import parallel_rank
import pytest
import torch
from test_distributed import CHANGES, check_steps, start_ranks
from tiny_run import make_cache, make_config

from mapet.distributed import World
from mapet.errors import ConfigError
from mapet.planning.memory import moments, step_size
from mapet.training.checkpoint import CheckpointStore
from mapet.training.learner import Learner
from mapet.training.loop import pretrain
from mapet.training.parallel import placement
from mapet.training.schedule import plan_steps

SHARDED = {**CHANGES, "train.micro_batch": 1, "train.parallel": "fsdp"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def run_ranks(*arguments: object, size: int, script: Path | None = None) -> list[str]:
    """Run to a good end; what the ranks printed."""
    processes = start_ranks(*arguments, size=size, **({"script": script} if script else {}))
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * size, outputs
    return [output for output, _ in outputs]


def final(output: Path) -> tuple[int, dict[str, object]]:
    """Steps, weights, averages and optimizer state of the newest checkpoint."""
    store = CheckpointStore(output / "checkpoints")
    loaded = store.load(store.newest_valid())
    state = loaded.state
    return loaded.step, {"task": state.task, "ema": state.ema, "moments": state.trainer["optimizer"]["state"]}


def test_parts_are_one_process(cache, tmp_path):
    run_ranks(cache, tmp_path / "parts", json.dumps(SHARDED), size=4)
    single = pretrain(make_config(cache, tmp_path / "one", **CHANGES))
    ours, theirs = final(tmp_path / "parts"), final(tmp_path / "one")
    assert ours[0] == theirs[0] == 4
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] == pytest.approx(single.loss, rel=1e-5)
    assert lines[-1]["accuracy"] == pytest.approx(single.metrics["accuracy"])
    # Gradients of the two blocks and of what is around them are reduced once a step, however many micro-batches; one
    # all-reduce is that of the gradient norm, one that of loss and accuracy.
    collectives = check_steps(tmp_path / "parts", size=4, steps=4)
    assert {counts["_reduce_scatter_base_"] for counts in collectives} == {3}
    assert {(counts["all_reduce"], counts["allreduce_"]) for counts in collectives} == {(1, 1)}


@pytest.mark.long
def test_a_run_goes_from_one_process_to_parts_and_back(cache, tmp_path):
    pretrain(make_config(cache, tmp_path / "run", **{**CHANGES, "train.max_steps": 2}))
    printed = run_ranks(cache, tmp_path / "run", json.dumps({**SHARDED, "train.max_steps": 5}), size=2)
    assert "going on from step 2" in printed[0]
    pretrain(make_config(cache, tmp_path / "run", **{**CHANGES, "train.max_steps": 7}))
    pretrain(make_config(cache, tmp_path / "whole", **{**CHANGES, "train.max_steps": 7}))
    ours, theirs = final(tmp_path / "run"), final(tmp_path / "whole")
    assert ours[0] == theirs[0] == 7
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def found(cache, tmp_path_factory) -> dict[str, object]:
    """What two processes of tests/parallel_rank.py found."""
    folder = tmp_path_factory.mktemp("found")
    pretrain(make_config(cache, folder / "one", **parallel_rank.CHANGES, **{"train.max_steps": 2}))
    arguments = (cache, folder / "one/checkpoints", folder / "report.json", *parallel_rank.VARIANTS)
    run_ranks(*arguments, size=2, script=Path(parallel_rank.__file__))
    return json.loads((folder / "report.json").read_text())


def test_every_variant_of_a_step_is_the_same_in_parts(found):
    variants = found["variants"]
    assert variants.keys() == set(parallel_rank.VARIANTS)
    assert [name for name, v in variants.items() if not v["difference"] <= 1.0] == []
    assert [name for name, v in variants.items() if v["losses"][0] != pytest.approx(v["losses"][1], rel=1e-5)] == []
    assert [name for name, v in variants.items() if v["graphs"]] == ["compile"]


def test_a_gradient_broken_in_one_part_calls_the_whole_update_off(found):
    overflow, nan = found["fp16 overflow"], found["fp32 nan"]
    assert overflow == {"changed": [], "scales": [[65536.0, 32768.0]] * 2, "failed": [None] * 2}
    assert nan == {"changed": [], "scales": [[1.0, 1.0]] * 2, "failed": [2] * 2}


def test_clipping_takes_the_norm_over_all_parts(found):
    norms = found["clipped"]
    assert norms["fsdp"] == pytest.approx(norms["ddp"], rel=1e-5)
    assert norms["fsdp"][0] > 0.1 and norms["fsdp"][1] == pytest.approx(0.01, rel=1e-3)


def test_a_checkpoint_is_the_same_after_loading_and_saving_in_parts(found):
    assert found["loaded"] == [[]] * 2


def test_each_process_holds_the_part_that_is_planned(found):
    changes = {**parallel_rank.CHANGES, "train.parallel": "fsdp"}
    size = step_size(make_config(Path("c"), Path("o"), **changes), 2)
    planned = next(moment for moment in moments(size) if moment.moment == "update")
    expected = {name: getattr(planned, name) for name in ("weights", "gradients", "optimizer", "average")}
    assert found["held"] == [expected] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.auto_batch": True}, r"train.auto_batch does not go with train.parallel fsdp.*train.micro_batch"),
        ({"speed.fp8": True}, r"speed.fp8 does not go with train.parallel fsdp"),
    ],
)
def test_what_does_not_go_with_parts_is_refused(change, message, cache):
    config = make_config(cache, Path("unused"), **change, **{"train.parallel": "fsdp"})
    with pytest.raises(ConfigError, match=message):
        Learner(config, World(torch.device("cpu"), size=2), plan_steps(config, 40, 2))


def test_one_process_has_nothing_to_share(cache, tmp_path):
    changes = {**CHANGES, "train.max_steps": 2}
    pretrain(make_config(cache, tmp_path / "fsdp", **{**changes, "train.parallel": "fsdp"}))
    pretrain(make_config(cache, tmp_path / "ddp", **changes))
    ours, theirs = final(tmp_path / "fsdp")[1], final(tmp_path / "ddp")[1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "processes", "dimension"),
    [((192, 192), 4, 0), ((1, 197, 192), 4, 2), ((1, 1, 192), 8, 2), ((8192,), 3, None), ((6, 5), 5, 1)],
)
def test_parts_are_even_where_they_can_be(shape, processes, dimension):
    chosen = placement(torch.empty(shape), processes)
    assert (chosen.dim if chosen else None) == dimension


def test_a_value_that_is_not_allowed_is_refused():
    with pytest.raises(ConfigError, match=r"train\.parallel must be one of ddp, fsdp, got 'zero'"):
        make_config(Path("c"), Path("o"), **{"train.parallel": "zero"})
