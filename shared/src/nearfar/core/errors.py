"""Errors that a user can mend."""


class UserError(Exception):
    """An input that the user can mend: one line that names the file or option, what is wrong and what to do.

    The command line prints it without a traceback and ends with exit status 2.
    """


class CheckpointError(UserError):
    """A checkpoint that does not fit the model: missing, unexpected or misshapen tensors, or an unsafe file."""
