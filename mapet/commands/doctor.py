"""`mapet doctor`."""

from mapet.doctor import doctor
from mapet.options import Doctor


def run(options: Doctor) -> int:
    """Print what was found; 1 if anything is a problem, else 0."""
    return doctor(cache=options.cache, run=options.run)
