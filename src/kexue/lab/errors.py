"""What can go wrong in the lab, each said in one sentence to the person at the terminal."""

__all__ = ["DataError", "LabError", "NotRun", "StoreError", "UsageError"]


class LabError(Exception):
    """An error whose message is one sentence for the user: what was expected, what came."""


class UsageError(LabError):
    """The command line asks for something that does not exist."""


class StoreError(LabError):
    """A run could not be written or read."""


class DataError(LabError, ValueError):
    """A file that the user handed in is not what its door expects."""


class NotRun(LabError):
    """A study cannot run on this machine: something that it needs is absent."""
