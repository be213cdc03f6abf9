"""`mapet doctor`."""

from mapet.commands.options import Doctor
from mapet.doctor import doctor


def run(options: Doctor) -> int:
    """Print what was found; 1 if anything is a problem, else 0."""
    return doctor(cache=options.cache, run=options.run)
