"""Table declarations, and every number of Table 1 against a transcription of its own, made from the paper's text."""

import re

from histodd_bench import paper
from histodd_bench.methods import METHODS
from histodd_bench.tables import TABLES

# Copied from the paper's Table 1, with its markup.
TEXT = r"""
TCGA-IDH	10	$6e^{-2}$	$51.9 \pm 0.02$	$53.0 \pm 0.7$	$53.0 \pm 3.7$	<b><math>69.7 \pm 0.2</math></b>	$80.0 \pm 0.7$
	20	0.11	$55.4 \pm 0.01$	$53.4 \pm 0.1$	$54.3 \pm 2.0$	<b><math>70.3 \pm 0.1</math></b>	
	50	0.28	$57.1 \pm 0.01$	$54.6 \pm 0.04$	$57.0 \pm 2.7$	<b><math>71.8 \pm 0.4</math></b>	
Camelyon16	10	$9e^{-4}$	$68.2 \pm 0.11$	$72.7 \pm 0.40$	$64.2 \pm 0.3$	<b><math>87.8 \pm 0.1</math></b>	$95.8 \pm 0.05$
	20	$2e^{-3}$	$73.1 \pm 0.04$	$78.4 \pm 1.8$	$69.1 \pm 0.04$	<b><math>88.8 \pm 0.2</math></b>	
	50	$5e^{-3}$	$77.6 \pm 0.6$	$81.4 \pm 0.04$	$73.8 \pm 0.1$	<b><math>89.6 \pm 1.1</math></b>	
UniToPath (DG)	10	0.18	$53.3 \pm 0.03$	$56.4 \pm 0.01$	$58.0 \pm 0.01$	<b><math>69.5 \pm 0.8</math></b>	$81.4 \pm 2.3$
	20	0.36	$56.8 \pm 0.01$	$57.2 \pm 0.01$	$59.4 \pm 0.01$	<b><math>71.2 \pm 0.8</math></b>	
	50	0.89	$58.7 \pm 0.02$	$60.8 \pm 0.02$	$61.4 \pm 0.02$	<b><math>72.1 \pm 1.1</math></b>	
UniToPath (PT)	10	0.10	$29.5 \pm 0.9$	$36.6 \pm 0.1$	$16.7 \pm 0.1$	<b><math>43.6 \pm 0.1</math></b>	$49.6 \pm 0.3$
	20	0.20	$32.1 \pm 2.9$	$37.2 \pm 1.2$	$21.5 \pm 0.4$	<b><math>44.2 \pm 1.2</math></b>	
	50	0.52	$36.8 \pm 0.3$	$39.2 \pm 0.2$	$25.4 \pm 0.3$	<b><math>45.2 \pm 0.2</math></b>	
"""  # noqa: W291
HEADS = ("Random", "Herding", "Forgetting", "Histo-DD", "Full")


def transcription() -> tuple[dict[tuple[str, int | None, str], tuple[str, str]], dict[tuple[str, int], str]]:
    ours = {theirs: name for name, theirs in paper.DATASETS.items()}
    numbers: dict[tuple[str, int | None, str], tuple[str, str]] = {}
    ratios: dict[tuple[str, int], str] = {}
    dataset = ""
    for line in TEXT.strip("\n").split("\n"):
        first, ipc, ratio, *cells = line.split("\t")
        dataset = ours[first] if first else dataset
        ratios[dataset, int(ipc)] = re.sub(r"\$(\d)e\^\{(-\d)\}\$", r"\1e\2", ratio)
        for head, cell in zip(HEADS, cells, strict=True):
            found = re.search(r"([\d.]+) \\pm ([\d.]+)", cell)
            if found:
                numbers[dataset, None if head == "Full" else int(ipc), head] = (found[1], found[2])
    return numbers, ratios


def test_table1_is_the_papers_digit_for_digit() -> None:
    numbers, ratios = transcription()
    assert len(numbers) == 4 * (3 * 4 + 1)
    assert {key: (p.mean, p.sd) for key, p in paper.TABLE1.items()} == numbers
    assert paper.TABLE1_RATIO == ratios


def test_printed_numbers_keep_their_zeros() -> None:
    assert paper.TABLE1["camelyon16", 10, "Herding"] == paper.Printed("72.7", "0.40")
    assert paper.TABLE1["camelyon16", 10, "Herding"].value == (72.7, 0.4)


def test_tables_name_known_methods_and_the_papers_columns() -> None:
    for name, table in TABLES.items():
        assert table.name == name
        assert all(column.method in METHODS for column in table.columns)
        titles = {column.title for column in table.columns}
        if table.kind != "statistics":
            assert {title for _, _, title in table.paper} <= titles
    assert [c.title for c in TABLES["table1"].columns] == list(HEADS)
