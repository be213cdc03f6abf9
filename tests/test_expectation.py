"""How fast a step can be, computed: beside what a real step on the CPU does, operator by operator."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from mapet.config import ModelConfig, ObjectiveConfig, OptimConfig, Precision, RunConfig, SpeedConfig, TrainConfig
from mapet.errors import ConfigError
from mapet.planning.estimate import (
    PAPER,
    SHARES,
    V100,
    Product,
    Shares,
    attentions,
    expect,
    expectation_rows,
    images_per_second,
    model_operations,
    page,
    passes,
    products,
    visible_pairs,
)
from mapet.planning.memory import StepSize, step_size
from mapet.recipes import RECIPES, recipe
from mapet_kernels import visibility

ROOT = Path(__file__).parent.parent
BATCH = 4


def tiny(precision: Precision = "fp16", image_size: int = 224, **changes) -> StepSize:
    config = RunConfig(
        model=replace(ModelConfig.preset("tiny"), image_size=image_size),
        objective=ObjectiveConfig(cut=50),
        optim=OptimConfig(global_batch=BATCH),
        train=TrainConfig(precision=precision),
    )
    return replace(step_size(config, 1), **changes)


@pytest.mark.parametrize(("name", "giga"), [("vit_tiny_kclip", 18), ("vit_small_kclip", 64), ("vit_base_kclip", 232)])
def test_operations_an_image_needs(name: str, giga: int) -> None:
    size = step_size(recipe(name), 1)
    assert round(model_operations(size) / 1e9) == giga
    assert model_operations(replace(size, micro_batch=64, recompute="blocks")) == pytest.approx(model_operations(size))


# bf16 takes a CPU many times as long.
@pytest.mark.parametrize(("precision", "image_size"), [("fp32", 224), ("bf16", 128)])
def test_a_real_step_does_what_is_computed(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, image_size: int
) -> None:
    """Operations to the last one, but for what a GPU's kernels compute again; bytes within a fifth. Nothing dropped."""
    monkeypatch.syspath_prepend(str(ROOT / "profiling"))
    speed = SpeedConfig(skip_dropped=False)
    workload = importlib.import_module("workload").Workload(
        batch=BATCH, precision=precision, image_size=image_size, speed=speed
    )
    work = importlib.import_module("step_roofline").count(workload)
    size = tiny(precision, image_size)
    expected = sum(p.operations for p in products(size))
    attention = list(attentions(size))
    assert work["attention", "forward"].flops == sum(a.forward for a in attention)
    assert work["attention", "backward"].flops == pytest.approx(sum(a.backward for a in attention) * 10 / 14)
    assert sum(w.flops for (part, _), w in work.items() if part != "attention") == pytest.approx(expected)
    moved = sum(p.bytes(size.element) for p in products(size)) + sum(a.bytes for a in attention) + passes(size)
    assert moved == pytest.approx(sum(w.bytes for w in work.values()), rel=0.2)


@pytest.mark.parametrize("objective", ["mapet", "pim", "mim"])
def test_visible_pairs_are_those_of_the_masks(objective: str) -> None:
    model = ModelConfig(image_size=32, patch_size=8, width=16, heads=1)
    size = replace(tiny(), model=model, objective=ObjectiveConfig(objective, 6), micro_batch=3)
    tokens, cut = model.tokens, 6
    if objective == "mim":
        everything, last = tokens * tokens, (tokens - cut) * tokens
    else:
        content, query = visibility.two_stream_visibility(tokens, cut, mask_tokens=objective == "mapet")
        everything, last = int(content.sum() + query.sum()), int(query.sum())
    assert visible_pairs(size, predicted_only=False) == 3 * everything
    assert visible_pairs(size, predicted_only=True) == 3 * last


def test_a_large_product_is_bound_by_operations_and_a_thin_one_by_bytes() -> None:
    assert Product(8, 4, 2, times=1).operations == 2 * 8 * 4 * 2 and Product(8, 4, 2, 1).bytes(2) == 2 * (32 + 8 + 16)
    size = step_size(recipe("vit_base_kclip"), 1)
    rates = {share: images_per_second(size, V100, share) for share in (Shares(), Shares(products=0.5), Shares(1, 0.5))}
    assert rates[Shares(products=0.5)] < 0.7 * rates[Shares()] and rates[Shares(1, 0.5)] < rates[Shares()]
    thin = replace(tiny(), micro_batch=256, share=256)
    slower = images_per_second(thin, V100, Shares(bandwidth=0.5))
    assert slower == pytest.approx(0.5 * images_per_second(thin, V100, Shares()), rel=0.2)


def test_guesses_lie_below_what_is_possible_and_recomputation_costs() -> None:
    assert all(0 < part < 1 for shares in SHARES for part in vars(shares).values())
    for name in RECIPES:
        size = replace(step_size(recipe(name), 1), micro_batch=64)
        rates = [
            images_per_second(replace(size, recompute=level), V100, SHARES[0]) for level in ("none", "cheap", "blocks")
        ]
        assert rates == sorted(rates, reverse=True) and rates[2] > 0.6 * rates[0]
        expected = expect(size, V100)
        assert expected.low < expected.high < expected.most
        assert images_per_second(replace(size, precision="fp32"), V100, Shares()) < expected.most / 2
    with pytest.raises(ConfigError, match="a V100 computes in fp32 and fp16, not in bf16"):
        expect(tiny("bf16"), V100)


def test_hours_follow_from_images_per_second() -> None:
    size = step_size(recipe("vit_base_kclip"), 1)
    expected = replace(expect(size, V100), low=100.0, high=200.0)
    assert expected.hours(images=720_000, epochs=2) == "2 to 4 h" and expected.images == "100 to 200"
    rows = dict(expectation_rows(size, V100, 1000, 7))
    assert rows["operations an image needs, forward and backward"] == "232 GFLOP" and rows["attention"] == "8 to 25 %"
    assert "7 epochs of 1,000 images on one GPU" in rows


def test_the_papers_rates_follow_from_its_gpus_and_its_day() -> None:
    """300 epochs of ImageNet-1k in about a day on 16, 32 and 64 V100."""
    assert PAPER.keys() == RECIPES.keys()
    for gpus, rate in zip((16, 32, 64), PAPER.values(), strict=True):
        assert rate == pytest.approx(300 * 1_281_167 / 86_400 / gpus, rel=0.01)


def test_the_readmes_table_is_what_the_code_prints() -> None:
    section = (ROOT / "README.md").read_text().split("## V100 and T4")[1].split("\n## ")[0]
    assert page() in section
    assert "computed, not measured" in section and "python -m mapet.planning.estimate" in section
    for shares, word in zip(
        zip(*(vars(s).values() for s in SHARES), strict=True), ("products", "attention", "bandwidth"), strict=True
    ):
        low, high = (f"{100 * share:.0f}" for share in shares)
        assert f"{low} to {high} %" in section, word
