"""The one error that a person is meant to read."""


class UserError(Exception):
    """Something the user can mend. The message says what was found, where, and what to do.

    Commands print the message alone and exit with 2; every other exception is a defect and keeps its traceback.
    """
