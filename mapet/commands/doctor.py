"""`mapet doctor`."""

from mapet.doctor import doctor
from mapet.options import Doctor


def run(options: Doctor) -> int:
    """Print what was found; always 0, since a report is not a failure."""
    return doctor(cache=options.cache, run=options.run)
