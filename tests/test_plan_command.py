"""`mapet plan`, and the options of `mapet pretrain` that plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from command_line import TRAINING
from tiny_run import make_cache

from mapet.commands import pretrain as command
from mapet.commands.parsing import parse
from mapet.config import RunConfig
from mapet.errors import ConfigError
from mapet.planning.estimate import GPUS
from mapet.training.limits import within_memory

BASE = ("--model", "base", "--cut", 60, "--precision", "bf16")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache", vocabulary=16)


def test_the_plan_for_16_gb(mapet) -> None:
    said = mapet.succeed("plan", *BASE, "--gpu-memory", "16GB", "--batch", 2048).out
    for part in ("weights", "gradients", "AdamW", "activations", "attention", "head", "in all"):
        assert part in said
    assert "micro-batch 64, accumulation 32, recompute none, GPUs: 1, each with 2048 images of a step" in said
    assert "none 10.96 GiB" in said and "computed, not measured" in said


def test_what_is_given_is_kept(mapet) -> None:
    small = ("--batch", 64, "--model.depth", 3)
    given = mapet.succeed("plan", *small, "--micro-batch", 16, "--train.recompute", "blocks", "--gpus", 2).out
    assert "micro-batch 16, accumulation 2, recompute blocks, GPUs: 2" in given
    assert "micro-batch 64, accumulation 1, recompute none" in mapet.succeed("plan", *small).out


def test_several_gpus(mapet) -> None:
    options = ("--gpus", 64, "--interconnect", "400Gb", "--images", "1.28M")
    said = mapet.succeed("plan", *BASE, *options).out
    assert "725 MB" in said and "14.5 ms" in said and "193 GB" in said and "unknown" in said
    assert "20 s to 29.1 s" in mapet.succeed("plan", *BASE, *options, "--images-per-second", 1000).out


def test_a_gpu_that_is_not_here(mapet) -> None:
    said = mapet.succeed("plan", "--recipe", "vit_base_kclip", "--gpu", "V100").out
    assert "95 % of 16GB" in said and "micro-batch 64" in said, "its memory is the limit"
    assert "one V100, fp16" in said and "232 GFLOP" in said and "300 epochs of 1,281,167 images" in said
    mapet.fail("plan", *BASE, "--gpu", "V100", code=2, names=("V100 computes in fp32 and fp16, not in bf16",))


def test_a_gpu_by_name_or_by_its_rates(mapet) -> None:
    images = re.compile(r"images per second, at most +│ (\d+)")
    rates = {}
    for options in (("--gpu", "H200"), ("--gpu", "RTX 4090"), ("--peak", "989T", "--bandwidth", "4.8TB")):
        said = mapet.succeed("plan", "--batch", 64, "--precision", "bf16", *options).out
        rates[options[1]] = int(images.search(said)[1])
    assert rates["H200"] == rates["989T"] > 2 * rates["RTX 4090"]
    mapet.fail("plan", "--batch", 64, "--peak", "989T", code=2, names=("--peak", "--bandwidth"))
    mapet.fail("plan", "--gpu", "GTX", code=2, names=("--gpu GTX", *GPUS, "--peak"))


def test_parts_are_planned_for(mapet) -> None:
    sizes = (*BASE, "--batch", 64, "--gpus", 8)
    copies = mapet.succeed("plan", *sizes).out
    parts = mapet.succeed("plan", *sizes, "--parallel", "fsdp").out
    totals = re.search(r"train.parallel\): ddp ([\d.]+ GiB), fsdp ([\d.]+ GiB)", copies)
    assert totals[0] in parts and totals[1] != totals[2]
    assert re.search(rf"in all .*{totals[1]}", copies) and re.search(rf"in all .*{totals[2]}", parts)
    assert "train.parallel" not in mapet.succeed("plan", *BASE, "--batch", 8).out


def test_bad_plans_say_what_is_wrong(mapet) -> None:
    mapet.fail(
        "plan", "--batch", 8, "--gpu-memory", "10MB", code=2, names=("are too little", "the least that would do")
    )
    mapet.fail("plan", "--gpu-memory", "16", code=2, names=("'16'", "16GB"))
    mapet.fail("plan", "--gpus", 3, code=2, names=("2048", "3 processes"))
    mapet.fail("plan", "--gpus", 0, code=2, names=("--gpus must be at least 1",))
    mapet.fail("plan", "--interconnect", "fast", code=2, names=("400Gb", "'fast'"))
    mapet.fail("plan", "--micro-batch", 7, code=2, names=("--micro-batch 7", "2048"))


def test_pretrain_plans_what_is_not_given() -> None:
    def planned(*options: str) -> tuple[RunConfig, str]:
        _, given = parse(["pretrain", *map(str, BASE), *options])
        return within_memory(command.run_config(given), processes=1)

    config, said = planned("--gpu-memory=16GB")
    assert (config.train.micro_batch, config.train.recompute) == (64, "none")
    assert said == "planned for 16GB: micro-batch 64, accumulation 32, recompute none; 10.96 GiB predicted"
    config, _ = planned("--gpu-memory=16GiB", "--micro-batch=128")
    assert (config.train.micro_batch, config.train.recompute) == (128, "cheap")
    config, _ = planned("--gpu-memory=16GiB", "--train.recompute=blocks")
    assert (config.train.micro_batch, config.train.recompute) == (512, "blocks")
    config, said = planned("--gpu-memory=16GiB", "--micro-batch=2", "--train.recompute=blocks")
    assert (config.train.micro_batch, config.train.recompute, said) == (2, "blocks", "")
    config, said = planned()
    assert (config.train.micro_batch, config.train.recompute, said) == (0, "auto", "")
    with pytest.raises(ConfigError, match="too little"):
        planned("--gpu-memory=1GiB")


def test_memory_of_a_cpu_is_not_capped(mapet, cache, tmp_path) -> None:
    options = ("--cache", cache, "--output", tmp_path, *TRAINING, "--gpu-memory", "16GB")
    mapet.fail("pretrain", *options, code=2, names=("16GB", "this run is on cpu"))
    assert not list(tmp_path.iterdir())


def test_gpus_are_the_processes(mapet, cache, tmp_path) -> None:
    options = ("--cache", cache, "--output", tmp_path, *TRAINING)
    mapet.fail(
        "pretrain", *options, "--gpus", 4, code=2, names=("--gpus 4", "1 process", "torchrun", "mapet plan --gpus 4")
    )
    mapet.succeed("pretrain", *options, "--gpus", 1, "--max-steps", 1)


def test_a_budget_and_epochs_contradict_each_other(mapet, cache) -> None:
    options = ("--cache", cache, *TRAINING, "--budget", "24h")
    mapet.fail("pretrain", *options, code=2, names=("--budget", "--epochs"))
    mapet.fail("pretrain", "--cache", cache, "--budget", "soon", code=2, names=("'soon'", "24h"))


def test_out_of_memory_is_an_error_without_traceback(mapet, cache, tmp_path, monkeypatch) -> None:
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr("mapet.training.learner.Learner._forward_backward", no_memory)
    options = ("--cache", cache, "--output", tmp_path, *TRAINING)
    mapet.fail("pretrain", *options, code=1, names=("micro-batch 8", "--micro-batch=4", "--auto-batch"))
    failed = mapet("pretrain", *options, "--auto-batch")
    assert failed.code == 1 and "going on with 4" in failed.err and "micro-batch 1 and" in failed.err
