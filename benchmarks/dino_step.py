"""A training step of DINO: opsin against the published step, and against lightly's parts where it is installed.

    PYTHONPATH=src python benchmarks/dino_step.py [--work ti16 s16 cifar] [--rounds 5] [--no-memory]

Equal work: the same network, heads, views and 65,536 prototypes; loss, backward pass, clip of each parameter,
AdamW, moving average, centre. `as installed` is the published step with torch's own settings, `same kernels` with
the matrix kernels that opsin chooses. Each way of working lives in a process of its own. `memory` is the peak of live
tensors beyond weights, teacher and moments: activations, gradients and temporaries.

Shapes: B images of a batch, S side of a view in pixels.
"""

import argparse
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from interleaved import table, take_turns
from memory_peak import activation_peak
from opsin.data.base import Batch, DataFacts
from opsin.methods.dino import DinoConfig, DinoViews
from opsin.nn.attention import choose_attention, set_attention
from opsin.nn.vit import ViTConfig
from opsin.timeline import Stage, Timeline
from opsin.training import precision
from opsin.training.memory import MemoryConfig, save_memory
from opsin.training.optim import AdamW, build_optimizer, pace_setter
from opsin.training.state import StepPlan, TrainState
from opsin.training.step import train_step
from published_dino import PublishedDino, StepSettings
from serving import Contestant, serve

try:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
except ImportError:
    DINOLoss = None

Step = Callable[[], object]
MIB = 2**20
NOTHING_SPARED = MemoryConfig()


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes."""

    title: str
    model: ViTConfig
    batch: int
    sides_px: tuple[int, int]
    local_count: int = 8
    prototypes: int = 65536

    def views(self) -> dict[str, Tensor]:
        """Normal numbers [count, B, 3, S, S]."""
        large, small = self.sides_px
        return {
            "global_1": torch.randn(1, self.batch, 3, large, large),
            "global_2": torch.randn(1, self.batch, 3, large, large),
            "local": torch.randn(self.local_count, self.batch, 3, small, small),
        }


WORKS = {
    "ti16": Work("ViT-Ti/16, 2x224 + 8x96", ViTConfig(), 4, (224, 96)),
    "s16": Work("ViT-S/16, 2x224 + 8x96", ViTConfig(width=384, heads=6), 8, (224, 96)),
    "cifar": Work("ViT-Ti/4, 2x32 + 8x16", ViTConfig(patch=4), 64, (32, 16)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="*", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--one", choices=list(WAYS), help="be one contestant, for the program itself")
    parser.add_argument("--peak", action="store_true", help="with --one: print its memory in bytes")
    arguments = parser.parse_args()
    if arguments.one:
        make = partial(WAYS[arguments.one], WORKS[arguments.work[0]])
        if arguments.peak:
            print(peak_bytes(make))
        else:
            serve(make()[0])
        return

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds in turns")
    for name in arguments.work:
        work = WORKS[name]
        print(f"\n{work.title}, batch {work.batch}, {work.prototypes:,} prototypes")
        print(table(["", "s/step", "speed", "over its format", "memory MiB"], list(measure(name, arguments))))


def measure(name: str, arguments: argparse.Namespace) -> Iterator[list[str]]:
    """One row for each way of working; `speed` is over the first one."""
    peaks: dict[str, int] = {}
    if not arguments.no_memory:
        for way in WAYS:
            command = [sys.executable, "-W", "ignore", __file__, "--work", name, "--one", way, "--peak"]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[way] = int(said.split()[-1])
    with ExitStack() as stack:
        steps = {way: stack.enter_context(Contestant(Path(__file__), "--work", name, "--one", way)) for way in WAYS}
        timings = take_turns(steps, rounds=arguments.rounds, warmup=2)
    first = {"fp32": timings[0], "bf16": next(t for t in timings if t.name == "published, bf16")}
    for timing in timings:
        own = first["bf16" if "bf16" in timing.name else "fp32"]
        memory = f"{peaks[timing.name] / MIB:.0f}" if timing.name in peaks else ""
        speeds = [f"{timing.speed_over(base):.2f}x" for base in (timings[0], own)]
        yield [timing.name, f"{timing.median_s:.3f}", *speeds, memory]


def published(work: Work, asked: str, same_kernels: bool) -> tuple[Step, int]:
    """The published step."""
    step = PublishedDino(
        work.sides_px[0],
        work.model.patch,
        work.model.width,
        work.model.depth,
        work.model.heads,
        prototypes=work.prototypes,
        precision="bf16" if asked == "bf16" else "fp32",
    )
    views = [image for view in work.views().values() for image in view]
    if same_kernels:
        # Kernels only: not how freed memory is kept, which is no matter of the published code.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]  # not in torch's stubs

    def run() -> None:
        step.step(views, StepSettings())

    return run, kept_bytes([step.student, step.teacher], step.optimizer)


def with_lightly(work: Work) -> tuple[Step, int]:
    """The published backbone and optimizer step, with the head and the loss of lightly."""
    assert DINOLoss is not None
    step = PublishedDino(
        work.sides_px[0], work.model.patch, work.model.width, work.model.depth, work.model.heads, prototypes=8
    )
    heads = [DINOProjectionHead(work.model.width, 2048, 256, work.prototypes, freeze_last_layer=0) for _ in range(2)]
    for network, head in zip((step.student, step.teacher), heads, strict=True):
        network.head = head
    for param in step.teacher.parameters():
        param.requires_grad_(False)
    loss = DINOLoss(work.prototypes)
    optimizer = torch.optim.AdamW(step.student.parameters())
    views = [image for view in work.views().values() for image in view]

    def run() -> None:
        with torch.no_grad():
            said = list(step.teacher(views[:2]).chunk(2))
        total = loss(said, list(step.student(views).chunk(len(views))), epoch=50)
        optimizer.zero_grad()
        total.backward()
        for param in step.student.parameters():
            if param.grad is not None:
                nn.utils.clip_grad_norm_(param, 3.0)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(step.teacher.parameters(), step.student.parameters(), strict=True):
                slow.mul_(0.996).add_(fast, alpha=0.004)

    return run, kept_bytes([step.student, step.teacher], optimizer)


def ours(
    work: Work, asked: str, *, memory: MemoryConfig = NOTHING_SPARED, freeze_epochs: float = 0.0
) -> tuple[Step, int]:
    """The step of `opsin train`."""
    device = torch.device("cpu")
    facts = DataFacts((), 1_281_167, work.sides_px[0], 3, (0.5,) * 3, (0.5,) * 3)
    wanted = DinoConfig(
        prototypes=work.prototypes,
        freeze_epochs=freeze_epochs,
        views=DinoViews(local_size=work.sides_px[1], local_count=work.local_count),
    )
    method = wanted.build(work.model, facts).train()
    precision.configure(device, asked, deterministic=True)
    set_attention(method, choose_attention(device, asked)[0])
    save_memory(memory, method)
    optim = AdamW(lr=5e-4, weight_decay=0.04, clip_norm=3.0, clip="each")
    state = TrainState(method, build_optimizer(optim, method))
    plan = StepPlan(
        forward=method,
        clock=Timeline([Stage(epochs=100, batch_size=work.batch, steps_per_epoch=1000)]).clock,
        set_pace=pace_setter(optim, method),
        autocast=precision.autocast(device, asked),
        seed=0,
        view_chunk=memory.view_chunk,
        clip_norm=optim.clip_norm,
        clip_each=True,
    )
    ids = torch.arange(work.batch)
    batch = Batch(work.views(), torch.full_like(ids, -1), ids)

    def run() -> None:
        train_step(state, batch, plan)

    return run, kept_bytes([method], state.optimizer)


def kept_bytes(networks: list[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Weights, buffers and two moments for each weight that learns."""
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    learned = [param for group in optimizer.param_groups for param in group["params"]]
    num_bytes: int = sum(t.nbytes for t in tensors) + 2 * sum(param.nbytes for param in learned if param.requires_grad)
    return num_bytes


