"""The tables by name, one file each."""

from histodd_bench.errors import unknown_name
from histodd_bench.tables import fig1, fig2, fig3, supp1, supp2, table1, table2, table3, table4, table5
from histodd_bench.tables.declaration import Column, Metric, Plot, Table, Times
from histodd_bench.tables.slide_level import SlideTable

TABLES: dict[str, Table] = {
    module.TABLE.name: module.TABLE
    for module in (table1, table2, table3, table4, table5, fig1, fig2, fig3, supp1, supp2)
}

__all__ = ["TABLES", "Column", "Metric", "Plot", "SlideTable", "Table", "Times", "get_table"]


def get_table(name: str) -> Table:
    """A table by name; an unknown one is refused with the nearest match."""
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    return TABLES[name]
