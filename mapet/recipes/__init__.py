"""The paper's runs by name. A recipe is a function without arguments that returns a RunConfig; its docstring has the
commands, the cost and the paper's numbers. `mapet pretrain --recipe NAME --help` shows it, with the recipe's values as
defaults."""

from collections.abc import Callable

from mapet.config import RunConfig
from mapet.errors import ConfigError
from mapet.recipes import pretrain

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (pretrain.vit_tiny_kclip, pretrain.vit_small_kclip, pretrain.vit_base_kclip)
}


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe; ConfigError for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name}: there is no such recipe; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