def peak_bytes(make: Callable[[], tuple[Step, int]]) -> int:
    """The peak of building and two steps, without what is kept."""
    kept: list[int] = []

    def work() -> None:
        step, num_bytes = make()
        kept.append(num_bytes)
        step()
        step()

    peak = activation_peak(work, warmup=0)
    gc.collect()
    return peak - kept[0]


WAYS: dict[str, Callable[[Work], tuple[Step, int]]] = {
    "published, fp32, as installed": partial(published, asked="fp32", same_kernels=False),
    "published, fp32, same kernels": partial(published, asked="fp32", same_kernels=True),
    "published, bf16": partial(published, asked="bf16", same_kernels=False),
    "opsin, fp32": partial(ours, asked="fp32"),
    "opsin, fp32, view_chunk=8": partial(ours, asked="fp32", memory=MemoryConfig(view_chunk=8)),
    "opsin, bf16": partial(ours, asked="bf16"),
    "opsin, bf16, view_chunk=8": partial(ours, asked="bf16", memory=MemoryConfig(view_chunk=8)),
    "opsin, bf16, view_chunk=2": partial(ours, asked="bf16", memory=MemoryConfig(view_chunk=2)),
    "opsin, bf16, checkpoint_blocks": partial(ours, asked="bf16", memory=MemoryConfig(checkpoint_blocks=True)),
    "opsin, bf16, both": partial(ours, asked="bf16", memory=MemoryConfig(checkpoint_blocks=True, view_chunk=8)),
    "opsin, bf16, prototypes frozen": partial(ours, asked="bf16", freeze_epochs=1000.0),
}
"""Each builds a step for a work, and says how many bytes it keeps between steps."""
if DINOLoss is not None:
    WAYS["lightly's head and loss, fp32"] = with_lightly


if __name__ == "__main__":
    main()
