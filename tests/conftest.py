"""Options and hooks of all tests; what they do is told where they are."""

import pytest

pytest_plugins = ("gpu_session",)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that at the end no process waits for another's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
