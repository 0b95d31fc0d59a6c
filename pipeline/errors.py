"""The error that a user sees: commands print its message as one line and exit with code 1."""

SHOWN = 60  # characters of a faulty text that a message shows
NAMED = 5  # faulty images that a message names


class UserError(ValueError):
    """Report input that cannot be used: what was given, what is allowed, and the remedy."""
