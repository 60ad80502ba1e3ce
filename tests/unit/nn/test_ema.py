import pytest
import torch
from torch import nn

from opsin.nn.ema import ModelEma, ema_decay

YES, NO = torch.tensor(1.0), torch.tensor(0.0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def move(layers: nn.Sequential, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in layers.parameters():
            param.add_(torch.randn(param.shape, generator=generator))
    layers(torch.randn(8, 3, generator=generator))  # moves the running statistics


def test_the_average_is_the_weighted_sum_of_all_weights_so_far() -> None:
    layers = network()
    ema = ModelEma(layers)
    seen = [{name: tensor.detach().double().clone() for name, tensor in layers.state_dict().items()}]
    for step in range(5):
        move(layers, step)
        ema.update(0.8, YES)
        seen.append({name: tensor.detach().double().clone() for name, tensor in layers.state_dict().items()})
    assert set(ema.average) == {name for name in seen[0] if not name.endswith("num_batches_tracked")}
    shares = [0.8**5, *(0.2 * 0.8 ** (4 - step) for step in range(5))]
    for name, average in ema.average.items():
        expected = sum(share * weights[name] for share, weights in zip(shares, seen, strict=True))
        assert isinstance(expected, torch.Tensor)
        # Five roundings of fp32.
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_cancelled_update_leaves_the_average_alone() -> None:
    layers = network()
    ema = ModelEma(layers)
    move(layers, 0)
    before = {name: tensor.clone() for name, tensor in ema.average.items()}
    ema.update(0.8, NO)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.average.items())


def test_inside_the_network_has_the_average_and_after_it_its_own_weights_bit_for_bit() -> None:
    layers = network()
    ema = ModelEma(layers)
    move(layers, 0)
    ema.update(0.5, YES)
    own = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in ema.average.items()}
    with ema.in_place():
        assert all(torch.equal(layers.state_dict()[name], tensor) for name, tensor in average.items())
    with pytest.raises(TypeError), ema.in_place():
        layers("no tensor")  # an evaluator that fails changes nothing either
    assert all(torch.equal(tensor, own[name]) for name, tensor in layers.state_dict().items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in ema.average.items())
    move(layers, 1)
    ema.update(0.5, YES)  # the average follows the weights that train, not those that were looked at
    assert not torch.equal(ema.average["0.weight"], average["0.weight"])


def test_the_decay_rises_during_the_warm_up() -> None:
    values = [ema_decay(step, decay=0.99, warmup=True) for step in range(2000)]
    assert values[:3] == pytest.approx([1 / 10, 2 / 11, 3 / 12])
    assert values == sorted(values)
    assert values[-1] == 0.99
    assert ema_decay(0, decay=0.99, warmup=False) == 0.99
