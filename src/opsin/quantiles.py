"""Quantiles of many values by part of a network, under the names that rows of the journal have for them."""

import math
from collections.abc import Mapping, Sequence

GRADIENTS = "gradients"
"""How names of quantiles of gradients begin."""
PERCENTS = (5, 25, 50, 75, 95, 100)
"""Of so many percent of the values, the largest is told."""


def quantile_names(prefix: str, part: str) -> list[str]:
    """`gradients/layer_00_q05` and so on, one name for each of `PERCENTS`."""
    return [f"{prefix}/{part}_q{percent:02}" for percent in PERCENTS]


def quantiles_by_part(prefix: str, values: Mapping[str, float]) -> dict[str, Sequence[float]]:
    """The quantiles of each part whose quantiles are all there and finite, in the order of the parts' names."""
    ending = f"_q{PERCENTS[0]:02}"
    parts = sorted(
        name.removeprefix(f"{prefix}/").removesuffix(ending)
        for name in values
        if name.startswith(f"{prefix}/") and name.endswith(ending)
    )
    found = {part: [values.get(name, math.nan) for name in quantile_names(prefix, part)] for part in parts}
    return {part: quantiles for part, quantiles in found.items() if all(map(math.isfinite, quantiles))}
