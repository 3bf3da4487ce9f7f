"""The two exceptions whose text is for the user: the command line prints it as one line, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: the text says what, where and what to do; exit code 2."""


class OutageError(RuntimeError):
    """The machine, or a service it depends on, has failed: the text says what, where and why; exit code 1."""
