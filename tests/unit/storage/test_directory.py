"""Run directories: one writer, nothing lost, and runs in a list."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opsin.errors import RunError
from opsin.storage.directory import RunDirectory, git_state, installed_versions
from opsin.storage.listing import list_runs, runs_table

RECIPE = "seed: 0\n"


def prepare(path: Path, recipe: str = RECIPE, *, fresh: bool = False) -> RunDirectory:
    run = RunDirectory.prepare(path, fresh=fresh)
    run.take_recipe(recipe)
    return run


# --- prepare ------------------------------------------------------------------------------------


def test_a_new_directory_holds_the_recipe(tmp_path: Path) -> None:
    with prepare(tmp_path / "deep" / "run") as run:
        assert run.recipe.read_text() == RECIPE
        assert run.exists()


def test_the_same_recipe_continues(tmp_path: Path) -> None:
    prepare(tmp_path / "run").close()
    (tmp_path / "run" / "metrics.jsonl").write_text("kept")
    with prepare(tmp_path / "run") as run:
        assert run.metrics.read_text() == "kept"


def test_a_recipe_that_differs_in_form_only_continues_and_is_written_anew(tmp_path: Path) -> None:
    prepare(tmp_path / "run").close()
    text = "# a comment\n" + RECIPE
    with prepare(tmp_path / "run", text) as run:
        assert run.recipe.read_text() == text


def test_another_recipe_is_an_error_that_shows_the_difference_and_the_ways_out(tmp_path: Path) -> None:
    path = tmp_path / "run"
    prepare(path).close()
    with pytest.raises(RunError) as caught, RunDirectory.prepare(path, fresh=False) as run:
        run.take_recipe("seed: 1\n", differences=["seed: 0 there, 1 asked for"])
    what, difference, way_out = caught.value.faults
    assert what == f"{path}: holds a run of another recipe"
    assert difference == f"{path}/recipe.yaml: seed: 0 there, 1 asked for"
    assert all(way in way_out for way in ("--out", "--fresh", f"opsin resume {path} key=value"))
    assert (path / "recipe.yaml").read_text() == RECIPE
    prepare(path).close()  # the lock is free again


def test_fresh_moves_the_earlier_run_aside_and_says_so(tmp_path: Path) -> None:
    path, notes = tmp_path / "run", list[str]()
    for seed in range(3):
        with prepare(path, f"seed: {seed}\n", fresh=True) as run:
            notes += run.notes
            run.metrics.write_text(f"run {seed}")
    assert notes == [f"{path}: the earlier run was moved to {path}.before-{number}" for number in (1, 2)]
    kept = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run.before-1", "run.before-2", "run")]
    assert kept == ["run 0", "run 1", "run 2"]


def test_fresh_leaves_a_link_where_it_is_and_moves_what_it_leads_to(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk" / "run", tmp_path / "run"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    prepare(link).close()
    with prepare(link, "seed: 1\n", fresh=True):
        assert (disk / "recipe.yaml").read_text() == "seed: 1\n"
    assert link.readlink() == disk
    assert (disk.with_name("run.before-1") / "recipe.yaml").read_text() == RECIPE


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"holds 1 other files \(thesis.tex, ...\) and no run; choose an empty or a new"):
        prepare(tmp_path, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_left_by_a_kill_during_set_up_is_taken(tmp_path: Path) -> None:
    for name in (".lock", ".recipe.yaml.4711.writing"):
        (tmp_path / name).write_text("")
    with prepare(tmp_path) as run:
        assert sorted(path.name for path in run.path.iterdir()) == [".lock", "recipe.yaml"]


def test_who_takes_the_lock_finishes_what_a_killed_process_left_half_done(tmp_path: Path) -> None:
    prepare(tmp_path).close()
    folder = tmp_path / "checkpoints"

    def leave() -> None:
        for name in (".replacing-step-00000005", ".removing-step-00000004-1", ".writing-6-1"):
            (folder / name).mkdir(parents=True)

    leave()
    with RunDirectory.prepare(tmp_path, fresh=False):
        assert [path.name for path in folder.iterdir()] == ["step-00000005"], "before the recipes are compared"
    leave()
    with RunDirectory.locked(tmp_path):
        assert [path.name for path in folder.iterdir()] == ["step-00000005"]


def test_a_place_that_cannot_be_written_is_an_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(RunError, match=rf"{path}: cannot be written: {reason}.*; choose another folder with --out"):
            prepare(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(RunError, match="Permission denied"):
        prepare(tmp_path / "run")


# --- the lock -----------------------------------------------------------------------------------


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from opsin.storage.directory import RunDirectory\n"
        f"RunDirectory.prepare(pathlib.Path(sys.argv[1]), fresh=False).take_recipe({RECIPE!r})\n"
        "lock = RunDirectory.prepare(pathlib.Path(sys.argv[1]), fresh=False)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        for fresh in (False, True):
            with pytest.raises(RunError, match=f"process {other.pid} is writing this run; stop it first"):
                prepare(tmp_path, fresh=fresh)
        other.kill()
    prepare(tmp_path).close()  # a killed process holds no lock


def test_a_directory_that_nobody_refers_to_is_unlocked(tmp_path: Path) -> None:
    prepare(tmp_path / "run")
    prepare(tmp_path / "run").close()


# --- run.json -----------------------------------------------------------------------------------


def read(path: Path) -> dict[str, object]:
    facts: dict[str, object] = json.loads(path.read_text())
    return facts


def test_run_json_tells_the_sessions_of_a_run(tmp_path: Path) -> None:
    with prepare(tmp_path) as run:
        run.begin_session(recipe="tiny", seed=7, hardware={"device": "cpu"})
        assert read(run.run_json)["status"] == "running"
        run.end_session("stopped", "SIGTERM")
        first = read(run.run_json)
    with prepare(tmp_path) as run:
        run.begin_session(recipe="tiny", seed=7, hardware={"device": "cuda"})
    with prepare(tmp_path) as run:
        run.begin_session(recipe="tiny", seed=7, hardware={"device": "cpu"})
        run.end_session("done")
        last = read(run.run_json)
    assert (first["status"], first["reason"], first["seed"]) == ("stopped", "SIGTERM", 7)
    assert last["started"] == first["started"]
    assert (last["status"], last["reason"], last["hardware"]) == ("done", None, {"device": "cpu"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", str(last["ended"]))
    sessions = last["sessions"]
    assert isinstance(sessions, list)
    assert [session["status"] for session in sessions] == ["stopped", "killed", "done"]
    assert last["versions"] == installed_versions()


def test_a_damaged_run_json_is_an_error_and_not_overwritten(tmp_path: Path) -> None:
    with prepare(tmp_path) as run:
        run.run_json.write_text("{")
        with pytest.raises(RunError, match=r"run\.json: is damaged .*; delete it"):
            run.begin_session(recipe="tiny", seed=0, hardware={})
        assert run.run_json.read_text() == "{"


def test_versions_name_what_numbers_depend_on() -> None:
    versions = installed_versions()
    assert versions["python"] == sys.version.split()[0]
    assert {"torch", "timm", "numpy"} <= versions.keys()


def test_git_state_tells_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None
    (tmp_path / "file").write_text("one")
    author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=/dev/null"]
    for command in (["init", "-q"], ["add", "file"], [*author, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], check=True)
    clean = git_state()
    assert clean is not None
    assert (len(str(clean["commit"])), clean["dirty"]) == (40, False)
    (tmp_path / "untracked").write_text("")
    assert git_state() == clean
    (tmp_path / "file").write_text("two")
    assert git_state() == clean | {"dirty": True}


# --- the list of runs ---------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    with prepare(tmp_path / "a-done") as run:
        run.begin_session(recipe="tiny", seed=0, hardware={})
        run.end_session("done")
        run.metrics.write_text('{"step": 10}\n{"step": 20}\n{"st')
        scores = {"train/loss": {"last": 0.5, "best": 0.4}, "val/top1": {"last": 0.9, "best": 0.95}, "lr": {"last": 1}}
        run.summary.write_text(json.dumps({"scores": scores}))
    with prepare(tmp_path / "b-killed") as run:
        run.begin_session(recipe="tiny", seed=0, hardware={})
    prepare(tmp_path / "c-new").close()
    for name, content in (("d-damaged", "{"), ("e-damaged", "[1]")):
        prepare(tmp_path / name).close()
        (tmp_path / name / "run.json").write_text(content)
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    return tmp_path


def test_runs_are_listed_with_state_and_scores(runs: Path) -> None:
    with prepare(runs / "f-running") as run:
        run.begin_session(recipe="tiny", seed=0, hardware={})
        found = list_runs(runs)
    assert [(run.name, run.status) for run in found] == [
        ("a-done", "done"),
        ("b-killed", "killed"),
        ("c-new", "new"),
        ("d-damaged", "damaged"),
        ("e-damaged", "damaged"),
        ("f-running", "running"),
    ]
    assert (found[0].recipe, found[0].step, found[0].best) == ("tiny", 20, {"train/loss": 0.4, "val/top1": 0.95})
    assert json.loads(json.dumps(found[0].as_dict()))["best"]["val/top1"] == 0.95


def test_the_table_is_aligned_and_puts_evaluations_first(runs: Path) -> None:
    lines = runs_table(list_runs(runs))
    assert lines[0] == "run        status   recipe  step  best"
    assert lines[1] == "a-done     done     tiny    20    val/top1 0.95  train/loss 0.4"
    assert lines[4] == "d-damaged  damaged  -       -     -"


def test_a_run_itself_can_be_listed_and_a_missing_folder_has_none(runs: Path) -> None:
    assert [run.name for run in list_runs(runs / "a-done")] == ["a-done"]
    assert list_runs(runs / "nothing") == []
