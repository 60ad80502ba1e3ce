"""The terminal picture of README.md: Ctrl-C stops a training, and the same command resumes it.

    PYTHONPATH=src python benchmarks/terminal_picture.py [--out docs/figures/terminal.svg]

A shell runs in a pseudo-terminal. The picture shows its screen after epoch 15.
"""

import argparse
import codecs
import fcntl
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 142, 40
COMMAND = "opsin train quickstart"
INTERRUPTED_AFTER, SHOWN_AFTER = "epoch 5/60", "epoch 15/60"
LIMIT_S = 600

# What a program sends to a terminal: a control sequence, a control character or a character to show.
TOKEN = re.compile(r"\x1b\[([?\d;]*[A-Za-z])|([\x00-\x1f\x7f])|(.)")

# rich's own format loads fonts from another host; this one takes the reader's.
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace }}
.{unique_id}-title {{ font: 18px sans-serif }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class Screen:
    """The rows that a terminal shows: lists of characters, each between the sequences that set and reset its colour."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.style = ""

    def feed(self, text: str) -> None:
        for sequence, control, character in TOKEN.findall(text):
            if character:
                row = self.rows[self.row]
                row += [" "] * (self.column + 1 - len(row))
                row[self.column] = f"{self.style}{character}\x1b[0m"
                self.column += 1
            elif sequence.endswith("m"):
                self.style = f"\x1b[{sequence}"
            elif sequence == "2K":
                self.rows[self.row] = []
            elif sequence.endswith("A"):
                self.row -= int(sequence[:-1] or 1)
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self.row += 1
                if self.row == len(self.rows):
                    self.rows.append([])
            elif sequence not in ("?25l", "?25h"):  # these hide and show the cursor
                raise ValueError(f"unknown control sequence or character: {sequence or control!r}")

    def lines(self) -> list[str]:
        return ["".join(row) for row in self.rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures/terminal.svg"))
    out = parser.parse_args().out.resolve()
    screen = Screen()
    with tempfile.TemporaryDirectory() as folder:
        process, terminal = open_shell(Path(folder))
        try:
            watch(terminal, screen, until="$ ")
            os.write(terminal, f"{COMMAND}\n".encode())
            watch(terminal, screen, until=INTERRUPTED_AFTER)
            os.write(terminal, b"\x03")
            watch(terminal, screen, until="\n$ ")
            os.write(terminal, f"{COMMAND}\n".encode())
            watch(terminal, screen, until=SHOWN_AFTER)
            watch(terminal, screen, until="left")  # the bar below the line
            out.write_text(picture(screen.lines()))
            os.write(terminal, b"\x03")
            watch(terminal, Screen(), until="\n$ ")
        finally:
            os.close(terminal)
            os.waitpid(process, 0)


def open_shell(folder: Path) -> tuple[int, int]:
    """A shell in `folder` whose `opsin` is that of this interpreter: its process and its terminal."""
    command = folder / "bin" / "opsin"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m opsin "$@"\n')
    command.chmod(0o755)
    source = Path(__file__).resolve().parent.parent / "src"
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        path = f"{command.parent}:{os.environ['PATH']}"
        os.environ.update(TERM="xterm-256color", PS1="$ ", PATH=path, PYTHONPATH=str(source))
        os.execvp("bash", ["bash", "--norc", "--noprofile", "--noediting"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    return process, terminal


def watch(terminal: int, screen: Screen, *, until: str) -> None:
    """Show the output of the shell on `screen` until it contains this text."""
    seen, decoder, end = "", codecs.getincrementaldecoder("utf-8")(), time.monotonic() + LIMIT_S
    while until not in seen:
        if not select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError("\n".join([f"no {until!r} within {LIMIT_S} s; the screen:", *screen.lines()]))
        text = decoder.decode(os.read(terminal, 65536))
        seen += text.replace("\r", "")
        screen.feed(text)


def picture(lines: list[str]) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text.from_ansi("\n".join(lines)), highlight=False, soft_wrap=True)
        return console.export_svg(title=COMMAND, code_format=SVG)


if __name__ == "__main__":
    main()
