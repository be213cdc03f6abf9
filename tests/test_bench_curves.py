"""`python -m bench curves`: it runs at tiny size, and tells curves that agree from those that do not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import matplotlib.image as mpimg
import numpy as np
import pytest

from bench import curves
from bench.curves import OTHER_SEED, CurvesBenchmark, compare, draw, smoothed

STEPS = np.arange(60)
REFERENCE = 4.0 * np.exp(-STEPS / 100)


def of(**factors: float) -> dict[str, list[float]]:
    """Curves that are so many times the reference's in the second half of the run."""
    named = {"fp32": 1.0, "bf16": 1.001, "fp16": 1.001, OTHER_SEED: 1.02, **factors}
    return {name: (REFERENCE * np.where(STEPS < 30, 1.0, factor)).tolist() for name, factor in named.items()}


def test_a_tiny_run_leaves_a_record_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "PART_OF_SPREAD", 1e9)  # the outcome of so few steps means nothing
    CurvesBenchmark(steps=12, quick=True, output=tmp_path).run()
    (path,) = tmp_path.glob("curves_demo_cpu_*.json")
    record = json.loads(path.read_text())
    lengths = {name: len(curve) for name, curve in record["curves"].items() if name != "fp8"}
    assert lengths == {"fp32": 12, "bf16": 12, "fp16": 12, OTHER_SEED: 12}
    assert ("fp8" in record["curves"]) is (importlib.util.find_spec("torchao") is not None)
    fp32, bf16, fp16 = (record["curves"][name] for name in ("fp32", "bf16", "fp16"))
    assert fp32 != bf16 and fp32 != fp16 and bf16 != fp16, "each computed in its own type"
    assert fp32[0] == pytest.approx(bf16[0], rel=1e-3) == pytest.approx(fp16[0], rel=1e-3), "from the same weights"
    assert abs(record["curves"][OTHER_SEED][0] / fp32[0] - 1) > 1e-3
    assert record["last_loss_scale"]["fp16"] > 1 == record["last_loss_scale"]["bf16"]
    assert mpimg.imread(path.with_suffix(".png"))[..., :3].std() > 0.05


def test_curves_agree_within_a_tenth_of_what_a_seed_makes() -> None:
    verdict = compare(of())
    assert verdict["agree"] and verdict["tolerance"] == pytest.approx(0.002)
    assert verdict["largest_difference"] == pytest.approx({"bf16": 0.001, "fp16": 0.001, OTHER_SEED: 0.02})
    assert verdict["within_tolerance"] == {"bf16": True, "fp16": True}
    assert not compare(of(fp16=1.0022))["agree"] and not compare(of(bf16=0.9978))["agree"]


def test_fp8_is_held_against_the_tolerance_but_may_miss_it() -> None:
    verdict = compare(of(fp8=1.01))
    assert verdict["within_tolerance"] == {"bf16": True, "fp16": True, "fp8": False} and verdict["agree"]


def test_a_loss_that_is_not_finite_never_agrees() -> None:
    broken = of()
    broken["fp16"][40] = None
    assert compare(broken)["largest_difference"]["fp16"] == float("inf") and not compare(broken)["agree"]


def test_disagreement_is_exit_code_1_with_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = compare(of(bf16=1.5))
    monkeypatch.setattr(curves, "run", lambda options: {**verdict, "curves": of(bf16=1.5)})
    with pytest.raises(SystemExit, match="disagree"):
        CurvesBenchmark(output=tmp_path).run()
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["agree"] is False


def test_one_step_of_noise_is_smoothed_away() -> None:
    curve = np.ones(30)
    curve[15] = 2.0
    assert smoothed(curve.tolist()).max() == pytest.approx(1.1)


def test_too_few_steps_and_other_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--steps must be at least 10"):
        curves.run(CurvesBenchmark(steps=9))
    other = tmp_path / "other.json"
    other.write_text('{"suite": "step"}')
    with pytest.raises(ValueError, match="is no record of `python -m bench curves`"):
        draw(other)
