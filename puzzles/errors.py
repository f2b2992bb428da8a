"""The one error of this package."""


class PuzzleError(ValueError):
    """An argument or text that is not allowed; the message says what was found and what would be."""
