"""Numbers printed in the paper (Cong et al., arXiv 2408.09709), digit for digit; tables show them marked as the paper's."""

from dataclasses import dataclass

DATASETS = {  # our names -> the paper's
    "tcga-idh": "TCGA-IDH",
    "camelyon16": "Camelyon16",
    "unitopatho-dg": "UniToPath (DG)",
    "unitopatho-pt": "UniToPath (PT)",
}


@dataclass(frozen=True)
class Printed:
    """A mean and standard deviation as printed: text, so that no digit is added or lost."""

    mean: str
    sd: str

    @property
    def value(self) -> tuple[float, float]:
        """The two numbers."""
        return float(self.mean), float(self.sd)


_COLUMNS = ("Random", "Herding", "Forgetting", "Histo-DD")

# dataset, images per class, Ratio%, then mean and standard deviation of _COLUMNS.
_ROWS = (
    ("tcga-idh", 10, "6e-2", "51.9 0.02", "53.0 0.7", "53.0 3.7", "69.7 0.2"),
    ("tcga-idh", 20, "0.11", "55.4 0.01", "53.4 0.1", "54.3 2.0", "70.3 0.1"),
    ("tcga-idh", 50, "0.28", "57.1 0.01", "54.6 0.04", "57.0 2.7", "71.8 0.4"),
    ("camelyon16", 10, "9e-4", "68.2 0.11", "72.7 0.40", "64.2 0.3", "87.8 0.1"),
    ("camelyon16", 20, "2e-3", "73.1 0.04", "78.4 1.8", "69.1 0.04", "88.8 0.2"),
    ("camelyon16", 50, "5e-3", "77.6 0.6", "81.4 0.04", "73.8 0.1", "89.6 1.1"),
    ("unitopatho-dg", 10, "0.18", "53.3 0.03", "56.4 0.01", "58.0 0.01", "69.5 0.8"),
    ("unitopatho-dg", 20, "0.36", "56.8 0.01", "57.2 0.01", "59.4 0.01", "71.2 0.8"),
    ("unitopatho-dg", 50, "0.89", "58.7 0.02", "60.8 0.02", "61.4 0.02", "72.1 1.1"),
    ("unitopatho-pt", 10, "0.10", "29.5 0.9", "36.6 0.1", "16.7 0.1", "43.6 0.1"),
    ("unitopatho-pt", 20, "0.20", "32.1 2.9", "37.2 1.2", "21.5 0.4", "44.2 1.2"),
    ("unitopatho-pt", 50, "0.52", "36.8 0.3", "39.2 0.2", "25.4 0.3", "45.2 0.2"),
)
_FULL = {"tcga-idh": "80.0 0.7", "camelyon16": "95.8 0.05", "unitopatho-dg": "81.4 2.3", "unitopatho-pt": "49.6 0.3"}

TABLE1: dict[tuple[str, int | None, str], Printed] = {
    (dataset, ipc, title): Printed(*cell.split())
    for dataset, ipc, _, *cells in _ROWS
    for title, cell in zip(_COLUMNS, cells, strict=True)
} | {(dataset, None, "Full"): Printed(*cell.split()) for dataset, cell in _FULL.items()}
"""Table 1, accuracy in percent on ResNet18, by (dataset, images per class or None, column)."""

TABLE1_RATIO: dict[tuple[str, int], str] = {(dataset, ipc): ratio for dataset, ipc, ratio, *_ in _ROWS}
"""Table 1, Ratio% by (dataset, images per class)."""
