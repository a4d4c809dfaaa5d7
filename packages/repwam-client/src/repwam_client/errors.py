"""The error of a user's mistake; where the rest of RepWAM is installed, the one that its commands print on one line."""

try:
    from repvitok.runtime.errors import UserError  # pyright: ignore[reportAssignmentType]
except ImportError:

    class UserError(ValueError):
        """A mistake in what the user gave: the message says what was expected, what came and what to do."""


__all__ = ["UserError"]
