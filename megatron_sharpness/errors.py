"""The errors for what a user can set right."""


class InputError(ValueError):
    """What was given cannot be used. The message names it, says why and what to do instead."""


class SettingError(InputError):
    """One setting cannot be used.

    Attributes:
        name: of the setting, as the Python interface calls it.
        value: what was given.
        reason: why it cannot be used, and what to do instead.
    """

    def __init__(self, name: str, value: object, reason: str) -> None:
        super().__init__(f"{name}={value!r}: {reason}.")
        self.name, self.value, self.reason = name, value, reason
