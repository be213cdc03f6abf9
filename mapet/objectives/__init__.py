"""Pre-training objectives, one file each, behind one interface."""

from __future__ import annotations

from mapet.config import ModelConfig, ObjectiveConfig, Recompute, SpeedConfig
from mapet.errors import ConfigError
from mapet.objectives.mapet import MaPeT
from mapet.objectives.mim import MIM
from mapet.objectives.pim import PIM
from mapet.objectives.two_stream import Objective, Plan

OBJECTIVES: dict[str, type[Objective]] = {"mapet": MaPeT, "pim": PIM, "mim": MIM}


def build_objective(
    objective: ObjectiveConfig,
    model: ModelConfig,
    *,
    backend: str = "auto",
    recompute: Recompute = "none",
    speed: SpeedConfig | None = None,
) -> Objective:
    """The objective of a configuration, with a freshly initialised model (global torch RNG)."""
    if objective.name not in OBJECTIVES:
        raise ConfigError(f"unknown objective {objective.name!r}; objectives are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective.name](model, objective.cut, backend=backend, recompute=recompute, speed=speed)


__all__ = ["MIM", "OBJECTIVES", "PIM", "MaPeT", "Objective", "Plan", "build_objective"]
