"""Features that collapse, teachers that stop teaching, and the words for it."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from opsin.clock.timeline import Stage, Timeline
from opsin.monitors.collapse import Collapse, CollapseConfig, effective_rank, spread
from opsin.training.state import ScheduledValues, StepReport
from opsin.training.stopwatch import Stopwatch
from tests.unit.monitors.synthetic import TIMELINE, judged
from tests.unit.training.tiny_run import fresh

LOG_K = math.log(1024)

# From runs of DINO on digits with 1,024 prototypes and 96 vectors for the teacher, a row for each 50 steps:
# share of ln K, divergence, share of the prototypes used; spread of student and teacher, their cosine.
HEALTHY = [
    (0.62, 0.54, 0.103, 0.066, 0.195, 0.90),
    (0.71, 0.27, 0.099, 0.103, 0.223, 0.91),
    (0.79, 0.22, 0.096, 0.186, 0.198, 0.90),
    (0.90, 0.14, 0.100, 0.225, 0.219, 0.91),
    (0.97, 0.08, 0.120, 0.377, 0.165, 0.85),
    (0.987, 0.058, 0.147, 0.434, 0.215, 0.77),
    (0.991, 0.047, 0.196, 0.622, 0.236, 0.69),
    (0.993, 0.044, 0.272, 0.601, 0.216, 0.67),
]
PLATEAU = [
    (0.970, 0.41, 0.46, 0.151, 0.181, 0.84),
    (0.973, 0.19, 0.40, 0.156, 0.194, 0.88),
    (0.987, 0.077, 0.32, 0.165, 0.176, 0.94),
    (0.994, 0.035, 0.40, 0.172, 0.163, 0.97),
    (0.996, 0.024, 0.41, 0.196, 0.168, 0.98),
    (0.9984, 0.0095, 0.35, 0.314, 0.201, 0.98),
    (0.9994, 0.0035, 0.31, 0.313, 0.207, 0.983),
    (0.9989, 0.0058, 0.24, 0.421, 0.206, 0.975),
    (0.9956, 0.017, 0.19, 0.535, 0.21, 0.96),
]
"""A healthy run that is close to uniform for a thousand steps while its features spread."""
HOT = [
    (0.9979, 0.323, 0.35, 0.068, 0.181, 0.85),
    (0.9993, 0.0193, 0.21, 0.056, 0.176, 0.92),
    (0.9998, 0.0013, 0.29, 0.048, 0.135, 0.956),
    (0.9999, 0.0007, 0.37, 0.043, 0.120, 0.968),
    (1.0, 0.0003, 0.46, 0.047, 0.128, 0.972),
]
NOT_CENTRED = [
    (0.42, 0.579, 0.068, 0.063, 0.176, 0.918),
    (0.063, 0.044, 0.0104, 0.060, 0.169, 0.935),
    (0.0015, 0.014, 0.0104, 0.048, 0.131, 0.944),
    (0.0003, 0.0075, 0.0104, 0.045, 0.118, 0.953),
]
NO_MOMENTUM = [
    (2.8e-5, 0.085, 0.0104, 0.063, 0.070, 0.9997),
    (1.0e-4, 0.025, 0.0104, 0.054, 0.055, 0.9999),
    (3.0e-4, 0.006, 0.0104, 0.048, 0.049, 0.9997),
    (1.0e-3, 0.002, 0.0104, 0.048, 0.048, 0.9996),
]


def monitor(**settings: object) -> Collapse:
    return CollapseConfig.model_validate(settings).build(TIMELINE)


def rows(course: Sequence[tuple[float, ...]], *, rank: float = 8.0) -> list[dict[str, float]]:
    return [
        {
            "train/teacher_entropy": share * LOG_K,
            "train/teacher_entropy_share": share,
            "train/kl": kl,
            "train/prototypes_used": used,
            "train/winners": used * 96,
            "collapse/student_std": student,
            "collapse/teacher_std": teacher,
            "collapse/student_rank": rank,
            "collapse/teacher_rank": rank,
            "collapse/cosine": cosine,
            "collapse/vectors": 96.0,
        }
        for share, kl, used, student, teacher, cosine in course
    ]


def features_of(std: float) -> dict[str, float]:
    return {"collapse/student_std": std, "collapse/student_rank": 8.0, "collapse/vectors": 96.0}


def report(features: Mapping[str, Tensor]) -> StepReport:
    clock = TIMELINE.clock(49)
    return StepReport(
        50,
        clock,
        ScheduledValues(0.1, 0.9, 0.0),
        {},
        torch.tensor(1.0),
        torch.arange(4),
        4,
        Stopwatch(torch.device("cpu")),
        features,
    )


def plain_rank(features: Tensor) -> float:
    centred = features.double().numpy()
    centred = centred - centred.mean(axis=0)
    shares = [value for value in np.linalg.svd(centred, compute_uv=False) if value > 0]
    total = sum(shares)
    return math.exp(-sum(value / total * math.log(value / total) for value in shares))


@pytest.mark.parametrize("shape", [(40, 16), (16, 40)])
def test_the_effective_rank_is_the_published_one(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, shape[1]) + 5
    # Roots of eigenvalues of float64 products: half of its 15 digits, for the smallest of them.
    assert effective_rank(features).item() == pytest.approx(plain_rank(features), rel=1e-6)


def test_the_effective_rank_of_many_vectors_is_that_of_a_part_of_them() -> None:
    features = torch.randn(2500, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 12)
    assert effective_rank(features).item() == pytest.approx(plain_rank(features[::3]), rel=1e-6)
    # The rank of random vectors hardly depends on how many there are, where they are many more than dimensions.
    assert effective_rank(features).item() == pytest.approx(plain_rank(features), rel=0.02)


def test_the_effective_rank_of_equal_features_is_one() -> None:
    assert effective_rank(torch.ones(20, 8)).item() == 1.0


def test_the_effective_rank_counts_directions() -> None:
    features = torch.cat([torch.eye(8), -torch.eye(8)])[:, :6]
    assert effective_rank(features).item() == pytest.approx(6.0, rel=1e-5)


def test_the_spread_is_one_over_the_sphere_and_none_at_a_point() -> None:
    sphere = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    assert spread(sphere).item() == pytest.approx(1.0, abs=0.02)
    assert spread(3 * torch.ones(10, 64)).item() == pytest.approx(0.0, abs=1e-6)


def test_features_of_both_encoders_are_measured() -> None:
    student = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    values = monitor().measure(fresh(), report({"student": student, "teacher": -2 * student}))
    assert set(values) == {"collapse/cosine", "collapse/vectors"} | {
        f"collapse/{encoder}_{what}" for encoder in ("student", "teacher") for what in ("std", "norm", "rank")
    }
    assert values["collapse/cosine"] == pytest.approx(-1.0)
    assert values["collapse/teacher_norm"] == pytest.approx(2 * values["collapse/student_norm"])
    assert values["collapse/vectors"] == 20


def test_features_of_different_images_are_not_compared() -> None:
    values = monitor().measure(fresh(), report({"student": torch.randn(20, 6), "teacher": torch.randn(10, 6)}))
    assert "collapse/cosine" not in values
    assert values["collapse/vectors"] == 10, "the fewest: what a rank can be at most"


@pytest.mark.parametrize("features", [{}, {"student": torch.ones(4, 6)}, {"student": torch.full((20, 6), math.nan)}])
def test_nothing_is_measured_where_there_is_nothing_to_see(features: Mapping[str, Tensor]) -> None:
    assert monitor().measure(fresh(), report(features)) == {}


@pytest.mark.parametrize("course", [HEALTHY, PLATEAU], ids=["healthy", "plateau"])
def test_a_healthy_run_gives_no_alarm(course: Sequence[tuple[float, ...]]) -> None:
    assert judged(monitor(), rows(course)) == {}


@pytest.mark.parametrize(
    ("course", "kind", "words"),
    [
        (HOT, "uniform_collapse", "uniform collapse: teacher entropy = ln K"),
        (NOT_CENTRED, "one_prototype_collapse", "one-prototype collapse: 1.0 prototypes win all images of a batch"),
        (NO_MOMENTUM, "no_teacher", "no teacher: its features are those of the student"),
    ],
    ids=["hot", "not centred", "no momentum"],
)
def test_a_collapse_is_named_within_200_steps(course: Sequence[tuple[float, ...]], kind: str, words: str) -> None:
    found = judged(monitor(), rows(course))
    assert next(iter(found)) <= 200
    assert {finding.kind for finding in found.values()} == {kind}
    text = next(iter(found.values())).text
    assert text.startswith(words)
    assert text.endswith("since step 100")


@pytest.mark.parametrize(
    ("possible", "winners", "is_found"), [(96, 4, True), (96, 5, False), (8, 4, True), (2, 1, False)]
)
def test_winners_count_as_they_are_told(possible: int, winners: int, is_found: bool) -> None:
    """Also where features are those of one view of several, and where a batch is computed in single images."""
    counts = {"train/winners": float(winners), "train/prototypes_used": winners / possible, "collapse/vectors": 48.0}
    course = [{**row, **counts} for row in rows(NOT_CENTRED)]
    assert bool(judged(monitor(), course)) == is_found


def test_what_gets_better_is_left_alone() -> None:
    rising = [(0.999, 0.001 * 1.3**index, 0.3, 0.02 * 1.3**index, 0.08, 0.99) for index in range(8)]
    assert judged(monitor(), rows(rising)) == {}
    still = [(0.999, 0.001, 0.3, 0.02, 0.08, 0.99)] * 8
    assert set(judged(monitor(), rows(still))) == {150, 200, 250, 300, 350, 400}


def test_features_that_have_shrunk_are_a_collapse() -> None:
    shrinking = [(0.8, 0.2, 0.2, 0.4 * 0.6**index, 0.3, 0.9) for index in range(8)]
    found = judged(monitor(), rows(shrinking))
    assert list(found) == [250, 300, 350, 400]
    assert found[250].kind == "feature_collapse"
    assert found[250].text == (
        "feature collapse: spread of the features of the student 0.052, 8.0 directions since step 200"
    )


def test_features_that_were_never_spread_get_more_time() -> None:
    narrow = [(0.8, 0.2, 0.2, 0.07, 0.3, 0.9)] * 14
    assert list(judged(monitor(), rows(narrow))) == [600, 650, 700]


def test_features_in_one_direction_are_a_collapse() -> None:
    found = judged(monitor(), rows([(0.8, 0.2, 0.2, 0.5, 0.5, 0.9)] * 4, rank=1.2))
    assert {step: finding.kind for step, finding in found.items()} == {150: "feature_collapse", 200: "feature_collapse"}


def test_the_encoder_with_few_directions_is_named_with_its_own_numbers() -> None:
    row = {"collapse/vectors": 96.0, "collapse/context_std": 0.8, "collapse/context_rank": 1.0}
    found = judged(monitor(), [{**row, "collapse/target_std": 0.3, "collapse/target_rank": 60.0}] * 4)
    assert found[150].text.startswith("feature collapse: spread of the features of the context 0.8, 1.0 directions")


def test_rows_between_measurements_neither_begin_nor_end_a_finding() -> None:
    course: list[dict[str, float]] = rows(HOT)[:4] + [{"train/loss": 1.0}] * 2 + rows(HOT)[4:]
    assert list(judged(monitor(), course)) == [150, 200, 250, 300, 350]


def test_one_bad_measurement_is_no_finding_however_long_ago() -> None:
    nothing = [{"train/loss": 1.0}] * 9
    course = [row for std in (0.9, 0.02, 0.02) for row in ({**features_of(std)}, *nothing)]
    assert next(iter(judged(monitor(every="500 steps", warmup=0), course))) == 1050, "measured at 50, 550 and 1050"
    assert judged(monitor(patience=0, warmup=0), [features_of(0.9), features_of(0.02)]) == {}


def test_a_finding_ends() -> None:
    assert list(judged(monitor(), rows(HOT + HEALTHY[2:]))) == [150, 200, 250]


def test_a_long_run_takes_its_time() -> None:
    timeline = Timeline([Stage(epochs=100, batch_size=48, steps_per_epoch=300)])
    found = judged(CollapseConfig().build(timeline), rows([*HOT, *[HOT[-1]] * 5]))
    assert list(found) == [350, 400, 450, 500]


def test_a_supervised_run_has_no_finding() -> None:
    assert judged(monitor(), [{"train/loss": 1.0, "train/grad_norm": 2.0}] * 20) == {}


def test_narrow_predictions_are_no_collapse_while_encoders_are_well() -> None:
    # From H-JEPA on digits, which learns: what cannot be predicted yet is predicted by its mean.
    predictions = [0.47, 0.34, 0.14, 0.095, 0.08, 0.073, 0.071, 0.075, 0.081, 0.092, 0.119, 0.12, 0.12, 0.13]
    targets = [0.51, 0.52, 0.49, 0.40, 0.19, 0.21, 0.22, 0.27, 0.30, 0.32, 0.35, 0.35, 0.36, 0.36]
    course = [
        {
            "collapse/prediction_1_std": prediction,
            "collapse/prediction_1_rank": 1.4,
            "collapse/target_1_std": target,
            "collapse/target_1_rank": 8.0,
            "collapse/vectors": 256.0,
        }
        for prediction, target in zip(predictions, targets, strict=True)
    ]
    assert judged(monitor(), course) == {}
    collapsing = [{**row, "collapse/target_1_std": 0.5 * 0.5**index} for index, row in enumerate(course)]
    found = judged(monitor(), collapsing)
    assert next(iter(found)) <= 250
    assert found[next(iter(found))].text.startswith("feature collapse: spread of the features of the target_1 ")
