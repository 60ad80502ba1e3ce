"""Cross-entropy in chunks of prototypes against softmax over all of them.

V student views, G = 2 teacher views, B images, d width, K prototypes
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.nn import prototypes as module
from opsin.nn.prototypes import Prototypes, Targets, cross_entropy, teacher_targets

PAIRS = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # [V, G]
STUDENT, TEACHER = 0.1, 0.04


@dataclass(frozen=True, slots=True)
class Case:
    """Unit vectors of the student [V, B, d] and the teacher [G, B, d], prototypes of both, and the centre [K]."""

    vectors: Tensor
    taught: Tensor
    own: Prototypes
    theirs: Prototypes
    center: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers, with gradients of their own."""
        own, theirs = (Prototypes(part.weight_v.shape[1], len(part.weight_v), learn_scale=True) for part in self.both())
        for part, source in zip((own, theirs), self.both(), strict=True):
            part.load_state_dict(source.state_dict())
        vectors = self.vectors.detach().to(dtype).requires_grad_()
        return Case(vectors, self.taught.to(dtype), own.to(dtype), theirs.to(dtype), self.center.to(dtype))

    def both(self) -> tuple[Prototypes, Prototypes]:
        return self.own, self.theirs

    def targets(self) -> Targets:
        return teacher_targets(self.taught, self.theirs, self.center, TEACHER)

    def loss(self, *, learn: bool = True) -> Tensor:
        return cross_entropy(self.vectors, self.own, self.targets(), PAIRS, temperature=STUDENT, learn=learn)

    def plain_probabilities(self) -> Tensor:
        """[G, B, K]"""
        return ((plain_scores(self.taught, self.theirs) - self.center) / TEACHER).softmax(-1).detach()

    def plain_loss(self) -> Tensor:
        asked = self.plain_probabilities()
        said = (plain_scores(self.vectors, self.own) / STUDENT).log_softmax(-1)  # [V, B, K]
        return torch.stack([-(asked[g] * said[v]).sum() for v, g in PAIRS.nonzero().tolist()]).sum()

    def gradients(self) -> list[Tensor]:
        """Of the student's vectors, and of the vectors and lengths of its prototypes."""
        found = [self.vectors.grad, self.own.weight_v.grad, self.own.weight_g.grad]
        return [grad for grad in found if grad is not None]


def plain_scores(vectors: Tensor, prototypes: Prototypes) -> Tensor:
    weight_v = prototypes.weight_v
    directions = weight_v / weight_v.norm(dim=1, keepdim=True)
    scores: Tensor = vectors @ (prototypes.weight_g * directions).T
    return scores


def case_of(*, images: int = 5, width: int = 8, count: int = 29, seed: int = 0) -> Case:
    """Lengths from a half to one and a half, and the teacher different from the student."""
    torch.manual_seed(seed)
    own, theirs = (Prototypes(width, count, learn_scale=True).double() for _ in range(2))
    with torch.no_grad():
        for part in (own, theirs):
            part.weight_g.uniform_(0.5, 1.5)
    vectors, taught = (F.normalize(torch.randn(views, images, width).double(), dim=-1) for views in PAIRS.shape)
    return Case(vectors, taught, own, theirs, 0.2 * torch.randn(count).double()).to(torch.float64)


def stretch(case: Case, lengths: Tensor | float) -> None:
    with torch.no_grad():
        for part in case.both():
            part.weight_g.copy_(torch.as_tensor(lengths).expand(len(part.weight_g)).unsqueeze(1))


def error(found: Tensor, exact: Tensor) -> float:
    """The root mean square of the difference, as a share of that of the exact values."""
    share: float = ((found.double() - exact).norm() / exact.norm()).item()
    return share


