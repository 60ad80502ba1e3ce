"""Everything that a user can get wrong: one line for each fault, the right exit status, nothing lost."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from opsin.storage.directory import RunDirectory
from tests.cli.commands import Answer, deviation, pictures, run_several, train
from tests.conftest import RunOpsin
from tests.unit.data.pictures import encoded, fill, pixels

Cases = dict[tuple[str, ...], tuple[str, ...]]


def judge(cases: Cases, cwd: Path, env: dict[str, str], *, status: int = 2) -> None:
    """All answers have this status and the faults stated."""
    answers = run_several(list(cases), cwd, env)
    deviations = {
        " ".join(command): found
        for (command, faults), answer in zip(cases.items(), answers, strict=True)
        if (found := deviation(answer, status, *faults))
    }
    assert not deviations, "\n".join(f"{command}\n{found}" for command, found in deviations.items())


# --- the recipe ---------------------------------------------------------------------------------


def test_every_fault_of_a_command_is_told_at_once_and_nothing_is_written(tmp_path: Path, run_opsin: RunOpsin) -> None:
    done = run_opsin(
        *("train", "quickstart", "--out", "run", "epoch=3", "epochs=ten", "data.holdout=1.5", "precision=fp8"),
        *("verbose", "checkpoints.every=3 weeks", "method.name=supervize", "device=gpu", "optim.betas=[0.9,1]"),
        "method.views.scale=[1,0.5]",
    )
    assert done.returncode == 2
    assert done.stdout == ""
    place = "opsin: command line: "
    assert sorted(done.stderr.splitlines()) == sorted(
        [
            f"{place}epoch: unknown key; did you mean epochs?",
            f"{place}epochs: 'ten' is not an option; must be a number or 'auto'",
            f"{place}data.holdout: 1.5 is out of range; must be less than 1",
            f"{place}precision: 'fp8' is not an option; must be 'auto', 'fp32', 'tf32', 'bf16' or 'fp16'",
            f"{place}'verbose' is not a setting; write key=value, such as data.path=images",
            f"{place}checkpoints.every: '3 weeks' does not fit; must be like "
            "'500 steps', '1 epoch', '10 minutes' or 'never'",
            f"{place}method.name: unknown method 'supervize'; known: dino, hjepa, ijepa, supervised; "
            "did you mean supervised?",
            f"{place}device: 'gpu' is not a device; must be auto, cpu, cuda or cuda:N",
            f"{place}optim.betas.1: 1 is out of range; must be less than 1",
        ]
    )
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_cannot_be_read_names_file_and_line(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    files = {
        "syntax.yaml": "extends: quickstart\nepochs: [1\nseed: 2\n",
        "twice.yaml": "extends: quickstart\nepochs: 1\nepochs: 2\n",
        "text.yaml": "an essay\n",
        "base.yaml": "extends: nothing\n",
        "circle.yaml": "extends: circle.yaml\n",
        "two faults.yaml": "extends: quickstart\nepochs: -1\noptim: {name: adamw, rate: 1}\n",
        "empty.yaml": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    cases: Cases = {
        ("train", "syntax.yaml"): ("syntax.yaml:3: is not valid YAML: .*",),
        ("train", "twice.yaml"): ("twice.yaml:3: epochs: given twice; the first is at twice.yaml:2",),
        ("train", "text.yaml"): ("text.yaml:1: a recipe must be keys and values",),
        ("train", "base.yaml"): ("base.yaml:1: extends: nothing: is neither a file nor a shipped recipe; shipped: ",),
        ("train", "circle.yaml"): ("circle.yaml:1: extends: circular: .*; remove one",),
        ("train", "two faults.yaml"): (
            "two faults.yaml:2: epochs: -1 is out of range; must be greater than 0",
            "two faults.yaml:3: optim.rate: unknown key; did you mean optim.",
        ),
        ("train", "empty.yaml", "seed=1"): (
            "empty.yaml: epochs is missing; give the passes over the images as epochs=VALUE, or stages",
            *(f"empty.yaml: {key}: missing" for key in ("batch_size", "data.path", "data.image_size", "model.name")),
        ),
        ("train", "nowhere.yaml"): ("command line: nowhere.yaml: is neither a file nor a shipped recipe",),
        ("recipes", "show", "quikstart"): ("command line: quikstart: .*; did you mean quickstart[?]",),
    }
    judge(cases, tmp_path, opsin_env)


# --- images, and settings that do not fit them or this machine ------------------------------------


def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    pictures(tmp_path / "pictures")
    pictures(tmp_path / "lonely", classes="a")
    fill(tmp_path / "flat", *(f"{number}.png" for number in range(24)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no weights")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    save_file({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "other.safetensors")
    cases: Cases = {
        train("data.path=nowhere"): ("nowhere: no such file or folder; .*check the path",),
        train("data.path=~/nowhere"): ("~/nowhere: no such file or folder",),
        train("data.path=notes.txt"): ("notes.txt: not a known kind of file; data.path is ",),
        train("data.path=empty"): ("empty: no images in this folder; .*check the path",),
        train("data.path=lonely"): ("data.path: 'a' is the only class; .* at least two folders",),
        train("data.path=flat"): ("data.path: these images have no labels, .*put each class into a folder",),
        train("batch_size=100"): ("batch_size=100: there are only 20 training images, .*use batch_size=20 or less",),
        train("data.holdout=0.9"): ("batch_size=8: there are only 2 training images",),
        train("data.holdout=0"): ("evaluators.val: there are no validation images .*or evaluators.val=null",),
        train("accumulate=9"): (
            "accumulate=9: a batch of 8 images cannot be split into 9 parts; use accumulate=8 or less",
        ),
        train("model.patch=3"): ("model.patch = 3: data.image_size 8 is not a multiple of it; use ",),
        (
            "train",
            "quickstart",
            "data.path=pictures",
            "batch_size=8",
            "model.name=resnet5",
            "--out",
            "run",
            "--quiet",
        ): ("model.name = 'resnet5': unknown to opsin and timm; did you mean 'resnet50'",),
        train("model.weights=no.pt"): ("no.pt: does not exist; give a .safetensors, .pt or .pth file",),
        train("model.weights=notes.txt"): ("notes.txt: ",),
        train("model.weights=cut.pt"): ("cut.pt: ",),
        train("model.weights=other.safetensors"): (
            "other.safetensors: has 0 of the .* give weights of the same model",
        ),
        train("stages=[{epochs: 1, image_size: 7}]"): (
            r"stages.0.image_size=7: model.patch = 2: images of 7 x 7 pixels",
        ),
        train("stages=[{epochs: 1, train: [heads.*]}]"): (r"stages.0.train: 'heads.\*' matches no parameter; .*head",),
        train("stages=[{epochs: 1, data_fraction: 0.01}]"): (
            "stages.0.data_fraction=0.01: of the .* images of class '.' none would be left; use at least 0.0",
        ),
        train("stages=[{epochs: 1}, {epochs: 1, batch_size: 100}]"): (
            "stages.1.batch_size=100: there are only 20 training images, .*use stages.1.batch_size=20 or less",
        ),
        train("device=cuda:99"): ("device: 'cuda:99' (was asked for, but torch .* sees no GPU; use|does not exist)",),
        train("precision=tf32"): ("precision: 'tf32' exists on CUDA only; use precision=fp32",),
    }
    judge(cases, tmp_path, opsin_env)
    # None of them is in the way of the right command, and no traceback went into the log.
    assert "Traceback" not in (tmp_path / "run" / "log.txt").read_text()
    judge({train(): ()}, tmp_path, opsin_env, status=0)


def test_several_processes_are_refused(tmp_path: Path, run_opsin: RunOpsin) -> None:
    done = run_opsin(*train("data.path=digits"), env={"WORLD_SIZE": "2"})
    assert (done.returncode, done.stderr) == (
        2,
        "opsin: WORLD_SIZE=2: this version trains in one process; start it without torchrun\n",
    )


def test_unreadable_images_are_listed_and_too_many_stop_the_run(tmp_path: Path, run_opsin: RunOpsin) -> None:
    folder = pictures(tmp_path / "pictures", count=55)
    cut = encoded(Image.fromarray(pixels(height=64, width=64)), "JPEG")
    (folder / "a" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (folder / "b" / "text.jpg").write_text("a thousand words")
    keys = ("data.holdout=0", "evaluators.val=null", "data.resident=true")
    # Pictures of one size are needed by resident=true; two unreadable ones of 112 are above the 1 % allowed.
    done = run_opsin(*train(*keys))
    assert deviation(Answer(done.returncode, done.stdout, done.stderr), 2, "2 of 112 images are unreadable: ") == ""
    assert "data.max_unreadable=0.01 allows 1: repair or remove them, or raise data.max_unreadable" in done.stderr
    listed = (tmp_path / "run" / "quarantine.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["pictures/a/cut.jpg", "pictures/b/text.jpg"]
    assert "truncated or damaged JPEG" in listed[0]
    assert "not an image" in listed[1]

    (folder / "b" / "text.jpg").unlink()
    (tmp_path / "run" / "quarantine.txt").unlink()
    done = run_opsin(*train(*keys))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "quarantine.txt").read_text().splitlines() == listed[:1]


# --- the run directory ---------------------------------------------------------------------------


def test_places_that_hold_no_run_are_named(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    (tmp_path / "file").write_text("")
    pictures(tmp_path / "pictures")
    cases: Cases = {
        train(out="file/run"): ("file/run: cannot be written: Not a directory.*choose another folder with --out",),
        train(out="file"): ("file: cannot be written: File exists; choose another folder with --out",),
        train(out="pictures"): (r"pictures: holds 2 other files \(a, ...\) and no run; choose an empty or a new",),
        train(out="busy"): (r"busy: process \d+ is writing this run; stop it first, or choose another --out",),
        ("resume", "busy"): (r"busy: process \d+ is writing this run",),
        ("eval", "busy", "beauty"): ("command line: unknown score 'beauty'; known: accuracy",),
        ("eval", "busy"): ("busy: holds no weights yet; train it first: opsin resume busy",),
        ("export", "busy"): ("busy: holds no weights yet; train it first: opsin resume busy",),
    }
    for place in ("nowhere", "pictures", "file"):
        cases["resume", place] = (f"{place}: holds no run to resume .*; start one with opsin train RECIPE --out",)
        cases["eval", place] = (f"{place}: is no run directory and no checkpoint of one; `opsin runs` lists those",)
        cases["export", place] = (f"{place}: is no run directory and no checkpoint of one",)
    with RunDirectory.prepare(tmp_path / "busy", fresh=False) as busy:
        busy.take_recipe("extends: quickstart\n")
        judge(cases, tmp_path, opsin_env)


def test_a_changed_recipe_is_shown_and_resume_takes_what_may_change(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    pictures(tmp_path / "pictures")
    steps: list[tuple[tuple[str, ...], int, tuple[str, ...]]] = [
        (train(), 0, ()),
        (
            train("optim.lr=0.5", "epochs=3"),
            2,
            (
                "run: holds a run of another recipe",
                r"run/recipe.yaml: epochs: 2(\.0)? -> 3",
                "run/recipe.yaml: optim.lr: 0.002 -> 0.5",
                "choose another --out, start over with --fresh .*or go on with changed keys: opsin resume run",
            ),
        ),
        (
            ("resume", "run", "seed=7", "model.width=32", "epochs=9"),
            2,
            ("run: seed: 0 -> 7: a run keeps this key", "run: model.width: 16 -> 32: a run keeps this key"),
        ),
        (("resume", "run", "epoch=9"), 2, ("command line: epoch: unknown key; did you mean epochs[?]",)),
        (("resume", "run", "data.path=nowhere", "--quiet"), 2, ("nowhere: no such file or folder",)),
        (("resume", "run", "epochs=1", "--quiet"), 2, ("run/checkpoints: the run has done 4 steps, the recipe ends",)),
        # What was refused has left no trace: the first command still means this run.
        (train(), 0, ()),
        (("resume", "run", "epochs=3", "optim.lr=0.5", "--quiet"), 0, ()),
        (train("epochs=3", "optim.lr=0.5"), 0, ()),
        ((*train(), "--fresh"), 0, ()),
    ]
    answers = run_several([command for command, _, _ in steps], tmp_path, opsin_env)
    for (command, status, faults), answer in zip(steps, answers, strict=True):
        assert deviation(answer, status, *faults) == "", command
    assert (tmp_path / "run.before-1" / "model.safetensors").exists()


def test_damage_is_survived_where_it_can_be_and_told_where_not(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    pictures(tmp_path / "pictures")
    assert run_several([train("checkpoints.best=null", out="whole")], tmp_path, opsin_env)[0].status == 0
    for name in ("flipped", "new", "hopeless", "history", "weights"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    newest = "checkpoints/step-00000004"
    flip_byte(tmp_path / "flipped" / newest / "state.pt")
    manifest = tmp_path / "new" / newest / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    for path in (tmp_path / "hopeless" / "checkpoints").glob("step-*/state.pt"):
        path.write_bytes(b"")
    (tmp_path / "hopeless" / "model.safetensors").unlink()
    (tmp_path / "history" / "run.json").write_text("{")
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"")
    resume = {name: ("resume", name, "--quiet") for name in ("flipped", "new", "hopeless", "history")}
    flipped, *others = run_several(
        [*resume.values(), ("eval", f"new/{newest}"), ("eval", "hopeless"), ("eval", "weights")], tmp_path, opsin_env
    )
    assert (flipped.status, flipped.err) == (0, "")
    warning = f"warning: flipped/{newest}: state.pt: sha256 is "
    assert flipped.out.startswith(warning)
    assert "renamed to damaged-step-00000004, going back to step 2" in flipped.out
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "flipped" / "model.safetensors").read_bytes() == whole

    damaged = (f"hopeless/{newest}: state.pt: has 0 bytes", "hopeless/checkpoints/step-00000002: state.pt: has 0 bytes")
    too_new = f"new/{newest}: too new: format 99, this opsin .* reads up to 2; upgrade opsin"
    expected = (
        (too_new,),
        (
            *damaged,
            "hopeless/checkpoints: no valid checkpoint is left; fetch one from the backup of the run, if it has any: "
            "opsin restore URL OTHER_DIR; or start over with --fresh",
        ),
        ("history/run.json: is damaged .*; delete it to go on without its history",),
        (too_new,),
        (*damaged, "hopeless: no valid weights; start over with --fresh"),
        ("weights/model.safetensors: is damaged .*; delete it to use the checkpoints",),
    )
    for answer, faults in zip(others, expected, strict=True):
        assert deviation(answer, 2, *faults) == ""


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_full_disk_costs_no_step_that_was_saved(
    tmp_path: Path, run_opsin: RunOpsin, opsin_env: dict[str, str]
) -> None:
    pictures(tmp_path / "pictures")
    # No file may grow beyond this: enough for all but weights.
    limit = 8 * 1024
    done = subprocess.run(
        [sys.executable, "-m", "opsin", *train()],
        cwd=tmp_path,
        env={**opsin_env, "PYTHONDONTWRITEBYTECODE": "1"},  # Python, too, could write half of a file
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    answer = Answer(done.returncode, done.stdout, done.stderr)
    pattern = "run: training is done, but its last checkpoint could not be written .*mend that, or make room; then"
    assert deviation(answer, 2, pattern) == ""
    assert "warning: checkpoint of step 2 was not written: File too large; there is no complete one" in done.stdout
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    done = run_opsin(*train())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kib", [400_000, 700_000, 1_300_000])
def test_a_limit_in_which_torch_cannot_work_is_refused(tmp_path: Path, opsin_env: dict[str, str], kib: int) -> None:
    """In so little memory libraries wait for ever when they are loaded, or abort the process in an update."""
    command = f"ulimit -d {kib}; exec {sys.executable} -m opsin train quickstart limits.steps=2 --quiet --out little"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=opsin_env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"opsin: ulimit -d {kib}: opsin train cannot work in {kib // 1024} MiB; it needs 1536"
    )
    assert done.stderr.count("\n") == 1
