"""The paper's pre-training runs by name. A recipe is one file with a docstring (command, cost, the paper's number) and
a function `config() -> RunConfig`."""

from collections.abc import Callable

from mapet.config import RunConfig
from mapet.errors import ConfigError
from mapet.recipes import vit_base_kclip, vit_small_kclip, vit_tiny_kclip

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "vit_tiny_kclip": vit_tiny_kclip.config,
    "vit_small_kclip": vit_small_kclip.config,
    "vit_base_kclip": vit_base_kclip.config,
}


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe; ConfigError for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name}: there is no such recipe; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
