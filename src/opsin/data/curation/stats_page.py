"""The report on a set of images as one HTML page that needs no other file, and the files beside it."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from opsin.data.curation.collection import Collection
from opsin.data.curation.duplicates import Groups, check_max_bits, group_duplicates
from opsin.data.curation.scan import Scan, scan
from opsin.data.curation.split_files import DUPLICATES_FILE, UNREADABLE_FILE, write_duplicates, write_unreadable
from opsin.data.curation.stats import Stats, summarize
from opsin.data.curation.stats_pictures import choose_pairs, draw_pairs, draw_samples, draw_sizes
from opsin.errors import DataError
from opsin.storage.files import write_atomic, writing
from opsin.storage.teller import Teller

PAGE_FILE = "stats.html"

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 20rem; padding-right: 0; } td.bar div { background: #0072B2; height: .8rem; margin-top: .35rem; }
img { max-width: 100%; height: auto; } code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } .warning { border-left: 4px solid #D55E00; padding: .1rem .8rem; margin: .4rem 0; }
"""


def report_stats(collection: Collection, teller: Teller, *, out: Path | None, max_bits: int | None) -> Stats:
    """Compute the statistics of a collection, and write the report into the folder `out` if one is given.

    Raises:
        ConfigError: `max_bits` is out of range.
        DataError: no image can be read, or `out` cannot be written or is part of the images.
    """
    check_max_bits(max_bits)
    if out is not None:
        collection.check_outside(out)
    looked = scan(collection, teller)
    groups = group_duplicates(looked, max_bits=max_bits)
    stats = summarize(collection, looked, groups)
    if out is not None:
        write_report(stats, collection, looked, groups, out)
    return stats


def write_report(stats: Stats, collection: Collection, looked: Scan, groups: Groups, out: Path) -> None:
    """Write the files of the report into the folder `out`: the page, its pictures, lists and numbers.

    Raises:
        DataError: the folder cannot be written.
    """
    pairs = choose_pairs(collection, looked, groups)
    pictures = {"samples.png": draw_samples(collection, looked)}
    if stats.sizes.distinct > 1:
        pictures["sizes.png"] = draw_sizes(looked)
    if pairs:
        pictures["duplicates.png"] = draw_pairs(collection, pairs)
    shown = [[_describe(collection, index) for index in pair] for pair in pairs]
    files = {
        PAGE_FILE: render(stats, pictures, shown).encode("utf-8", "surrogateescape"),
        "stats.json": (json.dumps(stats.as_dict(), indent=2) + "\n").encode(),
        **pictures,
    }
    splits = [collection.splits[number] for number in collection.split_numbers.tolist()]
    with writing(out, "make room, or choose another --out", DataError):
        out.mkdir(parents=True, exist_ok=True)
        for name in ("sizes.png", "duplicates.png", UNREADABLE_FILE, DUPLICATES_FILE):
            (out / name).unlink(missing_ok=True)  # of an earlier report
        for name, content in files.items():
            write_atomic(out / name, content)
        write_unreadable(looked.unreadable, out / UNREADABLE_FILE)
        write_duplicates(collection, groups.shared, splits, out / DUPLICATES_FILE)


