"""Methods and tokenizers by name: a registry holds module:class, and imports what is asked for alone."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mapet.errors import ConfigError


def registered(registry: Mapping[str, str], name: str, what: str) -> Any:
    """The class of a name. ConfigError, with those there are, for an unknown one; `what` a name is of."""
    if name not in registry:
        raise ConfigError(f"unknown {what} {name!r}; choose one of {', '.join(registry)}")
    module, _, kind = registry[name].partition(":")
    return getattr(importlib.import_module(module), kind)
