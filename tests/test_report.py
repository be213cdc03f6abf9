"""Pictures and the written report: the rule drawn, the numbers told, the words that follow from the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mapet.demo.folder import SeedResult
from mapet.demo.recipe import FULL
from mapet.demo.report import DemoRun, Spread, compare, render, tally, write_report
from mapet.errors import DataError
from mapet.evaluate.frozen import EvaluationResult, Score
from mapet.model.export import ExportReport
from mapet.report.loss_curve import draw_loss_curve, read_metrics, smooth
from mapet.report.markdown import table
from mapet.report.picture import Picture
from mapet.report.who_sees_whom import TOKENS, draw_who_sees_whom, image_order, panels
from mapet_kernels.visibility import two_stream_visibility


def colours(path):
    """Different colours of a PNG."""
    return len(np.unique(np.asarray(Image.open(path).convert("RGB"), np.int64) @ [65536, 256, 1]))


# who sees whom


def test_image_order_is_the_official_masks():
    # N = 6, c = 3, ranks of tokens 0..5; rows made by the official code. Keys: 6 content | mask tokens of 2, 3, 5.
    permutation = np.argsort([0, 2, 4, 5, 1, 3])
    content, query = (mask.numpy() for mask in two_stream_visibility(6, 3))
    keys, queries = image_order(permutation, 3)
    free, mask_row = "110010111", "110010111"
    wanted = [free, free, "111011010", "111111000", free, "110011110", mask_row, mask_row, mask_row]
    assert ["".join(map(str, row.astype(int))) for row in content[np.ix_(keys, keys)]] == wanted
    drawn = ["".join(map(str, row.astype(int))) for row in query[np.ix_(queries, keys)]]
    assert drawn == ["110011110", "111011010", "110010111"]


@pytest.mark.parametrize("cut", [1, 6, TOKENS - 1])
def test_panels_name_what_they_show(cut):
    permutation = np.concatenate([[0], 1 + np.random.default_rng(4).permutation(TOKENS - 1)])
    drawn = panels(permutation, cut)
    for panel in drawn:
        rows, keys = panel.visible.shape
        assert len(panel.row_names) == len(panel.row_groups) == len(panel.own) == rows
        assert len(panel.key_names) == len(panel.key_groups) == keys
        assert (panel.visible.sum(axis=1) == TOKENS).all(), "every row sees exactly N keys"
        # Content rows A and B see themselves, mask-token and query rows never see what they stand for.
        own = panel.visible[np.arange(rows), panel.own]
        np.testing.assert_array_equal(own, np.isin(panel.row_groups, ["A", "B"]))
    for query, letter in ((drawn[1], "z"), (drawn[3], "p")):
        assert all(query.key_names[k] == letter + name[1:] for k, name in zip(query.own, query.row_names, strict=True))
    assert [panel.key_names[:2] for panel in drawn[::2]] == [["z1", "z2"], ["cls", "p1"]]


def test_the_picture_is_drawn(tmp_path):
    path = draw_who_sees_whom(tmp_path / "new" / "who.png")
    assert Image.open(path).size == (2432, 1648) and colours(path) > 20


# loss curve


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_metrics_are_read_as_a_resumed_and_killed_run_leaves_them(tmp_path):
    path = write_lines(
        tmp_path / "metrics.jsonl",
        {"step": 10, "loss": 5.0, "accuracy": 0.1, "lr": 1e-3},
        {"step": 20, "loss": 4.0, "accuracy": 0.2, "lr": 1e-3},
        {"step": 20, "loss": 3.5, "lr": 5e-4},
        {"event": "checkpoint", "step": 20},
        {"step": 25, "loss": None, "accuracy": 0.3, "lr": 5e-4},
        '{"step": 30, "lo',
    )
    curve = read_metrics(path)
    np.testing.assert_array_equal(curve.step, [10, 20, 25])
    np.testing.assert_array_equal(curve.loss, [5.0, 3.5, np.nan])
    np.testing.assert_array_equal(curve.accuracy, [0.1, np.nan, 0.3])


def test_metrics_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file"):
        read_metrics(tmp_path / "none.jsonl")
    with pytest.warns(UserWarning, match=r"bad\.jsonl: 1 of 2 lines are damaged"):
        read_metrics(write_lines(tmp_path / "bad.jsonl", "{", {"step": 1, "loss": 2.0}))
    with pytest.raises(DataError, match="no line with a step and a loss"):
        read_metrics(write_lines(tmp_path / "empty.jsonl", {"event": "start"}))


def test_smoothing_is_what_it_says():
    np.testing.assert_allclose(smooth(np.array([1.0, 2, 6, 10]), 1), [1.5, 3, 6, 8])
    np.testing.assert_allclose(smooth(np.array([np.nan, 2.0, np.nan, np.nan]), 1), [2, 2, 2, np.nan])
    np.testing.assert_allclose(smooth(np.array([3.0, 5.0]), 0), [3, 5])


def test_the_curve_is_drawn_for_several_runs_without_accuracy_too(tmp_path):
    lines = [{"step": i, "loss": 6 - i / 50, "lr": 1e-3} for i in range(100)]
    curve = read_metrics(write_lines(tmp_path / "metrics.jsonl", *lines))
    path = draw_loss_curve(tmp_path / "loss.png", {"seed 0": curve, "seed 1": curve}, vocabulary=512, token_entropy=5.2)
    assert colours(path) > 20


# report


def make_result(accuracy, few=None):
    few = accuracy - 0.1 if few is None else few
    scores = (Score("kNN, k = 20", "all", accuracy), Score("kNN, k = 20", "10 per class", few))
    return EvaluationResult(scores, train_images=1437, test_images=360, classes=10)


def make_demo(folder=Path("runs/demo"), **changes):
    accuracies = {
        "pretrained": (0.90, 0.92, 0.94),
        "random_init": (0.50, 0.52, 0.54),
        "raw_pixels": (0.97, 0.97, 0.97),
    } | {kind: changes.pop(kind) for kind in ("pretrained", "random_init", "raw_pixels") if kind in changes}
    scores = [[make_result(accuracy) for accuracy in kind] for kind in accuracies.values()]
    values = {
        "command": "mapet demo",
        "device": "cpu",
        "recipe": FULL,
        "results": [SeedResult(seed, *of, token_entropy=4.3) for seed, of in enumerate(zip(*scores, strict=True))],
        "losses": (3.0, 3.1, 3.2),
        "timings": {"tokenize": 1.25, "pre-train": 100.0},
        "pictures": (),
        "export": ExportReport(folder / "model", "vit_base_patch16_224", 1234567, 3e-7, ()),
    }
    return DemoRun(**values | changes)


def test_spread_and_verdicts_follow_from_the_numbers():
    spread = Spread.of([0.90, 0.92, 0.94])
    assert spread.percent() == "92.0 ± 2.0"
    assert Spread.of([0.5]).percent() == "50.0"
    assert compare(spread, Spread(0.80, 0.01)) == "better"
    assert compare(spread, Spread(0.99, 0.01)) == "worse"
    # sqrt(0.02^2 + 0.02^2) = 0.0283
    assert compare(spread, Spread(0.893, 0.02)) == "within the spread"
    assert compare(spread, Spread(0.89, 0.02)) == "better"
    assert compare(Spread.of([0.9]), Spread.of([0.1])) == "one seed"
    assert compare(Spread(0.5, 0.0), Spread(0.5, 0.0)) == "within the spread"


def test_the_report_holds_every_number_and_an_honest_count():
    text = render(make_demo(), Path("runs/demo"))
    assert "| kNN, k = 20 | all | 92.0 ± 2.0 | 52.0 ± 2.0 | 97.0 ± 0.0 |" in text
    assert "| kNN, k = 20 | 10 per class | 82.0 ± 2.0 | 42.0 ± 2.0 | 87.0 ± 0.0 |" in text
    assert "| kNN, k = 20 | all | +40.0 (better) | -5.0 (worse) |" in text
    assert "Against raw pixels: of 2 comparisons, MaPeT is better in 0, worse in 2" in text
    assert "Against the same network at random initialisation: of 2 comparisons, MaPeT is better in 2" in text
    assert "| all | 101.2 |" in text and "| tokenize | 1.2 |" in text
    assert "chance: 10.0 %" in text and "- torch: 2." in text and "- device of this run: cpu" in text
    assert table(("a | b",), [("c",)]) == ["| a \\| b |", "| --- |", "| c |"]


def test_no_claim_is_made_within_the_spread_or_from_one_seed():
    level = (0.89, 0.92, 0.95)
    text = render(make_demo(random_init=level, raw_pixels=level), Path("."))
    assert text.count("(within the spread)") == 4
    assert text.count("better in 0, worse in 0, within the spread of the seeds in 2") == 2
    one = make_demo(pretrained=(0.9,), random_init=(0.5,), raw_pixels=(0.6,), losses=(3.0,))
    text = render(one, Path("."))
    assert text.count("one seed gives no spread, so no claim is made") == 2
    assert "(better)" not in text and "±" not in text
    assert tally(["one seed"]) == "one seed gives no spread, so no claim is made"


@pytest.mark.parametrize(
    "final, words",
    [
        ((3.0, 3.1), "the network uses what it sees"),
        ((4.2, 4.4), "no better than frequency alone"),
        ((5.2, 5.2), "needs more steps"),
        ((4.0,), "the network uses what it sees"),
    ],
)
def test_the_loss_is_told_beside_what_guessing_gives(final, words):
    text = render(make_demo(losses=final), Path("."))
    assert words in text and "4.85" in text and "4.30" in text


def test_the_report_is_written_beside_its_pictures(tmp_path):
    pictures = (Picture(tmp_path / "pictures" / "loss.png", "The loss."),)
    path = write_report(tmp_path / "report.md", make_demo(tmp_path, pictures=pictures))
    text = path.read_text()
    assert "![loss](pictures/loss.png)\n\nThe loss.\n" in text
    assert "1,234,567 parameters" in text and 'timm.create_model("local-dir:' in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.md"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not write the report"):
        write_report(tmp_path / "file" / "report.md", make_demo())
