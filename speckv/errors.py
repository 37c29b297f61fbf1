"""Errors that speckv raises on purpose; each message says what was given, what is wanted and what to do."""


class SpecKVError(Exception):
    """Anything speckv refuses; catch this to catch them all."""


class ModelError(SpecKVError, ValueError):
    """A model or drafter that cannot be loaded or does not fit."""


class InputError(SpecKVError, ValueError):
    """An argument out of range: a prompt, a temperature, a policy."""


class NumericalError(SpecKVError, RuntimeError):
    """The target or the drafter produced logits that are not a distribution."""
