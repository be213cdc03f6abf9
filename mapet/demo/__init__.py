"""The whole main job on images that ship inside Python packages: `run_demo`."""

from mapet.demo.run import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]
