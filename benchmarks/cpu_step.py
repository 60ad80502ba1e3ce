"""A training step of ViT-Ti/16 at 224 px on the CPU: opsin with `auto` against plain timm in fp32.

    PYTHONPATH=src python benchmarks/cpu_step.py [--batch 32] [--rounds 7]

Both compute forward pass, cross-entropy, backward pass and an AdamW update of the same network.
"""

import argparse

import timm
import torch

from interleaved import table, take_turns
from opsin.nn.vit import ViTConfig
from opsin.training.precision import choose_precision
from train_steps import Work, our_step, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    work = Work(arguments.batch, 224, torch.device("cpu"))
    script = plain(timm.create_model("vit_tiny_patch16_224"), work)
    chosen = choose_precision("auto", work.device).value
    step = our_step(ViTConfig(), work, asked=chosen)
    base, own = take_turns({"plain timm, fp32": script, f"opsin, auto ({chosen})": step}, rounds=arguments.rounds)

    print(
        f"ViT-Ti/16, 224 px, batch {work.batch}, {torch.get_num_threads()} threads, {arguments.rounds} rounds in turns"
    )
    rows = [
        [t.name, f"{t.median_s:.3f}", f"{work.batch / t.median_s:.1f}", f"{t.speed_over(base):.2f}x"]
        for t in (base, own)
    ]
    print(table(["", "s/step", "images/s", "speed"], rows))


if __name__ == "__main__":
    main()
