"""Accuracy against training time of the five strategies on CIFAR-10, over several seeds.

    python benchmarks/strategies.py data/cifar10 [--seeds 3] [--only cifar10-hybrid ...]

Each run is a process of its own, one after the other: on two cores nothing else should run beside it. Fine-tuning
starts from weights of `cifar10-standard` trained for half of its epochs, whose time is counted in. Runs are kept in
--out, and not done again where they are finished.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

STRATEGIES = (
    "cifar10-standard",
    "cifar10-progressive",
    "cifar10-hybrid",
    "cifar10-hybrid-freeze",
    "cifar10-finetune",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run reached, and its training time."""

    top1: float
    seconds: float


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CIFAR-10, as data.path wants it")
    parser.add_argument("--seeds", type=int, default=3, help="seeds for each strategy (default: 3)")
    parser.add_argument("--only", nargs="*", default=STRATEGIES, help="some of the recipes")
    parser.add_argument("--out", type=Path, default=Path("runs/strategies"), help="where the runs are kept")
    arguments = parser.parse_args()
    found: dict[str, list[Outcome]] = {name: [] for name in arguments.only}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            found[name].append(outcome_of(name, arguments.data, arguments.out, seed))
            print(f"{name}, seed {seed}: {found[name][-1]}", file=sys.stderr, flush=True)
    print("| recipe | top-1, mean and each seed | training time |")
    print("|---|---|---|")
    for name, outcomes in found.items():
        scores = ", ".join(f"{100 * outcome.top1:.2f}" for outcome in outcomes)
        mean = statistics.mean(outcome.top1 for outcome in outcomes)
        seconds = statistics.mean(outcome.seconds for outcome in outcomes)
        print(f"| `{name}` | {100 * mean:.2f} % ({scores}) | {seconds:.0f} s |")


def outcome_of(name: str, data: str, folder: Path, seed: int) -> Outcome:
    """Train a strategy, unless that is done already."""
    keys = [f"data.path={data}", f"seed={seed}", "evaluators.val.every=never", "checkpoints.every=never"]
    if name != "cifar10-finetune":
        return train(name, folder / f"{name}-{seed}", *keys)
    before = train("cifar10-standard", folder / f"before-finetune-{seed}", *keys, "epochs=1")
    weights = folder / f"before-finetune-{seed}" / "model.safetensors"
    after = train(name, folder / f"{name}-{seed}", *keys, f"model.weights={weights}")
    return Outcome(after.top1, before.seconds + after.seconds)


def train(recipe: str, out: Path, *keys: str) -> Outcome:
    """One run; its score is that of the averaged weights where it keeps them."""
    if not (out / "model.safetensors").exists():
        command = [sys.executable, "-m", "opsin", "train", recipe, *keys, "log.plots=false", "log.tensorboard=false"]
        subprocess.run([*command, "--quiet", "--fresh", "--out", str(out)], check=True)
    summary = json.loads((out / "summary.json").read_text())
    scores = summary["scores"]
    return Outcome(scores.get("val_ema/top1", scores["val/top1"])["last"], summary["seconds"])


if __name__ == "__main__":
    main()
