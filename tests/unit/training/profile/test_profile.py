"""The profile of a training: parts that add up to the step, and weights that do not notice."""

import io
import json
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # not in torch's stubs
from torch.profiler import profile

from opsin.data.base import Batch
from opsin.reporting.console import Console
from opsin.run.session import resume_run
from opsin.training.agenda import Agenda
from opsin.training.profile.parts import OTHER, STEP, Kernel, Span, device_times, host_times, read_events
from opsin.training.profile.profile import ProfileConfig, StepProfile
from opsin.training.profile.report import write_trace
from opsin.training.stopwatch import span
from tests.digits_run import STEPS_PER_EPOCH, train_digits
from tests.unit.training.tiny_run import TIMELINE, fresh

SUPERVISED = ["data", "forward", "backward", "optimizer", OTHER]
DINO = (
    "method.name=dino",
    "method.prototypes=32",
    "method.hidden=16",
    "method.bottleneck=8",
    "method.views.local_count=2",
    "method.views.local_size=4",
    "evaluators.val=null",
)
PROFILE = ("profile.steps=3", "profile.skip=3")


def split_of(folder: Path) -> dict[str, Any]:
    split: dict[str, Any] = json.loads((folder / "profile" / "split.json").read_text())
    return split


def warnings_of(folder: Path) -> list[str]:
    lines = (folder / "log.txt").read_text().splitlines()
    return [line.partition("warning: ")[2] for line in lines if "warning: profile" in line]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, with an evaluation after the second of them."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    assert 3 < STEPS_PER_EPOCH < 6
    train_digits(folder, *PROFILE)
    return folder


