import math

import pytest
import torch
import torch.nn.functional as F
from scipy import special, stats
from torch import Tensor
from torchvision.transforms import v2

from opsin.clock import seeding
from opsin.data.views.mix import Mix, beta_quantile
from tests.meta_device import watched

COUNT, SIDE, CLASSES = 40, 19, 10

SETTINGS = [
    Mix(mixup=0.2, cutmix=1.0),
    Mix(mixup=0.8, cutmix=0.0),
    Mix(mixup=0.0, cutmix=1.0),
    Mix(mixup=0.4, cutmix=0.5, p=0.5, cutmix_share=0.8),
]


@pytest.fixture
def images() -> Tensor:
    """As normalised ones: about -2 to 2."""
    return torch.rand(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 4 - 2


def draws(count: int = COUNT, *, seed: int = 0) -> Tensor:
    return seeding.uniform(seed, 0, torch.arange(count), "mix", Mix.num_draws)


def draws_as_torchvision(images: Tensor, share: float) -> Tensor:
    """Every image is mixed with the one before it, as torchvision does; Beta(1, 1) turns a draw into itself."""
    numbers = torch.zeros(len(images), Mix.num_draws)
    numbers[:, 2] = share
    numbers[:, 5] = torch.arange(1, len(images) + 1) % len(images) / len(images)
    return numbers


def soft_targets(labels: Tensor, shares: Tensor, partners: Tensor) -> Tensor:
    own = F.one_hot(labels, CLASSES).float()
    return shares[:, None] * own + (1 - shares[:, None]) * own[partners]


def mix_plainly(mix: Mix, image: Tensor, other: Tensor, numbers: list[float]) -> tuple[Tensor, float]:
    chosen, kind, level, row, column, _ = numbers
    if chosen >= mix.p:
        return image, 1.0
    if not mix.cutmix or (mix.mixup and kind >= mix.cutmix_share):
        share = special.betaincinv(mix.mixup, mix.mixup, level)
        return image * share + other * (1 - share), share
    half = int(SIDE * math.sqrt(1 - special.betaincinv(mix.cutmix, mix.cutmix, level)) / 2)
    result = image.clone()
    replaced = 0
    for y in range(int(row * SIDE) - half, int(row * SIDE) + half):
        for x in range(int(column * SIDE) - half, int(column * SIDE) + half):
            if 0 <= y < SIDE and 0 <= x < SIDE:
                result[:, y, x] = other[:, y, x]
                replaced += 1
    return result, 1 - replaced / SIDE**2


@pytest.mark.parametrize("mix", SETTINGS, ids=repr)
def test_each_image_is_mixed_as_by_a_loop_over_images(images: Tensor, mix: Mix) -> None:
    numbers = draws()
    mixed = mix(images, numbers)
    order = numbers[:, 5].tolist()
    partners = sorted(range(COUNT), key=lambda index: order[index])
    assert mixed.partners.tolist() == partners
    for index, row in enumerate(numbers.tolist()):
        alone, share = mix_plainly(mix, images[index], images[partners[index]], row)
        # The table of quantiles is exact to 5e-7 for these parameters; images differ by up to 4.
        torch.testing.assert_close(mixed.images[index], alone, atol=4e-6, rtol=0)
        assert float(mixed.shares[index]) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.9])
