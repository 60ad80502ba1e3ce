"""The command line. torch is imported by the commands that need it, after the arguments are read."""

import argparse
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from opsin.__version__ import __version__
from opsin.commands.backup import add_commands, directory_of_resume, out_of_train, take_local
from opsin.commands.checkpoints import add_checkpoints
from opsin.commands.supervision import supervised, take_supervision
from opsin.errors import ConfigError, OpsinError, TrainingError, TransientError
from opsin.processes.trail import Trail
from opsin.training.stop import SIGNALS, Interrupt

_WEIGHTS = "as trained, or their moving average where the recipe has `ema` (default: raw)"
_OVERRIDES = "recipe keys to change, as key=value (optim.lr=0.001)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (0 done, 2 wrong input, 3 stopped, 4 training failed)."""
    _mend_streams()
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no second run of positionals: `train RECIPE --out DIR key=value` leaves them over.
    if any(text.startswith("-") for text in rest) or not hasattr(arguments, "overrides"):
        parser.parse_args(argv)  # ends with argparse's own message
    else:
        arguments.overrides += rest
    # A table that nobody reads on is done; a training that breaks before its end is not.
    unread = 4 if arguments.command in ("train", "resume") else 0
    try:
        status: int = arguments.run(arguments)
        unread = status
        sys.stdout.flush()
    except OpsinError as error:
        if isinstance(error, TrainingError) and not isinstance(error, TransientError):
            Trail.from_environment().verdict(str(error))
        status = _fail(error.exit_status, *error.faults)
    except KeyboardInterrupt as error:
        # An interrupt that went through exec, as in some imports, makes Python die of SIGINT at exit: exec forgets it.
        exec("")
        goes_on = "the same command begins again, from the newest checkpoint where there is one"
        status = _fail(3, f"{str(error) or 'SIGINT'}: stopped before the end; {goes_on}")
    except BrokenPipeError:
        status = unread
    except OSError as error:
        status = _fail(4, str(error))
    except Exception:
        traceback.print_exc()
        status = _fail(4, "the above is a fault of opsin or of your own code, not of the recipe; saved steps are kept")
    _flush_output()
    return status


def _fail(status: int, *faults: str) -> int:
    for fault in faults:
        print(f"opsin: {fault}", file=sys.stderr)
    return status


