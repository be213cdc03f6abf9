"""`mapet demo`."""

from mapet.commands.options import Demo
from mapet.demo import DemoOptions, run_demo


def run(options: Demo) -> int:
    """Run the demo."""
    run_demo(DemoOptions(**vars(options)))
    return 0
