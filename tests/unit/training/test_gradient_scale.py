"""Gradients times their factors."""

import torch

from opsin.training.gradients import scale


def test_all_take_one_factor() -> None:
    grads = [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])]
    scale(grads, torch.tensor(0.5))
    assert [grad.tolist() for grad in grads] == [[0.5, 1.0], [[2.0]]]


def test_each_takes_its_own_factor() -> None:
    grads = [torch.tensor([1.0, 2.0]), torch.tensor([float("inf")]), torch.tensor([3.0])]
    scale(grads, torch.tensor([0.25, 1.0, 0.0]))
    assert [grad.tolist() for grad in grads] == [[0.25, 0.5], [float("inf")], [0.0]]


def test_what_is_not_a_number_stays_visible() -> None:
    grads = [torch.tensor([1.0, 2.0])]
    scale(grads, torch.tensor(float("nan")))
    assert grads[0].isnan().all()
