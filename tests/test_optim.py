"""Weight-decay groups, the update that a tensor calls off, clipping, and the weight average."""

import pytest
import torch
from tasks import make_task

from mapet.config import ModelConfig, OptimConfig
from mapet.model.vit import MaskedTokenViT
from mapet.task import is_decayed
from mapet.training.optim import WeightAverage, clip_gradients, gated_step, make_optimizer


@pytest.fixture
def model() -> MaskedTokenViT:
    torch.manual_seed(0)
    return MaskedTokenViT(ModelConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, vocabulary=32))


def test_decay_groups_are_the_official_ones(model):
    decayed = {name for name, p in model.named_parameters() if is_decayed(name, p)}
    block = {"attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    expected = {f"blocks.{i}.{name}.weight" for i in range(2) for name in block}
    assert decayed == expected | {"mask_positional_token", "patch_embed.proj.weight", "decoder.weight"}


def test_every_parameter_is_in_one_group_with_its_decay():
    task = make_task("mapet")
    optimizer = make_optimizer(task.parameter_groups(OptimConfig(weight_decay=0.05)), OptimConfig())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(task.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    assert all(decays[id(p)] == (0.05 if is_decayed(name, p) else 0.0) for name, p in task.named_parameters())


def test_a_gated_step_changes_nothing_and_an_open_one_is_adamw():
    weights = torch.nn.Parameter(torch.linspace(-1, 1, 5)[None].repeat(3, 1))
    twin = torch.nn.Parameter(weights.detach().clone())
    config = OptimConfig(lr=0.01)
    optimizer = make_optimizer([{"params": [weights], "weight_decay": 0.05}], config)
    reference = torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.999), weight_decay=0.05, foreach=False)
    for step, skip in enumerate([0.0, 1.0, 0.0, 1.0, 0.0]):
        before = weights.detach().clone()
        gradient = torch.full_like(weights, float("nan")) if skip else torch.sin(weights.detach() * (step + 1))
        weights.grad = gradient
        gated_step(optimizer, torch.tensor(skip))
        if skip:
            assert torch.equal(weights, before)
        else:
            twin.grad = gradient.clone()
            reference.step()
    torch.testing.assert_close(weights, twin)
    assert optimizer.state[weights]["step"] == 3


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_clipping_bounds_the_global_norm(limit, expected):
    parameters = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2, 2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    assert clip_gradients(iter(parameters), limit) == pytest.approx(5.0)
    after = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert after.item() == pytest.approx(expected, rel=1e-5)


def test_the_average_follows_its_formula_and_stands_still_when_skipped(model):
    average = WeightAverage(model, decay=0.9)
    start = model.norm.bias.detach().clone()
    with torch.no_grad():
        model.norm.bias += 1.0
    average.update(model, torch.tensor(0.0))
    torch.testing.assert_close(average.weights["norm.bias"], start + 0.1)
    average.update(model, torch.tensor(1.0))
    torch.testing.assert_close(average.weights["norm.bias"], start + 0.1)
    assert set(average.weights) == set(dict(model.named_parameters()))