def test_mixup_of_one_share_is_that_of_torchvision(images: Tensor, share: float) -> None:
    labels = torch.arange(COUNT) % CLASSES
    mixed = Mix(mixup=1.0, cutmix=0.0)(images, draws_as_torchvision(images, share))
    theirs = v2.MixUp(num_classes=CLASSES)
    parameters = {"lam": share, "labels": labels, "batch_size": COUNT}
    # One product and one sum of numbers up to 2, each rounded.
    torch.testing.assert_close(mixed.images, theirs.transform(images, parameters), atol=1e-6, rtol=0)
    targets = soft_targets(labels, mixed.shares, mixed.partners)
    torch.testing.assert_close(targets, theirs.transform(labels, parameters), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_of_one_box_is_that_of_torchvision(images: Tensor, seed: int) -> None:
    labels = torch.arange(COUNT) % CLASSES
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs, their_targets = v2.CutMix(num_classes=CLASSES)(images, labels)
        torch.manual_seed(seed)
        share = float(torch.distributions.Beta(torch.ones(1), torch.ones(1)).sample())
        column, row = int(torch.randint(SIDE, (1,))), int(torch.randint(SIDE, (1,)))
    numbers = draws_as_torchvision(images, share)
    numbers[:, 3], numbers[:, 4] = (row + 0.5) / SIDE, (column + 0.5) / SIDE
    mixed = Mix(mixup=0.0, cutmix=1.0)(images, numbers)
    assert torch.equal(mixed.images, theirs)
    # The share is a count of pixels over another, rounded to float32.
    torch.testing.assert_close(soft_targets(labels, mixed.shares, mixed.partners), their_targets, atol=1e-6, rtol=0)


def test_the_share_of_cutmix_is_that_of_the_pixels_that_remain() -> None:
    count = 500
    images = torch.arange(count).float()[:, None, None, None].expand(count, 1, SIDE, SIDE)
    mixed = Mix(mixup=0.0, cutmix=1.0)(images, draws(count))
    own = (mixed.images == images).float().mean((1, 2, 3))
    elsewhere = mixed.partners != torch.arange(count)
    torch.testing.assert_close(mixed.shares[elsewhere], own[elsewhere], atol=1e-6, rtol=0)
    assert float(own.min()) < 0.2
    assert float(own[elsewhere].max()) == 1


@pytest.mark.parametrize("mix", [Mix(0.2, 1.0, p=0.0), Mix(0.0, 0.0)], ids=repr)
def test_images_keep_their_bits_where_mixing_is_off(images: Tensor, mix: Mix) -> None:
    mixed = mix(images, draws())
    assert torch.equal(mixed.images, images)
    assert torch.equal(mixed.shares, torch.ones(COUNT))


def test_images_that_are_passed_over_keep_their_bits(images: Tensor) -> None:
    numbers = draws()
    missed = numbers[:, 0] >= 0.5
    before = images.clone()
    mixed = Mix(0.2, 1.0, p=0.5)(images, numbers)
    assert 5 < int(missed.sum()) < COUNT - 5
    assert torch.equal(mixed.images[missed], images[missed])
    assert torch.equal(mixed.shares[missed], torch.ones(int(missed.sum())))
    assert torch.equal(images, before), "mixing writes into its input"


def test_one_image_is_mixed_with_itself() -> None:
    image = torch.rand(1, 3, 8, 8)
    mixed = Mix(0.2, 1.0)(image, draws(1))
    assert torch.equal(mixed.images, image)
    assert mixed.partners.tolist() == [0]


def test_partners_are_a_permutation_that_changes_with_the_draws(images: Tensor) -> None:
    mixes = [Mix(0.2, 1.0)(images, draws(seed=seed)).partners for seed in range(2)]
    for partners in mixes:
        assert torch.equal(partners.sort().values, torch.arange(COUNT))
    assert not torch.equal(*mixes)


def test_kinds_come_as_often_as_asked() -> None:
    count = 20_000
    images = torch.linspace(0, 1, count)[:, None, None, None].expand(count, 1, 2, 2)
    mixed = Mix(mixup=1.0, cutmix=1.0, p=0.6, cutmix_share=0.25)(images, draws(count))
    whole = mixed.shares * 4 == (mixed.shares * 4).round()
    # 0.6 * 0.75 of all; CutMix and the images that are passed over leave whole pixels. The standard
    # deviation of the share is 0.0035.
    assert float((~whole).float().mean()) == pytest.approx(0.45, abs=0.015)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 2.0, 10.0])
def test_quantiles_are_those_of_the_beta_distribution(alpha: float) -> None:
    levels = torch.cat([torch.arange(0, 1 << 24, 997), (1 << 24) - torch.arange(1, 3000)]) / (1 << 24)
    exact = torch.from_numpy(special.betaincinv(alpha, alpha, levels.double().numpy()))
    # Between the nodes of the table the curve is taken as straight.
    torch.testing.assert_close(beta_quantile(alpha, levels).double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [0.4, 1.0, 4.0])
def test_shares_of_mixup_have_the_beta_distribution(alpha: float) -> None:
    images = torch.zeros(20_000, 1, 1, 1)
    shares = Mix(mixup=alpha, cutmix=0.0)(images, draws(len(images))).shares
    # Kolmogorov-Smirnov; the draws are fixed, so that the test cannot fail by chance.
    assert stats.kstest(shares.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.05


@pytest.mark.parametrize("mix", SETTINGS, ids=repr)
def test_nothing_is_read_back_from_the_device(images: Tensor, mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values refuse every step that needs one on the host."""
    pictures = images.to("meta")
    with watched(monkeypatch) as seen:
        mixed = mix(pictures, draws())
    assert not seen.waits
    assert not seen.mixed
    assert mixed.images.shape == images.shape
    assert (mixed.partners.shape, mixed.shares.shape) == ((COUNT,), (COUNT,))


@pytest.mark.gpu
@pytest.mark.parametrize("mix", SETTINGS, ids=repr)
def test_a_gpu_mixes_the_same(images: Tensor, mix: Mix) -> None:
    here, there = mix(images, draws()), mix(images.cuda(), draws())
    assert torch.equal(there.partners.cpu(), here.partners)
    # A sum over pixels and a product with a sum may round once more, or once less.
    torch.testing.assert_close(there.shares.cpu(), here.shares, atol=1e-6, rtol=0)
    torch.testing.assert_close(there.images.cpu(), here.images, atol=1e-6, rtol=0)
