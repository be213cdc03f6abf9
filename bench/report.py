from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    x: int = 0


def run(o):
    pass
