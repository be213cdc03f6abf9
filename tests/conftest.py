"""Options and hooks of all tests; what they do is told where they are."""

import os

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
