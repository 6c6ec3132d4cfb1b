"""The two errors a user can cause. Their text is one line: what is wrong, where, and what to do about it."""

import difflib
from collections.abc import Iterable


class HistoddError(Exception):
    """The work could not be done (exit code 1)."""


class UsageError(HistoddError):
    """The request itself is wrong: an unknown name, a bad option, an impossible combination (exit code 2)."""


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
