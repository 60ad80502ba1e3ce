"""Sizes of gradients by part: what they are, when they are looked at, and where they are shown."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from opsin.data.base import DataFacts
from opsin.methods.base import Method
from opsin.methods.dino import DinoConfig
from opsin.monitors import histograms
from opsin.monitors.histograms import Histograms, HistogramsConfig, parts_by_depth, parts_by_module, quantiles
from opsin.nn.vit import ViTConfig
from opsin.reporting.journal import PERCENTS, read_rows
from opsin.training.state import ScheduledValues, StepReport, TrainState
from opsin.training.stopwatch import Stopwatch
from tests.digits_run import SMALL_VIT, STEPS_PER_EPOCH, train_digits
from tests.unit.monitors.synthetic import TIMELINE

FACTS = DataFacts(("a", "b"), 100, 8, 3, (0.5,) * 3, (0.5,) * 3)
ENDINGS = [f"_q{percent:02}" for percent in PERCENTS]


def method_with_gradients() -> Method:
    """A student of two blocks and a head with gradients, and a teacher without."""
    config = DinoConfig(prototypes=8, hidden=16, bottleneck=8)
    torch.manual_seed(0)
    method = config.build(ViTConfig(width=16, depth=2, heads=2, patch=4), FACTS)
    for param in method.parameters():
        if param.requires_grad:
            param.grad = torch.randn_like(param)
    return method


def measured(monitor: Histograms, method: Method, step: int) -> dict[str, float]:
    monitor.view_gradients(method, step)
    state = TrainState(method, torch.optim.SGD(method.parameters(), lr=0.1), step=step)
    nothing = torch.zeros(())
    clock, times = TIMELINE.clock(step - 1), Stopwatch(torch.device("cpu"))
    report = StepReport(step, clock, ScheduledValues(0.1, 0.9, 0.0), {}, nothing, nothing, 4, times)
    return dict(monitor.measure(state, report))


def test_quantiles_are_those_of_numpy() -> None:
    parts = [torch.randn(30, 7), torch.randn(11), torch.randn(2, 3, 4, 4)]
    together = np.abs(np.concatenate([part.flatten().numpy() for part in parts]))
    expected = np.quantile(together, [percent / 100 for percent in PERCENTS], method="inverted_cdf")
    assert quantiles(parts).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0, 1.0, 0.5]])
def test_few_gradients_have_quantiles_too(values: list[float]) -> None:
    found = quantiles([torch.tensor(values)]).tolist()
    assert found == sorted(found)
    assert found[-1] == max(map(abs, values))


def test_of_very_many_gradients_evenly_spaced_ones_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.rand(30_000, generator=torch.Generator().manual_seed(1))]
    whole = quantiles(parts)
    monkeypatch.setattr(histograms, "_MOST", 10_000)
    torch.testing.assert_close(quantiles(parts), whole, rtol=0.1, atol=0)
    assert torch.equal(quantiles(parts), quantiles([parts[0][::3]]))


def test_parts_are_layers_from_the_image_on_and_modules_beside_them() -> None:
    method = method_with_gradients()
    by_depth, by_module = parts_by_depth(method), parts_by_module(method)
    assert list(by_depth) == ["layer_00", "layer_01", "layer_02", "prototypes", "student_head"]
    assert list(by_module) == ["prototypes", "student", "student_head"]
    counts = [sum(map(len, parts.values())) for parts in (by_depth, by_module)]
    assert counts == [sum(param.requires_grad for param in method.parameters())] * 2


def test_a_part_that_is_frozen_or_not_finite_is_left_out() -> None:
    method, monitor = method_with_gradients(), HistogramsConfig(every="1 step", by="module").build(TIMELINE)
    assert set(measured(monitor, method, 1)) == {
        f"gradients/{part}{ending}" for part in ("prototypes", "student", "student_head") for ending in ENDINGS
    }
    for name, param in method.named_parameters():
        if name.startswith("student."):
            param.grad = None
    assert not [name for name in measured(monitor, method, 2) if name.startswith("gradients/student_q")]
    for name, param in method.named_parameters():
        if param.grad is not None and name.startswith("student_head."):
            param.grad.fill_(math.nan)
    assert set(measured(monitor, method, 3)) == {f"gradients/prototypes{ending}" for ending in ENDINGS}


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(  # type: ignore[no-untyped-def]  # as torch declares it
        self, function, types: Sequence[type], args=(), kwargs=None
    ):
        self.count += function in {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__float__}
        return function(*args, **(kwargs or {}))


def test_the_device_is_asked_once_and_only_when_due() -> None:
    method, monitor = method_with_gradients(), HistogramsConfig(every="3 steps").build(TIMELINE)
    for step in (1, 2, 3):
        with Reads() as reads:
            found = measured(monitor, method, step)
        assert (reads.count, bool(found)) == ((1, True) if step == 3 else (0, False))


@pytest.mark.usefixtures("torch_switches")
def test_a_run_writes_them_when_due_and_learns_the_same(tmp_path: Path) -> None:
    watch = ("monitors.histograms.name=histograms", "monitors.histograms.every=1 epoch")
    train_digits(tmp_path / "watched", *watch, "accumulate=2", model=SMALL_VIT)
    train_digits(tmp_path / "alone", "accumulate=2", model=SMALL_VIT)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("watched", "alone")]
    assert files[0] == files[1]
    found = {
        row.step: {name.rpartition("_q")[0] for name in row.values if name.startswith("gradients/")}
        for row in read_rows(tmp_path / "watched" / "metrics.jsonl")
    }
    parts = {"gradients/layer_00", "gradients/layer_01", "gradients/head"}
    assert {step: names for step, names in found.items() if names} == {
        STEPS_PER_EPOCH: parts,
        2 * STEPS_PER_EPOCH: parts,
    }
