"""The error that users see."""


class UserError(Exception):
    """A problem that the user can fix. The message says what is wrong, where, and what to do.

    Commands print only the message and exit with 2. Every other exception is a defect and keeps its traceback.
    """
