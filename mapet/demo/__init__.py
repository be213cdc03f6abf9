"""The whole main job on images that ship inside Python packages: `mapet.demo.run.run_demo`."""
