"""The two errors a user can cause. Their text is one line: what is wrong, where, and what to do about it."""

import difflib
from collections.abc import Iterable


class HistoddError(Exception):
    """The work could not be done (exit code 1)."""


class UsageError(HistoddError):
    """The request itself is wrong: an unknown name, a bad option, an impossible combination (exit code 2)."""


def at_least(least: float, section: str, **fields: float | None) -> None:
    """Refuse fields that ``--set`` names ``section.field`` where they are below ``least``; None is no number."""
    for name, value in fields.items():
        if value is not None and value < least:
            must = "not be negative" if least == 0 else f"be at least {least:g}"
            raise UsageError(f"{section}.{name} must {must}, got {value}")


def above_zero(section: str, **fields: float | None) -> None:
    """Refuse fields that are zero or less; None is no number."""
    for name, value in fields.items():
        if value is not None and value <= 0:
            raise UsageError(f"{section}.{name} must be above 0, got {value}")


def below_one(section: str, **fields: float | None) -> None:
    """Refuse fields outside [0, 1), such as a momentum; None is no number."""
    for name, value in fields.items():
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"{section}.{name} must be at least 0 and below 1, got {value}")


def probability(section: str, **fields: float) -> None:
    """Refuse fields outside [0, 1]."""
    for name, value in fields.items():
        if not 0 <= value <= 1:
            raise UsageError(f"{section}.{name} must lie in [0, 1], got {value}")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """An error for a name that does not exist, with the nearest match, to be raised by the caller.

    Args:
        kind: what the name should have been, e.g. ``"dataset"``.
        name: what the user wrote.
        known: the valid names.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")
