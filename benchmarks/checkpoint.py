"""How long a checkpoint blocks training, how long it takes to reach the disk, and how large it is.

python benchmarks/checkpoint.py [--parameters 100] [--rounds 7] [--folder FOLDER] [--run DIR]

A state of that many million parameters with both moments of AdamW, saved in turns while training waits, beside
training, and both compressed. The blocking time is that of the call; the ratio is taken within each round.
`--run` compresses the newest checkpoint of a run, since random numbers are no trained network.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from interleaved import table
from opsin.clock.timeline import Stage, Timeline
from opsin.storage.compression import Compressor
from opsin.storage.teller import Fact, Silence
from opsin.training.agenda import Agenda
from opsin.training.checkpoints.checkpoints import Checkpoints
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.checkpoints.retention import CheckpointConfig
from opsin.training.state import TrainState

WAYS = {
    "waiting": CheckpointConfig(background=False),
    "beside": CheckpointConfig(),
    "waiting, zstd": CheckpointConfig(background=False, compression="zstd"),
    "beside, zstd": CheckpointConfig(compression="zstd"),
}
WIDTH = 768


def large_state(parameters: int) -> TrainState:
    """Weights and moments of the sizes that a transformer of this width has, with values of their kind."""
    torch.manual_seed(0)
    method = nn.ModuleList()
    while sum(param.numel() for param in method.parameters()) < parameters:
        method.append(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)))
    optimizer = torch.optim.AdamW(method.parameters(), fused=True)
    for param in method.parameters():
        first = torch.randn_like(param) * 1e-4
        optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": first.square() * 0.1}
    return TrainState(method, optimizer)  # type: ignore[arg-type]  # a checkpoint needs a module only


class _Home:
    """A folder of checkpoints that nobody else writes."""

    def __init__(self, folder: Path) -> None:
        self.path = self.checkpoints = folder

    def check_held(self) -> None:
        pass


class _Loud(Silence):
    """The record of a run in which nothing may go wrong."""

    def tell(
        self, kind: str, step: int | None = None, *, notice: str | None = None, warn: str | None = None, **facts: Fact
    ) -> None:
        assert warn is None, warn

    def sync(self) -> None:
        pass

    def history(self, name: str) -> Mapping[int, float]:
        return {}


class Way:
    """One way of saving, and what it took round by round."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        timeline = Timeline([Stage(epochs=1, batch_size=1, steps_per_epoch=10**6)])
        config = config.model_copy(update={"every": "1 step", "keep": 1, "best": None})
        self._folder = folder
        agenda = Agenda(timeline, timeline.total_steps, checkpoints="1 step")
        self._checkpoints = Checkpoints(_Home(folder), config, agenda, _Loud(), fingerprint="")
        self.blocked_s: list[float] = []
        self.whole_s: list[float] = []

    def save(self, state: TrainState) -> None:
        begun = time.perf_counter()
        path = self._checkpoints.save_if_due(state)
        self.blocked_s.append(time.perf_counter() - begun)
        self._checkpoints.wait()
        self.whole_s.append(time.perf_counter() - begun)
        assert path is not None

    @property
    def num_bytes(self) -> int:
        (path,) = find_checkpoints(self._folder).values()
        return sum(file.stat().st_size for file in path.iterdir())


def race(state: TrainState, folder: Path, rounds: int) -> None:
    ways = {name: Way(folder / name, config) for name, config in WAYS.items()}
    for number in range(rounds + 1):
        state.step += 1
        for name in list(ways)[:: 1 if number % 2 else -1]:
            ways[name].save(state)
    raw = ways["waiting"].num_bytes
    rows = []
    for name, way in ways.items():
        # The first round asks the system for memory.
        blocked, whole, waited = way.blocked_s[1:], way.whole_s[1:], ways["waiting"].blocked_s[1:]
        rows.append(
            (
                name,
                f"{statistics.median(blocked):.2f}",
                f"{100 * statistics.median(b / w for b, w in zip(blocked, waited, strict=True)):.1f}",
                f"{statistics.median(whole):.2f}",
                f"{way.num_bytes / 2**20:.0f}",
                f"{100 * way.num_bytes / raw:.1f}",
            )
        )
    print(table(("way", "blocked s", "% of waiting", "until on disk s", "MiB", "% of size"), rows))


def compress(run: Path) -> None:
    path = list(find_checkpoints(run / "checkpoints").values())[-1] / "state.pt"
    content = path.read_bytes()
    rows = []
    for level in (1, 3, 9):
        compressor, begun = Compressor(level), time.perf_counter()
        size = sum(map(len, compressor.feed(memoryview(content)))) + len(compressor.finish())
        speed = len(content) / 2**20 / (time.perf_counter() - begun)
        rows.append((f"zstd {level}", f"{size / 2**20:.2f}", f"{100 * size / len(content):.1f}", f"{speed:.0f}"))
    print(f"{path}: {len(content) / 2**20:.2f} MiB")
    print(table(("level", "MiB", "% of size", "MiB/s"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100, help="millions (default: 100)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--run", type=Path, help="a run directory whose newest checkpoint is compressed too")
    arguments = parser.parse_args()
    state = large_state(arguments.parameters * 10**6)
    print(f"{sum(param.numel() for param in state.method.parameters()) / 1e6:.0f} million parameters")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        race(state, Path(folder), arguments.rounds)
    if arguments.run is not None:
        compress(arguments.run)


if __name__ == "__main__":
    main()
