"""The network and the objectives: official names and counts, pruning, drop-path, causality of predictions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tasks import TINY, draws_for, make_task, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from mapet.checked import conform
from mapet.config import ModelConfig, RunConfig, change, from_dict, to_dict
from mapet.errors import CheckpointError, ConfigError
from mapet.model.vit import MaskedTokenViT, drop_path_rates, load_official
from mapet.objectives import OBJECTIVES, options
from mapet.objectives import loss as loss_module
from mapet.objectives.loss import token_accuracy, token_cross_entropy


@pytest.mark.parametrize(("preset", "count"), [("tiny", 7_110_272), ("small", 24_829_184), ("base", 92_117_504)])
def test_parameter_counts_are_the_official_ones(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = MaskedTokenViT(ModelConfig.preset(preset))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert len(model.state_dict()) == 201


def test_initialisation_follows_the_official_code() -> None:
    torch.manual_seed(0)
    model = MaskedTokenViT(ModelConfig.preset("tiny", depth=2))
    assert model.blocks[0].attn.kv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.decoder.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(1 / math.sqrt(768), rel=0.01)
    assert model.cls_token.abs().max().item() < 1e-4
    assert (model.blocks[1].ls2.gamma == 0.1).all() and (model.blocks[1].mlp.fc1.bias == 0).all()


def test_drop_path_rates_grow_linearly() -> None:
    rates = drop_path_rates(ModelConfig(drop_path=0.1))
    assert rates.tolist() == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert drop_path_rates(ModelConfig(depth=1)).tolist() == [0.0]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("class_token", [True, False])
def test_loss_is_near_uniform_and_reaches_every_parameter(name: str, class_token: bool) -> None:
    config = ModelConfig(**{**to_dict(TINY), "class_token": class_token})
    task = make_task(name, model=config)
    loss, accuracy = task(random_batch(config), draws_for(task)).values()
    assert loss.item() == pytest.approx(math.log(40), abs=0.2)
    assert 0 <= accuracy <= 1 and not accuracy.requires_grad
    loss.backward()
    for parameter_name, parameter in task.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pruned_last_block_changes_nothing(name: str) -> None:
    """Predictions equal those of a model that computes every row to the end."""
    objective = make_task(name).double()
    images, permutation = random_batch()["images"], draws_for(objective)["permutation"]
    layout = objective.layout(4)
    x = objective.model.embed(images, permutation, layout)
    for block in objective.model.blocks:
        x = block(x, layout, None, objective.attention, False)
    full = objective.model.norm(layout.predicted(x))
    torch.testing.assert_close(objective.predictions(images, permutation), full)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_prediction_depends_on_earlier_targets_only(name: str) -> None:
    """Changing the pixels of target k alters the predictions of targets after k, for MIM of none."""
    objective = make_task(name).double()
    images, permutation = random_batch(images=1)["images"], draws_for(objective, 1)["permutation"]
    before = objective.predictions(images, permutation)
    targets = TINY.tokens - 4
    for k in range(targets):
        patch = int(permutation[0, 4 + k]) - 1
        row, column = divmod(patch, TINY.grid)
        changed = images.clone()
        changed[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] ^= 255
        moved = (objective.predictions(changed, permutation) - before).abs().amax(dim=1) > 1e-12
        assert moved.tolist() == [i > k and name != "mim" for i in range(targets)]


def test_mapet_knows_the_positions_still_to_come_and_pim_does_not() -> None:
    """MaPeT's first prediction depends on the position embeddings of all later targets, PIM's on none of them."""
    first, second = (make_task(name).double() for name in ("mapet", "pim"))
    images, permutation = random_batch(images=1)["images"], draws_for(first, 1)["permutation"]
    for objective, has_gradient in ((first, True), (second, False)):
        objective.zero_grad()
        objective.predictions(images, permutation).view(1, -1, 32)[0, 0, 0].backward()
        later = objective.model.pos_embed.grad[0, permutation[0, 5:]].abs().amax(dim=1)
        assert ((later > 0) == has_gradient).all()


def test_drop_path_is_shared_by_the_streams_and_drops_whole_images() -> None:
    objective = make_task("mapet").double()
    images, permutation = random_batch()["images"], draws_for(objective)["permutation"]
    keep = torch.ones(4, 3, 2, dtype=torch.float64)
    keep[2] = 0  # every branch of image 2 dropped: its prediction is the embedding, normalised
    features = objective.predictions(images, permutation, keep).view(4, -1, 32)
    start = objective.model.embed(images, permutation, objective.layout(4))
    expected = objective.model.norm(objective.layout(4).predicted(start)).view(4, -1, 32)
    torch.testing.assert_close(features[2], expected[2])
    without = objective.predictions(images, permutation).view(4, -1, 32)
    torch.testing.assert_close(features[[0, 1, 3]], without[[0, 1, 3]])


def test_draws_are_permutations_that_keep_the_class_token_first() -> None:
    task = make_task("mapet", model=ModelConfig(**{**to_dict(TINY), "drop_path": 0.5}), color_jitter=0.4)
    draws = draws_for(task, 2000)
    permutation, keep = draws["permutation"], draws["keep"]
    assert (permutation[:, 0] == 0).all()
    assert torch.equal(permutation.sort(dim=1).values, torch.arange(10).expand(2000, -1))
    second = permutation[:, 1].bincount(minlength=10)[1:] / 2000
    assert (second - 1 / 9).abs().max() < 0.03  # uniform
    assert (keep[:, 0] == 1).all() and set(keep[:, 2].unique().tolist()) == {0.0, 2.0}
    assert keep[:, 2].mean().item() == pytest.approx(1.0, abs=0.05)
    assert all(len(value) == 2000 for value in draws.values()), "images first"
    assert draws_for(task.eval()).keys() == {"permutation"}, "an evaluation drops nothing and changes no colour"


def test_uint8_and_float_images_agree() -> None:
    task, batch = make_task("mapet"), random_batch()
    draws = draws_for(task)
    scaled = batch | {"images": batch["images"] / 255}
    torch.testing.assert_close(task(batch, draws)["loss"], task(scaled, draws)["loss"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_whole_model_compiles_without_graph_break(name: str) -> None:
    task, batch = make_task(name), random_batch()
    draws = draws_for(task)
    eager = task(batch, draws)["loss"]
    torch._dynamo.reset()
    traced = torch.compile(task, fullgraph=True, backend="aot_eager")(batch, draws)["loss"]
    torch.testing.assert_close(eager, traced)
    traced.backward()


def test_state_dict_loads_official_names_and_says_what_does_not_fit() -> None:
    source, target = MaskedTokenViT(TINY), MaskedTokenViT(TINY)
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    load_official(target, state)
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    state["module.extra"] = torch.zeros(1)
    del state["module.norm.bias"]
    state["module.pos_embed"] = torch.zeros(1, 5, 32)
    with pytest.raises(
        CheckpointError, match=r"missing \['norm.bias'\], unexpected \['extra'\].*pos_embed: \(1, 5, 32\)"
    ):
        load_official(target, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_loss_equals_cross_entropy(monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * 50 * 7)  # 7 rows at a time
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(33, 16, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(50, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 50, (33,), generator=generator)
    logits = F.linear(features, weight, bias)
    expected = F.cross_entropy(logits, targets)
    actual = token_cross_entropy(features, weight, bias, targets)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(3 * actual, (features, weight, bias)),
        torch.autograd.grad(3 * expected, (features, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(token_cross_entropy(features, weight, bias, targets), expected)
    accuracy = token_accuracy(features, weight, bias, targets)
    assert accuracy.item() == pytest.approx((logits.argmax(1) == targets).float().mean().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_under_autocast_adds_up_in_fp32(monkeypatch, dtype: torch.dtype) -> None:
    """Products in 16 bits, all else in fp32: without a loss scale, gradients that fp16 cannot hold come out right."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * 50 * 1000)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8000, 16, generator=generator)
    weight, bias = 0.02 * torch.randn(50, 16, generator=generator), torch.zeros(50)
    targets = torch.randint(0, 50, (8000,), generator=generator)

    def run(dtype: torch.dtype, loss_of: Callable) -> tuple[torch.Tensor, ...]:
        given = [x.to(dtype).requires_grad_() for x in (features, weight, bias)]
        loss = loss_of(*given, targets)
        return loss, *torch.autograd.grad(loss, given)

    exact = run(torch.float64, lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t))
    with torch.autocast("cpu", dtype), ProductDtypes() as products:
        ours = run(torch.float32, token_cross_entropy)
    assert products.seen == {dtype} and all(x.dtype == torch.float32 for x in ours)
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=2e-5)
    unit = torch.finfo(dtype).eps
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert ((a - b).norm() / b.norm()).item() < 2 * unit
    assert ours[1].abs().max() < torch.finfo(torch.float16).tiny, "so that fp16 would round them coarsely, or to 0"