@pytest.mark.usefixtures("torch_switches")
class TestOfRun:
    def test_the_parts_add_up_to_the_step(self, profiled: Path) -> None:
        split = split_of(profiled)
        assert list(split["parts"]) == SUPERVISED
        parts = split["parts"].values()
        assert sum(part["mean_ms"] for part in parts) == pytest.approx(split["step"]["mean_ms"], rel=1e-9)
        assert sum(part["share"] for part in parts) == pytest.approx(1)
        assert split["parts"][OTHER]["share"] < 0.5, "spans are where the work is"
        for spread in (split["step"], *parts):
            assert 0 <= spread["min_ms"] <= spread["median_ms"] <= spread["p90_ms"] <= spread["max_ms"]
        assert (split["first_step"], split["last_step"], split["steps"]) == (4, 6, 3)
        assert split["images_per_s"] == pytest.approx(1000 * 256 / split["step"]["mean_ms"])

    def test_an_evaluation_is_not_recorded(self, profiled: Path) -> None:
        names = {operator["name"]: operator for operator in split_of(profiled)["operators"]}
        assert names["aten::addmm"]["calls"] == int(names["aten::addmm"]["calls"]), "the same in every step"
        events = json.loads((profiled / "profile" / "trace.json").read_text())["traceEvents"]
        assert sum(event["name"] == STEP for event in events) == 2

    def test_the_picture_is_one(self, profiled: Path) -> None:
        with Image.open(profiled / "profile" / "split.png") as picture:
            assert min(picture.size) > 200

    def test_the_weights_are_the_same_without(self, profiled: Path, tmp_path: Path) -> None:
        train_digits(tmp_path / "plain")
        assert not (tmp_path / "plain" / "profile").exists()
        name = "model.safetensors"
        assert (profiled / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()

    def test_a_resumed_run_counts_from_where_it_goes_on(self, tmp_path: Path) -> None:
        train_digits(tmp_path / "run", "limits.steps=4")
        resume_run(
            tmp_path / "run", ["limits.steps=8", "profile.steps=2", "profile.skip=1", "profile.trace=false"], quiet=True
        )
        split = split_of(tmp_path / "run")
        assert (split["first_step"], split["last_step"]) == (6, 7)
        assert not (tmp_path / "run" / "profile" / "trace.json").exists()

    def test_what_is_left_of_a_run_is_profiled(self, tmp_path: Path) -> None:
        train_digits(tmp_path / "run", "limits.steps=5", *PROFILE)
        assert split_of(tmp_path / "run")["steps"] == 2
        assert warnings_of(tmp_path / "run") == [
            "profile.steps=3 after profile.skip=3: 5 steps are left: only the last 2 are profiled"
        ]

    def test_a_folder_that_cannot_be_written_costs_the_profile_only(self, tmp_path: Path) -> None:
        train_digits(tmp_path / "run", "limits.steps=2")
        (tmp_path / "run" / "profile").write_text("in the way")
        run = resume_run(tmp_path / "run", ["limits.steps=8", *PROFILE], quiet=True)
        assert run.checkpoints.newest_step == 8
        (warning,) = warnings_of(tmp_path / "run")
        assert warning.endswith("is not complete: File exists; training goes on")

    def test_a_method_with_a_teacher_has_more_parts(self, tmp_path: Path) -> None:
        train_digits(tmp_path / "run", "limits.steps=3", "profile.steps=2", "profile.skip=0", *DINO)
        parts = split_of(tmp_path / "run")["parts"]
        named = ["data", "teacher forward", "student forward", "loss", "forward"]
        assert list(parts) == [*named, "backward", "optimizer", "teacher update", OTHER]
        assert all(parts[name]["min_ms"] > 0 for name in parts)


def test_a_trace_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as recording:
        torch.ones(3).sum()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="cut off"):
            write_trace(recording, tmp_path / "trace.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


class Clock:
    """A clock of training time that nobody reads."""

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_a_training_that_ends_early_leaves_no_profiler_behind(tmp_path: Path) -> None:
    def batches() -> Iterator[Batch]:
        while True:
            yield Batch({}, torch.zeros(4), torch.zeros(4))

    screen = io.StringIO()
    step_profile = StepProfile(
        ProfileConfig(steps=3, skip=0),
        tmp_path,
        Console(screen),
        Agenda(TIMELINE, 9),
        Clock(),
        device=torch.device("cpu"),
    )
    given = step_profile.over(batches(), fresh())
    next(given)
    assert not isinstance(span("forward"), nullcontext)
    given.close()  # type: ignore[attr-defined]  # what an exception in the loop does
    assert isinstance(span("forward"), nullcontext)
    assert "interrupted before 3 steps were profiled" in screen.getvalue()


def test_a_rollback_in_the_middle_begins_the_profile_anew(tmp_path: Path) -> None:
    screen, state = io.StringIO(), fresh()
    step_profile = StepProfile(
        ProfileConfig(steps=12, skip=0, trace=False),
        tmp_path / "profile",
        Console(screen),
        Agenda(TIMELINE, 99),
        Clock(),
        device=torch.device("cpu"),
    )

    def train(*, to: int) -> None:
        batches = iter([Batch({}, torch.zeros(4), torch.zeros(4))] * 99)
        given = step_profile.over(batches, state)
        while state.step < to:
            next(given)
            for part in ("forward", "backward", "optimizer"):
                with span(part):
                    torch.ones(100, 100).sum()
            state.step += 1
            step_profile.end_step(state)
        given.close()  # type: ignore[attr-defined]  # what an exception in the loop does

    train(to=5)
    assert not (tmp_path / "profile" / "split.json").exists()
    state.step = 2
    train(to=14)
    split = split_of(tmp_path)
    assert (split["first_step"], split["last_step"], split["steps"]) == (3, 14, 12)
    written = (tmp_path / "profile" / "split.json").read_bytes()
    state.step = 4
    train(to=30)
    assert (tmp_path / "profile" / "split.json").read_bytes() == written, "once is enough"
    assert screen.getvalue().count("interrupted before 12 steps") == 1


def test_without_a_profile_a_span_is_nothing() -> None:
    assert isinstance(span("forward"), nullcontext)


def test_the_time_of_a_part_is_without_the_parts_inside_it() -> None:
    ms = 1_000_000
    spans = [
        Span("data", 0, 2 * ms),
        Span("forward", 3 * ms, 9 * ms),
        Span("teacher forward", 3 * ms, 5 * ms),
        Span("student forward", 6 * ms, 8 * ms),
        Span(STEP, 0, 10 * ms),
        Span("forward", 12 * ms, 13 * ms),
        Span(STEP, 11 * ms, 14 * ms),
    ]
    first, second = host_times(spans)
    assert first.parts == {"data": 2, OTHER: 2, "teacher forward": 2, "forward": 2, "student forward": 2}
    assert first.total == 10
    assert second.parts == {OTHER: 2, "forward": 1}


def test_on_a_gpu_a_kernel_counts_for_the_part_that_launched_it() -> None:
    ms = 1_000_000
    # The host is done with a step in 4 ms, the device works on it for 10 and waits for the batch of the second.
    spans = [
        Span(STEP, 0, 4 * ms),
        Span("data", 0, ms),
        Span("forward", ms, 2 * ms),
        Span("backward", 2 * ms, 4 * ms),
        Span(STEP, 5 * ms, 18 * ms),
        Span("data", 5 * ms, 16 * ms),
        Span("forward", 16 * ms, 18 * ms),
    ]
    kernels = [
        Kernel(int(0.5 * ms), ms, 2 * ms),
        Kernel(int(1.5 * ms), 2 * ms, 6 * ms),
        Kernel(int(2.5 * ms), 5 * ms, 10 * ms),  # of another stream, at first beside the forward pass
        Kernel(int(4.5 * ms), 10 * ms, 11 * ms),  # between the steps
        Kernel(17 * ms, 17 * ms, 20 * ms),
    ]
    first, second = device_times(spans, kernels)
    assert first.total == 10
    assert first.parts == {"data": 2, OTHER: 0, "forward": 4, "backward": 4}
    assert first.idle == 1
    assert second.total == 9, "from the end of the work before it"
    assert second.parts == {"data": 5, OTHER: 1, "forward": 3}
    assert second.idle == 6


class Event(NamedTuple):
    """An event as torch's profiler hands it out, in milliseconds."""

    called: str
    start: int
    end: int
    number: int = 0
    of_host: bool = True
    annotates: bool = False

    def name(self) -> str:
        return self.called

    def start_ns(self) -> int:
        return self.start * 1_000_000

    def end_ns(self) -> int:
        return self.end * 1_000_000

    def correlation_id(self) -> int:
        return self.number

    def device_type(self) -> DeviceType:
        return DeviceType.CPU if self.of_host else DeviceType.CUDA

    def is_user_annotation(self) -> bool:
        return self.annotates


@pytest.mark.parametrize(
    "launch",
    ["cudaLaunchKernel", "__cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaMemcpyAsync", "hipMalloc"],
)
def test_work_is_found_whatever_the_call_that_launched_it(launch: str) -> None:
    """Code that is compiled for CUDA 13 launches through `__cudaLaunchKernel`."""
    events = [
        Event(STEP, 0, 5, annotates=True),
        Event("forward", 1, 4, annotates=True),
        Event("aten::mul", 1, 3),
        Event(launch, 2, 3, number=7),
        Event("a kernel", 4, 9, number=7, of_host=False),
    ]
    recorded = read_events(events, on_device=True)
    assert (recorded.kernels, recorded.lost) == (1, 0)
    (step,) = recorded.steps
    assert step.parts == {"data": 0, OTHER: 4, "forward": 5}
    assert recorded == read_events(reversed(events), on_device=True)


def test_work_that_nothing_launched_is_counted_as_lost() -> None:
    events = [
        Event(STEP, 0, 5, annotates=True),
        Event("cudaLaunchKernel", 1, 2, number=1),
        Event("found", 2, 3, number=1, of_host=False),
        Event("launched by a graph", 3, 4, number=2, of_host=False),
    ]
    recorded = read_events(events, on_device=True)
    assert (recorded.kernels, recorded.lost) == (2, 1)
    assert recorded.steps[0].parts == {"data": 0, OTHER: 3}
