"""Titles of what stands side by side or below each other: alike ones say in which fields they differ."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from histodd_bench import results
from histodd_bench.results import Record


def told_apart(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each configuration, the fields in which they differ, as text; hashes only where nothing else tells two apart."""
    flat = [
        {k.removeprefix("eval.").removeprefix("model."): v for k, v in results.flat_config(c).items()} for c in configs
    ]
    names = {n for f in flat for n in f}
    differing = sorted(n for n in names if len({json.dumps(f.get(n)) for f in flat}) > 1)
    hashes = [n for n in differing if any(isinstance(f.get(n), str) and len(f[n]) == 64 for f in flat)]

    def texts(shown: Sequence[str]) -> list[str]:
        return [", ".join(f"{n}={f.get(n) if n not in hashes else str(f.get(n))[:8]}" for n in shown) for f in flat]

    plain = texts([n for n in differing if n not in hashes])
    return plain if len(set(plain)) == len({json.dumps(f, sort_keys=True) for f in flat}) else texts(differing)


def configuration(title: str, plain: str) -> str:
    """What :func:`group_titles` added to a plain title, without its brackets; empty where nothing."""
    return title.removeprefix(plain)[2:-1]


def group_titles(
    groups: Sequence[Sequence[Record]], title: Callable[[Record], str], config: Callable[[Record], Mapping[str, Any]]
) -> list[str]:
    """A title for each group of records; several that would have the same say in which fields they differ."""
    plain = [title(same[0]) for same in groups]
    made = list(plain)
    for text in dict.fromkeys(plain):
        alike = [i for i, t in enumerate(plain) if t == text]
        for i, fields in zip(alike, told_apart([config(groups[i][0]) for i in alike]), strict=True):
            made[i] = f"{text} ({fields})" if fields else text
    return made
