"""The two kinds of failure a user can meet.

`UserError` is for what the user can correct: a wrong name, a broken file, a setting that cannot work. The command line
prints it as one line (what is wrong, where, what to do) and exits with 2. It is a `ValueError`, so that library users
catch what they expect. Everything that fails although the input was right (a full disk, a dead worker) is a
`WorkError`, printed as one line too, exit code 1. Anything else is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """The input is wrong. The message is one line and names the fix."""


class WorkError(RuntimeError):
    """The work failed although the input was right. The message says what was kept and how to go on."""