@pytest.fixture(params=[4, 29, 2048], ids=["chunks of 4", "one chunk", "a chunk to spare"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", request.param)


@pytest.fixture(params=[1 << 20, 0], ids=["kept", "computed again"])
def exponentials(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_BYTES", request.param)


# Float64, the same sums in another order: some roundings of 1e-16, of terms up to a hundred times as large.
EXACT = 1e-12


@pytest.mark.usefixtures("chunk", "exponentials")
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_loss_and_gradients_equal_those_of_softmax(factor: float) -> None:
    case, plain = case_of(), case_of()
    loss, expected = case.loss(), plain.plain_loss()
    assert loss.item() == pytest.approx(expected.item(), rel=EXACT)
    (factor * loss).backward()
    (factor * expected).backward()
    assert len(case.gradients()) == 3
    for found, exact in zip(case.gradients(), plain.gradients(), strict=True):
        assert error(found, exact) < EXACT
    assert all(param.grad is None for param in case.theirs.parameters())


@pytest.mark.usefixtures("chunk")
def test_targets_equal_softmax() -> None:
    case = case_of()
    targets, expected = case.targets(), case.plain_probabilities()
    assert error(targets.probabilities(), expected) < EXACT
    assert error(targets.entropy, -(expected * expected.log()).sum(-1)) < EXACT
    scores = plain_scores(case.taught, case.theirs)
    assert error(targets.mean_scores, scores.mean((0, 1))) < EXACT
    assert torch.equal(targets.winners, expected.argmax(-1))
    assert not targets.exponentials.requires_grad


@pytest.mark.usefixtures("exponentials")
def test_resting_prototypes_get_no_gradient_and_vectors_the_same_one() -> None:
    resting, learning = case_of(), case_of()
    loss, expected = resting.loss(learn=False), learning.loss()
    assert loss.item() == expected.item()
    loss.backward()
    expected.backward()
    assert resting.own.weight_v.grad is None
    assert resting.own.weight_g.grad is None
    assert resting.vectors.grad is not None
    assert learning.vectors.grad is not None
    assert torch.equal(resting.vectors.grad, learning.vectors.grad)


@pytest.mark.usefixtures("exponentials")
def test_lengths_that_are_not_learned_get_no_gradient() -> None:
    case = case_of()
    case.own.weight_g.requires_grad_(False)
    case.loss().backward()
    assert case.own.weight_g.grad is None
    assert case.own.weight_v.grad is not None


def test_scores_all_at_once_are_the_products() -> None:
    case = case_of()
    assert error(case.own(case.vectors), plain_scores(case.vectors, case.own)) < EXACT


def test_prototypes_start_at_unit_length_and_keep_it_unless_it_is_learned() -> None:
    assert torch.equal(Prototypes(8, 29).weight_g, torch.ones(29, 1))
    assert not Prototypes(8, 29).weight_g.requires_grad
    assert Prototypes(8, 29, learn_scale=True).weight_g.requires_grad


ONE_LONG = torch.tensor([20.0] + [1.0] * 28)


@pytest.mark.usefixtures("exponentials")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("lengths", "center"),
    [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (10.0, 1.0), (ONE_LONG, 1.0), (100.0, 10.0)],
    ids=["unit", "far centre", "length 3", "length 10", "one of length 20", "length 100"],
)
def test_large_scores_neither_overflow_nor_vanish(lengths: Tensor | float, center: float, dtype: torch.dtype) -> None:
    case = case_of()
    stretch(case, lengths)
    case.center.copy_(center * torch.randn(29))
    exact, small = case.to(torch.float64), case.to(torch.float32)
    expected = exact.plain_loss()
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype.itemsize == 2):
        loss, targets = small.loss(), small.targets()
    assert targets.entropy.isfinite().all()
    # Softmax of all scores at once is off by up to 5e-8 and 9e-7 in fp32, 2e-3 and 4e-2 in bf16.
    for_loss, for_gradients = (5e-7, 5e-6) if dtype == torch.float32 else (1e-2, 0.2)
    assert loss.item() == pytest.approx(expected.item(), rel=for_loss)
    loss.backward()
    expected.backward()
    assert all(grad.isfinite().all() for grad in small.gradients())
    for found, right in zip(small.gradients(), exact.gradients(), strict=True):
        assert error(found, right) < for_gradients


@pytest.mark.parametrize("lengths", [1.0, 4.0])
@pytest.mark.parametrize("common", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_costs_no_more_than_in_plain_pytorch(dtype: torch.dtype, common: float, lengths: float) -> None:
    """Scores like those of training: images have a part in common, and the centre is the mean of the scores."""
    worst = {}
    for seed in range(2):
        case = case_of(images=32, width=64, count=512, seed=seed)
        stretch(case, lengths)
        shared = common * F.normalize(torch.randn(64).double(), dim=0)
        for vectors in (case.vectors.data, case.taught):
            vectors.copy_(F.normalize(vectors + shared, dim=-1))
        case.center.copy_(plain_scores(case.taught, case.theirs).mean((0, 1)))
        exact, plain, chunked = case.to(torch.float64), case.to(torch.float32), case.to(torch.float32)
        exact.plain_loss().backward()
        with torch.autocast("cpu", dtype=dtype):
            (sums := chunked.loss()).backward()
            (expected := plain.plain_loss()).backward()
            targets = chunked.targets()
            found = targets.probabilities()
            worst[seed, "probabilities"] = error(found, exact.plain_probabilities()) / error(
                plain.plain_probabilities(), exact.plain_probabilities()
            )
        # A sum of 128 cross-entropies, each off by a rounding or two: by much less than one of bf16 in all.
        assert sums.item() == pytest.approx(expected.item(), rel=2**-9)
        for name, one, other, right in zip(
            ("vectors", "weight_v", "weight_g"),
            chunked.gradients(),
            plain.gradients(),
            exact.gradients(),
            strict=True,
        ):
            worst[seed, name] = error(one, right) / error(other, right)
    assert max(worst.values()) < 2, worst
