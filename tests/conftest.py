"""Options and hooks of all tests; what they do is told where they are."""

import os
from pathlib import Path

import pytest

pytest_plugins = ("gpu_session", *("shallow_stack",) * (os.environ.get("TRITON_INTERPRET") == "1"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that at the end no process waits for another's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def mapet(capsys: pytest.CaptureFixture):
    """The command line, in this process."""
    from command_line import Mapet  # which needs packages that a GPU machine lacks

    return Mapet(capsys)


@pytest.fixture
def failing(mapet, monkeypatch: pytest.MonkeyPatch):
    """What `main` makes of an exception."""
    from mapet.commands import tokenize

    def run_with(error: BaseException):
        def run(options):
            raise error

        monkeypatch.setattr(tokenize, "run", run)
        return mapet("tokenize", "--images", "x")

    return run_with


# What several files of tests begin with; imported within, as a GPU machine lacks packages.
@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small labelled pictures."""
    from command_line import pictures

    return pictures(tmp_path_factory.mktemp("images") / "labelled")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the tiny run."""
    from tiny_run import make_cache

    return make_cache(tmp_path_factory.mktemp("tiny") / "cache")


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    from tiny_run import make_config

    from mapet.training.loop import pretrain

    output = tmp_path_factory.mktemp("run") / "run"
    pretrain(make_config(tiny, output, **{"train.max_steps": 2}))
    return output
