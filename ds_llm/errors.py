"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """A wrong option, file or environment. The message is one line: what is wrong, where, and what to do.

    Launch scripts print it without a traceback, from one rank, and exit with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(UserError):
    """A configuration key or value that cannot be used; exit code 2."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)
