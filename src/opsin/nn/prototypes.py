"""Prototypes, and the cross-entropy of teacher and student over them without all scores in memory.

The head and the loss of DINO (Caron et al. 2021, sections 3.1 and 3.2). A score is the product of a unit vector
and a prototype of fixed length. For a student's vector z, prototypes W and the teacher's probabilities q

    -sum_k q_k log p_k = log sum_k exp(z W_k / t) - z (sum_k q_k W_k) / t,

so a pass over the prototypes, some thousand at a time, needs three running sums: of exp, of exp W and of q W.
They also give the gradient for z; that for W comes from a second pass over the same exponentials. All views
share the teacher's probabilities, so q W is computed once for each teacher view.

Shapes: K prototypes, C of a chunk, d their width, G teacher views, V student views, B images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# A CPU computes a chunk in its caches. A GPU needs as long to start each of the 50 operations of a chunk as to compute
# it, and its peak of memory lies in the network, not here.
_CHUNK, _KEPT_BYTES = 2048, 128 << 20
_GPU_CHUNK, _GPU_KEPT_BYTES = 65_536, 4 << 30
# Exponents that need not be reduced: far from the limits of the format, also when multiplied by 65,536.
_SAFE_EXPONENT = {torch.float64: 60.0, torch.float32: 60.0, torch.bfloat16: 60.0, torch.float16: 8.0}


class Prototypes(nn.Module):
    """K directions of width d, each a learned vector scaled to the length `weight_g`.

    The parameters are those of a weight-normed linear layer (Salimans & Kingma 2016). Without `learn_scale` the
    lengths stay at 1, and scores of unit vectors lie in [-1, 1].
    """

    def __init__(self, width: int, count: int, *, learn_scale: bool = False) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, width))
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=learn_scale)
        bound = 1 / math.sqrt(width)
        nn.init.uniform_(self.weight_v, -bound, bound)

    def forward(self, vectors: Tensor) -> Tensor:
        """Unit vectors [..., d] to scores [..., K] in one piece, for small K."""
        return F.linear(vectors, self.weight_g * F.normalize(self.weight_v, dim=1))

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Chunks of prototypes, [C, d] in `dtype`, with the lengths of their vectors, [C, 1]; without gradient."""
        for part in _parts(self.weight_v):
            vectors = self.weight_v.detach()[part]
            norms = vectors.norm(dim=1, keepdim=True)
            yield part, (vectors * (self.weight_g.detach()[part] / norms)).to(dtype), norms


@dataclass(frozen=True, slots=True)
class Targets:
    """The teacher's probabilities of every image, as exponentials with a factor for each chunk."""

    exponentials: Tensor
    """[G, B, K]"""
    shares: Tensor
    """[chunks, G, B]: factors from exponentials to probabilities, one for each chunk of prototypes."""
    mean_scores: Tensor
    """[K]: the scores before centring, averaged over views and images."""
    entropy: Tensor
    """[G, B], in nats."""
    winners: Tensor
    """int64 [G, B]: the most probable prototype of each image."""

    def probabilities(self) -> Tensor:
        """[G, B, K] in one piece, for small K."""
        parts = zip(_parts(self.exponentials.movedim(-1, 0)), self.shares, strict=True)
        return torch.cat([self.exponentials[..., part] * share[..., None] for part, share in parts], -1)


