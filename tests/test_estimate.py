"""How fast a step can be on paper, beside a real step on the CPU; several GPUs; units as people type them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mapet.config import DataConfig, ModelConfig, OptimConfig, Precision, RunConfig, TrainConfig, change
from mapet.distributed import World
from mapet.errors import ConfigError
from mapet.objectives import options
from mapet.objectives.loss import chunks_as_on
from mapet.planning.estimate import (
    GPUS,
    PAPER,
    SHARES,
    Shares,
    expect,
    expectation_rows,
    gpu_of,
    hours,
    images_per_second,
    model_operations,
    scaling_rows,
    scaling_table,
    speed_table,
)
from mapet.planning.memory import LEVELS, StepSize, predict_memory, step_size
from mapet.planning.trace import LiveBytes
from mapet.recipes import RECIPES, recipe
from mapet.training.learner import Learner
from mapet.training.schedule import plan_steps
from mapet.units import (
    duration,
    gib,
    metric,
    parse_bytes,
    parse_count,
    parse_duration,
    parse_link,
    parse_rate,
)  # fmt: skip
from mapet_kernels import visibility
from mapet_kernels.flops import BACKWARD_PRODUCTS
from mapet_kernels.registry import REGISTRY

ROOT = Path(__file__).parent.parent
BATCH = 4
V100 = GPUS["V100"]
BASE = RunConfig(model=ModelConfig.preset("base"))


def tiny(precision: Precision = "fp16", **model) -> StepSize:
    config = RunConfig(
        model=ModelConfig.preset("tiny", **model),
        objective=options("mapet", cut=50),
        optim=OptimConfig(global_batch=BATCH),
        train=TrainConfig(precision=precision),
    )
    return step_size(config, 1)


@pytest.mark.parametrize(("name", "giga"), [("vit_tiny_kclip", 18), ("vit_small_kclip", 64), ("vit_base_kclip", 232)])
def test_operations_an_image_needs(name: str, giga: int) -> None:
    size = replace(step_size(recipe(name), 1), micro_batch=64)
    assert round(model_operations(size) / 1e9) == giga
    assert model_operations(replace(size, recompute="blocks")) == model_operations(size)


@pytest.mark.parametrize("changes", [{}, {"train.recompute": "cheap", "optim.global_batch": 16}], ids=["once", "twice"])
def test_a_real_step_does_what_is_traced(changes: dict) -> None:
    """The learner's step on the CPU: FLOP to the last one, and the peak of live tensors."""
    model = ModelConfig.preset("tiny", image_size=64, depth=3, vocabulary=512)
    data, train = DataConfig(color_jitter=0.4), TrainConfig(micro_batch=8, ema_decay=0.9)
    start = RunConfig(model=model, objective=options("mapet", cut=6), data=data, train=train)
    config = change(start, {"optim.global_batch": 8, "speed.skip_dropped": False, **changes})
    size = step_size(config, 1)
    learner = Learner(config, World(torch.device("cpu")), plan_steps(config, 64, 1))
    shapes = learner.task.example(size.share)
    batch = {name: torch.randint(0, 200, x.shape).to(x.dtype) for name, x in shapes.items()}
    with FlopCounterMode(display=False) as counter:
        learner.step(0, batch, metrics=False)
    traced = size.trace()
    flop = sum(flop * n for (_, flop, _), n in traced.work.items())
    assert counter.get_total_flops() == flop * size.share / size.micro_batch
    learner.optimizer.zero_grad(set_to_none=True)
    with LiveBytes() as live, chunks_as_on("cuda"):
        moments = [x for state in learner.optimizer.state.values() for x in state.values()]
        live.add_all(
            [*learner.task.state_dict().values(), *moments, *learner.average.weights.values(), *batch.values()]
        )
        learner.step(1, batch, metrics=False)
    memory = predict_memory(size)
    assert memory.total - memory.workspace == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize("objective", ["mapet", "pim"])
