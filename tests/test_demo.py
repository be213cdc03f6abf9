"""The demo with tiny sizes, end to end: what it leaves, what it keeps, and what it refuses."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mapet.cli import main
from mapet.data.cache import TokenCache
from mapet.data.images import open_source
from mapet.data.subset import Subset
from mapet.demo import run as demo_run
from mapet.demo import seed as demo_seed
from mapet.demo.folder import DemoFolder, Timings, read_json
from mapet.demo.pictures import striking_entries
from mapet.demo.recipe import FULL, QUICK
from mapet.demo.report import Spread
from mapet.demo.run import run_demo
from mapet.demo.seed import initial_weights
from mapet.distributed import World
from mapet.errors import ConfigError, DataError
from mapet.tokenizers import load_tokenizer
from mapet.training.learner import Learner
from mapet.training.schedule import plan_steps

PICTURES = ("loss.png", "who_sees_whom.png", "codebook_digits.png", "codebook_photos.png")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick demo of one seed that was then asked for two."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "draw_pictures", lambda *_: ())
        run_demo(folder, seeds=1, device="cpu", quick=True)
    run_demo(folder, seeds=2, device="cpu", quick=True)
    return folder


def test_everything_is_there(demo: Path) -> None:
    for name in PICTURES:
        with Image.open(demo / name) as picture:
            assert min(picture.size) > 500
            assert np.asarray(picture.convert("L")).std() > 10
    report = (demo / "report.md").read_text()
    assert all(f"]({name})" in report for name in PICTURES)
    for seed in (0, 1):
        assert len(list((demo / f"seed_{seed}" / "run" / "checkpoints").glob("step_*"))) == 1
        assert (demo / f"seed_{seed}" / "run" / "metrics.jsonl").is_file()


def test_the_report_has_the_numbers_of_the_scores(demo: Path) -> None:
    results = [DemoFolder(demo).load_result(seed) for seed in (0, 1)]
    report = (demo / "report.md").read_text()
    table = re.findall(
        r"^\| (.+?) \| (all|10 per class) \| (.+? ± .+?) \| (.+? ± .+?) \| (.+? ± .+?) \|$", report, re.M
    )
    assert len(table) == len(results[0].pretrained.scores) == 10
    for method, labels, *cells in table:
        for cell, kind in zip(cells, ("pretrained", "random_init", "raw_pixels"), strict=True):
            values = [getattr(result, kind).accuracy(method, labels) for result in results]
            assert cell == Spread.of(values).percent()
            assert 0 <= float(cell.split(" ± ")[0]) <= 100
    stages = dict(re.findall(r"^\| (.+) \| ([\d.]+) \|$", report, re.M))
    assert {"pre-train", "evaluate", "pictures"} < stages.keys()
    assert all(float(seconds) > 0 for stage, seconds in stages.items() if stage != "export")


def test_timm_loads_the_export(demo: Path) -> None:
    model = timm.create_model(f"local-dir:{demo / 'timm_model'}", pretrained=True)
    assert model(torch.zeros(2, 3, QUICK.model.image_size, QUICK.model.image_size)).shape == (2, QUICK.model.width)


def test_no_test_image_is_seen_before_the_scores_and_seeds_have_splits_of_their_own(demo: Path) -> None:
    tested = []
    for seed in (0, 1):
        place = demo / f"seed_{seed}"
        split, seen = read_json(place / "split.json"), TokenCache.open(place / "cache")
        assert seen.names == split["train"] and not set(seen.names) & set(split["test"])
        assert len(seen.names) + len(split["test"]) == QUICK.digits
        assert load_tokenizer(place / "tokenizer").report.images == len(seen)
        result = DemoFolder(demo).load_result(seed)
        for scores in (result.pretrained, result.random_init, result.raw_pixels):
            assert (scores.train_images, scores.test_images) == (len(seen), len(split["test"]))
        tested.append(split["test"])
    assert tested[0] != tested[1]


def test_a_second_run_keeps_what_is_done(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished seed was run again")

    monkeypatch.setattr(demo_seed, "pretrain", never)
    monkeypatch.setattr(demo_seed, "evaluate", never)
    before = table_of(demo)
    (demo / "report.md").unlink()
    (demo / "loss.png").unlink()
    run_demo(demo, seeds=2, device="cpu", quick=True)
    assert capsys.readouterr().out.count("is done already") == 2
    assert table_of(demo) == before
    assert (demo / "loss.png").is_file()


def table_of(demo: Path) -> list[str]:
    return [line for line in (demo / "report.md").read_text().splitlines() if "±" in line]


def test_results_of_other_settings_are_not_mixed(demo: Path) -> None:
    before = sorted(demo.rglob("*"))
    with pytest.raises(ConfigError, match=r"other settings \(.*recipe.model.depth: 2 instead of 4.*not mixed"):
        run_demo(demo, device="cpu")
    assert sorted(demo.rglob("*")) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no folder of a demo"):
        run_demo(tmp_path, device="cpu", quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seeds must be at least 1, got 0"):
        run_demo(tmp_path, seeds=0)


def test_ctrl_c_stops_with_a_checkpoint_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["demo", "--output", str(tmp_path / "run"), "--seeds", "1", "--device", "cpu", "--quick"]
    monkeypatch.setattr(demo_run, "draw_pictures", lambda *_: ())
    step = Learner.step

    def step_and_ctrl_c(learner: Learner, number: int, *args: object, **options: object) -> None:
        step(learner, number, *args, **options)
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step_and_ctrl_c)
        assert main(command) == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err
    folder = DemoFolder(tmp_path / "run")
    assert folder.load_result(0) is None
    first = Timings(folder.root).seconds["pre-train"]
    assert main(command) == 0
    assert "going on from step 2" in capsys.readouterr().out
    assert folder.load_result(0) is not None
    assert Timings(folder.root).seconds["pre-train"] > first


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    folder = DemoFolder(tmp_path)
    (tmp_path / "seed_0").mkdir()
    (tmp_path / "seed_0" / "scores.json").write_text('{"seed": 0}')
    with pytest.raises(DataError, match=r"cannot read .*scores.json: its content lacks .*; delete it"):
        folder.load_result(0)


def test_random_initialisation_is_where_pretraining_starts(demo: Path) -> None:
    config = QUICK.run(1, demo / "seed_1" / "cache", demo / "unused", "cpu")
    steps = plan_steps(config, 191, 1)
    start = Learner(config, World(torch.device("cpu")), steps).model.state_dict()
    initial = initial_weights(config)
    assert start.keys() == initial.keys()
    assert all(torch.equal(start[name], initial[name]) for name in start)


def test_the_full_recipe_is_a_valid_run(tmp_path: Path) -> None:
    config = FULL.run(0, tmp_path, tmp_path, "cpu")
    assert 1 <= config.objective.cut < config.model.tokens
    assert plan_steps(config, 1437, 1).last > 1000


def test_striking_entries_are_common_and_differ() -> None:
    flat, edge, rare = np.zeros(4), np.array([1.0, 1, 0, 0]), np.array([5.0, 0, 0, 5])
    codebook = torch.tensor(np.stack([flat, edge, edge + 0.01 * np.arange(4), edge[::-1], rare]))
    tokens = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [4, 4, 4, 4]])
    assert sorted(striking_entries(codebook, tokens, 2)) in ([1, 3], [2, 3])


def test_a_subset_is_a_source_of_its_own() -> None:
    digits = open_source("digits")
    few = Subset(digits, [5, 3])
    assert few.names == ["digit_0005", "digit_0003"]
    assert few.labels.tolist() == digits.labels[[5, 3]].tolist()
    assert few.load(1).tobytes() == digits.load(3).tobytes()
    assert few.fingerprint() == Subset(digits, [5, 3]).fingerprint()
    assert few.fingerprint() not in (Subset(digits, [3, 5]).fingerprint(), digits.fingerprint())
    with pytest.raises(IndexError, match="image ids 0 to 1797, the source holds 0 to 1796"):
        Subset(digits, [0, 1797])
