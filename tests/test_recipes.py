"""The recipes against Table 8 of the paper."""

from __future__ import annotations

import pytest

from mapet.errors import ConfigError
from mapet.recipes import RECIPES, recipe

SIZES = {
    "vit_tiny_kclip": (192, 768, 3, 50, ("16 V100", "75.5", "62.5")),
    "vit_small_kclip": (384, 1536, 6, 50, ("32 V100", "82.1", "71.6")),
    "vit_base_kclip": (768, 3072, 12, 60, ("64 V100", "83.6", "73.5")),
}
"""Hidden size, hidden size of the MLP, heads, cut; and what the docstring must say."""


def test_there_are_three():
    assert set(RECIPES) == set(SIZES)
    with pytest.raises(ConfigError, match=r"vit_huge.*vit_tiny_kclip"):
        recipe("vit_huge")


@pytest.mark.parametrize("name", SIZES)
def test_the_numbers_are_those_of_table_8(name):
    config, (width, hidden, heads, cut, _) = recipe(name), SIZES[name]
    model, optim = config.model, config.optim
    assert (model.width, model.width * model.mlp_ratio, model.heads, model.head_size) == (width, hidden, heads, 64)
    assert (model.depth, model.layer_scale, model.patch_size, model.image_size) == (12, 0.1, 16, 224)
    assert (model.drop_path, model.class_token, model.vocabulary) == (0.1, True, 8192)
    assert (config.objective.name, config.objective.cut) == ("mapet", cut)
    assert (optim.epochs, optim.global_batch, optim.warmup_epochs, optim.cooldown_epochs) == (300, 2048, 10, 0)
    assert (optim.lr, optim.min_lr, optim.warmup_lr) == (1.5e-3, 1e-5, 1e-6)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip) == (0.9, 0.999, 1e-8, 0.05, 3.0)
    assert (config.data.color_jitter, config.train.ema_decay, config.train.precision) == (0.4, 0.0, "fp16")


@pytest.mark.parametrize("name", SIZES)
def test_the_docstring_states_command_cost_and_result(name):
    text = RECIPES[name].__doc__
    cache = recipe(name).data.cache
    said = (
        "torchrun",
        f"--recipe {name}",
        "mapet tokenize --images imagenet/train --tokenizer kclip",
        f"--output {cache}",
    )
    for part in (*said, *SIZES[name][4]):
        assert part in text