def test_attention_counts_the_pairs_of_its_mask(objective: str) -> None:
    model = ModelConfig(image_size=32, patch_size=8, width=16, heads=1, depth=2)
    config = RunConfig(model=model, objective=options(objective, cut=6), optim=OptimConfig(global_batch=3))
    found = step_size(config, 1).trace().work
    content, query = visibility.two_stream_visibility(model.tokens, 6, mask_tokens=objective == "mapet")
    forward = {flop for kind, flop, _ in found if kind == "attention"}
    first, last = (4 * 16 * 3 * int(pairs) for pairs in (content.sum() + query.sum(), query.sum()))
    assert forward == {first, last}
    assert {flop for kind, flop, _ in found if kind == "attention backward"} == {2.5 * first, 2.5 * last}


@pytest.mark.parametrize(("op", "shape"), [("two_stream_attention", "vit"), ("prefix_suffix_attention", "mim")])
def test_torchs_counter_knows_our_attention(op: str, shape: str) -> None:
    spec = REGISTRY[op]
    case = spec.make_case(spec.shapes[shape], spec.dtypes[1])
    inputs = {name: x.requires_grad_() for name, x in case.inputs.items()}
    flop = spec.cost(spec.shapes[shape], spec.dtypes[1])[0]
    with FlopCounterMode(display=False) as counter:
        results = spec.function(**inputs, **case.options, backend="sdpa")
        sum(x.sum() for x in (results if isinstance(results, tuple) else [results])).backward()
    assert counter.get_total_flops() == pytest.approx((1 + BACKWARD_PRODUCTS) * flop)


def test_guesses_lie_below_what_is_possible_and_recomputation_costs() -> None:
    assert all(0 < part < 1 for shares in SHARES for part in vars(shares).values())
    size = replace(step_size(recipe("vit_base_kclip"), 1), micro_batch=64)
    rates = [images_per_second(replace(size, recompute=level), V100, SHARES[0]) for level in LEVELS]
    assert rates == sorted(rates, reverse=True) and rates[2] > 0.6 * rates[0]
    low, high, most = expect(size, V100)
    assert low < high < most
    assert images_per_second(size, V100, Shares(products=0.5)) < 0.7 * most
    assert images_per_second(size, V100, Shares(attention=0.5)) < most
    thin = tiny(depth=2)
    slower = images_per_second(thin, V100, Shares(bandwidth=0.5))
    assert slower == pytest.approx(0.5 * images_per_second(thin, V100, Shares()), rel=0.2), "bound by bytes"


def test_a_gpu_has_a_name_or_rates() -> None:
    assert gpu_of(None, None, None) is None and gpu_of("H200", None, None) == GPUS["H200"]
    assert all(parse_bytes(gpu.memory) and 0 < gpu.fp32 < gpu.fp16 for gpu in GPUS.values())
    mine = gpu_of(None, "312T", "2.0TB")
    assert (mine.operations("bf16"), mine.operations("fp32"), mine.bandwidth) == (312e12, 312e12, 2e12)
    assert gpu_of("A100", "150T", None).operations("bf16") == 150e12
    for name in ("V100", "T4"):
        assert GPUS[name].operations("auto") == GPUS[name].operations("fp16")
        with pytest.raises(ConfigError, match=f"a {name} computes in fp32 and fp16, not in bf16"):
            GPUS[name].operations("bf16")
    with pytest.raises(ConfigError, match="both --peak, such as 312T, and --bandwidth"):
        gpu_of(None, "312T", None)


def test_hours_follow_from_images_per_second() -> None:
    assert hours(720_000, 2, 100.0, 200.0) == "2 to 4 h"
    rows = dict(expectation_rows(tiny(depth=2), V100, 1000, 7))
    assert rows["attention"] == "8 to 25 %" and "7 epochs of 1,000 images on one GPU" in rows


