"""The command line: help, names, every command on a tiny data set, and Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_project import OPTIONS, SCORING, command, environment, program, without, write_imagefolder

from histodd_bench import cli, presets, projection
from histodd_bench.models import MODELS
from histodd_bench.options import make_parser
from histodd_bench.tables import TABLES
from histodd_bench.workers import cores


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished tiny table, made through the command line."""
    base = tmp_path_factory.mktemp("cli")
    made = {"data": write_imagefolder(base / "data"), "out": base / "out", "cache": base / "cache"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTODD_CACHE", str(made["cache"]))
        assert cli.main(command(made["data"], made["out"], "--methods", "random,histodd,full", seeds="1")) == 0
    return made


@pytest.fixture(autouse=True)
def cache(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTODD_CACHE", str(tiny["cache"]))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---- help and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["run", "show", "list", "distill", "select", "evaluate", "report", "compare", "doctor"]
)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        cli.main([name, "--help"])
    assert leave.value.code == 0
    assert "usage: python -m histodd_bench " + name in capsys.readouterr().out


def test_shared_options_have_the_same_names_wherever_they_do_something(capsys: pytest.CaptureFixture[str]) -> None:
    shared = ("--dataset --data-root --preset --ipc --methods --archs --distill-arch --seeds --eval-seeds --image-size "
              "--device --workers --out --set --threads --stain --debug --dry-run").split()  # fmt: skip
    making = ["--methods", "--archs", "--eval-seeds"]  # sets are made and not scored
    idle = {"run": [], "distill": making, "select": making, "distill-slides": making,
            "evaluate": ["--ipc", "--methods", "--distill-arch", "--seeds", "--dry-run"]}  # fmt: skip
    for name, without_effect in idle.items():
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        words = capsys.readouterr().out.split()
        assert [o for o in shared if o not in words] == without_effect


def test_help_needs_no_torch() -> None:
    code = "import sys; from histodd_bench import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(Path("x")), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_show_needs_no_torch(tiny: dict[str, Path]) -> None:
    code = f"import sys; from histodd_bench import cli; cli.main(['show', '--out', {str(tiny['out'])!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(Path("x")), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_no_command_teaches_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 2 and "run table1" in out


def test_list_names_everything_with_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list")
    lines = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert code == 0
    assert {"tables", "datasets", "methods", "models", "presets", "table1", "demo", "idc", "imagefolder", "random", "herding",
            "forgetting", "histodd", "full", "quick", "standard", "paper", *MODELS} <= set(lines)  # fmt: skip
    code, out, _ = run(capsys, "list", "fields")
    assert code == 0 and "histodd.alpha" in out and "eval.lr" in out and "pool.networks" in out and "table1" not in out


def test_fields_are_listed_as_a_preset_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*more: str) -> dict[str, str]:
        code, out, _ = run(capsys, "list", "fields", *more)
        assert code == 0 and f"preset {more[1] if more else 'quick'}" in out.splitlines()[0]
        return dict(line.split(maxsplit=1) for line in out.splitlines()[1:])

    quick, paper = listed(), listed("--preset", "paper")
    assert (quick["histodd.outer_steps"], quick["pool.epochs"], quick["mil.width"]) == ("10", "1", "128")
    assert (paper["pool.epochs"], paper["eval.min_steps"], paper["histodd.initial"]) == ("10", "0", "real")
    assert paper["histodd.outer_steps"] == "200 at 10 per class, 500 at 20 per class, 1000 at 50 per class"
    assert quick["eval.stain_train"] == "(as --stain says)" == paper["histodd.stain_probability"]
    given = [f"{name}={value}" for name, value in quick.items() if not value.startswith("(")]
    parsed = presets.parse_overrides(given)  # what is listed is what --set takes
    assert parsed["herding"] == {"arch": "convnet-d3", "width": 32, "epochs": 10} and parsed["pool"]["balanced"] is True
    assert sum(map(len, parsed.values())) == len(given) > 50
    code, _, err = run(capsys, "list", "models", "--preset", "paper")
    assert code == 2 and "--preset is for 'list fields'" in err


