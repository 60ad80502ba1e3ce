"""`opsin tune lr` as a user types it."""

import json
from pathlib import Path

from opsin.run.recipe import read
from tests.cli.commands import deviation, pictures, run_several
from tests.conftest import RunOpsin

CONVNET = (
    *("device=cpu", "precision=fp32", "data.workers=0", "data.image_size=10"),
    *("model.name=convnet", "model.widths=[8,8,8]"),
)
"""Keys that make `quickstart` a network that learns digits in a hundred updates."""


def test_the_suggestion_is_said_with_its_reason_and_its_recipe_trains(tmp_path: Path, run_opsin: RunOpsin) -> None:
    done = run_opsin("tune", "lr", "quickstart", *CONVNET, "--steps", "100", "optim.name=sgd", "optim.lr=auto")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["quickstart-lr"]
    folder = Path("runs", "quickstart-lr")
    lr = json.loads((tmp_path / folder / "lr.json").read_text())["rates"]["lr"]
    assert "sweep: 100 updates, learning rate 0.0001 to 10" in done.stdout
    assert f"optim.lr {lr:g}: where the steep descent of the loss ends" in done.stdout
    assert f"opsin train {folder}/tuned.yaml" in done.stdout
    tuned = read(str(tmp_path / folder / "tuned.yaml"))
    assert (tuned.optim.name, tuned.optim.lr) == ("sgd", lr)
    keys = ("limits.steps=2", "log.plots=false", "log.tensorboard=false")
    again = run_opsin("train", folder / "tuned.yaml", *keys, "--out", "run", "--quiet")
    assert again.returncode == 0, again.stderr


def test_wrong_input_is_told_in_one_line(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("of a run")
    pictures(tmp_path / "few", count=3)
    tune = ("tune", "lr", "quickstart", *CONVNET, "--quiet")
    cases: dict[tuple[str, ...], tuple[int, str]] = {
        (*tune, "--steps", "5"): (2, "command line: --steps 5: too few to see a slope; use 20 or more"),
        (*tune, "--from", "1", "--to", "0.1"): (
            2,
            "command line: --from 1 --to 0.1: must be two rates above 0, the sm",
        ),
        (*tune, "--out", "run"): (2, "run: holds other files .recipe.yaml.; choose an empty or a new folder"),
        (*tune, "data.path=empty"): (2, "empty: "),
        (*tune, "data.path=nowhere"): (2, "nowhere: "),
        (*tune, "data.path=few", "data.kind=folder"): (2, "batch_size=64: "),
        (*tune, "optim.lr=fast"): (2, "command line: optim.lr: 'fast'"),
        ("tune", "lr", "quikstart"): (2, "command line: quikstart: .*; did you mean quickstart"),
        (*tune, "optim.name=sgd", "--from", "1e6", "--to", "1e8", "--steps", "30"): (
            4,
            "quickstart: no learning rate found: the loss runs away as soon as the sweep begins, at 1e.06: begin lower",
        ),
        (*tune, "--from", "1e-9", "--to", "1e-8", "--steps", "30"): (
            4,
            "quickstart: no learning rate found: the loss never falls clearly before the sweep ended at 1e-08",
        ),
    }
    answers = run_several(list(cases), tmp_path, opsin_env)
    deviations = {
        " ".join(command): found
        for (command, (status, fault)), answer in zip(cases.items(), answers, strict=True)
        if (found := deviation(answer, status, fault))
    }
    assert not deviations, "\n".join(f"{command}\n{found}" for command, found in deviations.items())


def test_auto_finds_the_rate_before_the_run_and_the_same_command_goes_on_with_it(
    tmp_path: Path, run_opsin: RunOpsin
) -> None:
    keys = (*CONVNET, "optim.name=sgd", "optim.lr=auto", "epochs=0.5", "log.plots=false", "log.tensorboard=false")
    done = run_opsin("train", "quickstart", *keys, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "optim.lr=auto: sweeping the learning rate first (run-lr)" in done.stdout
    rates = json.loads((tmp_path / "run-lr" / "lr.json").read_text())["rates"]
    assert read(str(tmp_path / "run" / "recipe.yaml")).optim.lr == rates["lr"]
    assert "sweep" not in (tmp_path / "run" / "events.jsonl").read_text()
    again = run_opsin("train", "quickstart", *keys, "--out", "run")
    assert again.returncode == 0, again.stderr
    assert "sweeping" not in again.stdout, "the run has its rate"
    assert "resumed from the checkpoint" in again.stdout


def test_auto_that_finds_nothing_starts_no_run(tmp_path: Path, run_opsin: RunOpsin) -> None:
    pictures(tmp_path / "few", count=3)
    keys = (*CONVNET, "data.path=few", "data.kind=folder", "optim.lr=auto")
    done = run_opsin("train", "quickstart", *keys, "--out", "run", "--quiet")
    assert done.returncode == 2
    assert done.stderr.startswith("opsin: optim.lr=auto: batch_size=64: ")
    assert not (tmp_path / "run").exists()
