"""What values of options must look like; each raises ``argparse.ArgumentTypeError`` with what was wrong."""

import argparse
import re
from pathlib import Path

MOST_PIXELS = 4096  # side of a patch: training holds many of them


def count(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def side(text: str) -> int:
    """Side of patches in pixels, not larger than any network could train on."""
    if count(text) > MOST_PIXELS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_PIXELS} pixels, got {text!r}")
    return int(text)


def place(text: str) -> Path:
    """A file or folder; an empty name would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty ('.' is the current folder)")
    return Path(text)


def seed(text: str) -> int:
    """A whole number from 0."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """``10,20``: whole numbers above 0, ascending, each once."""
    return tuple(sorted({count(item.strip()) for item in text.split(",")}))


def names(text: str) -> tuple[str, ...]:
    """``a,b``: at least one, each once."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError("must name at least one")
    return found


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """``64x64,16x256``: patches and side, pairs of whole numbers above 0."""
    found = []
    for item in text.split(","):
        n, cross, side = item.strip().partition("x")
        if not cross:
            raise argparse.ArgumentTypeError(f"must be like 64x64 (patches x side), got {item.strip()!r}")
        found.append((count(n), count(side)))
    return tuple(dict.fromkeys(found))


def part(text: str) -> tuple[int, int]:
    """``I/N``: part I of N, from 1/N to N/N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, e.g. 3/8, got {text!r}")
    return int(found[1]), int(found[2])


def option(text: str) -> tuple[str, str]:
    """``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value
