"""A monitor of collapse: features that no longer distinguish images, a teacher that no longer teaches.

Shapes: N feature vectors, D width, K prototypes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from opsin.clock.timeline import Timeline
from opsin.reporting.journal import Row
from opsin.training.monitor import Finding, Monitor, MonitorConfig
from opsin.training.state import StepReport, TrainState

_FEWEST = 8
"""Feature vectors below which neither spread nor rank says anything."""
_GROWTH = 1.1
"""A training in which something has grown by this factor since the first bad row is recovering by itself."""
_NOTHING = 1 / 50
"""This share of a small divergence counts as none."""
_SAME = 1 / 100
"""This share of a small angle counts as none."""
_LONG = 10
"""Multiple of the patience for features that are narrow and have never been much wider."""
_RANKED = 1024
"""Most feature vectors whose rank is measured."""
_PREDICTED = "prediction"
"""Prefix of the names of features that no encoder gives. A predictor begins with the mean of its targets: narrow
predictions show an untrained predictor, not collapsed encoders."""


class CollapseConfig(MonitorConfig):
    """Spread and rank of features, and four verdicts on teacher and student; needs a method that gives features."""

    name: Literal["collapse"] = "collapse"
    warmup: int | Literal["auto"] = "auto"
    """Steps at the start that are not judged, since a fresh network looks collapsed; `auto` is 100, or 1 % of a long
    run."""
    patience: int = Field(50, ge=0)
    """Steps over which every measurement must be bad, two at least, and none better than the first."""
    uniform_entropy: float = Field(0.99, gt=0, le=1)
    """Uniform collapse needs a teacher whose entropy exceeds this share of ln K."""
    uniform_kl: float = Field(0.05, ge=0)
    """Uniform collapse needs a student whose divergence from the teacher is below this, in nats, while features are
    below `std`; or below a 50th of this."""
    peaked_entropy: float = Field(0.5, ge=0, lt=1)
    """One-prototype collapse needs a teacher whose entropy is below this share of ln K."""
    prototypes: float = Field(4.0, ge=1)
    """One-prototype collapse needs a batch with at most this number of prototypes as first choices of its images."""
    std: float = Field(0.1, ge=0)
    """Features have collapsed if `collapse/<encoder>_std` is below this, and below half of its largest value or for 10
    times the patience."""
    rank: float = Field(2.0, ge=1)
    """Features have collapsed if `collapse/<encoder>_rank` is below this."""
    cosine: float = Field(0.999, gt=0, le=1)
    """A teacher does not teach if its features and the student's have at least this cosine while they are below `std`,
    or a cosine a hundred times closer to 1."""

    def delay(self, row_steps: int, timeline: Timeline) -> int:
        # One interval until it is measured, the longest patience, and one more if that ends between two.
        return _LONG * self.patience + 2 * super().delay(row_steps, timeline)

    def build(self, timeline: Timeline) -> "Collapse":
        warmup = max(100, timeline.total_steps // 100) if self.warmup == "auto" else self.warmup
        return Collapse(self, warmup=warmup)


class Collapse(Monitor):
    """Measures features of student and teacher, and judges them together with values of the method.

    From the method it reads, where rows have them, `train/teacher_entropy_share`, `train/kl`, `train/winners`, how many
    prototypes are the first choice for an image of the batch, and `train/prototypes_used`, the same as a share of how
    many it could be.
    """

    def __init__(self, config: CollapseConfig, *, warmup: int) -> None:
        self._config = config
        self._warmup = warmup
        patience = config.patience
        # The first that holds is the verdict: it explains those that follow.
        self._spells = {
            "no_teacher": _Spell(patience),
            "uniform_collapse": _Spell(patience),
            "one_prototype_collapse": _Spell(patience),
            "feature_collapse": _Spell(patience),
            "feature_collapse from the start": _Spell(_LONG * patience),
        }
        self._std = math.nan
        """The smallest of the encoders, as last judged."""
        self._largest: dict[str, float] = {}
        """The largest `std` of each encoder so far."""
        self._verdict: str | None = None

    @torch.no_grad()
    def measure(self, state: TrainState, report: StepReport) -> Mapping[str, float]:
        """`collapse/<encoder>_std`, `_norm`, `_rank`; `collapse/vectors`, the fewest; `collapse/cosine` of both."""
        values: dict[str, float] = {}
        features = {name: tensor.float() for name, tensor in report.features.items() if len(tensor) >= _FEWEST}
        features = {name: tensor for name, tensor in features.items() if bool(tensor.isfinite().all())}
        for name, tensor in features.items():
            values[f"collapse/{name}_std"] = spread(tensor).item()
            values[f"collapse/{name}_norm"] = tensor.norm(dim=1).mean().item()
            values[f"collapse/{name}_rank"] = effective_rank(tensor).item()
        if features:
            values["collapse/vectors"] = float(min(map(len, features.values())))
        student, teacher = features.get("student"), features.get("teacher")
        if student is not None and teacher is not None and student.shape == teacher.shape:
            # float64: the verdict lies in the fifth digit behind the point.
            values["collapse/cosine"] = F.cosine_similarity(student.double(), teacher.double(), dim=1).mean().item()
        return values

    def judge(self, row: Row) -> Finding | None:
        stds = _by_encoder(row.values, "_std")
        for encoder, std in stds.items():
            self._largest[encoder] = max(std, self._largest.get(encoder, 0.0))
        self._std = min(stds.values(), default=self._std)
        for kind, symptom in self._symptoms(row.values).items():
            if row.step >= self._warmup or not symptom.is_there:
                self._spells[kind].note(row.step, symptom)
        lasting = [kind for kind, spell in self._spells.items() if spell.lasts]
        if self._verdict not in lasting:
            self._verdict = lasting[0] if lasting else None
        if self._verdict is None:
            return None
        spell = self._spells[self._verdict]
        assert spell.since is not None, "it lasts"
        text = f"{spell.text} since step {spell.since}"
        return Finding(self._verdict.split()[0], text, spell.since, spell.last_good_step)

    def _symptoms(self, values: Mapping[str, float]) -> "dict[str, _Symptom]":
        """The symptom of each kind in this row, except where it lacks the values."""
        found = self._feature_symptoms(values)
        cosine = values.get("collapse/cosine", math.nan)
        if not math.isnan(cosine):
            angle, limit = 1 - cosine, 1 - self._config.cosine
            found["no_teacher"] = _Symptom(
                angle <= limit * _SAME or (angle <= limit and self._std < self._config.std),
                f"no teacher: its features are those of the student (cosine {cosine:.6f})",
                ways_out=(self._std,),
            )
        names = ("teacher_entropy_share", "kl", "winners", "prototypes_used")
        share, kl, winners, used = (values.get(f"train/{name}", math.nan) for name in names)
        if not math.isnan(share + kl):
            found["uniform_collapse"] = self._uniform(share, kl)
        # Few images have few winners: a batch that is computed image by image says nothing.
        if not math.isnan(share) and winners >= _FEWEST * used:
            found["one_prototype_collapse"] = self._peaked(share, winners)
        return found

    def _uniform(self, share: float, kl: float) -> "_Symptom":
        nothing = self._config.uniform_kl * _NOTHING
        is_idle = kl < nothing or (kl < self._config.uniform_kl and self._std < self._config.std)
        return _Symptom(
            share > self._config.uniform_entropy and is_idle,
            f"uniform collapse: teacher entropy = ln K ({share:.2%} of it, {kl:.2g} nats to learn)",
            ways_out=(max(kl, nothing), self._std),
        )

    def _peaked(self, share: float, winners: float) -> "_Symptom":
        return _Symptom(
            share < self._config.peaked_entropy and winners <= self._config.prototypes,
            f"one-prototype collapse: {winners:.1f} prototypes win all images of a batch (teacher entropy {share:.2%} "
            "of ln K)",
        )

    def _feature_symptoms(self, values: Mapping[str, float]) -> "dict[str, _Symptom]":
        stds, ranks = _by_encoder(values, "_std"), _by_encoder(values, "_rank")
        if not stds or stds.keys() != ranks.keys():
            return {}
        narrow, flat = min(stds, key=lambda name: stds[name]), min(ranks, key=lambda name: ranks[name])
        is_narrow, is_flat = stds[narrow] < self._config.std, ranks[flat] < self._config.rank
        encoder = narrow if is_narrow or not is_flat else flat
        std = stds[encoder]
        text = f"feature collapse: spread of the features of the {encoder} {std:.2g}, {ranks[encoder]:.1f} directions"
        fallen = (is_narrow and std < self._largest[narrow] / 2) or is_flat
        return {
            "feature_collapse": _Symptom(fallen, text, ways_out=(std,)),
            "feature_collapse from the start": _Symptom(is_narrow, text, ways_out=(std,)),
        }


def spread(features: Tensor) -> Tensor:
    """Spread of the directions of features [N, D]: 0 if all are equal, 1 if they are uniform on the sphere.

    The mean over the dimensions of the standard deviation of normalised features, times sqrt(D).
    """
    directions = F.normalize(features, dim=1)
    return directions.std(dim=0).mean() * math.sqrt(features.shape[1])


def effective_rank(features: Tensor) -> Tensor:
    """Effective number of directions of features [N, D], between 1 and the smaller of N - 1 and D.

    exp(entropy of the normalised singular values) of the centred features (Roy & Vetterli 2007); 1 if all are equal.
    Of more than 1,024 vectors, every second, third and so on is taken.
    """
    features = features[:: -(-len(features) // _RANKED)].double()
    centred = features - features.mean(dim=0)
    # Eigenvalues of the smaller product take a fraction of the time of singular values. They are squares: float64.
    product = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    singular = torch.linalg.eigvalsh(product).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()


@dataclass(frozen=True, slots=True)
class _Symptom:
    """A kind of collapse in one row."""

    is_there: bool
    text: str
    ways_out: tuple[float, ...] = ()
    """Values that grow if the training recovers by itself."""


class _Spell:
    """Consecutive rows in which something is wrong and gets no better."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._first: tuple[float, ...] = ()
        self.last_good_step = 0
        self.since: int | None = None
        self._last = 0
        """The step of the last row that was bad."""
        self.text = ""

    def note(self, step: int, symptom: _Symptom) -> None:
        """Begin, continue, begin again if it gets better, or end."""
        if not symptom.is_there:
            self.since, self.last_good_step = None, step
            return
        grows = any(now > _GROWTH * first for now, first in zip(symptom.ways_out, self._first, strict=False))
        if self.since is None or grows:
            self.since, self._first = step, symptom.ways_out
        self._last, self.text = step, symptom.text

    @property
    def lasts(self) -> bool:
        """True if it was seen at least twice, over as many steps as the patience; rows without values do not count."""
        return self.since is not None and self._last - self.since >= max(self._patience, 1)


def _by_encoder(values: Mapping[str, float], suffix: str) -> dict[str, float]:
    """The values `collapse/<encoder><suffix>` by encoder; predictions are measured, but not judged."""
    prefix = "collapse/"
    return {
        name[len(prefix) : -len(suffix)]: value
        for name, value in values.items()
        if name.startswith(prefix)
        and not name.startswith(prefix + _PREDICTED)
        and name.endswith(suffix)
        and not math.isnan(value)
    }
