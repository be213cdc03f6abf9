"""Options and hooks of all tests; what they do is told where they are."""

pytest_plugins = ("gpu_session",)
