"""The memory plan against what torch allocates for the real step, and the choices made from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from memory import measure_step

from mapet.commands.options import Plan as Options
from mapet.commands.plan import plan_config
from mapet.config import ModelConfig, ObjectiveConfig
from mapet.errors import ConfigError
from mapet.objectives import OBJECTIVES, build_objective
from mapet.objectives.two_stream import part_size
from mapet.planning.memory import (
    FP32,
    LEVELS,
    USABLE,
    StepSize,
    block_parameters,
    in_parts,
    kept_in_all,
    moments,
    out_of_memory_advice,
    parameters,
    plan_memory,
    predict_memory,
    step_size,
)

BASE = ModelConfig.preset("base")
GIB = 2**30


def size_of(model: ModelConfig, images: int, recompute: str = "none", precision: str = "bf16", **changes) -> StepSize:
    objective = changes.pop("objective", ObjectiveConfig(cut=60))
    return StepSize(model, objective, images, changes.pop("share", images), precision, recompute, **changes)


CASES = {
    "base": size_of(BASE, 96),
    "base_cheap": size_of(ModelConfig.preset("base", depth=4), 128, "cheap"),
    "base_blocks_in_parts": size_of(ModelConfig.preset("base", depth=4), 300, "blocks"),
    "tiny_fp32": size_of(ModelConfig.preset("tiny", depth=4), 48, precision="fp32"),
    "tiny_fp32_cheap": size_of(ModelConfig.preset("tiny", depth=4), 48, "cheap", "fp32"),
    "small_accumulates": size_of(ModelConfig.preset("small", depth=4), 32, share=64),
    "small_average": size_of(ModelConfig.preset("small", depth=3), 1, "blocks", ema=True),
    "pim": size_of(ModelConfig.preset("small", depth=3), 40, objective=ObjectiveConfig("pim", 50)),
    "pim_cheap": size_of(ModelConfig.preset("small", depth=3), 40, "cheap", objective=ObjectiveConfig("pim", 50)),
    "mim_fp32": size_of(
        ModelConfig.preset("tiny", depth=3), 40, precision="fp32", objective=ObjectiveConfig("mim", 122)
    ),
    "mim_blocks": size_of(ModelConfig.preset("tiny", depth=3), 40, "blocks", objective=ObjectiveConfig("mim", 122)),
    "jitter": size_of(ModelConfig.preset("tiny", depth=4), 256, "blocks", jitter=True),
    "no_drop_path": size_of(ModelConfig.preset("tiny", depth=3, drop_path=0.0, class_token=False), 24, "cheap"),
}


@pytest.mark.parametrize("case", CASES)
def test_prediction_is_what_torch_allocates(case: str) -> None:
    size = CASES[case]
    accumulation = size.share // size.micro_batch
    measured = measure_step(
        size.model,
        size.objective,
        size.micro_batch,
        precision=size.precision,
        recompute=size.recompute,
        ema=size.ema,
        accumulation=accumulation,
        jitter=size.jitter,
    )
    predicted, kept = predict_memory(size), kept_in_all(size)
    for name in ("weights", "optimizer", "average"):
        assert getattr(predicted, name) == pytest.approx(getattr(measured, name), rel=0.01)
    assert FP32 * parameters(size.model) == measured.gradients
    assert kept.attention == pytest.approx(measured.attention, rel=0.05)
    assert kept.activations == pytest.approx(measured.kept - measured.attention, rel=0.05)
    assert kept.total == pytest.approx(measured.kept, rel=0.03)
    images = predicted.images // accumulation  # the measurement makes those of each micro-batch anew
    total = predicted.total - predicted.workspace - predicted.images + images
    assert total == pytest.approx(max(measured.peak, measured.update_peak), rel=0.03)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_are_those_of_the_objective(name: str) -> None:
    model, objective = ModelConfig.preset("tiny", depth=1), ObjectiveConfig(name, 50)
    with torch.device("meta"):
        built = build_objective(objective, model)
    assert size_of(model, 3, objective=objective).layout(3) == built.layout(3)
    assert parameters(model) == sum(p.numel() for p in built.parameters())


def test_the_targets_fit_16_gib() -> None:
    """ViT-B: 96 images with nothing recomputed, 128 with cheap recomputation, 512 with that of blocks."""
    for images, level in ((96, "none"), (128, "cheap"), (512, "blocks")):
        assert predict_memory(size_of(BASE, images, level)).total <= USABLE * 16 * GIB
    assert predict_memory(size_of(BASE, 128, "none")).total > 16 * GIB, "so the cheap level is needed for it"
    assert predict_memory(size_of(BASE, 512, "cheap")).total > 16 * GIB


def test_parts_add_up_and_the_peak_is_the_largest_moment() -> None:
    size = size_of(BASE, 64)
    memory = predict_memory(size)
    assert memory.total == sum(memory.parts().values()) == max(moment.total for moment in moments(size))
    assert memory.activations + memory.attention == kept_in_all(size).total and memory.moment == "loss"
    assert predict_memory(CASES["jitter"]).moment == "loss", "pictures in fp32 exist in the forward pass only"
    assert predict_memory(CASES["small_average"]).moment == "update"


def test_slower_levels_and_smaller_batches_take_less() -> None:
    sizes = [predict_memory(size_of(BASE, 64, level)).total for level in LEVELS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    totals = [predict_memory(size_of(BASE, images)).total for images in (1, 8, 32, 64)]
    assert totals == sorted(totals) and len(set(totals)) == 4


def test_the_plan_is_the_fastest_level_with_the_largest_divisor_that_fits() -> None:
    size = size_of(BASE, 2048)
    plan = plan_memory(size, 16 * GIB)
    assert (plan.micro_batch, plan.accumulation, plan.recompute) == (64, 32, "none")
    assert plan.memory == predict_memory(replace(size, micro_batch=64)) and plan.memory.total <= USABLE * 16 * GIB
    assert predict_memory(replace(size, micro_batch=128)).total > USABLE * 16 * GIB
    assert plan_memory(size, 16 * GIB, levels=["blocks"]).micro_batch == 512
    assert plan_memory(size_of(BASE, 96), 16 * GIB).accumulation == 1
    assert plan_memory(size, 16 * GIB, micro_batch=128).recompute == "cheap"


def test_a_level_that_leaves_the_gpu_idle_gives_way() -> None:
    size = size_of(BASE, 2048)
    for limit in (3, 4, 6, 8):
        plan = plan_memory(size, limit * GIB)
        assert plan.micro_batch * size.layout(1).rows >= 8192, "some level keeps the GPU busy, and is taken"
    none = plan_memory(size, 3 * GIB, levels=["none"])
    assert none.micro_batch < 17, "and nothing recomputed would not have"


def test_nothing_fits_says_what_would() -> None:
    size = size_of(BASE, 2048)
    with pytest.raises(ConfigError, match=r"1.00 GiB are too little.*blocks takes 1\.\d+ GiB.*least.*1\.\d+ GiB.*GPUs"):
        plan_memory(size, GIB)
    with pytest.raises(
        ConfigError, match=r"micro-batch 512 with recompute none takes.*micro-batch 64 with recompute none"
    ):
        plan_memory(size, 16 * GIB, levels=["none"], micro_batch=512)


def test_out_of_memory_advice_has_numbers() -> None:
    text = out_of_memory_advice(size_of(BASE, 128, share=2048), 16 * GIB)
    assert text.startswith("out of memory with micro-batch 128 and recompute none, which by `mapet plan` take 19.")
    assert "of 16.00 GiB; set train.micro_batch=64 train.recompute=none (predicted 10.93 GiB), or" in text
    assert "train.micro_batch=128 train.recompute=cheap (predicted 13." in text and "--auto-batch" in text
    assert "smaller model" in out_of_memory_advice(size_of(BASE, 1, "blocks"), 0)


def test_parts_divide_weights_gradients_and_optimizer_by_the_processes() -> None:
    numbers, block = parameters(BASE), block_parameters(BASE)
    around = numbers - BASE.depth * block
    for processes in (2, 8):
        size = size_of(BASE, 96, ema=True, processes=processes, parallel="fsdp")
        part = FP32 * numbers // processes
        by_moment = {moment.moment: in_parts(size, moment) for moment in moments(size)}
        update, loss = by_moment["update"], by_moment["loss"]
        held = (update.weights, update.gradients, update.optimizer, update.average)
        assert held == pytest.approx((part, part, 2 * part, part), abs=2), "no weight is whole at the update"
        assert loss.weights == pytest.approx(part + FP32 * (around + 3 * block), abs=1)
        assert loss.gradients == pytest.approx(part + FP32 * (around + 2 * block), abs=1)
        assert predict_memory(size).total == max(moment.total for moment in by_moment.values())
        assert predict_memory(size).activations == predict_memory(replace(size, parallel="ddp")).activations


def test_gradients_that_add_up_are_whole_in_every_process() -> None:
    size = size_of(BASE, 32, share=64, processes=4, parallel="fsdp")
    assert predict_memory(size).gradients > FP32 * parameters(BASE)
    assert predict_memory(replace(size, share=32)).gradients < FP32 * parameters(BASE)


def test_one_process_has_no_parts() -> None:
    size = size_of(BASE, 96)
    assert predict_memory(replace(size, parallel="fsdp")) == predict_memory(size)


def test_parts_are_advised_where_they_help() -> None:
    large = ModelConfig.preset("base", width=1536, heads=24, depth=24)
    size = size_of(large, 16, share=16, processes=8)
    text = out_of_memory_advice(size, 16 * GIB)
    copies, parts = predict_memory(size).total, predict_memory(replace(size, parallel="fsdp")).total
    assert parts < 0.7 * copies and f"train.parallel=fsdp (predicted {parts / GIB:.2f} GiB)" in text
    assert "--auto-batch" in text
    inside = out_of_memory_advice(replace(size, parallel="fsdp"), 16 * GIB)
    assert "train.parallel" not in inside and "--auto-batch" not in inside, "neither goes with parts"
    with pytest.raises(ConfigError, match=r"set train.parallel=fsdp \(then .*GiB\), give more"):
        plan_memory(size, 8 * GIB)
    assert plan_memory(replace(size, parallel="fsdp"), 8 * GIB).memory.total <= USABLE * 8 * GIB


def test_uneven_shares_are_refused() -> None:
    config, _ = plan_config(Options(model="tiny", global_batch=100, micro_batch=30))
    with pytest.raises(ConfigError, match=r"train.micro_batch 30 does not divide the 100 images"):
        step_size(config, 1)
    with pytest.raises(ConfigError, match="100 is not divisible by 3 processes"):
        step_size(config, 3)


def test_parts_of_recomputed_blocks_are_even() -> None:
    assert [part_size(images) for images in (1, 128, 129, 192, 512, 513)] == [1, 128, 65, 96, 128, 103]
