"""The error that a user sees: commands print its message as one line and exit with code 1."""


class UserError(ValueError):
    """Report input that cannot be used: what was given, what is allowed, and the remedy."""
