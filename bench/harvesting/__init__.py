"""The parts of `python bench/harvest.py`: each a function of a `Run`, called in a process of its own."""
