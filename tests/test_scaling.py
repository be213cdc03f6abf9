"""The arithmetic of several GPUs, its page, and units as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapet.config import ModelConfig
from mapet.errors import ConfigError
from mapet.planning.scaling import Cluster, scale, scaling_rows
from mapet.planning.scaling_page import page
from mapet.units import duration, gib, metric, parse_bytes, parse_count, parse_duration, parse_link

BASE = ModelConfig.preset("base")
PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


def test_the_page_is_what_the_code_prints() -> None:
    assert PAGE.read_text() == page()
    assert "computed, not measured" in page()
    for gpus in ("8 GPUs", "64 GPUs", "1,024 GPUs"):
        assert page().count(gpus) >= 2, "for ImageNet-1k and for a billion images"


def test_scaling_follows_the_formulas() -> None:
    result = scale(BASE, Cluster(64, 50e9, 2048, 1_281_167, rate=500.0))
    assert result.gradient_bytes == 4 * 92_117_504 and result.share == 32
    assert result.sent_bytes == pytest.approx(2 * 63 / 64 * result.gradient_bytes)
    assert result.reduce_seconds == pytest.approx(result.sent_bytes / 50e9)
    assert result.image_bytes == 3 * 224**2 + 2 * 196 and result.storage_bytes == 1_281_167 * result.image_bytes
    assert result.steps == 625 and result.compute_seconds == pytest.approx(32 / 500)
    assert result.step_seconds == pytest.approx((0.064, 0.064 + result.reduce_seconds))
    assert result.epoch_seconds == pytest.approx(tuple(625 * s for s in result.step_seconds))
    assert result.read_bytes == pytest.approx(2048 * result.image_bytes / 0.064)


def test_one_gpu_sends_nothing_and_a_slow_link_bounds_the_step() -> None:
    assert scale(BASE, Cluster(1, 1e9, 64, 640)).reduce_seconds == 0
    slow = scale(BASE, Cluster(8, 1e9, 64, 640, rate=1e6))
    assert slow.step_seconds[0] == slow.reduce_seconds > slow.compute_seconds


def test_an_unknown_rate_is_said_to_be_unknown() -> None:
    rows = dict(scaling_rows(BASE, Cluster(8, 50e9, 2048, 10**6)))
    assert rows["computing a step"].startswith("unknown") and not any("epoch, " in name for name in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 3}, "2048 cannot be shared evenly by 3"),
        ({"images": 10}, "10 images are fewer"),
        ({"rate": 0.0}, "positive"),
    ],
)
def test_clusters_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cluster(**{"gpus": 8, "link": 1e9, "global_batch": 2048, "images": 10**6} | changes)


def test_units() -> None:
    assert (
        parse_bytes("16GB") == 16 * 10**9 and parse_bytes("16 GiB") == 16 * 2**30 and parse_bytes("1.5gb") == 15 * 10**8
    )
    assert parse_link("400Gb") == 50e9 == parse_link("50GB/s") and parse_link("100Gbit/s") == 12.5e9
    assert (parse_count("1.28M"), parse_count("1B"), parse_count("7")) == (1_280_000, 10**9, 7)
    assert (parse_duration("24h"), parse_duration("90min"), parse_duration("2d"), parse_duration("5s")) == (
        86400, 5400, 172800, 5,
    )  # fmt: skip
    assert (gib(3 * 2**29), gib(2**20), metric(736e6, "B"), metric(3, "B")) == ("1.50 GiB", "1 MiB", "736 MB", "3 B")
    assert (duration(0.0147), duration(90), duration(2e5)) == ("14.7 ms", "1.5 min", "2.31 days")


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse, text)
        for parse in (parse_bytes, parse_link, parse_count, parse_duration)
        for text in ("", "x", "0GB", "-1")
    ]
    + [
        (parse_bytes, "16"),
        (parse_bytes, "16Gb2"),
        (parse_link, "400"),
        (parse_duration, "24"),
        (parse_duration, "1y"),
    ],
)
def test_units_that_are_none_are_refused_with_what_is_allowed(parse, text: str) -> None:
    with pytest.raises(ConfigError, match="such as") as error:
        parse(text)
    assert repr(text) in str(error.value)
