"""Everything a user can get wrong: one clear line that names it and the remedy, the right exit code, no traceback."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import OPTIONS, SCORING, command, environment, write_imagefolder

from histodd_bench import cli, results
from histodd_bench.files import only_writer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("bad")
    return {"data": write_imagefolder(base / "data", train=(12, 5)), "cache": base / "cache"}


@pytest.fixture(autouse=True)
def cache(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(folders["cache"]))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on standard error that begins with ``error:``."""
    capsys.readouterr()
    code = cli.main(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, captured.err
    assert captured.err.endswith(lines[0] + "\n") and "Traceback" not in captured.err
    return code, lines[0]


def test_fewer_patches_than_ipc_names_class_and_counts(folders, tmp_path, capsys) -> None:
    code, line = refused(capsys, *command(folders["data"], tmp_path / "out", ipc="2,6"))
    assert (
        code == 1 and "class 'class1' has 5 patches, fewer than the 6 per class asked for" in line and "--ipc" in line
    )
    assert not list((tmp_path / "out").glob("records/*"))


def test_a_refused_run_leaves_no_row_in_later_tables(folders, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    refused(capsys, *command(folders["data"], out, ipc="6"))
    assert results.read_plan(out) == {}
    assert cli.main(command(folders["data"], out, "--methods", "random", ipc="2", seeds="1")) == 0
    plan = results.read_plan(out)
    refused(capsys, *command(folders["data"], out, "--methods", "random,herding", ipc="2,6"))
    assert plan["table1"]["imagefolder"]["ipc"] == [2] and results.read_plan(out) == plan


def test_one_class_only(tmp_path, capsys) -> None:
    code, line = refused(capsys, *command(write_imagefolder(tmp_path / "data", train=(5,)), tmp_path / "out"))
    assert code == 1 and "class0" in line


@pytest.mark.parametrize("name", ["imagefolder", "idc"])
def test_empty_folder(name: str, tmp_path, capsys) -> None:
    (tmp_path / "data").mkdir()
    code, line = refused(
        capsys,
        "run",
        "table1",
        "--dataset",
        name,
        "--data-root",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
        *OPTIONS,
    )
    assert code == 1 and str(tmp_path / "data") in line


def test_missing_folder_and_missing_option(tmp_path, capsys) -> None:
    code, line = refused(capsys, *command(tmp_path / "nothing", tmp_path / "out"))
    assert code == 2 and "--data-root" in line and "nothing" in line
    code, line = refused(capsys, "run", "table1", "--dataset", "idc", "--out", str(tmp_path / "out"))
    assert code == 2 and "--data-root" in line


def test_unreadable_images_are_counted_and_left_out(tmp_path, capsys) -> None:
    data = write_imagefolder(tmp_path / "data", train=(4, 4))
    (data / "train" / "class0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (data / "train" / "class1" / "empty.png").write_bytes(b"")
    code = cli.main(command(data, tmp_path / "out", "--methods", "random", seeds="1"))
    captured = capsys.readouterr()
    assert code == 0 and "2 files" in captured.err and "broken.png" in captured.err
    assert "8 training patches" in captured.out


def test_a_test_class_without_patches_does_not_stop_the_run(tmp_path, capsys) -> None:
    data = write_imagefolder(tmp_path / "data", train=(4, 4, 4))
    shutil.rmtree(data / "test" / "class2")
    code = cli.main(command(data, tmp_path / "out", "--methods", "random", seeds="1"))
    captured = capsys.readouterr()
    assert code == 0 and "Traceback" not in captured.err
    warning = "WARNING: the test set has no patch of class class2: balanced accuracy and AUC cover only the classes that are there"
    assert warning in captured.out and captured.out.count("WARNING: the test set") == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--archs", "resnet18", "--image-size", "8"), "patches of 8 px are too small for resnet18: it needs at least"),
        (("--distill-arch", "resnetap10", "--image-size", "8"), "too small for resnetap10"),
        (("--archs", "convnet-d3", "--distill-arch", "convnet-d3", "--image-size", "4"), "too small for convnet-d3"),
    ],
)
def test_patches_too_small_for_a_network(folders, tmp_path, capsys, more: tuple[str, ...], says: str) -> None:
    code, line = refused(capsys, *command(folders["data"], tmp_path / "out", *more))
    assert code == 2 and says in line and "--image-size" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "tabel1"), "unknown table 'tabel1': did you mean 'table1'?"),
        (("show", "table2x"), "unknown table 'table2x': did you mean 'table2'?"),
        (("run", "table1", "--dataset", "dmeo"), "unknown dataset 'dmeo': did you mean 'demo'?"),
        (("run", "table1", "--methods", "random,hearding"), "unknown method 'hearding': did you mean 'herding'?"),
        (("run", "table1", "--archs", "resnet-18"), "unknown model 'resnet-18': did you mean 'resnet18'?"),
        (("run", "table1", "--distill-arch", "convnet"), "did you mean 'convnet-d3'?"),
        (("run", "table1", "--archs", "resnet18:wide"), "the width after the colon must be a whole number above 0"),
        (("run", "table1", "--preset", "papr"), "unknown preset 'papr': did you mean 'paper'?"),
        (("run", "table1", "--stain", "of"), "unknown stain policy 'of': did you mean 'off'?"),
        (("show", "--format", "markdwon"), "unknown format 'markdwon': did you mean 'markdown'?"),
        (("list", "model"), "unknown list 'model': did you mean 'models'?"),
        (("distill", "histo-dd"), "unknown method 'histo-dd': did you mean 'histodd'?"),
        (("runn", "table1"), "did you mean 'run'?"),
        (("run", "table1", "--see", "3"), "unrecognized arguments: --see"),
        (("run", "table1", "--seed", "3"), "did you mean '--seeds'?"),
        (("run", "table1", "--seeds", "0"), "argument --seeds: must be a whole number above 0, got '0'"),
        (("run", "table1", "--ipc", "10,x"), "argument --ipc: must be a whole number above 0, got 'x'"),
        (("run", "table1", "--ipc", "-5"), "--ipc"),
        (("run", "table1", "--image-size", "32.5"), "argument --image-size"),
        (("run", "table1", "--image-size", "100000"), "argument --image-size: must be at most 4096 pixels, got '100000'"),
        (("data", "prepare", "demo", "--out", "x", "--image-size", "4097"), "must be at most 4096 pixels"),
        (("run", "table1", "--out", ""), "argument --out: must not be empty"),
        (("distill", "--out", " "), "argument --out: must not be empty"),
        (("export", "tests", "--out", ""), "argument --out: must not be empty"),
        (("run", "table1", "--methods", ","), "must name at least one"),
        (("run",), "table"),
        (("evaluate", "/no/such/folder"), "/no/such/folder is not a folder"),
        (("run", "table1", "--workers", "0"), "argument --workers: must be a whole number above 0, got '0'"),
        (("run", "table1", "--workers", "-1"), "--workers"),
        (("run", "table1", "--encoder", "pool"), "--encoder is for tables of slide-level models: table4, table5"),
        (("run", "table1,fig1", "--engine-option", "a=b"), "--engine-option is for tables of slide-level models"),
        (("run", "table1", "--data-root", "idc=x"), "--data-root idc=...: --dataset does not name idc"),
        (
            ("run", "table1", "--dataset", "idc", "--data-root", "a", "--data-root", "b"),
            "say NAME=DIR for each data set",
        ),
        (("run", "table1", "--data-root", "tests"), "dataset 'demo' is drawn: it reads no --data-root"),
        (("distill", "--methods", "random"), "--methods would do nothing here"),
        (("select", "random", "--archs", "vit"), "--archs would do nothing here"),
        (("distill-slides", "--eval-seeds", "3"), "--eval-seeds would do nothing here"),
        (("evaluate", "x", "--ipc", "3"), "--ipc would do nothing here"),
        (("evaluate", "tests", "--set", "histodd.alpha=1"), "--set histodd.alpha would do nothing here: only fields of eval"),
        (("evaluate", "x", "--dry-run"), "--dry-run would do nothing here"),
        (("evaluate", "tests", "--dataset", "demo,demo-varied"), "a set is evaluated on one data set at a time"),
        (("show", "--predictions"), "--predictions is for --format json"),
        (("report", "x", "--every", "3"), "--every is how often --follow writes"),
    ],
)
def test_unknown_names_and_impossible_values(capsys, arguments: tuple[str, ...], says: str) -> None:
    code, line = refused(capsys, *arguments)
    assert code == 2 and says in line


