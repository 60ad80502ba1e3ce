"""The command line: quick answers, arguments in any order, and exit statuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opsin.__version__ import __version__
from opsin.commands.main import main
from opsin.run.recipe import read
from tests.digits_run import OVERRIDES, SMALL_VIT

QUICK = (*OVERRIDES, *SMALL_VIT, "limits.steps=2")


def run(*arguments: str | Path) -> int:
    return main([*map(str, arguments)])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["recipes"], ["runs", "nowhere"], ["runs", "--json"]]
)
def test_quick_answers_do_not_wait_for_torch(arguments: list[str], tmp_path: Path, opsin_env: dict[str, str]) -> None:
    script = (
        "import sys\nfrom opsin.commands.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'numpy', 'timm'} & set(sys.modules)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env=opsin_env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    if arguments[-1] != "--json":
        assert process.stdout


@pytest.mark.usefixtures("torch_switches")
@pytest.mark.parametrize("order", ["out first", "out last", "out between", "flag first"])
def test_recipe_keys_and_options_come_in_any_order(order: str, tmp_path: Path) -> None:
    out, keys = ["--out", str(tmp_path / "run")], [*QUICK, "seed=3"]
    arguments = {
        "out first": ["quickstart", *out, "--quiet", *keys],
        "out last": ["quickstart", *keys, *out, "--quiet"],
        "out between": ["quickstart", *keys[:4], *out, "--quiet", *keys[4:]],
        "flag first": ["--quiet", *out, "quickstart", *keys],
    }[order]
    assert run("train", *arguments) == 0
    assert read(str(tmp_path / "run" / "recipe.yaml")) == read("quickstart", keys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fit"],
        ["train"],
        ["train", "quickstart", "--ot", "x"],
        ["train", "quickstart", "a=b", "--nope", "c=d"],
        ["eval", "run", "--out", "x"],
        ["schema", "extra"],
    ],
)
def test_arguments_that_do_not_exist_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: opsin" in capsys.readouterr().err


def test_each_fault_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "quickstart", "epoch=3", "optim.lr=-1", "--out", tmp_path / "run") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    assert all(line.startswith("opsin: ") for line in err.splitlines())
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("torch_switches")
def test_a_run_can_be_scored_listed_resumed_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert run("train", "quickstart", *QUICK, "--out", folder, "--quiet") == 0
    assert capsys.readouterr() == ("", "")

    assert run("eval", folder, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["accuracy"]["images"] == 359
    assert run("eval", folder, "accuracy") == 0
    assert f"top-1 {scores['accuracy']['top1']:.2%}" in capsys.readouterr().out
    assert run("eval", folder, "linear", "knn", "--weights", "initial") == 0
    assert [line.split(" top-1 ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "linear probe",
        "k-NN (k 20)",
    ]

    assert run("runs", tmp_path, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["status"], listed["step"]) == ("done", 2)
    assert run("runs", tmp_path) == 0
    assert "done" in capsys.readouterr().out

    assert run("resume", folder, "limits.steps=3", "--quiet") == 0
    assert run("runs", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3

    assert run("export", folder, "--out", tmp_path / "export") == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'export'}\n"
    assert (tmp_path / "export" / "backbone.safetensors").exists()


def test_an_unknown_score_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", "anywhere", "knm") == 2
    assert capsys.readouterr().err.startswith(
        "opsin: command line: unknown score 'knm'; known: accuracy, knn, linear, maps; did you mean knn?"
    )


def test_a_recipe_is_shown_as_it_will_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "show", "quickstart", "seed=7") == 0
    shown = capsys.readouterr().out
    assert "# The seed of every random number of the run." in shown
    (tmp_path / "shown.yaml").write_text(shown)
    assert read(str(tmp_path / "shown.yaml")) == read("quickstart", ["seed=7"])


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema") == 0
    assert json.loads(capsys.readouterr().out)["properties"]["seed"]["type"] == "integer"


def test_a_reader_that_leaves_early_is_no_fault(opsin_env: dict[str, str], tmp_path: Path) -> None:
    process = subprocess.run(
        f"{sys.executable} -m opsin recipes | true",
        shell=True,
        cwd=tmp_path,
        env=opsin_env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stderr == ""


@pytest.mark.usefixtures("torch_switches")
def test_a_failed_training_ends_with_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Twenty cancelled updates in a row: a learning rate beyond all measure.
    keys = (*OVERRIDES, *SMALL_VIT, "epochs=20", "optim.lr=1e30")
    assert run("train", "quickstart", *keys, "--out", tmp_path / "run", "--quiet") == 4
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("opsin: step ")
    assert "limits.cancelled_in_a_row allows 20" in last


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"opsin {__version__}\n"


@pytest.mark.parametrize(("arguments", "status"), [(["train", "quickstart"], 4), (["recipes"], 0)])
def test_only_a_table_may_end_because_nobody_reads_on(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int
) -> None:
    def broken(arguments: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(f"opsin.commands.{arguments[0]}._{arguments[0]}", broken)
    assert main(arguments) == status


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't start new thread"), ImportError("x.so: failed to map segment from it")]
)
def test_a_lack_of_memory_is_not_called_a_fault_of_opsin(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: Path) -> None:
        raise error

    monkeypatch.setattr("opsin.storage.listing.list_runs", run)
    assert main(["runs"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opsin: out of memory (")
    assert "ulimit -d" in line
