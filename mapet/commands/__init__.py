"""The sub-commands of `mapet`, one module each: `run(options)` takes the dataclass of options.py of its name."""