class ProductDtypes(TorchDispatchMode):
    """Dtypes of the operands of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"image_size": 225}, "image_size 225 is not divisible by model.patch_size 16"),
        ({"heads": 5}, "heads 5 does not divide model.width 192"),
        ({"vocabulary": 70000}, "at most 65536"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_model_configuration_errors(values: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ModelConfig(**values)


@pytest.mark.parametrize("cut", [0, 197, -3])
def test_cut_must_leave_something_to_predict_and_something_to_see(cut: int) -> None:
    with pytest.raises(ConfigError, match=rf"cut must be in \[1, 196\] with 197 tokens an image, got {cut}"):
        RunConfig(objective=options("mapet", cut=cut))


@pytest.mark.parametrize(("class_token", "masked", "most"), [(True, 197, 196), (False, 196, 195), (True, 0, None)])
def test_mim_must_leave_something_to_see(class_token: bool, masked: int, most: int | None) -> None:
    text = rf"must be in \[1, {most}\] with 196 patches an image, got {masked}" if most else "must be at least 1, got 0"
    with pytest.raises(ConfigError, match=rf"objective.masked {text}"):
        RunConfig(model=ModelConfig(class_token=class_token), objective=options("mim", masked=masked))


def test_mim_masks_75_patches_unless_told_otherwise() -> None:
    """The default of the official command line, whatever the cut of the other methods is."""
    base = RunConfig(objective=options("mapet", cut=60))
    mim = change(base, {"objective.name": "mim"})
    assert mim.objective == options("mim") and mim.objective.masked == 75
    assert change(base, {"objective.name": "pim"}).objective == options("pim", cut=60)
    assert change(mim, {"objective.name": "mapet"}).objective.cut == 50
    assert from_dict(to_dict(mim)) == mim


def test_model_configuration_round_trip() -> None:
    assert conform(ModelConfig, to_dict(TINY), "model") == TINY
    with pytest.raises(ValueError, match="model has an unknown entry 'widht'"):
        conform(ModelConfig, {"widht": 3}, "model")
    with pytest.raises(ConfigError, match="presets are tiny, small, base"):
        ModelConfig.preset("huge")
