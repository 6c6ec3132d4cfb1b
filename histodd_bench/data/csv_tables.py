"""Reading the CSV files that come with datasets: named columns, one clear line for what is wrong.

Names of columns count without spaces around them and without regard to case. Columns may be separated by semicolons or
tabs instead of commas; which it is, the first line says: where it has a comma, it is the comma.
"""

import csv
import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

from histodd_bench.errors import HistoddError

_LARGEST = 1 << 28  # bytes
_ALIKE = 0.8  # ratio of difflib: patients and center are meant, patient_age is not
_MEANT = {
    **dict.fromkeys(("case", "case_id", "caseid", "subject", "subject_id"), "patient"),
    **dict.fromkeys(("center_id", "centre_id", "centreid", "centerid"), "centre"),
}


def read_table(
    path: Path, required: Collection[str], *, optional: Collection[str] = (), header: tuple[str, ...] | None = None
) -> list[dict[str, str]]:
    """Rows of a CSV file as dicts of stripped text; ``#line`` holds the line's number.

    Args:
        required: columns that must be there, in lower case.
        optional: columns that are used where they are there, in lower case. One that is missing while another has nearly
            its name is an error; what the table has besides is returned as it is.
        header: names of the columns of a file that has no header line.

    Raises:
        HistoddError: absent, unreadable, or a column is missing, misnamed or there twice.
    """
    rows: list[dict[str, str]] = []
    try:
        if path.stat().st_size > _LARGEST:
            raise HistoddError(f"{path} has {path.stat().st_size:,} bytes: too large for a table of slides")
        with open(path, newline="", encoding="utf-8-sig") as file:
            separator = "," if header else _separator(file.readline())
            file.seek(0)
            reader = csv.DictReader(file, fieldnames=header, skipinitialspace=True, delimiter=separator)
            columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            _check_columns(path, columns, required, optional)
            for row in reader:
                clean = {
                    name: (value or "").strip() for name, value in row.items() if name and not isinstance(value, list)
                }
                if any(clean.values()):
                    rows.append({**clean, "#line": str(reader.line_num)})
    except FileNotFoundError:
        more = f" and, where known, {', '.join(optional)}" if optional else ""
        raise HistoddError(
            f"{path} is missing: it must be a CSV file in UTF-8 with the columns {', '.join(required)}{more}"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HistoddError(f"{path} cannot be read ({error}): it must be CSV in UTF-8") from None
    return rows


def _separator(line: str) -> str:
    return next((c for c in ";\t" if c in line and "," not in line), ",")


def _check_columns(path: Path, columns: Sequence[str], required: Collection[str], optional: Collection[str]) -> None:
    missing = sorted(set(required) - set(columns))
    if missing:
        raise HistoddError(f"{path} has no column {missing[0]!r}: its columns are {', '.join(columns) or 'none'}")
    twice = [name for name in (*required, *optional) if columns.count(name) > 1]
    if twice:
        raise HistoddError(f"{path} has two columns {twice[0]!r}: remove or rename one")
    absent = [name for name in optional if name not in columns]
    for name in columns:
        if name in required or name in optional:
            continue
        plain = name.replace(" ", "_").replace("-", "_")
        near = [_MEANT[plain]] if plain in _MEANT else difflib.get_close_matches(plain, absent, n=1, cutoff=_ALIKE)
        if near and near[0] in absent:
            raise HistoddError(
                f"{path} has a column {name!r}, which is not used: rename it to {near[0]!r}, or, if it is something else, "
                "to a name less alike"
            )
