"""Muon against its definition: momentum, orthogonal direction, and an update that can be cancelled."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opsin.training import muon
from opsin.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (8, 3, 3, 3), (24, 24)])
def test_singular_values_come_close_to_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    result = orthogonal(torch.randn(1, *shape))[0].flatten(1)
    rows, columns = result.shape
    values = torch.linalg.svdvals(result.double()) / max(1.0, rows / columns) ** 0.5
    # The published quintic leaves singular values between about 0.7 and 1.2.
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_the_direction_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 30)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    aligned = u.T @ orthogonal(matrix[None])[0] @ v.T
    # Off the diagonal only the rounding of float32 is left, at most 485 times.
    assert (aligned - torch.diag(aligned.diagonal())).abs().max() < 1e-4


@pytest.mark.parametrize("rank", [4, 48])
def test_the_direction_of_a_gradient_of_any_rank_is_the_same_on_every_chip(rank: int) -> None:
    torch.manual_seed(0)
    strengths = torch.logspace(0, -3, rank)
    gradient = (torch.randn(48, rank) * strengths) @ torch.randn(rank, 432)
    # Another order of sums changes float32 by some 1e-7. Five steps multiply that by 485 and square it in the gram
    # matrices: below 1e-3. The bf16 of a GPU gives 1e-2.
    disturbed = gradient * (1 + 1e-7 * torch.randn_like(gradient))
    direction, other = orthogonal(torch.stack([gradient, disturbed]))
    assert (direction - other).norm() < 1e-3 * direction.norm()
    # The definition in float64: the matrices of a batch do not touch each other.
    x = gradient.double() / gradient.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    assert (direction - x).norm() < 2e-3 * x.norm()


@pytest.mark.parametrize("shape", [(2, 12, 30), (2, 30, 12), (3, 4, 2, 3)])
def test_the_iteration_of_a_gpu_is_that_of_a_cpu(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    expected = orthogonal(matrices)
    monkeypatch.setattr(muon, "_iterate_on_grams", muon._iterate)
    # Float32 for both here, so that all but roundings is seen.
    torch.testing.assert_close(orthogonal(matrices), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_iteration_acts_on_each_singular_value_as_published(steps: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 30)
    values = torch.linalg.svdvals(matrix.double()) / matrix.double().norm()
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = torch.linalg.svdvals(orthogonal(matrix[None], steps)[0].double())
    # Float32, multiplied by 41 at most.
    torch.testing.assert_close(found.sort().values, values.sort().values, rtol=1e-5, atol=1e-5)


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
        w = w * (1 - 0.1 * 0.1) - 0.1 * orthogonal((hidden.grad + 0.9 * v)[None])[0]
        u = 0.8 * u + other.grad
        b = b - 0.1 * (other.grad + 0.8 * u)
        optimizer.step()
    torch.testing.assert_close(hidden.detach(), w)
    torch.testing.assert_close(other.detach(), b)


def _many() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(0)
    hidden = [nn.Parameter(torch.randn(shape)) for shape in ((6, 10), (6, 10), (6, 10), (10, 6), (4, 3, 3, 3))]
    return hidden, [nn.Parameter(torch.randn(shape)) for shape in ((4,), (7,), (2, 3))]


@pytest.mark.parametrize("at_once", [1, 130, 1 << 20], ids=["alone", "two by two", "all"])
@pytest.mark.parametrize("unit_filters", [False, True])
def test_parameters_are_updated_together_as_alone(
    at_once: int, unit_filters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(muon._VALUES_AT_ONCE, "cpu", at_once)
    hidden, other = _many()
    alone_hidden, alone_other = _many()
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "unit_filters": unit_filters}
    together = Muon([{"params": hidden, "hidden": True, "weight_decay": 0.1}, {"params": other}], **settings)
    alone = [
        *(Muon([{"params": [p], "hidden": True, "weight_decay": 0.1}], **settings) for p in alone_hidden),
        *(Muon([{"params": [p]}], **settings) for p in alone_other),
    ]
    for step in range(3):
        _set_gradients(step, *hidden, *other)
        _set_gradients(step, *alone_hidden, *alone_other)
        together.found_inf = torch.tensor(float(step == 1))
        for optimizer in (together, *alone):
            optimizer.found_inf = together.found_inf
            optimizer.step()
    for mine, expected in zip([*hidden, *other], [*alone_hidden, *alone_other], strict=True):
        torch.testing.assert_close(mine, expected)  # a product of three matrices may sum in another order


class _Count(TorchDispatchMode):
    """Counts the operations that start kernels."""

    kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels += not func.is_view
        return func(*args, **(kwargs or {}))


def test_equal_shapes_start_as_many_kernels_as_one_matrix() -> None:
    def kernels(count: int) -> int:
        hidden = [nn.Parameter(torch.zeros(6, 10, device="meta")) for _ in range(count)]
        other = [nn.Parameter(torch.zeros(size + 1, device="meta")) for size in range(2 * count)]
        optimizer = Muon(
            [{"params": hidden, "hidden": True}, {"params": other}], lr=0.1, momentum=0.9, unit_filters=False
        )
        for param in (*hidden, *other):
            param.grad = torch.zeros_like(param)
        with _Count() as seen:  # type: ignore[no-untyped-call]  # torch leaves its base untyped
            optimizer.step()
        return int(seen.kernels)

    assert kernels(12) == kernels(1) < 80


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
