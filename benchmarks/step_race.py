"""Steps of training raced against each other, on the CPU or a GPU: a table of times and memory for each work.

Each way of doing a step lives in a process of its own (`serving.py`), all do it in turns (`interleaved.py`), and
what each holds at most is measured alone (`memory_peak.py`).
"""

import argparse
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from interleaved import table, take_turns
from memory_peak import activation_peak
from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch
from opsin.methods.base import Method
from opsin.nn.attention import choose_attention, set_attention
from opsin.nn.vit import ViTConfig
from opsin.training import precision
from opsin.training.memory import MemoryConfig, save_memory
from opsin.training.optim import OptimConfig, build_optimizer, schedule_setter
from opsin.training.state import StepPlan, TrainState
from opsin.training.step import train_step
from serving import Contestant, serve

Step = Callable[[], object]
Made = tuple[Step, int]
"""A step, and how many bytes it keeps between steps."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes."""

    title: str
    model: ViTConfig
    batch: int
    device: torch.device = field(default=torch.device("cpu"), kw_only=True)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers of this shape, where the step is computed."""
        return torch.randn(*shape, device=self.device)


W = TypeVar("W", bound=Work)


def race(script: str, doc: str, works: Mapping[str, W], ways: Mapping[str, Callable[[W], Made]]) -> None:
    """The program `script`: every way does every work. The first way is what the others are compared with.

    Ways of one number format have its name (`fp32`, `bf16`) in theirs.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--work", nargs="*", choices=list(works), default=list(works))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    parser.add_argument("--batch", type=int, help="images of a batch (default: the work's)")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn (default: 1)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--only", nargs="*", choices=list(ways), help="these ways (all live in memory at a time)")
    parser.add_argument("--one", choices=list(ways), help="be one contestant, for the program itself")
    parser.add_argument("--peak", action="store_true", help="with --one: print its memory in bytes")
    arguments = parser.parse_args()
    asked = {
        name: replace(work, device=arguments.device, batch=arguments.batch or work.batch)
        for name, work in works.items()
    }
    if arguments.one:
        make = partial(ways[arguments.one], asked[arguments.work[0]])
        if arguments.peak:
            print(_peak_bytes(make, arguments.device))
        else:
            serve(partial(_turn, make()[0], arguments.steps, arguments.device))
        return
    print(f"{_machine(arguments.device)}, torch {torch.__version__}, {arguments.rounds} rounds in turns")
    for name in arguments.work:
        print(f"\n{works[name].title}, batch {asked[name].batch}")
        rows = list(_rows(script, name, arguments.only or list(ways), arguments))
        print(table(["", "s/step", "speed", "over its format", "memory MiB"], rows), flush=True)


def opsin_step(method: Method, optim: OptimConfig, asked: str, batch: Batch, memory: MemoryConfig) -> Made:
    """The update of `opsin train` where the batch is, in the number format asked for."""
    device = batch.ids.device
    method = method.to(device)
    precision.configure(device, asked, deterministic=True)
    set_attention(method, choose_attention(device, asked)[0])
    save_memory(memory, method)
    state = TrainState(method.train(), build_optimizer(optim, method))
    plan = StepPlan(
        forward=method,
        clock=Timeline([Stage(epochs=100, batch_size=len(batch), steps_per_epoch=1000)]).clock,
        set_schedule=schedule_setter(optim, method),
        autocast=precision.autocast(device, asked),
        seed=0,
        view_chunk=memory.view_chunk,
        clip_norm=optim.clip_norm,
        clip_each=optim.clip == "each",
    )
    return partial(train_step, state, batch, plan), kept_bytes([method], state.optimizer)


def use_our_kernels(device: torch.device) -> None:
    """Products in fp32 as opsin computes them: all of fp32; on the CPU through oneDNN where that keeps fp32.

    Not how freed memory is kept.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu" and precision.onednn_keeps_fp32():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]  # not in torch's stubs


def kept_bytes(networks: list[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Weights, buffers and two moments for each weight that learns."""
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    learned = [param for group in optimizer.param_groups for param in group["params"]]
    num_bytes: int = sum(t.nbytes for t in tensors) + 2 * sum(param.nbytes for param in learned if param.requires_grad)
    return num_bytes


def _rows(script: str, work: str, ways: list[str], arguments: argparse.Namespace) -> Iterator[list[str]]:
    same = ["--work", work, "--device", str(arguments.device), "--steps", str(arguments.steps)]
    same += [] if arguments.batch is None else ["--batch", str(arguments.batch)]
    peaks: dict[str, int] = {}
    if not arguments.no_memory:
        for way in ways:
            command = [sys.executable, "-W", "ignore", script, *same, "--one", way, "--peak"]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{way}: status {done.returncode}\n{done.stderr}")
            peaks[way] = int(done.stdout.split()[-1])
            print(f"{way}: {peaks[way] / MIB:.0f} MiB", flush=True)
    with ExitStack() as stack:
        steps = {way: stack.enter_context(Contestant(Path(script), *same, "--one", way)) for way in ways}
        timings = take_turns(steps, rounds=arguments.rounds, warmup=2)
    first = {kind: next((t for t in timings if kind in t.name), timings[0]) for kind in ("fp32", "bf16")}
    for timing in timings:
        own = first["bf16" if "bf16" in timing.name else "fp32"]
        memory = f"{peaks[timing.name] / MIB:.0f}" if timing.name in peaks else ""
        speeds = [f"{timing.speed_over(base):.2f}x" for base in (timings[0], own)]
        yield [timing.name, f"{timing.median_s / arguments.steps:.4f}", *speeds, memory]


def _machine(device: torch.device) -> str:
    return f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _turn(step: Step, count: int, device: torch.device) -> None:
    """So many steps, to their end."""
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(make: Callable[[], Made], device: torch.device) -> int:
    """The peak of building and two steps, without what is kept."""
    kept: list[int] = []

    def work() -> None:
        step, num_bytes = make()
        kept.append(num_bytes)
        step()
        step()

    if device.type == "cuda":
        work()
        return torch.cuda.max_memory_allocated(device) - kept[0]
    peak = activation_peak(work, warmup=0)
    gc.collect()
    return peak - kept[0]