def test_the_papers_rates_follow_from_its_gpus_and_its_day() -> None:
    """300 epochs of ImageNet-1k in about a day on 16, 32 and 64 V100."""
    assert PAPER.keys() == RECIPES.keys()
    for gpus, rate in zip((16, 32, 64), PAPER.values(), strict=True):
        assert rate == pytest.approx(300 * 1_281_167 / 86_400 / gpus, rel=0.01)


def test_the_tables_are_what_the_code_prints() -> None:
    section = (ROOT / "README.md").read_text().split("## V100 and T4")[1].split("\n## ")[0]
    assert speed_table() in section
    for low, high in zip(*(vars(shares).values() for shares in SHARES), strict=True):
        assert f"{100 * low:.0f} to {100 * high:.0f} %" in section
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling_table(1_281_167) in page and scaling_table(10**9) in page
    for text in (section, page):
        assert "computed, not measured" in text and "python -m mapet.planning.estimate" in text


def test_scaling_follows_the_formulas() -> None:
    rows = dict(scaling_rows(BASE, 64, 50e9, 1_281_167, rate=500.0))
    gradients, image = 4 * 92_117_504, 3 * 224**2 + 2 * 196
    sent = 2 * 63 / 64 * gradients
    low, high = 0.064, 0.064 + sent / 50e9
    assert list(rows.values()) == [
        "32",
        metric(gradients, "B"),
        metric(sent, "B"),
        duration(sent / 50e9),
        metric(image, "B"),
        metric(1_281_167 * image, "B"),
        "625",
        duration(0.064),
        f"{duration(low)} to {duration(high)}",
        f"{metric(2048 * image / low, 'B')}/s",
        f"{duration(625 * low)} to {duration(625 * high)}",
    ]
    slow = dict(scaling_rows(BASE, 8, 1e9, 10**6, rate=1e6))
    assert slow["a step, all-reduce hidden or not"].startswith(slow["ring all-reduce, without latency"])
    alone = dict(scaling_rows(BASE, 1, 1e9, 10**6))
    assert alone["sent by each GPU in a step"] == "0 B" and alone["computing a step"].startswith("unknown")
    assert not any("epoch, " in name for name in alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 3}, "2048 cannot be shared evenly by 3"),
        ({"images": 10}, "10 images are fewer"),
        ({"rate": 0.0}, "positive"),
    ],
)
def test_gpus_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaling_rows(BASE, **{"gpus": 8, "link": 1e9, "images": 10**6} | changes)


def test_units() -> None:
    assert [parse_bytes(text) for text in ("16GB", "16 GiB", "1.5gb")] == [16 * 10**9, 16 * 2**30, 15 * 10**8]
    assert parse_link("400Gb") == 50e9 == parse_link("50GB/s") and parse_link("100Gbit/s") == 12.5e9
    assert [parse_count(text) for text in ("1.28M", "1B", "7")] == [1_280_000, 10**9, 7]
    assert [parse_rate(text) for text in ("312T", "2.25P", "900G")] == [312e12, 2.25e15, 9e11]
    assert [parse_duration(text) for text in ("24h", "90min", "2d", "5s")] == [86400, 5400, 172800, 5]
    assert (gib(3 * 2**29), gib(2**20), metric(736e6, "B"), metric(3, "B")) == ("1.50 GiB", "1 MiB", "736 MB", "3 B")
    assert (duration(0.0147), duration(90), duration(2e5)) == ("14.7 ms", "1.5 min", "2.31 days")


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (parse_bytes, ("16", "16Gb2")),
        (parse_link, ("400",)),
        (parse_count, ()),
        (parse_rate, ("312", "312B")),
        (parse_duration, ("24", "1y")),
    ],
)
def test_units_that_are_none_are_refused_with_what_is_allowed(parse, texts: tuple[str, ...]) -> None:
    for text in ("", "x", "0GB", "-1", *texts):
        with pytest.raises(ConfigError, match="such as") as error:
            parse(text)
        assert repr(text) in str(error.value)
