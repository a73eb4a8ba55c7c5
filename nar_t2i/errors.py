"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input. The message says what was wrong, where (file, key, sample), and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
