"""`opsin eval` and `opsin export`: scores and weights of a run."""

import argparse
import json

from opsin.commands.arguments import Commands, path
from opsin.errors import ConfigError

_SCORES = ("accuracy", "knn", "linear", "maps")


def add_commands(commands: Commands) -> None:
    """Add `eval` and `export`."""
    evaluate = commands.add_parser("eval", help="score a run on its validation images, or others")
    evaluate.add_argument("directory", type=path, metavar="DIR", help="run directory, or a checkpoint inside it")
    scores = f"{', '.join(_SCORES)} (default: accuracy of a classifier, else knn and linear)"
    evaluate.add_argument("scores", nargs="*", metavar="SCORE", help=scores)
    weights = "as trained, their moving average, or those before step 0 (default: raw)"
    evaluate.add_argument("--weights", choices=("raw", "ema", "initial"), default="raw", help=weights)
    evaluate.add_argument("--data", metavar="PATH", help="score on these labelled images, as in data.path")
    blocks = "score features after the last N blocks, side by side (knn, linear; default: as the recipe says)"
    evaluate.add_argument("--blocks", type=int, metavar="N", help=blocks)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_eval)

    export = commands.add_parser("export", help="write the encoder as safetensors and JSON")
    export.add_argument("directory", type=path, metavar="DIR", help="run directory, or a checkpoint inside it")
    weights = "as trained, or their moving average if the recipe has `ema` (default: raw)"
    export.add_argument("--weights", choices=("raw", "ema"), default="raw", help=weights)
    export.add_argument("--out", type=path, metavar="FOLDER", help="where to write (default: DIR/export)")
    export.set_defaults(run=_export)


def _eval(arguments: argparse.Namespace) -> None:
    for score in arguments.scores:
        if score not in _SCORES:
            from opsin.settings.faults import did_you_mean

            known = f"{', '.join(_SCORES)}{did_you_mean(score, _SCORES)}"
            raise ConfigError(f"command line: unknown score {score!r}; known: {known}")
    from opsin.run.results import evaluate_run

    asked = {"weights": arguments.weights, "data": arguments.data, "blocks": arguments.blocks}
    reports = evaluate_run(arguments.directory, arguments.scores, **asked)
    if arguments.json:
        print(json.dumps({name: report.as_dict() for name, report in reports.items()}))
    else:
        print("\n".join(line for report in reports.values() for line in report.lines()))


def _export(arguments: argparse.Namespace) -> None:
    from opsin.run.results import export_run

    print(f"wrote {export_run(arguments.directory, arguments.out, weights=arguments.weights)}")