def _mend_streams() -> None:
    """A stream that the caller closed takes everything, one with few letters shows the others as `?`."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # for as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _flush_output() -> None:
    """Write what is left, unless nobody takes it (`opsin runs | head`), of which Python would complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Outside of training, which has its own way to stop, SIGTERM and SIGUSR1 end the process as Ctrl-C does."""
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _path(text: str) -> Path:
    # No shell expands the ~ in `--out=~/runs`.
    return Path(os.path.expanduser(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="opsin", description="Train vision models from one YAML recipe.")
    parser.add_argument("--version", action="version", version=f"opsin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe; goes on where the run directory holds a checkpoint")
    _take_recipe(train)
    train.add_argument("--out", metavar="DIR", help="run directory (default: runs/RECIPE), or s3://BUCKET/FOLDER")
    take_local(train)
    train.add_argument("--fresh", action="store_true", help="start over; an earlier run in DIR is moved aside")
    train.add_argument("--quiet", action="store_true", help="print warnings only")
    take_supervision(train)
    train.set_defaults(run=_train)

    resume = commands.add_parser("resume", help="go on with a run, with changed keys if wanted")
    resume.add_argument("directory", metavar="DIR", help="run directory, or s3://BUCKET/FOLDER")
    take_local(resume)
    resume.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)
    resume.add_argument("--quiet", action="store_true", help="print warnings only")
    take_supervision(resume)
    resume.set_defaults(run=_resume)

    _add_eval(commands.add_parser("eval", help="score a run on its validation images, or others"))
    verify = commands.add_parser("verify", help="train straight, and killed and resumed; compare the weights' hashes")
    _take_recipe(verify)
    verify.add_argument("--steps", type=int, default=200, help="steps to train (default: 200)")
    verify.add_argument("--kills", type=int, default=3, help="times to kill the second run (default: 3)")
    verify.set_defaults(run=_verify)

    recipes = commands.add_parser("recipes", help="list the shipped recipes, or show one with all its keys")
    actions = recipes.add_subparsers(dest="action", metavar="show")
    show = actions.add_parser("show", help="print the whole effective recipe, with a comment for each key")
    _take_recipe(show)
    show.set_defaults(run=_show)
    recipes.set_defaults(run=_recipes)

    restore = commands.add_parser("restore", help="get a run back from its backup")
    add_commands(restore, commands.add_parser("backup", help="bring the backup of a run up to date"))
    add_checkpoints(commands.add_parser("checkpoints", help="list, verify, prune or restore the checkpoints"), _path)
    schema = commands.add_parser("schema", help="print the JSON schema of recipes, for editors")
    schema.set_defaults(run=_schema)

    runs = commands.add_parser("runs", help="list run directories with their state and scores")
    runs.add_argument("folder", nargs="?", type=_path, default=Path("runs"), help="where to look (default: runs)")
    runs.add_argument("--json", action="store_true", help="print one JSON object per run")
    runs.set_defaults(run=_runs)

    export = commands.add_parser("export", help="write the encoder as safetensors and JSON")
    export.add_argument("directory", type=_path, metavar="DIR", help="run directory, or a checkpoint inside it")
    export.add_argument("--weights", choices=("raw", "ema"), default="raw", help=_WEIGHTS)
    export.add_argument("--out", type=_path, metavar="FOLDER", help="where to write (default: DIR/export)")
    export.set_defaults(run=_export)
    _add_tune(commands.add_parser("tune", help="measure good settings: `tune lr` for the learning rate"))
    _add_data(commands.add_parser("data", help="look at images, or split them, before training"))
    return parser


def _take_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="a shipped recipe (see `opsin recipes`) or a YAML file")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)


def _add_eval(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("directory", type=_path, metavar="DIR", help="run directory, or a checkpoint inside it")
    scores = "accuracy, knn, linear, maps (default: accuracy of a classifier, else knn and linear)"
    evaluate.add_argument("scores", nargs="*", metavar="SCORE", help=scores)
    weights = "as trained, their moving average, or those before step 0 (default: raw)"
    evaluate.add_argument("--weights", choices=("raw", "ema", "initial"), default="raw", help=weights)
    evaluate.add_argument("--data", metavar="PATH", help="score on these labelled images, as in data.path")
    blocks = "score features after the last N blocks, side by side (knn, linear; default: as the recipe says)"
    evaluate.add_argument("--blocks", type=int, metavar="N", help=blocks)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_eval)


def _add_tune(tune: argparse.ArgumentParser) -> None:
    subjects = tune.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    lr = subjects.add_parser("lr", help="sweep the learning rate; write its curve and a recipe with the best one")
    _take_recipe(lr)
    lr.add_argument("--out", type=_path, metavar="DIR", help="where to write (default: runs/RECIPE-lr)")
    ends = "(default: 1e-5 to 1 for AdamW, else 1e-4 to 10)"
    lr.add_argument("--from", dest="first", type=float, metavar="LR", help=f"first learning rate {ends}")
    lr.add_argument("--to", dest="last", type=float, metavar="LR", help="last learning rate")
    lr.add_argument("--steps", type=int, default=200, help="updates to make (default: 200)")
    lr.add_argument("--quiet", action="store_true", help="print warnings only")
    lr.set_defaults(run=_tune_lr)

    loader = subjects.add_parser("loader", help="find out whether training waits for the data, and the best settings")
    _take_recipe(loader)
    loader.add_argument("--seconds", type=float, default=2.0, help="time for each measurement (default: 2)")
    loader.add_argument("--json", action="store_true", help="print one JSON object")
    loader.set_defaults(run=_tune_loader)


def _add_data(data: argparse.ArgumentParser) -> None:
    subjects = data.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    split = subjects.add_parser("split", help="divide images into train, val and test; copies of one stay together")
    stats = subjects.add_parser("stats", help="count, measure and check images: sizes, colours, copies, faults")
    for command in (split, stats):
        command.add_argument("path", metavar="PATH", help="a folder, list or file, as in data.path")
        command.add_argument("--labels", choices=("auto", "folders", "none"), default="auto", help="as in data.labels")
        command.add_argument("--image-column", metavar="NAME", help="as in data.image_column")
        command.add_argument("--label-column", metavar="NAME", help="as in data.label_column")
        bits = "bits of 128 in which hashes of near-duplicates differ at most, or off (default: 8)"
        command.add_argument("--near-duplicates", type=_bits, default=8, metavar="N", help=bits)
        command.add_argument("--json", action="store_true", help="print one JSON object")
    split.add_argument("--out", type=_path, metavar="DIR", required=True, help="the new folder")
    split.add_argument("--val", type=float, default=0.1, help="share that validates (default: 0.1)")
    split.add_argument("--test", type=float, default=0.1, help="share that tests (default: 0.1)")
    split.add_argument("--seed", type=int, default=0, help="another seed gives another split (default: 0)")
    split.add_argument("--as", dest="layout", choices=("folders", "lists"), default="folders", help="what to write")
    split.add_argument("--copy", action="store_true", help="copies of the files, where hard links would do")
    split.add_argument("--merge", action="store_true", help="take images together that are in splits already")
    split.set_defaults(run=_data_split)
    stats.add_argument("--out", type=_path, metavar="DIR", help="write stats.html, pictures and lists into DIR")
    stats.set_defaults(run=_data_stats)


def _bits(text: str) -> int | None:
    if text == "off":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor off") from error


def _train(arguments: argparse.Namespace) -> int:
    name = Path(arguments.recipe).stem
    out = out_of_train(arguments)
    command = ["train", arguments.recipe, *arguments.overrides, "--out", str(out)]
    if (status := supervised(arguments, command, out, fresh=arguments.fresh)) is not None:
        return status
    with _signals_interrupt():
        from opsin.run.recipe import read
        from opsin.run.session import train_recipe

        recipe = read(arguments.recipe, arguments.overrides)
        train_recipe(recipe, out, name=name, fresh=arguments.fresh, quiet=arguments.quiet)
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    directory = directory_of_resume(arguments)
    command = ["resume", str(directory), *arguments.overrides]
    if (status := supervised(arguments, command, directory)) is not None:
        return status
    with _signals_interrupt():
        from opsin.run.session import resume_run

        resume_run(directory, arguments.overrides, quiet=arguments.quiet)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    known = ("accuracy", "knn", "linear", "maps")
    for score in arguments.scores:
        if score not in known:
            from opsin.settings.faults import did_you_mean

            options = f"{', '.join(known)}{did_you_mean(score, known)}"
            raise ConfigError(f"command line: unknown score {score!r}; known: {options}")
    from opsin.run.results import evaluate_run

    reports = evaluate_run(
        arguments.directory,
        arguments.scores,
        weights=arguments.weights,
        data=arguments.data,
        blocks=arguments.blocks,
    )
    if arguments.json:
        print(json.dumps({name: report.as_dict() for name, report in reports.items()}))
    else:
        print("\n".join(line for report in reports.values() for line in report.lines()))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with _signals_interrupt():
        from opsin.commands.verify import verify

        return verify(arguments.recipe, arguments.overrides, steps=arguments.steps, kills=arguments.kills)


def _tune_lr(arguments: argparse.Namespace) -> int:
    with _signals_interrupt():
        from opsin.tuning.lr import tune_lr

        tune_lr(
            arguments.recipe,
            arguments.overrides,
            out=arguments.out,
            first=arguments.first,
            last=arguments.last,
            steps=arguments.steps,
            quiet=arguments.quiet,
        )
    return 0


def _tune_loader(arguments: argparse.Namespace) -> int:
    with _signals_interrupt():
        from opsin.run.recipe import read
        from opsin.tuning.loader import tune_loader

        recipe = read(arguments.recipe, arguments.overrides)
        report = tune_loader(recipe, seconds=arguments.seconds, say=_aside)
    print(json.dumps(report.as_dict()) if arguments.json else "\n".join(report.lines()))
    return 0


def _data_split(arguments: argparse.Namespace) -> int:
    with _signals_interrupt():
        from opsin.data.curation.assignment import Fractions
        from opsin.data.curation.collection import open_collection
        from opsin.data.curation.split import SplitSettings, split

        settings = SplitSettings(
            Fractions(arguments.val, arguments.test),
            seed=arguments.seed,
            layout=arguments.layout,
            copy=arguments.copy,
            max_bits=arguments.near_duplicates,
            merge=arguments.merge,
        )
        columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
        collection = open_collection(arguments.path, labels=arguments.labels, **columns)
        _aside(f"data: {collection.said}")
        report = split(collection, arguments.out, settings, say=_aside)
    print(json.dumps(report.as_dict()) if arguments.json else "\n".join(report.lines()))
    return 0


def _data_stats(arguments: argparse.Namespace) -> int:
    with _signals_interrupt():
        from opsin.data.curation.collection import open_collection
        from opsin.data.curation.stats_page import report_stats

        columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
        collection = open_collection(arguments.path, labels=arguments.labels, **columns)
        _aside(f"data: {collection.said}")
        stats = report_stats(collection, out=arguments.out, max_bits=arguments.near_duplicates, say=_aside)
    print(json.dumps(stats.as_dict()) if arguments.json else "\n".join(stats.lines()))
    if arguments.out is not None and not arguments.json:
        print(f"wrote {arguments.out / 'stats.html'}")
    return 0


def _aside(text: str) -> None:
    """What is worth knowing while a command works; its result alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def _recipes(arguments: argparse.Namespace) -> int:
    from opsin.settings.text import shipped_recipes

    found = shipped_recipes(Path(__file__).parent.parent / "recipes")
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:{width}}  {text}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from opsin.run.recipe import read
    from opsin.settings.text import to_yaml

    print(to_yaml(read(arguments.recipe, arguments.overrides), comments=True), end="")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from opsin.run.recipe import Recipe
    from opsin.settings.text import json_schema

    print(json.dumps(json_schema(Recipe), indent=2))
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    from opsin.storage.listing import list_runs, runs_table

    found = list_runs(arguments.folder)
    if arguments.json:
        for run in found:
            print(json.dumps(run.as_dict()))
    else:
        print("\n".join(runs_table(found)) if found else f"no runs in {arguments.folder}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from opsin.run.results import export_run

    print(f"wrote {export_run(arguments.directory, arguments.out, weights=arguments.weights)}")
    return 0
