"""What every test shares: one torch thread, repeatable hypothesis examples, and where the real data lie."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

settings.register_profile("histodd", deadline=None, derandomize=True, max_examples=25, print_blob=True)
settings.load_profile("histodd")

if os.environ.get("HISTODD_EMULATED"):  # the CUDA kernels on the CPU, see test_cuda_emulated.py
    import emulated

    emulated.extension(Path(os.environ["HISTODD_EMULATED"]))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums depend on the number of threads in their last bits; tests that study threads set their own."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real test data (never part of the repository): $HISTODD_SHARED or ../shared/data beside it."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("HISTODD_SHARED", default))
    if not path.is_dir():
        pytest.skip(f"real test data not found at {path} (set HISTODD_SHARED)")
    return path


@pytest.fixture(scope="session")
def compiled() -> dict[str, object]:
    """Build information of the compiled operators; skips without them, fails where HISTODD_EXTENSION=1 demands them."""
    from histodd_bench.ops._extension import build_info, missing_reason

    if not build_info():
        text = f"compiled operators: {missing_reason()}"
        pytest.fail(text) if os.environ.get("HISTODD_EXTENSION") == "1" else pytest.skip(text)
    return build_info()


@pytest.fixture(scope="session")
def read_rgb():
    """Reads an image file as ``[3,H,W]`` uint8, transparency composited on white."""

    def read(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgb = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
        return torch.from_numpy(rgb.copy()).permute(2, 0, 1).contiguous()

    return read


@pytest.fixture(scope="session")
def slide_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six small slides with their table. Read only."""
    from slide_makers import project

    return project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def prepared_project(slide_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 'data prepare' makes of it at 64 px. Read only."""
    from prepared_slides import prepared

    out = tmp_path_factory.mktemp("prepared") / "out"
    prepared(slide_project, out)
    return out


@pytest.fixture(scope="session")
def all_tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every table of the program, run at its smallest on one data set into one folder. Read only."""
    from tiny_project import OPTIONS, write_imagefolder

    from histodd_bench import cli

    base = tmp_path_factory.mktemp("all-tables")
    made = {"data": write_imagefolder(base / "data"), "cache": base / "cache", "out": base / "out"}
    options = ["--dataset", "imagefolder", "--data-root", str(made["data"]), "--out", str(made["out"]), "--ipc", "2",
               "--seeds", "1", "--eval-seeds", "2", *OPTIONS]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTODD_CACHE", str(made["cache"]))
        assert cli.main(["run", "all", *options, "--archs", "convnet-d3:8,vit:8"]) == 0
    return made
