"""The suite curves runs at tiny size, and tells curves that agree from those that do not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bench_suites import RULES

from bench import curves, report_plots, suites
from bench.contest import measure
from bench.curves import OTHER_SEED, largest_difference, smoothed
from bench.options import Options
from bench.report_data import read
from mapet.demo.recipe import QUICK

CPU = torch.device("cpu")
REFERENCE = 4.0 * np.exp(-np.arange(60) / 100)


def later(factor: float) -> list[float]:
    """The reference, from its middle on so many times as much."""
    return (REFERENCE * np.where(np.arange(60) < 30, 1.0, factor)).tolist()


def test_a_tiny_run_is_a_record_with_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "PART_OF_SPREAD", 1e9)  # the outcome of so few steps means nothing
    monkeypatch.setattr(curves, "STEPS", 12)
    monkeypatch.setattr(curves, "FULL", QUICK)
    (path,) = suites.run(Options(("curves",), device="cpu", output=tmp_path))
    (entry,) = read(path)
    losses = {way: row["losses"] for way, row in entry.timed.items() if way != "fp8"}
    assert {way: len(curve) for way, curve in losses.items()} == {"fp32": 12, "bf16": 12, "fp16": 12, OTHER_SEED: 12}
    assert ("fp8" in entry.timed) is (importlib.util.find_spec("torchao") is not None)
    fp32, bf16, fp16 = (losses[name] for name in ("fp32", "bf16", "fp16"))
    assert fp32 != bf16 and fp32 != fp16 and bf16 != fp16, "each computed in its own type"
    assert fp32[0] == pytest.approx(bf16[0], rel=1e-3) == pytest.approx(fp16[0], rel=1e-3), "from the same weights"
    assert abs(losses[OTHER_SEED][0] / fp32[0] - 1) > 1e-3
    report_plots.run(report_plots.Plot((path,)))
    assert path.with_name(f"{path.stem}_losses.png").stat().st_size > 5000


@pytest.mark.parametrize(("factor", "agrees"), [(1.0018, True), (1.0022, False), (0.9978, False)])
def test_curves_agree_within_a_tenth_of_what_a_seed_makes(
    factor: float, agrees: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disagreement is exit code 1, with a record."""
    made = {"fp32": later(1.0), "bf16": later(factor), "fp16": later(1.001), OTHER_SEED: later(1.02)}

    def train(config) -> None:
        config.mkdir(parents=True)
        lines = [json.dumps({"loss": loss}) for loss in made[config.name]]
        (config / "metrics.jsonl").write_text("\n".join(lines))

    class Config:
        def __init__(self, output: Path) -> None:
            self.train, self.output = self, output

    monkeypatch.setattr(curves, "demo_tokens", lambda *_: None)
    monkeypatch.setattr(curves, "run_config", lambda recipe, cache, output, way, device: Config(output))
    monkeypatch.setattr(curves, "pretrain", lambda config: train(config.output))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (contest,) = curves.contests(Options(), CPU)
    rows = measure(contest, RULES)["ways"]
    assert rows["bf16"]["status"] == ("timed" if agrees else "wrong") and rows["fp16"]["status"] == "timed"
    assert rows["fp16"]["from_fp32"] == pytest.approx(0.001) and rows["fp8"]["status"] == "unavailable"
    if not agrees:
        with pytest.raises(SystemExit, match="wrong results: bf16 of demo"):
            suites.run(Options(("curves",), device="cpu", output=tmp_path))
        assert len(list(tmp_path.glob("*.json"))) == 1


def test_one_step_of_noise_is_smoothed_away_and_a_missing_loss_is_not() -> None:
    curve = np.ones(30)
    curve[15] = 2.0
    assert smoothed(curve.tolist()).max() == pytest.approx(1.1)
    assert largest_difference([None, *curve[1:]], np.ones(30).tolist()) == float("inf")
    assert largest_difference(curve, np.ones(30)) == pytest.approx(0.1)
