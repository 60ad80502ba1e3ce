"""Muon against its definition: momentum, orthogonal direction, and an update that can be cancelled."""

import pytest
import torch
from torch import Tensor, nn

from opsin.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (8, 3, 3, 3), (24, 24)])
def test_singular_values_come_close_to_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    result = orthogonal(torch.randn(shape)).flatten(1)
    rows, columns = result.shape
    values = torch.linalg.svdvals(result.double()) / max(1.0, rows / columns) ** 0.5
    # The published quintic leaves singular values between about 0.7 and 1.2; bf16 blurs that by some percent.
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_the_direction_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 30)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    aligned = u.T @ orthogonal(matrix) @ v.T
    # Off the diagonal only bf16 rounding is left.
    assert (aligned - torch.diag(aligned.diagonal())).abs().max() < 0.05


@pytest.mark.parametrize("steps", [1, 3])
def test_the_iteration_acts_on_each_singular_value_as_published(steps: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 30)
    values = torch.linalg.svdvals(matrix.double()) / matrix.double().norm()
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = torch.linalg.svdvals(orthogonal(matrix, steps).double())
    # bf16 has two to three digits.
    torch.testing.assert_close(found.sort().values, values.sort().values, rtol=0.03, atol=0.01)


def _parameters() -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(4))


def _optimizer(hidden: nn.Parameter, other: nn.Parameter, *, unit_filters: bool = False) -> Muon:
    groups = [{"params": [hidden], "hidden": True, "weight_decay": 0.1}, {"params": [other], "momentum": 0.8}]
    return Muon(groups, lr=0.1, momentum=0.9, unit_filters=unit_filters)


def _set_gradients(step: int, *parameters: nn.Parameter) -> None:
    torch.manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


def test_two_steps_follow_the_definition() -> None:
    hidden, other = _parameters()
    optimizer = _optimizer(hidden, other)
    w, b = hidden.detach().clone(), other.detach().clone()
    v, u = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(2):
        _set_gradients(step, hidden, other)
        assert hidden.grad is not None
        assert other.grad is not None
        v = 0.9 * v + hidden.grad
        w = w * (1 - 0.1 * 0.1) - 0.1 * orthogonal(hidden.grad + 0.9 * v)
        u = 0.8 * u + other.grad
        b = b - 0.1 * (other.grad + 0.8 * u)
        optimizer.step()
    torch.testing.assert_close(hidden.detach(), w)
    torch.testing.assert_close(other.detach(), b)


def test_unit_filters_have_the_length_of_the_root_of_their_outputs() -> None:
    hidden, other = _parameters()
    optimizer = _optimizer(hidden, other, unit_filters=True)
    _set_gradients(0, hidden, other)
    optimizer.step()
    torch.testing.assert_close(hidden.detach().norm(), torch.tensor(6.0).sqrt())


@pytest.mark.parametrize("unit_filters", [False, True])
def test_a_cancelled_update_changes_nothing(unit_filters: bool) -> None:
    hidden, other = _parameters()
    optimizer = _optimizer(hidden, other, unit_filters=unit_filters)
    _set_gradients(0, hidden, other)
    optimizer.step()

    def everything() -> list[Tensor]:
        moments = [optimizer.state[p]["momentum_buffer"] for p in (hidden, other)]
        return [t.detach().clone() for t in (hidden, other, *moments)]

    before = everything()
    _set_gradients(1, hidden, other)
    assert hidden.grad is not None
    hidden.grad[0, 0] = float("nan")
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))
