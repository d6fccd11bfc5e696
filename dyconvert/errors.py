"""What can go wrong, in four types. Each message says what happened, why, and what to do next."""


class DyconvertError(Exception):
    """Base of every error that dyconvert raises on purpose; the command line turns it into exit code 2."""


class ModelError(DyconvertError):
    """A model can't be found, built, given its weights, or isn't one that can be converted."""


class PlanError(DyconvertError):
    """A plan, or what was asked of one (method, g, patterns), doesn't make sense or doesn't fit the model."""


class CheckpointError(DyconvertError):
    """A saved model can't be written, or can't be read back as it was written."""
