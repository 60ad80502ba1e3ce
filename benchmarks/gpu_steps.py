"""Training steps on one GPU, in every number format: opsin against plain timm.

    PYTHONPATH=src python benchmarks/gpu_steps.py [--batch 256] [--rounds 5] [--steps 10]

Random images that lie on the GPU, so that only the step is timed. `peak` is the memory that the
allocator held at most, weights and optimizer state included, for one way of working alone.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial

import timm
import torch

from interleaved import table, take_turns
from opsin.nn.backbone import ModelConfig
from opsin.nn.timm_backbone import TimmConfig
from opsin.nn.vit import ViTConfig
from train_steps import Work, our_step, plain

NETWORKS: dict[str, ModelConfig] = {
    "resnet50": TimmConfig(name="resnet50"),
    "vit_small_patch16_224": ViTConfig(width=384, heads=6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps in a round")
    parser.add_argument("--formats", nargs="*", default=["fp32", "tf32", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true", help="also compiled, in bf16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")

    torch.manual_seed(0)
    work = Work(arguments.batch, 224, torch.device("cuda"))
    rows = []
    for name, model in NETWORKS.items():
        rows += measure(name, model, work, arguments)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, 224 px, batch {work.batch}")
    print(table(["", "ms/step", "images/s", "speed", "peak GiB"], rows))


def measure(name: str, model: ModelConfig, work: Work, arguments: argparse.Namespace) -> list[list[str]]:
    """One row for each way of working."""
    filters = name.startswith("resnet")
    ways: dict[str, Callable[[], Callable[[], None]]] = {
        "plain timm, fp32": lambda: plain(timm.create_model(name), work)
    }
    for asked in arguments.formats:
        ways[f"opsin, {asked}"] = partial(our_step, model, work, asked=asked, channels_last=filters)
    if arguments.compile:
        ways["opsin, bf16, compiled"] = partial(
            our_step, model, work, asked="bf16", channels_last=filters, compiled=True
        )
    peaks = {label: peak_gib(make) for label, make in ways.items()}
    steps = {label: many(make(), arguments.steps) for label, make in ways.items()}
    timings = take_turns(steps, rounds=arguments.rounds, warmup=1, finish=torch.cuda.synchronize)
    rows = []
    for timing in timings:
        step_s = timing.median_s / arguments.steps
        speed = f"{timing.speed_over(timings[0]):.2f}x"
        row = [f"{step_s * 1e3:.1f}", f"{work.batch / step_s:.0f}", speed, f"{peaks[timing.name]:.1f}"]
        rows.append([f"{name}: {timing.name}", *row])
    return rows


def many(step: Callable[[], None], count: int) -> Callable[[], None]:
    """`count` steps as one call."""

    def run() -> None:
        for _ in range(count):
            step()

    return run


def peak_gib(make: Callable[[], Callable[[], None]]) -> float:
    """Memory of three steps with nothing else on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    many(step, 3)()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    del step
    gc.collect()
    return peak


if __name__ == "__main__":
    main()
