"""The tables by name, one file each."""

from histodd_bench.errors import unknown_name
from histodd_bench.tables import table1
from histodd_bench.tables.declaration import Column, Metric, Table

TABLES: dict[str, Table] = {table1.TABLE.name: table1.TABLE}

__all__ = ["TABLES", "Column", "Metric", "Table", "get_table"]


def get_table(name: str) -> Table:
    """A table by name; an unknown one is refused with the nearest match."""
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    return TABLES[name]
