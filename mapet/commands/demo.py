"""`mapet demo`."""

from mapet.demo import DemoOptions, run_demo
from mapet.options import Demo


def run(options: Demo) -> int:
    """Run the demo."""
    run_demo(DemoOptions(**vars(options)))
    return 0
