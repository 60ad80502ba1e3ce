"""Tables of text: rows as lines with aligned columns."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int | None = None) -> list[str]:
    """Return a line for each row. The first `left` columns (all if None) are aligned to the left, the rest right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    layout = [f"<{width}" if number < left else f">{width}" for number, width in enumerate(widths)]
    return ["  ".join(f"{cell:{space}}" for cell, space in zip(row, layout, strict=True)).rstrip() for row in rows]
