"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave: one clear line that says what, where and what to do.

    The command line prints its text without a traceback and leaves with exit code 2.
    Anything else that escapes is a fault of ours or of the machine, and leaves with exit code 1.
    """
