"""Errors whose text is for the person at the command line: what was given, what is allowed, what to do."""


class MapetError(Exception):
    """An expected failure. The command line prints its text without a traceback and exits with `exit_code`."""

    exit_code = 1


class ConfigError(MapetError, ValueError):
    """An option, or a combination of options, that cannot work."""

    exit_code = 2


class FieldError(ConfigError):
    """A value that its field does not allow. `name` is the field's; the text begins with it."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        super().__init__(text)


class DataError(MapetError):
    """Images, labels, tokens or a cache that cannot be used as given."""


class CheckpointError(MapetError):
    """A checkpoint that is damaged, missing, or belongs to another configuration."""


class WeightsMissingError(MapetError, FileNotFoundError):
    """Weights of a tokenizer network that are neither given, cached nor downloadable."""


class OutOfMemory(MapetError):
    """A step that does not fit the memory of its device; the text says what to change."""


class TrainingError(MapetError):
    """Training that cannot go on: a loss or gradient that is not finite."""
