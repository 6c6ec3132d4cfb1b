"""Reading the CSV files that come with datasets: named columns, one clear line for what is wrong."""

import csv
from collections.abc import Collection
from pathlib import Path

from histodd_bench.errors import HistoddError

_LARGEST = 1 << 28  # bytes


def read_table(path: Path, required: Collection[str], *, header: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """Rows of a CSV file as dicts of stripped text; ``#line`` holds the line's number.

    Args:
        required: columns that must be there.
        header: names of the columns of a file that has no header line.

    Raises:
        HistoddError: absent, unreadable, or a column is missing.
    """
    rows: list[dict[str, str]] = []
    try:
        if path.stat().st_size > _LARGEST:
            raise HistoddError(f"{path} has {path.stat().st_size:,} bytes: too large for a table of slides")
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, fieldnames=header, skipinitialspace=True)
            columns = [(name or "").strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            missing = sorted(set(required) - set(columns))
            if missing:
                raise HistoddError(
                    f"{path} has no column {missing[0]!r}: its columns are {', '.join(columns) or 'none'}"
                )
            for row in reader:
                clean = {
                    name: (value or "").strip() for name, value in row.items() if name and not isinstance(value, list)
                }
                if any(clean.values()):
                    rows.append({**clean, "#line": str(reader.line_num)})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HistoddError(f"{path} cannot be read ({error}): it must be CSV in UTF-8") from None
    return rows
