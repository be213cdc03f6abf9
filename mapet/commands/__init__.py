"""The sub-commands of `mapet`, one module each: `run(options)` takes the dataclass of mapet/options.py of its name."""
