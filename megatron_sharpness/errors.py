"""The error for what a user can set right."""


class InputError(ValueError):
    """What was given cannot be used. The message names it, says why and what to do instead."""
