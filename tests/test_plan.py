"""The memory plan: what the real step takes on fake tensors, and the choices made from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import nn

from mapet.config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig
from mapet.errors import ConfigError
from mapet.objectives import OBJECTIVES, build_task, options
from mapet.objectives.two_stream import part_size
from mapet.planning import memory, trace
from mapet.planning.memory import (
    LEVELS,
    USABLE,
    Memory,
    StepSize,
    divisors,
    moments,
    out_of_memory_advice,
    plan_memory,
    predict_memory,
    step_size,
)
from mapet.task import Task
from mapet.training.limits import advice

GIB = 2**30
BASE = ModelConfig.preset("base")


def size_of(model: str | ModelConfig, images: int, recompute: str = "none", precision: str = "bf16", **changes):
    """The step of a model, by preset or `preset/depth`; by name what else is not as usual."""
    if isinstance(model, str):
        preset, _, depth = model.partition("/")
        sizes = {"depth": int(depth)} if depth else {}
        model = ModelConfig.preset(preset, **sizes, **changes.pop("sizes", {}))
    processes = changes.pop("processes", 1)
    config = RunConfig(
        model=model,
        objective=changes.pop("objective", options("mapet", cut=60)),
        data=DataConfig(color_jitter=changes.pop("jitter", 0.0)),
        optim=OptimConfig(global_batch=processes * changes.pop("share", images)),
        train=TrainConfig(
            precision=precision,
            recompute=recompute,
            ema_decay=changes.pop("ema", 0.0),
            parallel=changes.pop("parallel", "ddp"),
        ),
    )
    assert not changes
    return step_size(config, processes, images)


PIM, MIM = options("pim", cut=50), options("mim", masked=75)
BARE = {"drop_path": 0.0, "class_token": False}
GOLDEN = {
    "base": (15_746_831_616, ("base", 96), {}),
    "base 128 cheap": (13_959_844_864, ("base", 128, "cheap"), {}),
    "base 512 blocks": (12_573_973_504, ("base", 512, "blocks"), {}),
    "cheap": (4_783_952_896, ("base/4", 128, "cheap"), {}),
    "blocks in parts": (4_055_891_648, ("base/4", 300, "blocks"), {}),
    "tiny fp32": (1_331_257_856, ("tiny/4", 48, "none", "fp32"), {}),
    "tiny fp32 cheap": (972_432_128, ("tiny/4", 48, "cheap", "fp32"), {}),
    "accumulates": (1_313_961_472, ("small/4", 32), {"share": 64}),
    "average": (246_158_408, ("small/3", 1, "blocks"), {"ema": 0.9}),
    "pim": (1_015_408_000, ("small/3", 40), {"objective": PIM}),
    "pim cheap": (845_119_424, ("small/3", 40, "cheap"), {"objective": PIM}),
    "mim fp32": (552_442_976, ("tiny/3", 40, "none", "fp32"), {"objective": MIM}),
    "mim blocks": (364_867_584, ("tiny/3", 40, "blocks"), {"objective": MIM}),
    "jitter": (1_134_755_328, ("tiny/4", 256, "blocks"), {"jitter": 0.4}),
    "no drop path": (489_932_032, ("tiny/3", 24, "cheap"), {"sizes": BARE}),
    "fsdp": (15_069_860_352, ("base", 96), {"ema": 0.9, "processes": 8, "parallel": "fsdp"}),
    "fsdp accumulates": (6_152_634_368, ("base", 32), {"share": 64, "processes": 4, "parallel": "fsdp"}),
}
"""Totals by the formulas that there were before anything was traced, derived on paper: another way to the same."""


@pytest.mark.parametrize("case", GOLDEN)
def test_totals_are_those_of_the_formulas(case: str) -> None:
    total, arguments, changes = GOLDEN[case]
    assert predict_memory(size_of(*arguments, **changes)).total == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    ("images", "recompute", "changes"),
    [(16, "cheap", {"ema": 0.9}), (130, "blocks", {"jitter": 0.4}), (16, "none", {"objective": MIM, "share": 32})],
)
def test_a_few_blocks_tell_of_many_to_the_byte(monkeypatch, images: int, recompute: str, changes: dict) -> None:
    size = size_of("tiny/5", images, recompute, **changes)
    short = size.trace()
    monkeypatch.setattr(trace, "SHALLOW", (3, 100))
    trace._trace.cache_clear()
    whole = size.trace()
    assert len(whole.peaks) > len(short.peaks) and (short.rows, short.network) == (whole.rows, whole.network)
    assert all(+Counter(short.peaks[moment]) == +Counter(whole.peaks[moment]) for moment in short.peaks)
    assert short.peak == whole.peak
    for i in (1, 2):  # FLOP and bytes
        assert sum(k[i] * n for k, n in short.work.items()) == pytest.approx(
            sum(k[i] * n for k, n in whole.work.items()), rel=1e-5
        )


def test_a_few_parts_tell_of_many_to_the_byte(monkeypatch) -> None:
    size = size_of("tiny/1", 640, "blocks", objective=options("mapet", cut=150))
    short = size.trace()
    monkeypatch.setattr(trace, "LARGEST_TRACED", 640)
    trace._trace.cache_clear()
    whole = size.trace()
    assert (short.calls, short.rows, short.peak) == (whole.calls, whole.rows, whole.peak) and whole.calls == 5


def test_the_targets_fit_16_gib() -> None:
    """ViT-B: 96 images with nothing recomputed, 128 with cheap recomputation, 512 with that of blocks."""
    for images, level in ((96, "none"), (128, "cheap"), (512, "blocks")):
        assert predict_memory(size_of("base", images, level)).total <= USABLE * 16 * GIB
    assert predict_memory(size_of("base", 128, "none")).total > 16 * GIB, "so the cheap level is needed for it"
    assert predict_memory(size_of("base", 512, "cheap")).total > 16 * GIB
    sizes = [predict_memory(size_of("base", 64, level)).total for level in LEVELS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_are_what_they_say(name: str) -> None:
    size = size_of("tiny/3", 8, "none", "fp32", objective=options(name), share=16, ema=0.9)
    with torch.device("meta"):
        task = build_task(size.config)
    peak, numbers = predict_memory(size), sum(p.numel() for p in task.parameters())
    assert peak.total == sum(peak.parts().values()) == max(moment.total for moment in moments(size))
    assert peak.weights == pytest.approx(4 * numbers, abs=1000), "buffers are small"
    assert peak.gradients == peak.average == 4 * numbers
    assert peak.optimizer == pytest.approx(8 * numbers, abs=1000)
    assert peak.images == pytest.approx(16 * (3 * 224**2 + 8 * (196 + 197)), rel=0.01)
    layout = task.layout(8)
    rows, keys = 2 * layout.rows + layout.batch * layout.targets, 3 * layout.batch * layout.content_rows
    assert peak.attention == 4 * (192 * 2 * (rows + keys) + 3 * rows), "q, kv, result, log-sum-exp of three blocks"
    assert size.trace().rows == layout.rows and peak.moment == "loss"
    assert predict_memory(size_of("small/3", 1, "blocks", ema=0.9)).moment == "update"


@pytest.mark.long
def test_the_plan_is_the_fastest_level_with_the_largest_divisor_that_fits() -> None:
    size = size_of("base", 2048)
    plan = plan_memory(size, 16 * GIB)
    assert (plan.micro_batch, plan.accumulation, plan.recompute) == (64, 32, "none")
    assert plan.memory == predict_memory(replace(size, micro_batch=64)) and plan.memory.total <= USABLE * 16 * GIB
    assert predict_memory(replace(size, micro_batch=128)).total > USABLE * 16 * GIB
    assert plan_memory(size, 16 * GIB, levels=["blocks"]).micro_batch == 512
    assert plan_memory(size_of("base", 96), 16 * GIB).accumulation == 1
    assert plan_memory(size, 16 * GIB, micro_batch=128).recompute == "cheap"


@pytest.mark.parametrize("share", [1, 96, 97, 2048, 2520])
@pytest.mark.parametrize("images", [0.5, 3.0, 40.0, 100.0, 1500.0, 1e9], ids=str)
def test_few_traces_find_what_all_of_them_would(monkeypatch, share: int, images: float) -> None:
    """With a head that stops growing at 30 images; the limit is what so many images take."""
    traced = []

    def predict(size: StepSize) -> Memory:
        traced.append(size.micro_batch)
        return memory_of(size.micro_batch)

    def memory_of(images: float) -> Memory:
        head = int(20 * min(images, 30))
        return Memory(weights=500, activations=int(90 * images) + 40, temporary=int(15 * images), head=head)

    monkeypatch.setattr(memory, "predict_memory", predict)
    limit = memory_of(images).total / USABLE + 1
    plan = memory._largest(size_of("tiny", share), limit, 0)
    assert (plan.micro_batch if plan else 0) == max((n for n in divisors(share) if n <= images), default=0)
    assert len(traced) == len(set(traced)) <= 5


def test_a_level_that_leaves_the_gpu_idle_gives_way() -> None:
    size = size_of("base", 2048)
    for limit, expected in ((4, (64, "blocks")), (6, (32, "cheap")), (8, (32, "none"))):
        plan = plan_memory(size, limit * GIB)
        assert (plan.micro_batch, plan.recompute) == expected
    assert plan_memory(size, 4 * GIB, levels=["none"]).micro_batch < 17, "too few rows to keep a GPU busy"


def test_nothing_fits_says_what_would() -> None:
    size = size_of("base", 2048)
    with pytest.raises(ConfigError, match=r"1.00 GiB are too little.*blocks takes 1\.\d+ GiB.*least.*1\.\d+ GiB.*GPUs"):
        plan_memory(size, GIB)
    with pytest.raises(
        ConfigError, match=r"micro-batch 512 with recompute none takes.*micro-batch 64 with recompute none"
    ):
        plan_memory(size, 16 * GIB, levels=["none"], micro_batch=512)


def test_out_of_memory_advice_has_numbers() -> None:
    text = out_of_memory_advice(size_of("base", 128, share=2048), 16 * GIB)
    assert text.startswith("out of memory with micro-batch 128 and recompute none, which by `mapet plan` take 19.")
    assert "of 16.00 GiB; set train.micro_batch=64 train.recompute=none (predicted 10.9" in text
    assert "train.micro_batch=128 train.recompute=cheap (predicted 13." in text and "--auto-batch" in text
    assert "smaller model" in out_of_memory_advice(size_of("base", 1, "blocks"), 0)


def test_parts_divide_weights_gradients_and_optimizer_by_the_processes() -> None:
    around, *blocks = trace.network(size_of("base", 1).config).weights
    numbers, block = around + sum(blocks), blocks[0]
    assert numbers == 4 * 92_117_504 and len(blocks) == 12 and set(blocks) == {block}
    for processes in (2, 8):
        size = size_of("base", 96, ema=0.9, processes=processes, parallel="fsdp")
        part = numbers // processes
        by_moment = {moment.moment: moment for moment in moments(size)}
        update, loss = by_moment["update"], by_moment["loss"]
        held = (update.weights, update.gradients, update.optimizer, update.average)
        assert held == pytest.approx((part, part, 2 * part, part), abs=2), "no weight is whole at the update"
        assert loss.weights == pytest.approx(part + around + 3 * block, abs=1)
        assert loss.gradients == pytest.approx(part + around + 2 * block, abs=1)
        assert predict_memory(size).activations == predict_memory(replace(size, parallel="ddp")).activations
    several = size_of("base", 32, share=64, processes=4, parallel="fsdp")
    assert predict_memory(several).gradients > numbers, "gradients that add up are whole in every process"
    assert predict_memory(replace(several, share=32)).gradients < numbers
    alone = size_of("base", 96)
    assert predict_memory(replace(alone, parallel="fsdp")) == predict_memory(alone)


@pytest.mark.long
def test_parts_are_advised_where_they_help() -> None:
    size = size_of(ModelConfig.preset("base", width=1536, heads=24, depth=24), 16, processes=8)
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
    config = replace(RunConfig(), optim=OptimConfig(global_batch=100), train=TrainConfig(micro_batch=30))
    with pytest.raises(ConfigError, match=r"train.micro_batch 30 does not divide the 100 images"):
        step_size(config, 1)
    with pytest.raises(ConfigError, match="100 is not divisible by 3 processes"):
        step_size(config, 3)


def test_parts_of_recomputed_blocks_are_even() -> None:
    assert [part_size(images) for images in (1, 128, 129, 192, 512, 513)] == [1, 128, 65, 96, 128, 103]


@dataclass(frozen=True)
class ToyConfig(ObjectiveConfig):
    """Options of a method that nothing else knows."""

    name: Literal["toy"] = "toy"
    reads_values: bool = False


class Toy(Task):
    """Layers of different sizes, no attention, a batch of its own, a teacher that follows."""

    Options = ToyConfig

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(256, n) for n in (512, 1024, 1024))
        self.teacher = nn.Linear(256, 2560, bias=False).requires_grad_(False)
        nn.init.trunc_normal_(self.teacher.weight)

    @classmethod
    def open(cls, config: RunConfig) -> Any:
        raise NotImplementedError

    def draw(self, images: int, rng) -> dict[str, torch.Tensor]:
        return {"noise": torch.randn(images, 256, generator=rng.generator("noise"), device=rng.device)}

    def forward(self, batch, draws, *, metrics=True) -> dict[str, torch.Tensor]:
        x = batch["sound"] + draws["noise"]
        if self.options.reads_values and float(x.sum()) > 0:
            x = -x
        out = torch.cat([layer(x).tanh() for layer in self.layers], dim=1)
        return {"loss": (out - self.teacher(x).detach()).square().mean()}

    def example(self, images: int) -> dict[str, torch.Tensor]:
        return {"sound": torch.empty(images, 256)}

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def backbone(self) -> Any:
        raise NotImplementedError

    def after_update(self, step: int, skip: torch.Tensor) -> None:
        with torch.no_grad():
            self.teacher.weight[:512].lerp_(self.layers[0].weight, 0.1)


@pytest.fixture
def toy(monkeypatch):
    """toy(...): the step of 64 images of this method, 32 at a time."""
    monkeypatch.setitem(OBJECTIVES, "toy", f"{__name__}:Toy")

    def make(**values: Any) -> StepSize:
        config = RunConfig(objective=ToyConfig(**values), optim=OptimConfig(global_batch=64))
        return step_size(replace(config, train=TrainConfig(micro_batch=32, recompute="none")), 1)

    return make


def test_any_task_is_planned(toy) -> None:
    size = toy()
    peak, weights = predict_memory(size), 4 * 257 * 2560
    assert peak.weights == weights + 4 * 256 * 2560, "the teacher's are weights, and take no gradients"
    assert peak.gradients == weights and peak.optimizer == pytest.approx(2 * weights, abs=100)
    assert peak.images == 2 * 64 * 256 * 4 and peak.attention == 0
    assert peak.activations + peak.head + peak.temporary > 2 * 32 * 2560 * 4
    products = sum(flop * n for (kind, flop, _), n in size.trace().work.items() if kind == "product")
    assert products == 2 * 32 * 256 * 2560 * 3, "forward, the teacher's, and of the weights; the input has no gradient"
    assert plan_memory(size, GIB).micro_batch == 64
    text = advice(size.config, torch.device("cpu"), 1, 32)
    assert text.startswith("out of memory with micro-batch 32") and "train.micro_batch=16" in text


def test_a_task_that_looks_at_values_gets_advice_without_numbers(toy) -> None:
    size = toy(reads_values=True)
    with pytest.raises(ConfigError, match=r"objective toy cannot be planned.*without values.*DataDependent"):
        predict_memory(size)
    text = advice(size.config, torch.device("cpu"), 1, 32)
    assert text.startswith("out of memory with micro-batch 32 and recompute none; set a smaller train.micro_batch")
