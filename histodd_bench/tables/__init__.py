"""The tables by name, one file each."""

from histodd_bench.errors import unknown_name
from histodd_bench.tables import table1, table4, table5
from histodd_bench.tables.declaration import Column, Metric, Table
from histodd_bench.tables.slide_level import SlideTable

TABLES: dict[str, Table] = {t.TABLE.name: t.TABLE for t in (table1, table4, table5)}

__all__ = ["TABLES", "Column", "Metric", "SlideTable", "Table", "get_table"]


def get_table(name: str) -> Table:
    """A table by name; an unknown one is refused with the nearest match."""
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    return TABLES[name]
