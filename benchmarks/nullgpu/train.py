"""The whole command line of opsin on a GPU that does nothing.

    benchmarks/nullgpu/run.sh benchmarks/nullgpu/train.py train dino-cifar10 data.path=... limits.steps=20

After it, the exit status, and for the steps after the first: launches, time of the host, and waits by line. Steps hold
whatever the loop does between two updates: batches, rows, monitors, checkpoints.
"""

import sys
from collections import Counter
from unittest.mock import patch

from nullgpu.watch import NullGpu
from opsin.commands.main import main
from opsin.data.base import Batch
from opsin.training import loop
from opsin.training.state import StepPlan, StepReport, TrainState
from opsin.training.step import train_step


def run(arguments: list[str]) -> int:
    """The exit status of `opsin` with these arguments, and what it asked of the GPU."""
    gpu = NullGpu()
    marks: list[int] = []
    waits_before: list[Counter[str]] = []

    with gpu.watching() as seen:

        def marked(state: TrainState, batch: Batch, plan: StepPlan) -> StepReport:
            marks.append(gpu.launches())
            waits_before.append(seen.waits.copy())
            return train_step(state, batch, plan)

        with patch.object(loop, "train_step", marked):
            try:
                status = main(arguments)
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
    print(f"exit status {status}, {len(marks)} updates, {seen.launches:,} kernels")
    if len(marks) > 3:
        steps = len(marks) - 2
        print(f"{(marks[-1] - marks[1]) / steps:,.0f} kernels a step; waits in {steps} steps:")
        for what, count in (waits_before[-1] - waits_before[1]).most_common(20):
            print(f"   {count:5d}x {what}")
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
