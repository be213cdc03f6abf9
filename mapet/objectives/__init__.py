"""Pre-training methods by name. A method is one file, with its options and its Task, and one line here.

Nothing here imports torch; a method's file does, and is imported when the method is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mapet.registry import registered

if TYPE_CHECKING:
    from mapet.config import ObjectiveConfig, RunConfig
    from mapet.task import Task

OBJECTIVES: dict[str, str] = {
    "mapet": "mapet.objectives.mapet:MaPeT",
    "pim": "mapet.objectives.pim:PIM",
    "mim": "mapet.objectives.mim:MIM",
}
"""The Task of each method, as module:class."""


def objective(name: str) -> type[Task]:
    """The Task of a method. ConfigError for an unknown name."""
    return registered(OBJECTIVES, name, "objective")


def options(name: str, **values: Any) -> ObjectiveConfig:
    """Options of a method: its defaults, and the values given. Errors as `objective`, and those of its own checks."""
    return objective(name).Options(**values)


def build_task(config: RunConfig) -> Task:
    """The task of a run, with freshly initialised weights (global torch RNG)."""
    return objective(config.objective.name)(config)