@torch.no_grad()
def teacher_targets(vectors: Tensor, prototypes: Prototypes, center: Tensor, temperature: float) -> Targets:
    """Softmax of (scores - center [K]) / temperature, for unit `vectors` [G, B, d]."""
    dtype = _compute_dtype(vectors)
    count, views = len(prototypes.weight_v), vectors.shape[:2]
    flat = vectors.flatten(0, 1)
    sharp = (flat / temperature).to(dtype)
    mean = flat.mean(0, keepdim=True)  # a mean of scores is the score of the mean
    offset = -center / temperature
    exponentials = flat.new_empty(len(flat), count, dtype=dtype)
    mean_scores = flat.new_empty(count)
    found: list[tuple[Tensor, ...]] = []
    with torch.autocast(flat.device.type, enabled=False):
        for part, weights, _ in prototypes.chunks(flat.dtype):
            mean_scores[part] = F.linear(mean, weights)[0]
            logits = F.linear(sharp, weights.to(dtype)).to(flat.dtype) + offset[part]
            high, winner = logits.max(1)
            chunk = torch.exp(logits - high[:, None])
            exponentials[:, part] = chunk
            found.append((high, winner + part.start, chunk.sum(1), (chunk * logits).sum(1)))
    highs, winners, sums, energies = (torch.stack(column) for column in zip(*found, strict=True))  # [chunks, G B]
    top, best = highs.max(0)
    factors = torch.exp(highs - top)
    total = (factors * sums).sum(0)
    entropy = total.log() + top - (factors * energies).sum(0) / total
    return Targets(
        exponentials.view(*views, count),
        (factors / total).view(-1, *views),
        mean_scores,
        entropy.view(views),
        winners.gather(0, best[None]).view(views),
    )


def cross_entropy(
    vectors: Tensor, prototypes: Prototypes, targets: Targets, pairs: Tensor, *, temperature: float, learn: bool
) -> Tensor:
    """The cross-entropy with the teacher's probabilities, summed over images and pairs of views.

    `vectors` are the student's unit vectors [V, B, d], `pairs` [V, G] the weights of pairs of a student's and a
    teacher's view. The gradient reaches the prototypes only with `learn`.
    """
    learned = [weight if learn else weight.detach() for weight in (prototypes.weight_v, prototypes.weight_g)]
    loss: Tensor = _CrossEntropy.apply(vectors, *learned, prototypes, targets, pairs, temperature)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        weight_v: Tensor,
        weight_g: Tensor,
        prototypes: Prototypes,
        targets: Targets,
        pairs: Tensor,
        temperature: float,
    ) -> Tensor:
        with torch.autocast(vectors.device.type, enabled=False):
            passes = _Passes(vectors, prototypes, targets, pairs.to(vectors.dtype), temperature)
            loss, grad = passes.loss()
            learned = passes.prototype_grads(ctx.needs_input_grad[2]) if ctx.needs_input_grad[1] else (None, None)
            ctx.grads = (grad, *learned)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled without a copy: those of the prototypes are the largest tensors of a step.
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "one backward pass for each forward pass"
        if factor.device.type == "cpu" and factor == 1:  # on a GPU the host would wait for the number
            return *grads, None, None, None, None
        return *(None if grad is None else grad.mul_(factor) for grad in grads), None, None, None, None


