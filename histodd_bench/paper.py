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

_TABLE2_COLUMNS = ("None", "Stain Norm", "Rotate", "Flip", "Scale", "All")
_TABLE2_ROWS = (
    ("tcga-idh", 10, "66.6 0.2", "67.9 0.1", "67.6 0.1", "67.0 0.1", "67.6 0.2", "69.7 0.2"),
    ("camelyon16", 10, "82.9 0.3", "85.5 0.2", "83.1 0.1", "83.3 0.3", "84.2 0.5", "86.8 0.1"),
    ("unitopatho-dg", 10, "64.5 0.5", "67.4 0.4", "66.1 0.3", "66.1 0.2", "65.6 0.4", "69.5 0.8"),
    ("unitopatho-pt", 10, "39.4 0.3", "41.7 0.1", "40.3 0.9", "41.1 0.7", "41.1 0.8", "43.6 0.1"),
)
TABLE2: dict[tuple[str, int | None, str], Printed] = {
    (dataset, ipc, title): Printed(*cell.split())
    for dataset, ipc, *cells in _TABLE2_ROWS
    for title, cell in zip(_TABLE2_COLUMNS, cells, strict=True)
}
"""Table 2, accuracy in percent, by (dataset, images per class, column)."""

_TABLE3_NETWORKS = ("resnet18", "densenet121", "vit")
# dataset, images per class (None: Full), Ratio%, then mean, standard deviation and seconds an epoch of each network.
_TABLE3_ROWS = (
    ("tcga-idh", 10, "6e-2", "69.7 0.5 0.24", "64.0 0.1 1.43", "71.8 0.2 1.84"),
    ("tcga-idh", 20, "0.11", "70.3 0.1 0.39", "69.4 0.1 2.80", "72.5 0.4 3.63"),
    ("tcga-idh", 50, "0.28", "71.8 0.4 1.02", "70.2 0.4 4.40", "73.4 0.4 8.02"),
    ("tcga-idh", None, "100", "80.0 0.7 40", "76.3 0.6 80", "78.9 0.2 181"),
    ("camelyon16", 10, "1e-3", "87.8 0.1 0.23", "93.5 0.3 1.44", "93.9 0.7 1.84"),
    ("camelyon16", 20, "2e-3", "88.8 0.2 0.38", "94.0 0.1 2.76", "94.4 0.3 3.61"),
    ("camelyon16", 50, "5e-3", "89.6 0.7 1.04", "95.6 0.2 4.40", "96.3 0.3 8.01"),
    ("camelyon16", None, "100", "95.8 0.1 1620", "98.7 0.1 4826", "98.6 0.1 11049"),
    ("unitopatho-dg", 10, "0.18", "69.5 0.8 0.25", "70.5 1.6 1.42", "67.2 0.1 1.82"),
    ("unitopatho-dg", 20, "0.36", "71.2 0.8 0.38", "74.1 0.4 2.80", "68.6 0.3 3.63"),
    ("unitopatho-dg", 50, "0.89", "72.1 1.1 1.01", "77.0 0.1 4.41", "73.5 0.4 8.07"),
    ("unitopatho-dg", None, "100", "81.4 2.3 80", "82.6 0.5 115", "75.8 0.4 120"),
    ("unitopatho-pt", 10, "0.10", "43.6 0.1 0.63", "46.9 1.3 2.01", "44.1 0.9 5.46"),
    ("unitopatho-pt", 20, "0.20", "44.2 0.2 1.16", "49.4 0.8 3.98", "45.6 0.6 10.83"),
    ("unitopatho-pt", 50, "0.52", "44.6 0.2 2.93", "50.5 0.9 9.88", "47.1 0.5 27.20"),
    ("unitopatho-pt", None, "100", "49.6 0.2 200", "51.5 0.2 212", "48.5 0.6 213"),
)
_TABLE3_FACTORS = {  # as printed beside the seconds, "N times faster than Full"
    "tcga-idh": "167 76 98  103 39 50  39 25 23",
    "camelyon16": "7043 3351 6000  4263 1750 3060  1557 1097 1380",
    "unitopatho-dg": "320 81 66  211 41 33  79 26 15",
    "unitopatho-pt": "317 105 39  172 53 20  68 21 8",
}


def _table3() -> dict[tuple[str, int | None, str], tuple[Printed, str]]:
    factors = {d: iter(text.split()) for d, text in _TABLE3_FACTORS.items()}
    made: dict[tuple[str, int | None, str], tuple[Printed, str]] = {}
    for dataset, ipc, _, *cells in _TABLE3_ROWS:
        for network, cell in zip(_TABLE3_NETWORKS, cells, strict=True):
            mean, sd, seconds = cell.split()
            times = "" if ipc is None else f" (x{next(factors[dataset])})"
            made[dataset, ipc, network] = (Printed(mean, sd), seconds + times)
    return made


TABLE3 = _table3()
"""Table 3 by (dataset, images per class or None for Full, network): accuracy in percent, and seconds an epoch as text."""

TABLE3_RATIO: dict[tuple[str, int], str] = {(d, ipc): ratio for d, ipc, ratio, *_ in _TABLE3_ROWS if ipc is not None}
"""Table 3, Ratio% by (dataset, images per class)."""

_AT_100 = {"tcga-idh": "75.1 0.1", "camelyon16": "93.5 0.3", "unitopatho-dg": "76.0 0.9", "unitopatho-pt": "46.3 0.3"}
FIG1: dict[tuple[str, int | None, str], Printed] = TABLE1 | {
    (dataset, 100, "Histo-DD"): Printed(*cell.split()) for dataset, cell in _AT_100.items()
}
"""Figure 1 (b): Table 1, and the accuracies at 100 images per class from the text of section 5.2."""

SUPP1: dict[tuple[str, int | None, str], Printed] = {
    (dataset, None, title): Printed(number, "")
    for dataset, numbers in {
        "tcga-idh": ("17,686", "2,310", "1,191", "149"),
        "camelyon16": ("1,066,988", "567,510", "270", "129"),
        "unitopatho-dg": ("5,631", "2,277", "160", "70"),
        "unitopatho-pt": ("6,889", "2,647", "208", "88"),
    }.items()
    for title, number in zip(
        ("Training patches", "Test patches", "Training slides", "Test slides"), numbers, strict=True
    )
}
"""Table 1 of the supplement: counts by (dataset, None, column)."""

SUPP2: dict[tuple[str, int | None, str], Printed] = {
    (dataset, 10, title): Printed(*cell.split())
    for dataset, title, cell in (
        ("tcga-idh", "SN-DSA, SN at test", "69.7 0.2"),
        ("camelyon16", "SN-DSA, SN at test", "86.8 0.1"),
        ("unitopatho-dg", "SN-DSA, SN at test", "69.5 0.8"),
        ("unitopatho-pt", "SN-DSA, SN at test", "43.6 0.1"),
        ("tcga-idh", "SN-Pre, SN at test", "64.9 0.2"),
        ("tcga-idh", "SN-Pre", "67.1 0.3"),
    )
}
"""Table 2 of the supplement, accuracy in percent, by (dataset, images per class, column); its other cells are empty."""
