"""What is publicly known of each dataset: the paper's supplementary Table 1, counts, where to get the files, licences."""

from dataclasses import dataclass

from histodd_bench import paper


def _supplementary(dataset: str) -> tuple[int, int, int, int]:
    columns = ("Training patches", "Test patches", "Training slides", "Test slides")
    a, b, c, d = (int(paper.SUPP1[dataset, None, column].mean.replace(",", "")) for column in columns)
    return a, b, c, d


SUPPLEMENTARY_TABLE1 = {dataset: _supplementary(dataset) for dataset in paper.DATASETS}
"""Training and test patches, training and test slides, as numbers."""


@dataclass(frozen=True)
class Facts:
    """One dataset: what it is, what to know about it, and where its files are."""

    title: str
    known: tuple[str, ...]
    where: str


FACTS = {
    "camelyon16": Facts(
        "Camelyon16 (Ehteshami Bejnordi et al. 2017): lymph nodes, normal against tumour; 256 px at 5x",
        (
            "training: 159 normal and 111 tumour slides, test: 80 normal and 49 tumour slides, of Radboud and Utrecht",
            "20 tumour slides and test_114 are not exhaustively annotated: they give no normal patches",
            "normal_086 became tumor_111 and test_049 is a duplicate: neither is part of it",
            "the paper's patch counts follow its own rules for tissue and partly covered patches, which it does not state",
        ),
        "open data (CC0), about 700 GB; 'data fetch camelyon16 --out DIR' downloads slides and annotations from the public "
        "bucket (or: aws s3 sync --no-sign-request s3://camelyon-dataset/CAMELYON16 DIR); reference.csv is in its evaluation "
        "folder, centres are in FLamby's metadata.csv",
    ),
    "tcga-idh": Facts(
        "TCGA-IDH (paper 4.1): gliomas, IDH mutant against wild type; 1,024 px at 10x, more than half tissue",
        (
            "training: 477 MU and 714 WT slides, test: 59 MU and 90 WT slides",
            "the paper's split is not public: it is drawn by patient here, or read from split.csv",
        ),
        "open access through the GDC portal: diagnostic slides (DX) of TCGA-GBM and TCGA-LGG, with gdc-client and a manifest; "
        "IDH status from the supplement of Ceccarelli et al. 2016, written to labels.csv",
    ),
    "unitopatho-dg": Facts(
        "UniToPatho, dysplasia grading (Barbano et al. 2021): adenomas, high against low grade; 800 and 7000 microns",
        ("training: 30 HG and 130 LG slides, test: 16 HG and 54 LG slides, as the paper prints them",),
        "IEEE DataPort, 'UniToPatho', after a free registration (about 300 GB); unpack into unitopath-public/",
    ),
    "unitopatho-pt": Facts(
        "UniToPatho, polyp typing (Barbano et al. 2021): six classes; 800 and 7000 microns",
        (
            "9,536 patches of 292 slides: 8,669 of 800 microns and 867 of 7000 microns",
            "the official training set has 204 slides; the paper prints 208, and its classes sum to 203",
        ),
        "IEEE DataPort, 'UniToPatho', after a free registration (about 300 GB); unpack into unitopath-public/",
    ),
    "pcam": Facts(
        "PatchCamelyon (Veeling et al. 2018): 96 px patches of Camelyon16 at 10x, tumour in the centre or not",
        ("262,144 training, 32,768 validation (not used) and 32,768 test patches",),
        "open data (CC0), 8 GB; 'data fetch pcam --out DIR' downloads it",
    ),
    "pathmnist": Facts(
        "PathMNIST (MedMNIST v2, Yang et al. 2023): colorectal tissue, nine classes",
        ("89,996 training, 10,004 validation (not used) and 7,180 test patches of 28, 64, 128 or 224 px",),
        "open data (CC BY 4.0); 'data fetch pathmnist --out DIR' downloads it, as does the package medmnist",
    ),
    "idc": Facts(
        "Breast IDC patches (Cruz-Roa et al. 2014): 50 px at 2.5x, with or without invasive ductal carcinoma",
        ("277,524 patches of 279 patients",),
        "Kaggle, 'breast histopathology images' (registration); unpack it so that DIR/<patient>/<0 or 1>/*.png is there",
    ),
    "demo": Facts("The demo: computer-drawn H&E slides, no real tissue", (), "made on first use, nothing to get"),
    "demo-uniform": Facts("The demo with every slide stained alike, no real tissue", (), "made on first use, nothing to get"),
    "demo-varied": Facts("The demo with stains that vary twice as much, no real tissue", (), "made on first use, nothing to get"),
    "imagefolder": Facts("Your own patches: train/<class>/* and test/<class>/*", (), "your own files"),
    "slides": Facts("Your own slides: a folder with slides.csv", (), "your own files"),
}


def where(name: str) -> str:
    """Where the files of a dataset are."""
    return FACTS[name].where if name in FACTS else "no published place is known here"
