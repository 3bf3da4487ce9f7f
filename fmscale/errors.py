"""The exceptions whose text is for the user: the command line prints it as one line, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: the text says what, where and what to do; exit code 2."""


class SharedError(UserError):
    """One that every rank of a job raises alike; rank 0 tells of it."""


class OutageError(RuntimeError):
    """The machine, or a service it depends on, has failed: the text says what, where and why; exit code 1."""
