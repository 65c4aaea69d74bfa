"""What a user can set right, and why a step could not be measured."""

from __future__ import annotations

from collections.abc import Mapping


class InputError(ValueError):
    """What was given cannot be used. The message names it, says why and what to do instead."""


def refuse(reasons: Mapping[str, bool]) -> None:
    """Refuse a configuration once, for all that is wrong with it.

    Args:
        reasons: each names what cannot be used, why, and the remedy, and whether it applies.

    Raises:
        InputError: with all reasons that apply.
    """
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise InputError("critical sharpness cannot be measured here: " + ". And ".join(found))


def flag_of(name: str) -> str:
    """The command-line flag whose value is kept under this name."""
    return "--" + name.replace("_", "-")


def bad_flag(name: str, value: object, reason: str) -> InputError:
    """An error that names the flag of ``name``, the value, the reason and the remedy."""
    return InputError(f"{flag_of(name)} {value}: {reason}.")


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


class ProbeError(RuntimeError):
    """A step could not be measured, or a loss not be evaluated; the message is the reason.

    Adapters raise it on all ranks together.
    """


def reason_of(error: Exception) -> str:
    """An error in a record: what is ours says all, others begin with their kind."""
    return str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
