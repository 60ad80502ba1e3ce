"""The fast network for small images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from opsin.errors import ConfigError
from opsin.nn.convnet import ConvNet, ConvNetConfig
from opsin.nn.weights import initialise


def build(image_size: int = 16, channels: int = 3) -> ConvNet:
    torch.manual_seed(0)
    return ConvNetConfig(widths=(8, 12, 16)).build(image_size=image_size, channels=channels)


def natural(channels: int = 3) -> Tensor:
    """Images whose neighbouring pixels and channels resemble each other, as in photographs."""
    noise = torch.randn(64, channels, 20, 20, generator=torch.Generator().manual_seed(2))
    smooth = F.avg_pool2d(noise, 5, stride=1)
    return 5 * (smooth + 0.5 * smooth.mean(1, keepdim=True))


@pytest.mark.parametrize("image_size", [9, 16, 32])
def test_features_have_the_shapes_of_a_backbone(image_size: int) -> None:
    network = build(image_size)
    tokens = network(torch.zeros(2, 3, image_size, image_size))
    side = (image_size - 1) // 8
    assert network.width == 16
    assert tokens.pooled.shape == (2, 16)
    assert tokens.patches.shape == (2, side * side, 16)


def test_the_pooled_vector_is_the_maximum_over_all_places() -> None:
    tokens = build(32)(torch.randn(2, 3, 32, 32))
    assert torch.equal(tokens.pooled, tokens.patches.amax(1))


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening_gives_every_filter_unit_variance_and_no_correlation(channels: int) -> None:
    network, images = build(16, channels), natural(channels)
    network.prepare(lambda: images)
    out = network.whiten(images).transpose(0, 1).flatten(1).double()  # [2 * C * 4, places]
    half = len(out) // 2
    assert torch.equal(out[half:], -out[:half])
    covariance = out[:half] @ out[:half].T / out.shape[1]
    # The weakest direction has a variance of about 0.05, to which 5e-4 is added: 1 % below unit at most.
    assert torch.linalg.eigvalsh(covariance).min() > 0.98
    torch.testing.assert_close(covariance, torch.eye(half).double(), atol=0.02, rtol=0)


def test_whitening_is_the_same_each_time_and_needs_no_gradient() -> None:
    networks = [build(), build()]
    for network in networks:
        network.prepare(natural)
    assert torch.equal(networks[0].whiten.weight, networks[1].whiten.weight)
    assert not networks[0].whiten.weight.requires_grad


def whitened_by(images: Tensor) -> Tensor:
    """The filters that whiten `images`, [C * 4, C * 4]: without their negatives."""
    network = build(images.shape[-1], images.shape[1])
    network.prepare(lambda: images)
    half = network.whiten.weight.flatten(1)
    return half[: len(half) // 2]


def grey() -> Tensor:
    """Three equal channels: of the 12 directions of a patch, 8 are empty."""
    return natural(1).expand(-1, 3, -1, -1)


def without_direction() -> Tensor:
    """Noise whose four pixels of a patch are worth the same: every eigenvalue occurs several times, but for chance."""
    noise = torch.randn(64, 3, 20, 20, generator=torch.Generator().manual_seed(3))
    turned = torch.cat([noise.rot90(quarter, (2, 3)) for quarter in range(4)])
    return torch.cat([turned, turned.roll(1, 1), turned.roll(2, 1)])


@pytest.mark.parametrize("images", [natural, grey, without_direction])
def test_filters_follow_from_the_images_whatever_their_roundings(images: Callable[[], Tensor]) -> None:
    """Eigenvectors would not: their signs are free, and so are their directions where eigenvalues are equal."""
    exact = images()
    noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(4)) * 2 - 1
    rounded = exact * (1 + 1e-7 * noise)
    backwards = exact.flip(0).contiguous()  # other sums
    for others in (rounded, backwards):
        # Filters have entries of 1 to 10; the weakest direction of `natural` amplifies roundings twenty times.
        torch.testing.assert_close(whitened_by(others), whitened_by(exact), atol=1e-5, rtol=0)


@pytest.mark.parametrize("images", [natural, grey, without_direction])
def test_filters_turn_with_the_pixels(images: Callable[[], Tensor]) -> None:
    """Mirrored images give mirrored filters: no pixel of a patch is treated as another."""
    size = (-1, 3, 2, 2)
    mirrored = whitened_by(images().flip(3)).view(-1, *size[1:])
    expected = whitened_by(images()).view(3, 2, 2, 3, 2, 2).flip(2, 5).reshape(size)
    torch.testing.assert_close(mirrored, expected, atol=1e-5, rtol=0)


def test_filters_of_grey_images_whiten_what_there_is_and_leave_the_empty_directions_out() -> None:
    filters, images = whitened_by(grey()).double(), grey()
    patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1).double()
    covariance = filters @ (patches.T @ patches / len(patches)) @ filters.T
    variances = torch.linalg.eigvalsh(covariance)
    torch.testing.assert_close(variances[8:], torch.ones(4).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(variances[:8], torch.zeros(8).double(), atol=1e-9, rtol=0)
    colour = torch.eye(3).double()[1] - torch.eye(3).double()[0]
    assert (filters @ torch.kron(colour, torch.ones(4).double())).abs().max() < 1e-6


def test_flat_images_give_finite_filters() -> None:
    network = build()
    network.prepare(lambda: torch.zeros(8, 3, 16, 16))
    assert network.whiten.weight.isfinite().all()


def test_a_convolution_starts_by_passing_its_inputs_through() -> None:
    block: Any = build().blocks[1]  # 8 channels to 12
    images = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block.conv1(images)[:, :8], images)


def test_a_third_convolution_stands_beside_a_shortcut() -> None:
    torch.manual_seed(0)
    block: Any = ConvNetConfig(widths=(8, 12, 16), convs=(2, 3, 2)).build(image_size=16).blocks[1]
    images = torch.randn(2, 8, 6, 6)
    first = F.gelu(block.norm1(F.max_pool2d(block.conv1(images), 2)))
    second = F.gelu(block.norm2(block.conv2(first)))
    torch.testing.assert_close(block(images), F.gelu(block.norm3(block.conv3(second)) + first))


def test_norms_learn_an_offset_only() -> None:
    learned = {name for name, p in build().named_parameters() if p.requires_grad}
    norms = {name for name in learned if "norm" in name}
    assert norms == {f"blocks.{block}.norm{which}.bias" for block in range(3) for which in (1, 2)}


def test_images_too_small_for_three_halvings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_size 8: .* at least 9 pixels; use a larger image_size"):
        build(8)


def test_an_empty_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.widths=\[8, 0, 8\]: each must be at least 1"):
        ConvNetConfig(widths=(8, 0, 8)).build(image_size=32)


def test_a_whitening_that_came_with_weights_is_kept(tmp_path: Path) -> None:
    config = ConvNetConfig(widths=(4, 4, 4))
    trained, fresh = (config.build(image_size=16) for _ in range(2))
    trained.prepare(lambda: torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    initialise(fresh, config.model_copy(update={"weights": str(tmp_path / "weights.safetensors")}))
    fresh.prepare(lambda: torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(fresh.whiten.weight, trained.whiten.weight)
