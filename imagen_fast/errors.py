"""Errors that a user can mend: the command line shows their message alone, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what was expected."""


class ConfigError(UserError):
    """A configuration holds an unknown key, or a value of the wrong type or out of range."""


class CheckpointError(UserError):
    """A checkpoint directory misses a file, or holds a tensor that does not fit the model."""


class OutputError(UserError):
    """A result cannot be written where it was asked for."""
