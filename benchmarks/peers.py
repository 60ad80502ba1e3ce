"""The same training in opsin and in what a user would take instead, in turns: speed, memory, start, lines to write.

    PYTHONPATH=src python benchmarks/peers.py PICTURES [--python PYTHON] [--only resnet18 ...] [--busy] [--rounds 2]

PICTURES has class folders (`first_hour.py pictures` writes some). PYTHON is an environment with lightly-train and
lightning beside opsin's packages. Every way runs twice in a process of its own, for few steps and for more: the
difference gives the images per second, the rest is the start. `--busy` keeps an endless loop on every core but one.
Networks, sizes, batches, number format (fp32) and crops are the same; each program keeps its own way to do them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from busy import loops
from opsin.storage.table import aligned

_PEERS = Path(__file__).parent / "peers"
_FEW = 3
_MIB = 2**10  # rusage counts KiB


@dataclass(frozen=True, slots=True)
class Work:
    """A training that all ways do."""

    model: str
    size: int
    batch: int
    steps: int
    peers: tuple[str, ...]
    keys: tuple[str, ...]
    """What `opsin train` gets for it."""


@dataclass
class Measured:
    """Figures of one way, one value for each round."""

    rates: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    memory_mib: float = 0.0


_PLAIN = ("evaluators.val=null", "checkpoints.best=null", "checkpoints.every=never", "epochs=100000")
_SUPERVISED = (
    "imagenet-resnet50",
    "data.eval_resize=null",
    "method.views.scale=[0.35,1.0]",
    *(f"method.views.{name}=0" for name in ("brightness", "contrast", "saturation")),
    "optim.name=adamw",
    "optim.lr=0.001",
    "optim.weight_decay=0.05",
    "optim.clip_norm=1.0",
    *_PLAIN,
)
_DINO = (
    "dino-folder",
    *("method.prototypes=1024", "method.hidden=2048", "method.bottleneck=256"),
    *("optim.name=adamw", "optim.lr=0.0005", "optim.clip_norm=3.0"),  # the recipe itself takes Muon
    *_PLAIN,
)
_VIT = ("model.name=vit", "model.width=192", "model.heads=3", "model.depth=12", "model.patch=16")
_SIX = "method.views.local_count=6"
_LOOPS = ("plain_torch", "timm_parts", "lightning_loop")
WORKS = {
    "resnet18": Work("resnet18", 128, 32, 20, _LOOPS, (*_SUPERVISED, "model.name=resnet18")),
    "vit-ti": Work("vit_tiny_patch16_224", 128, 32, 20, _LOOPS, (*_SUPERVISED, *_VIT)),
    "dino-resnet18": Work(
        *("resnet18", 128, 16, 8, ("lightly_dino",)),
        (*_DINO, "model.name=resnet18", "method.views.local_size=48", _SIX),
    ),
    "dino-vit-ti": Work(
        *("vit_tiny_patch16_224", 128, 16, 8, ("lightly_dino",)),
        (*_DINO, *_VIT, "method.views.local_size=48", _SIX),
    ),
}


def main() -> None:
    """Measure all ways in turns, and print a table for each work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--only", nargs="*", default=list(WORKS))
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    rows: list[tuple[str, ...]] = [("work", "way", "images/s", "of ours in fp32", "start s", "MiB", "lines to write")]
    with loops((os.cpu_count() or 1) - 1 if asked.busy else 0):
        for name in asked.only:
            rows += measure(name, WORKS[name], asked)
    print("\n".join(aligned(rows, 2)))


def measure(name: str, work: Work, asked: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each way."""
    ways = {"opsin, fp32": ("precision=fp32",), "opsin, auto": ("precision=auto",), **dict.fromkeys(work.peers, ())}
    found = {way: Measured() for way in ways}
    for _ in range(asked.rounds):
        for way, keys in ways.items():
            few_s, one = run(way, work, keys, _FEW, asked)
            many_s, other = run(way, work, keys, _FEW + work.steps, asked)
            step_s = max(many_s - few_s, 1e-9) / work.steps
            found[way].rates.append(work.batch / step_s)
            found[way].starts.append(few_s - _FEW * step_s)
            found[way].memory_mib = max(found[way].memory_mib, one, other)
    ours = statistics.median(found["opsin, fp32"].rates)
    return [
        (
            name,
            way,
            f"{statistics.median(one.rates):.1f} ({min(one.rates):.1f} to {max(one.rates):.1f})",
            f"{statistics.median(one.rates) / ours:.2f}",
            f"{statistics.median(one.starts):.1f}",
            f"{one.memory_mib:,.0f}",
            "1" if way.startswith("opsin") else str(lines_of(way)),
        )
        for way, one in found.items()
    ]


def run(way: str, work: Work, keys: Sequence[str], steps: int, asked: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of a process that trains for `steps`, and its peak memory in MiB."""
    with tempfile.TemporaryDirectory(prefix="opsin-peers-") as folder:
        size = [f"data.image_size={work.size}", f"batch_size={work.batch}", "optim.schedule.warmup_epochs=0"]
        command = [asked.python, "-m", "opsin", "train", *work.keys, *size, f"data.path={asked.pictures}"]
        command += [*keys, f"limits.steps={steps}", "--out", f"{folder}/run", "--quiet"]
        if not way.startswith("opsin"):
            numbers = map(str, (work.size, work.batch, steps))
            command = [asked.python, str(_PEERS / f"{way}.py"), str(asked.pictures), work.model, *numbers]
        environment = {**os.environ, "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
        started = time.monotonic()
        with Path(folder, "said").open("wb") as said:
            child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
            _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - started
        if os.waitstatus_to_exitcode(status) != 0:
            raise SystemExit(f"{' '.join(command)}\n{Path(folder, 'said').read_text(errors='replace')[-3000:]}")
    return seconds, usage.ru_maxrss / _MIB


def lines_of(peer: str) -> int:
    """Lines of the peer's program that are neither empty nor text about it."""
    lines = (_PEERS / f"{peer}.py").read_text().splitlines()
    return sum(bool(line.strip()) and '"""' not in line for line in lines)


if __name__ == "__main__":
    main()
