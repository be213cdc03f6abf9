"""`mapet demo`."""

from mapet.commands.options import Demo
from mapet.demo.run import run_demo


def run(options: Demo) -> int:
    """Run the demo."""
    run_demo(**vars(options))
    return 0
