"""`opsin data`: look at images, or split them, before training."""

import argparse
import json

from opsin.commands.arguments import Commands, path, signals_interrupt


def add_commands(commands: Commands) -> None:
    """Add `data`."""
    data = commands.add_parser("data", help="look at images, or split them, before training")
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
    split.add_argument("--out", type=path, metavar="DIR", required=True, help="the new folder")
    split.add_argument("--val", type=float, default=0.1, help="share that validates (default: 0.1)")
    split.add_argument("--test", type=float, default=0.1, help="share that tests (default: 0.1)")
    split.add_argument("--seed", type=int, default=0, help="another seed gives another split (default: 0)")
    split.add_argument("--as", dest="layout", choices=("folders", "lists"), default="folders", help="what to write")
    split.add_argument("--copy", action="store_true", help="copy the files, even if hard links would do")
    split.add_argument("--merge", action="store_true", help="take images together that are in splits already")
    split.set_defaults(run=_split)
    stats.add_argument("--out", type=path, metavar="DIR", help="write stats.html, pictures and lists into DIR")
    stats.set_defaults(run=_stats)


def _bits(text: str) -> int | None:
    if text == "off":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor off") from error


@signals_interrupt()
def _split(arguments: argparse.Namespace) -> None:
    from opsin.data.curation.assignment import Fractions
    from opsin.data.curation.collection import open_collection
    from opsin.data.curation.split import SplitSettings, split
    from opsin.reporting.teller import CommandTeller

    teller = CommandTeller()
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
    teller.notice(f"data: {collection.said}")
    report = split(collection, arguments.out, settings, teller)
    print(json.dumps(report.as_dict()) if arguments.json else "\n".join(report.lines()))


@signals_interrupt()
def _stats(arguments: argparse.Namespace) -> None:
    from opsin.data.curation.collection import open_collection
    from opsin.data.curation.stats_page import report_stats
    from opsin.reporting.teller import CommandTeller

    teller = CommandTeller()
    columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    collection = open_collection(arguments.path, labels=arguments.labels, **columns)
    teller.notice(f"data: {collection.said}")
    stats = report_stats(collection, teller, out=arguments.out, max_bits=arguments.near_duplicates)
    print(json.dumps(stats.as_dict()) if arguments.json else "\n".join(stats.lines()))
    if arguments.out is not None and not arguments.json:
        print(f"wrote {arguments.out / 'stats.html'}")