def test_a_device_that_is_not_there(folders, tmp_path, capsys) -> None:
    for name in ("cuda:99", "abacus", "cdua", "mps"):
        code, line = refused(capsys, *command(folders["data"], tmp_path / "out", "--device", name))
        assert code == 2 and f"--device {name}" in line and "doctor" in line
        assert len(line) < 250, "what torch was built for is no help"


def test_output_that_cannot_be_made(folders, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, line = refused(capsys, *command(folders["data"], out))
        assert code == 1 and f"cannot write {out}" in line and "--out" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(folders, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    code, line = refused(capsys, *command(folders["data"], tmp_path / "out"))
    assert code == 1 and f"cannot write {tmp_path / 'out'}: Permission denied" in line and "--out" in line


def test_read_only_output_of_root(folders, tmp_path, capsys) -> None:
    """A place where nobody can make files, root included."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    code, line = refused(capsys, *command(folders["data"], Path("/proc/histodd")))
    assert code == 1 and "cannot write /proc/histodd" in line and "--out" in line


@pytest.mark.parametrize(("limit", "what"), [(3000, "sets"), (2000, "records")])
def test_a_full_disk(folders, tmp_path, limit: int, what: str) -> None:
    """The kernel refuses every write beyond a limit, as a full disk does; nothing that is left is taken for a result."""
    arguments = command(folders["data"], tmp_path / "out", "--methods", "random", seeds="1")
    assert cli.main(arguments) == 0
    shutil.rmtree(tmp_path / "out" / "records")
    if what == "sets":
        shutil.rmtree(tmp_path / "out" / "sets")
    done = subprocess.run([sys.executable, "-m", "histodd_bench", *arguments], env=environment(folders["cache"]),
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                          capture_output=True, text=True)  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"cannot write {tmp_path / 'out' / what}" in errors[0] and "--out" in errors[0]
    assert results.read_records(tmp_path / "out") == ([], [])
    assert len(list(tmp_path.glob("out/sets/*"))) == (0 if what == "sets" else 1)
    assert cli.main(arguments) == 0
    assert len(results.read_records(tmp_path / "out")[0]) == 2


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace('"format": 1', '"format": 7'), "another version (record format 7, this one reads 1)"),
        (lambda text: text[: len(text) // 2], "the command that computed it computes it again"),
    ],
)
def test_a_record_that_cannot_be_read_is_named_and_computed_again(folders, tmp_path, capsys, damage, says) -> None:
    out = tmp_path / "out"
    arguments = command(folders["data"], out, "--methods", "random", seeds="1")
    assert cli.main(arguments) == 0
    paths = sorted((out / "records").iterdir())
    good = paths[0].read_text()
    paths[0].write_text(damage(good))
    capsys.readouterr()
    assert cli.main(["show", "--out", str(out), "--format", "csv"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and says in captured.err
    assert "Random,ours" in captured.out and captured.out.splitlines()[1].endswith(",1,,,,")
    assert cli.main(arguments) == 0
    assert says in capsys.readouterr().err
    assert results.read_records(out)[1] == []
    assert results.read_record(paths[0])["predictions"] == json.loads(good)["predictions"]


def test_two_runs_do_not_write_in_one_folder(folders, tmp_path, capsys) -> None:
    with only_writer(tmp_path / "out"):
        code, line = refused(capsys, *command(folders["data"], tmp_path / "out"))
    assert code == 1 and "another run is writing in" in line


def test_a_distillation_that_diverges(folders, tmp_path, capsys) -> None:
    fields = ("--set", "histodd.step=plain", "--set", "histodd.image_lr=1e38", "--set", "histodd.network_lr=1e30")
    code, line = refused(
        capsys, *command(folders["data"], tmp_path / "out", *fields, "--methods", "histodd", seeds="1")
    )
    assert code == 1 and "image_lr" in line
    assert not list(tmp_path.glob("out/sets/*"))


def test_an_evaluation_that_diverges_is_no_result(folders, tmp_path, capsys) -> None:
    """What was computed before stays, and the cell is computed once its learning rate allows it."""
    out = tmp_path / "out"
    arguments = command(folders["data"], out, "--methods", "random", seeds="1")
    assert cli.main(arguments) == 0
    before = results.read_records(out)[0]
    code, line = refused(capsys, *arguments, "--set", "eval.lr=1e8")
    assert code == 1 and "training convnet-d3 diverged" in line and "lower its learning rate (eval.lr=1e+08)" in line
    assert results.read_records(out)[0] == before and len(before) == 2
    code, line = refused(capsys, *arguments, "--set", "eval.lr=1e8", "--workers", "2")
    assert code == 1 and "training convnet-d3 diverged" in line
    assert results.read_records(out)[0] == before


def test_debug_shows_where(folders, tmp_path) -> None:
    with pytest.raises(Exception, match="fewer than the 6 per class"):
        cli.main(command(folders["data"], tmp_path / "out", "--debug", ipc="6"))


def test_a_set_that_does_not_fit_the_data(folders, tmp_path, capsys) -> None:
    shutil.copytree(folders["data"] / "train", tmp_path / "set")
    (tmp_path / "set" / "class0").rename(tmp_path / "set" / "other")
    options = ["--out", str(tmp_path / "out"), *SCORING]
    data = ["--dataset", "imagefolder", "--data-root", str(folders["data"]), *options]
    code, line = refused(capsys, "evaluate", str(tmp_path / "set"), *data)
    assert code == 1 and "class 'other', which the test data lack: theirs are class0, class1" in line