def test_doctor_reports(capsys: pytest.CaptureFixture[str], tiny: dict[str, Path]) -> None:
    code, out, _ = run(capsys, "doctor")
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert code == 0
    assert {"histodd-bench", "python", "torch", "cpu", "compiled operators", "OpenSlide", "data and networks"} <= set(
        names
    )
    assert str(tiny["cache"]) in out and "torch would use 1 thread\n" in out


def test_version() -> None:
    done = program("--version", cache=Path("x"))
    assert done.returncode == 0 and done.stdout.startswith("histodd-bench ")


# ---- commands --------------------------------------------------------------------------------------------------------


def test_show_in_every_format(tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    starts = {"rich": "Table 1", "markdown": "### Table 1", "latex": "% needs", "csv": "dataset,network,metric"}
    for name, start in starts.items():
        code, out, err = run(capsys, "show", "table1", "--format", name, "--out", str(tiny["out"]))
        assert code == 0 and out.startswith(start) and not err
    code, out, _ = run(capsys, "show", "table1", "--format", "json", "--out", str(tiny["out"]))
    records = json.loads(out)
    assert len(records) == 2 * 2 + 2 and all("predictions" not in r for r in records)
    code, out, _ = run(
        capsys, "show", "--format", "json", "--predictions", "--methods", "full", "--out", str(tiny["out"])
    )
    assert [r["method"] for r in json.loads(out)] == ["full", "full"] and "predictions" in out


def test_files_say_what_show_says(tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for name, suffix in (("markdown", "md"), ("latex", "tex"), ("csv", "csv")):
        _, out, _ = run(capsys, "show", "--format", name, "--out", str(tiny["out"]))
        assert (tiny["out"] / f"table1.{suffix}").read_text() == out


def test_show_changes_nothing_and_invents_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show", "--out", str(tmp_path / "nothing"))
    assert code == 1 and "no results in" in err and not (tmp_path / "nothing").exists()
    code, out, err = run(capsys, "show", "--out", str(tmp_path))
    assert code == 0 and out == "" and "no results" in err and not list(tmp_path.iterdir())


def test_data_of_two_folders_make_tables_that_name_them(
    tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_imagefolder(tmp_path / "other", seed=1)
    for data in (tiny["data"], other):
        code, _, err = run(capsys, *command(data, tmp_path / "out", "--methods", "random", seeds="1"))
        assert code == 0, err
    _, out, _ = run(capsys, "show", "--format", "markdown", "--out", str(tmp_path / "out"))
    titles = sorted(line.rpartition(" (")[2] for line in out.splitlines() if line.startswith("### "))
    assert titles == ["folder=data)", "folder=other)"] and str(tmp_path) not in out


def test_show_leaves_out_what_it_is_not_asked_for(tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Herding is missing, Random and Full are there: as long as nobody asks for them, none of them looks missing."""
    shown = ("show", "--format", "csv", "--out", str(tiny["out"]))
    _, out, _ = run(capsys, *shown)
    whole = [line for line in out.splitlines() if ",Histo-DD," in line]
    code, out, _ = run(capsys, *shown, "--methods", "histodd")
    assert code == 0 and "Accuracy %" in out and set(out.splitlines()[1:]) <= set(whole)
    _, out, _ = run(capsys, *shown, "--methods", "histodd,herding")
    assert ",Herding,ours,,,0," in out and "Random" not in out and "Full" not in out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--methods", "random,herdin"), "unknown method 'herdin': did you mean 'herding'?"),
        (("--dataset", "imagefoldr"), "unknown dataset 'imagefoldr': did you mean 'imagefolder'?"),
        (("--archs", "convnet-d4:8"), "unknown model 'convnet-d4': did you mean 'convnet-d3'?"),
    ],
)
def test_show_refuses_unknown_names(
    given: tuple[str, ...], says: str, tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("markdown", "json"):
        code, out, err = run(capsys, "show", "--out", str(tiny["out"]), "--format", form, *given)
        assert code == 2 and out == "" and says in err
    for known in (("--methods", "gradmatch"), ("--dataset", "idc"), ("--archs", "clam-sb")):
        code, out, err = run(capsys, "show", "--out", str(tiny["out"]), *known)
        assert code == 0 and ("Gradient match" in out or f"no such results in {tiny['out']} yet" in err)


def test_distill_select_and_evaluate(tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--dataset", "imagefolder", "--data-root", str(tiny["data"])]
    making, scoring = [*data, *without(OPTIONS, "--archs")], [*data, *SCORING]
    made = []
    for arguments in (["distill"], ["select", "random"]):
        code, out, err = run(capsys, *arguments, *making, "--ipc", "2", "--seeds", "1", "--out", str(tmp_path / "made"))
        assert code == 0, err
        (folder,) = out.split()
        assert (Path(folder) / "card.json").is_file()
        made.append(folder)
    # a set made alone is the set of the table
    name = Path(made[0]).name
    assert (Path(made[0]) / "images.safetensors").read_bytes() == (
        tiny["out"] / "sets" / name / "images.safetensors"
    ).read_bytes()
    code, out, err = run(
        capsys,
        "evaluate",
        made[0],
        *scoring,
        "--eval-seeds",
        "2",
        "--out",
        str(tmp_path / "scores"),
        "--format",
        "json",
    )
    assert code == 0, err
    scores = [r["metrics"]["accuracy"] for r in json.loads(out)]
    _, out, _ = run(capsys, "show", "--methods", "histodd", "--format", "json", "--out", str(tiny["out"]))
    assert scores == [r["metrics"]["accuracy"] for r in json.loads(out)]
    code, out, err = run(
        capsys,
        "evaluate",
        str(tiny["data"] / "train"),
        *scoring,
        "--eval-seeds",
        "1",
        "--out",
        str(tmp_path / "scores"),
    )
    assert code == 0 and "Accuracy %" in out and "identical" not in err, err
    assert "paid for itself" not in out, "there is no such row"
    assert "over at most 1 evaluation seed; selection and distillation seeds do not apply" in out
    assert "Full has evaluation seeds only" not in out, "there is no such column"


def test_evaluate_says_which_patches_of_a_set_are_test_patches(
    tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where both are made smaller, as they are evaluated."""
    mixed = tmp_path / "mixed"
    for label in ("class0", "class1"):
        shutil.copytree(tiny["data"] / "train" / label, mixed / label)
    for i in range(3):
        shutil.copy(tiny["data"] / "test" / "class0" / f"{i:03d}.png", mixed / "class0" / f"test-{i}.png")
    code, out, err = run(capsys, "evaluate", str(mixed), "--dataset", "imagefolder", "--data-root", str(tiny["data"]),
                       "--eval-seeds", "1", "--out", str(tmp_path / "scores"), "--archs", "convnet-d3:8", "--image-size", "12",
                       *without(SCORING, "--archs", "--image-size"))  # fmt: skip
    assert code == 0, err
    for text in (err, out):
        assert f"WARNING: 3 of the 27 patches in {mixed} are identical to test patches of imagefolder" in text


def test_select_names_every_coreset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["select", "--help"])
    assert "coreset method: random, herding, forgetting, gradmatch" in " ".join(capsys.readouterr().out.split())


def test_distill_and_select_know_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "select", "histodd")[0] == 2
    code, _, err = run(capsys, "distill", "herding")
    assert code == 2 and "choose from histodd" in err
    assert run(capsys, "select", "full")[0] == 2


def test_dry_run_projects_every_phase_and_leaves_nothing(
    tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *command(tiny["data"], tmp_path / "out", "--dry-run"))
    assert code == 0, err
    for phase in (
        "pool of 2 x convnet-d3",
        "herding: networks",
        "histodd: 2 per class",
        "training on all patches",
        "scoring",
        "projected total",
    ):
        assert phase in out
    assert not (tmp_path / "out").exists()


def test_slow_phases_are_timed_once_and_still_counted(
    tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_SLOW", 0.0)
    code, out, err = run(capsys, *command(tiny["data"], tmp_path / "out", "--dry-run"))
    assert code == 0, err
    phases = re.findall(r"([\d.e-]+) s per .* x +([\d,]+) =", out)
    assert len(phases) >= 5 and all(float(seconds) > 0 and count != "0" for seconds, count in phases)


def test_processes_do_not_share_cores(
    tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default none is started that would have to, and a projection does not count on those that do."""
    parser = make_parser(cli.COMMANDS)
    for preset in presets.PRESETS:
        (request,) = cli.make_requests(
            parser.parse_args(["run", "table1", "--preset", preset]), TABLES["table1"], tmp_path
        )
        assert request.workers == 1 or request.workers * request.threads <= cores()
    projected = command(tiny["data"], tmp_path / "out", "--dry-run", "--threads", str(cores()), "--workers", "2")
    code, out, err = run(capsys, *projected)
    assert code == 0, err
    assert "projected total" in out and "processes" not in out


def test_plugged_in_methods_run(tiny: dict[str, Path], tmp_path: Path) -> None:
    """A real distribution on the path, found through its entry points; what selects says so and counts as a coreset."""
    (tmp_path / "firstfew.py").write_text(
        "from dataclasses import dataclass\nimport torch\n\n@dataclass(frozen=True)\nclass FirstFew:\n    skip: int = 0\n\n"
        "    def __call__(self, train, ipc, pool, seed, *, device, workdir, progress):\n"
        "        return train.subset(torch.cat([train.class_indices(c)[self.skip:self.skip + ipc] for c in range(train.num_classes)]))\n"
        "\n@dataclass(frozen=True)\nclass Selected(FirstFew):\n    synthetic = False\n"
    )
    info = tmp_path / "firstfew-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: firstfew\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[histodd_bench.methods]\nfirst-few = firstfew:FirstFew\nselected = firstfew:Selected\n"
    )
    env = environment(tiny["cache"])
    env["PYTHONPATH"] = str(tmp_path) + os.pathsep + env["PYTHONPATH"]

    def program(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "histodd_bench", *arguments], env=env, capture_output=True, text=True)

    out, methods = tmp_path / "out", ("--methods", "first-few,selected", "--set", "first-few.skip=1")
    done = program(*command(tiny["data"], out, *methods, seeds="1"))
    assert done.returncode == 0, done.stderr
    assert "first-few" in done.stdout.splitlines()[2] and "selected" in done.stdout.splitlines()[2]
    (row,) = [x for x in (out / "table1.md").read_text().splitlines() if x.startswith("| Accuracy, points above")]
    assert re.findall(r"to (\S+)", row) == ["selected"], "the distilled set beside the coreset, and not the other way round"
    making = ["--dataset", "imagefolder", "--data-root", str(tiny["data"]), "--out", str(tmp_path / "sets"), "--ipc", "2",
              "--seeds", "1", *without(OPTIONS, "--archs")]  # fmt: skip
    assert program("select", "selected", *making).returncode == 0
    done = program("select", "first-few", *making)
    assert done.returncode == 2 and "choose from random, herding, forgetting, gradmatch, selected" in done.stderr


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupted(child: "subprocess.Popen[str]", started: str, pause: float = 0.0) -> tuple[int, str]:
    """Send SIGINT ``pause`` seconds after ``started`` was printed; exit code and what came on standard error."""
    assert child.stderr is not None
    seen = ""
    while started not in seen:
        line = child.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(pause)
    child.send_signal(signal.SIGINT)
    _, rest = child.communicate(timeout=60)
    return child.returncode, seen + rest


def test_ctrl_c_says_how_to_go_on(tiny: dict[str, Path], tmp_path: Path) -> None:
    arguments = command(tiny["data"], tmp_path / "out", "--set", "eval.epochs=100000", "--methods", "random")
    child = subprocess.Popen([sys.executable, "-m", "histodd_bench", *arguments], env=environment(tiny["cache"]),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    code, text = interrupted(child, "pool of")
    assert code == 130 and "Traceback" not in text
    assert "the same command continues from here" in text and f"--out {tmp_path / 'out'}" in text


def test_ctrl_c_ends_a_process_stuck_in_a_kernel() -> None:
    """Nothing of Python runs while one operator computes for minutes; the exit does not wait for it."""
    code = (
        "import sys, torch\nfrom histodd_bench.interrupt import prompt_exit\ntorch.set_num_threads(1)\n"
        "with prompt_exit(lambda: 'continue with X'):\n"
        "    x = torch.rand(6000, 6000, dtype=torch.float64)\n"
        "    print('started', file=sys.stderr, flush=True)\n"
        "    torch.linalg.svd(x)\nprint('finished')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], env=environment(Path("x")),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    exit_code, text = interrupted(child, "started", pause=2.0)
    assert exit_code == 130 and "continue with X" in text and "Traceback" not in text