def render(stats: Stats, pictures: Mapping[str, bytes], pairs: Sequence[Sequence[str]]) -> str:
    """Return the page; `pairs` describes the columns of `duplicates.png`."""
    sections = [
        "".join(f'<p class="warning">{html.escape(text)}</p>' for text in stats.warnings),
        f"<h2>Samples</h2>{_image(pictures['samples.png'], 'Some images of each class')}",
        f"<h2>Classes</h2>{_classes(stats)}",
        f"<h2>Images</h2>{_facts(stats)}",
        _image(pictures["sizes.png"], "Widths, heights and aspects") if "sizes.png" in pictures else "",
        f"<h2>Duplicates</h2>{_duplicates(stats, pictures, pairs)}",
        f"<h2>Unreadable</h2>{_unreadable(stats)}",
    ]
    title = html.escape(f"Images of {stats.name}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _classes(stats: Stats) -> str:
    splits = list(stats.counts)
    largest = max(stats.per_class.values())
    head = "".join(f'<th class="n">{html.escape(split)}</th>' for split in splits)
    rows = []
    for name in next(iter(stats.counts.values())):
        numbers = [stats.counts[split][name] for split in splits]
        cells = "".join(f'<td class="n">{number:,}</td>' for number in numbers)
        bar = f'<td class="bar"><div style="width:{100 * sum(numbers) / largest:.1f}%"></div></td>'
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}{bar}</tr>")
    totals = "".join(f'<th class="n">{sum(stats.counts[split].values()):,}</th>' for split in splits)
    foot = f"<tr><th>all</th>{totals}<td></td></tr>"
    return f'<div class="scroll"><table><tr><th>class</th>{head}<td></td></tr>{"".join(rows)}{foot}</table></div>'


def _facts(stats: Stats) -> str:
    sizes = stats.sizes
    low, middle, high = sizes.aspect
    facts = {
        "smallest": f"{sizes.smallest[0]} x {sizes.smallest[1]}, {sizes.smallest_place}",
        "largest": f"{sizes.largest[0]} x {sizes.largest[1]}, {sizes.largest_place}",
        "different sizes": f"{sizes.distinct:,}",
        "shorter side (5 %, median, 95 %)": " / ".join(map(str, sizes.shorter_side)),
        "longer side (5 %, median, 95 %)": " / ".join(map(str, sizes.longer_side)),
        "width / height (5 %, median, 95 %)": f"{low:.2f} / {middle:.2f} / {high:.2f}",
        "formats": _list(stats.formats),
        "modes": _list(stats.modes),
        "grey": f"{stats.num_grey:,}",
        "with transparency": f"{stats.num_alpha:,}",
        "16 bit": f"{stats.num_16_bit:,}",
    }
    rows = "".join(f"<tr><td>{name}</td><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    keys = f"<p>For the recipe: <code>{html.escape(stats.keys)}</code></p>"
    return f'<div class="scroll"><table>{rows}</table></div>{keys}'


def _duplicates(stats: Stats, pictures: Mapping[str, bytes], pairs: Sequence[Sequence[str]]) -> str:
    copies = stats.duplicates
    if not copies.groups:
        return "<p>None found.</p>"
    text = f"{copies.images:,} images in {copies.groups:,} groups, {copies.exact_groups:,} of them with equal pixels."
    rows = "".join(
        f'<tr><td class="n">{number}</td><td>{html.escape(first)}<br>{html.escape(second)}</td></tr>'
        for number, (first, second) in enumerate(pairs, 1)
    )
    picture = _image(pictures["duplicates.png"], "Pairs of duplicates, above each other")
    return f'<p>{text} All are listed in {DUPLICATES_FILE}.</p>{picture}<div class="scroll"><table>{rows}</table></div>'


def _unreadable(stats: Stats) -> str:
    if not stats.num_unreadable:
        return "<p>None.</p>"
    rows = "".join(f"<li>{html.escape(location)}: {html.escape(reason)}</li>" for location, reason in stats.unreadable)
    return f"<p>{stats.num_unreadable:,}, all listed in {UNREADABLE_FILE}. The first:</p><ul>{rows}</ul>"


def _describe(collection: Collection, index: int) -> str:
    split = collection.splits[collection.locate(index).split]
    known = [split] if len(collection.splits) > 1 else []
    if collection.classes:
        known.append(collection.class_name(int(collection.labels[index])))
    return " ".join([collection.location(index), *([f"({', '.join(known)})"] if known else [])])


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "not known"


def _image(content: bytes, text: str) -> str:
    return f'<p><img alt="{text}" src="data:image/png;base64,{base64.b64encode(content).decode()}"></p>'
