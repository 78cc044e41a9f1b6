"""The exception for mistakes that a user can fix."""

from __future__ import annotations

import sys


class UserError(Exception):
    """A wrong option, file or environment. The message is one line: what is wrong, where, and what to do.

    Commands print it without a traceback and exit with `exit_code`. Usually every rank finds the same mistake and only
    rank 0 prints it. any_rank: only one rank may find it, so the rank that does prints it. said: it is printed already.
    """

    def __init__(self, message: str, exit_code: int = 1, any_rank: bool = False):
        super().__init__(message)
        self.exit_code, self.any_rank, self.said = exit_code, any_rank, False


class ConfigError(UserError):
    """A configuration key or value that cannot be used; exit code 2."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say(error: UserError) -> None:
    """Print an error to standard error, once."""
    if not error.said:
        print(f"error: {error}", file=sys.stderr, flush=True)
    error.said = True
