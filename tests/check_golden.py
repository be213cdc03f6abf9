"""Compare MaPeT's loss, logits and gradients with recorded ones of the official code.

    python tests/check_golden.py tests/data/mapet_official_forward_backward.safetensors

A file holds, in float64: `state.*` (weights), `image`, `tokens` (visual tokens, raster order), `permutation` (token
indices by rank, the class token first), `target_positions`, `logits` (targets in image order), `loss` and `grad.*`;
its metadata holds the configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass

import torch
from safetensors import safe_open

from mapet.config import ModelConfig, RunConfig, TrainConfig
from mapet.model.vit import load_official
from mapet.objectives import build_task, options
from mapet.objectives.loss import token_cross_entropy

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences from the recorded values."""

    loss: float
    logits: float
    gradients: dict[str, float]

    @property
    def largest(self) -> float:
        return max(self.loss, self.logits, *self.gradients.values())


def compare(path: str, *, dtype: torch.dtype = torch.float64, backend: str = "auto", device: str = "cpu") -> Comparison:
    """Run the recorded case in `dtype` and compare."""
    with safe_open(path, "pt", device=device) as file:
        recorded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        config = json.loads(file.metadata()["config"])
    state = {name.removeprefix("state."): value for name, value in recorded.items() if name.startswith("state.")}
    model_config = ModelConfig(
        image_size=config["img_size"], patch_size=config["patch_size"], width=config["embed_dim"],
        depth=config["depth"], heads=config["num_heads"], mlp_ratio=config["mlp_ratio"],
        class_token=config["class_token"], layer_scale=config["layer_scale"], drop_path=0.0,
        vocabulary=config["num_tokens"], norm_eps=config["norm_eps"],
    )  # fmt: skip
    run = RunConfig(model_config, options("mapet", cut=config["cut"]), train=TrainConfig(backend=backend))
    objective = build_task(run).to(device, dtype)
    load_official(objective.model, {name: value.to(dtype) for name, value in state.items()})

    permutation = recorded["permutation"]
    features = objective.predictions(recorded["image"].to(dtype), permutation, normalise=False)
    logits = objective.model.decoder(features.detach())  # (B * T, V), permuted order
    head, tokens = objective.model.decoder, objective.targets(recorded["tokens"], permutation)
    loss = token_cross_entropy(features, head.weight, head.bias, tokens)
    loss.backward()

    batch, targets = recorded["target_positions"].shape
    image_order = permutation[:, objective.cut :].argsort(dim=1).unsqueeze(-1)
    logits = logits.detach().view(batch, targets, -1)
    logits = logits.gather(1, image_order.expand_as(logits))
    gradients = {
        name: float((parameter.grad - recorded[f"grad.{name}"]).abs().max())
        for name, parameter in objective.model.named_parameters()
    }
    return Comparison(
        loss=float((loss.detach() - recorded["loss"]).abs().max()),
        logits=float((logits - recorded["logits"]).abs().max()),
        gradients=gradients,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--backend", default="auto", help="attention backend (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="default: %(default)s")
    options = parser.parse_args()
    failed = False
    for path in options.files:
        result = compare(path, backend=options.backend)
        worst = max(result.gradients, key=result.gradients.get)
        print(f"{path}\n  loss      {result.loss:.2e}\n  logits    {result.logits:.2e}")
        print(f"  gradients {result.gradients[worst]:.2e} ({worst}; {len(result.gradients)} parameters)")
        if not result.largest <= options.tolerance:
            failed = True
            print(f"  FAILED: a difference is over {options.tolerance:g}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