class _Passes:
    """Passes of the student over all prototypes, a chunk at a time."""

    def __init__(
        self, vectors: Tensor, prototypes: Prototypes, targets: Targets, pairs: Tensor, temperature: float
    ) -> None:
        self.dtype = targets.exponentials.dtype
        self.prototypes = prototypes
        self.teacher = targets.exponentials.flatten(0, 1)  # [G B, K]
        self.shares = targets.shares.flatten(1)[..., None]  # [chunks, G B, 1]
        self.pairs = pairs
        self.temperature = temperature
        self.vectors = vectors  # [V, B, d]
        self.flat = vectors.flatten(0, 1)
        self.sharp = (self.flat / temperature).to(self.dtype)
        self.sums = self.flat.new_zeros(len(self.flat), 1)
        self.top = torch.full_like(self.sums, -math.inf)
        """The highest exponent of each vector so far, which is subtracted from all; unused with `bounded`."""
        # Unless lengths are learned, the score of a unit vector is at most 1.
        self.bounded = not prototypes.weight_g.requires_grad and 1 / temperature < _SAFE_EXPONENT[self.dtype]
        num_bytes = (len(self.flat) + len(self.teacher)) * len(prototypes.weight_v) * self.dtype.itemsize
        self.keeps = num_bytes <= (_KEPT_BYTES if self.flat.device.type == "cpu" else _GPU_KEPT_BYTES)
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.norms: list[Tensor] = []

    def loss(self) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient for the vectors."""
        pushed = torch.zeros_like(self.flat)  # sum_k exp(s_k) W_k
        pulled = self.flat.new_zeros(len(self.teacher), self.flat.shape[1])  # sum_k q_k W_k
        for (part, weights, norms), shares in zip(self.prototypes.chunks(self.dtype), self.shares, strict=True):
            both, high = self._exponentials(weights, part)
            adding = both[: len(self.flat)].sum(1, keepdim=True, dtype=self.sums.dtype)
            # Not `@`: linear layers use the faster kernels of a CPU.
            pushing, pulling = F.linear(both, weights.T).tensor_split([len(self.flat)])
            pulled += pulling * shares
            if self.bounded:
                pushed += pushing
                self.sums += adding
            else:
                top = torch.maximum(self.top, high)
                before, now, self.top = torch.exp(self.top - top), torch.exp(high - top), top
                pushed = pushed * before + pushing * now
                self.sums = self.sums * before + adding * now
            self.norms.append(norms)
            if self.keeps:
                self.kept.append((both, high))
        answers = torch.einsum("vg,gbd->vbd", self.pairs, pulled.view(self.pairs.shape[1], *self.vectors.shape[1:]))
        totals = self.pairs.sum(1)[:, None]  # [V, 1]
        logs = self.sums.log() if self.bounded else self.sums.log() + self.top
        loss = (totals * logs.view(self.vectors.shape[:2])).sum() - (self.vectors * answers).sum() / self.temperature
        return loss, (totals[..., None] * (pushed / self.sums).view(self.vectors.shape) - answers) / self.temperature

    def prototype_grads(self, scale_learns: bool) -> tuple[Tensor, Tensor | None]:
        """The gradients for the prototypes' vectors [K, d] and lengths [K, 1]; call `loss` first."""
        weight_v, weight_g = self.prototypes.weight_v.detach(), self.prototypes.weight_g.detach()
        totals = self.pairs.sum(1).repeat_interleave(self.vectors.shape[1])[:, None]
        pushing = self.flat * (totals / self.sums / self.temperature)
        pulling = torch.einsum("vg,vbd->gbd", self.pairs, self.vectors).flatten(0, 1) / self.temperature
        # Divided out before half precision, whose range ends soon below, and multiplied back after.
        unit = torch.maximum(pushing.abs().max(), (pulling * self.shares).abs().max())
        pushing, pulling = pushing / unit, pulling / unit
        grad_v = torch.empty_like(weight_v)
        grad_g = torch.empty_like(weight_g) if scale_learns else None
        for index, (part, norms) in enumerate(zip(_parts(weight_v), self.norms, strict=True)):
            vectors, lengths = weight_v[part], weight_g[part]
            weights = None if self.keeps else (vectors * (lengths / norms)).to(self.dtype)
            both, high = self.kept[index] if weights is None else self._exponentials(weights, part)
            own = pushing if self.bounded else pushing * torch.exp(high - self.top)
            factors = torch.cat([own, -pulling * self.shares[index]])
            grad = F.linear(both.T, factors.T.to(self.dtype)).to(weight_v.dtype)
            along = (grad * vectors).sum(1, keepdim=True) / norms
            if grad_g is not None:
                grad_g[part] = along * unit
            # Across the vector only, and without a copy: these are the largest tensors of a step.
            slopes = lengths / norms * unit
            torch.mul(grad, slopes, out=grad_v[part]).addcmul_(vectors, along / norms * slopes, value=-1)
        return grad_v, grad_g

    def _exponentials(self, weights: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Exponentials of student and teacher, [V B + G B, C], for prototypes [C, d].

        Also what was subtracted from each exponent of the student, [V B, 1]; unused with `bounded`.
        """
        logits: Tensor = F.linear(self.sharp, weights)
        high = self.sums
        if not self.bounded:
            logits = logits.to(self.flat.dtype)
            high = logits.amax(1, keepdim=True)
            logits = logits.sub_(high)
        return torch.cat([logits.exp_().to(self.dtype), self.teacher[:, part]]), high


def _parts(prototypes: Tensor) -> Iterator[slice]:
    """The chunks of `prototypes` [K, ...]."""
    size, count = _CHUNK if prototypes.device.type == "cpu" else _GPU_CHUNK, len(prototypes)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _compute_dtype(vectors: Tensor) -> torch.dtype:
    kind = vectors.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else vectors.dtype
