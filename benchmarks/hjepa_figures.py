"""The figures of docs/HJEPA.md: nested grids over a photograph, the flow of a step, and what masks show and hide.

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/hjepa_figures.py [--out docs/figures] [--images 20000]

The photograph comes with scikit-learn. Masks are those of training, drawn from a seed.
"""

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opsin.data.views.masks import MaskConfig
from opsin.evaluation.map_pictures import outlines, shade
from opsin.methods.hjepa import coarser
from opsin.methods.ijepa import Cells
from opsin.reporting.style import BLUE, GREEN, RED, new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATCH, SIDE, LEVELS = 14, 16, 3
BATCH = 500
SHOWN_IMAGE = 13
TEXT, SMALL = 8.0, 6.8
KINDS = {
    "H-JEPA, three levels\n(cells of 4 x 4 patches)": MaskConfig(coarsest=4),
    "H-JEPA, two levels\n(cells of 2 x 2 patches)": MaskConfig(coarsest=2),
    "I-JEPA\n(cells are patches)": MaskConfig(),
    "the released sampler\n(parity=published)": MaskConfig(parity="published"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--images", type=int, default=20_000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "hjepa-levels.png": draw_levels(),
        "hjepa-flow.png": draw_flow(),
        "hjepa-visibility.png": draw_visibility(arguments.images),
    }
    for name, picture in pictures.items():
        with Image.open(io.BytesIO(picture)) as whole:
            whole.convert("RGB").quantize(192).save(arguments.out / name, optimize=True)
        print(f"{arguments.out / name}: {(arguments.out / name).stat().st_size / 1000:.0f} kB")


def photograph() -> Tensor:
    """The central square of a photograph, [3, S, S] in 0..1."""
    from sklearn.datasets import load_sample_image

    whole = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255
    height, width = whole.shape[1:]
    square = whole[:, :, (width - height) // 2 :][:, :, :height]
    return F.interpolate(square[None], (PATCH * SIDE,) * 2, mode="bilinear", antialias=True)[0].clamp(0, 1)


def draw_levels() -> bytes:
    from matplotlib.patches import Rectangle

    image = photograph()
    masks = MaskConfig(coarsest=2 ** (LEVELS - 1)).build(SIDE)(0, 0, torch.tensor([SHOWN_IMAGE]))
    seen = torch.zeros(SIDE**2, dtype=torch.bool)
    seen[masks["context"][0]] = True
    figure = new_figure(8.8, 2.45, dots_per_inch=110)
    first, *others = figure.subplots(1, LEVELS + 1)
    first.imshow(image.permute(1, 2, 0))
    first.set_title("what the target encoder sees", fontsize=TEXT)
    finest = Cells.of(masks)
    for level, axes in enumerate(others):
        cells = finest if level == 0 else coarser(finest, 2**level, SIDE)
        across = SIDE // cells.side
        blocks = [found[valid].tolist() for found, valid in zip(cells.indices[0], cells.valid[0], strict=True)]
        axes.imshow(shade(image, seen.view(SIDE, SIDE)).permute(1, 2, 0))
        scale = PATCH * SIDE
        for line in outlines(blocks, across):
            corner, size = (line.left * scale, line.top * scale), (line.width * scale, line.height * scale)
            width = 1.8 if line.thick else 0.5
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=line.colour, linewidth=width))
        axes.set_title(f"level {level}: {across} x {across} cells", fontsize=TEXT)
    for axes in (first, *others):
        axes.set_axis_off()
    return to_png(figure)


def draw_visibility(images: int) -> bytes:
    figure = new_figure(8.8, 4.5, dots_per_inch=110)
    panels = figure.subplots(2, len(KINDS))
    for column, (title, config) in enumerate(KINDS.items()):
        for row, (name, rates) in enumerate(count_visits(config, images).items()):
            axes = panels[row][column]
            axes.imshow(100 * rates, cmap="cividis", vmin=0, vmax=100)
            low, high = 100 * float(rates.min()), 100 * float(rates.max())
            what = "in the context" if name == "context" else "in a target"
            axes.set_title(f"{title}\n" if row == 0 else "", fontsize=TEXT)
            axes.set_xlabel(f"{what}: {low:.0f} to {high:.0f} %", fontsize=TEXT)
            axes.set_xticks([])
            axes.set_yticks([])
    return to_png(figure)


def count_visits(config: MaskConfig, images: int) -> dict[str, Tensor]:
    """In which share of the images each patch is in the context, and in a target: [SIDE, SIDE]."""
    sampler = config.build(SIDE)
    counts = {name: torch.zeros(SIDE**2) for name in ("context", "target")}
    for epoch in range(images // BATCH):
        masks = sampler(0, epoch, torch.arange(BATCH))
        for name, found in counts.items():
            patches, valid = masks["context" if name == "context" else "targets"], masks[f"{name}_valid"]
            named = torch.zeros(BATCH, SIDE**2 + 1, dtype=torch.bool)
            named.scatter_(1, torch.where(valid, patches, SIDE**2).flatten(1), True)
            found += named[:, :-1].sum(0)
    return {name: (found / (images // BATCH * BATCH)).view(SIDE, SIDE) for name, found in counts.items()}


def draw_flow() -> bytes:
    """Boxes are networks and operations, from the image on the left to the losses on the right."""
    figure = new_figure(8.8, 3.7, dots_per_inch=110, constrained=False)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 88)
    axes.set_ylim(0, 37)
    axes.set_axis_off()
    box(axes, 1, 15, 9, 8, "image", "16 x 16\npatches", "black")
    box(axes, 16, 25, 15, 8, "context encoder", "patches of the\ncontext alone", BLUE)
    box(axes, 16, 3, 15, 8, "target encoder", "all patches;\nfollows slowly", GREEN)
    arrow(axes, (10, 20), (16, 28))
    arrow(axes, (10, 18), (16, 8))
    arrow(axes, (23.5, 25), (23.5, 11), "weights,\nno gradient", dashed=True)
    for index, level in enumerate(reversed(range(LEVELS))):
        left, across = 38 + 17 * index, SIDE // 2**level
        box(axes, left, 24, 12.5, 8, f"predictor {level}", f"asks for cells\nof {across} x {across}", BLUE)
        box(axes, left, 14.5, 12.5, 5, "smooth L1", f"weight {0.5**level:g}", RED)
        pooling = "" if level == 0 else f"mean of {2**level} x {2**level}, "
        box(axes, left, 3, 12.5, 7, f"targets {level}", f"{pooling}\nlayer norm" if pooling else "layer norm", GREEN)
        arrow(axes, (left + 6.25, 24), (left + 6.25, 19.5))
        arrow(axes, (left + 6.25, 10), (left + 6.25, 14.5))
        # What all levels take runs above and below them.
        arrow(axes, (left + 6.25, 35), (left + 6.25, 32))
        arrow(axes, (left + 6.25, 1), (left + 6.25, 3))
        if level:
            arrow(axes, (left + 12.5, 28), (left + 17, 28), "hint")
    last = 38 + 17 * (LEVELS - 1) + 6.25
    for y, bottom in ((35, 33), (1, 3)):
        axes.plot([23.5, last], [y, y], color="black", linewidth=0.9)
        axes.plot([23.5, 23.5], [bottom, y], color="black", linewidth=0.9)
    return to_png(figure)


def box(
    axes: "Axes", left: float, bottom: float, width: float, height: float, name: str, text: str, colour: str
) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, "round,pad=0,rounding_size=0.8", fc="white", ec=colour, lw=1.3)
    )
    lines = 2 + text.count("\n")
    axes.text(
        left + width / 2,
        bottom + height * (1 - 0.75 / lines),
        name,
        ha="center",
        va="center",
        fontsize=TEXT,
        color=colour,
    )
    axes.text(
        left + width / 2, bottom + height * (lines - 1) / lines / 2, text, ha="center", va="center", fontsize=SMALL
    )


def arrow(
    axes: "Axes", start: tuple[float, float], end: tuple[float, float], text: str = "", *, dashed: bool = False
) -> None:
    style = {"arrowstyle": "-|>", "color": "black", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**style, "linestyle": "--" if dashed else "-"})
    if not text:
        return
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    if dashed:
        axes.text(x + 0.8, y, text, fontsize=SMALL, ha="left", va="center")
    else:
        axes.text(x, y + 0.5, text, fontsize=SMALL, ha="center", va="bottom")


if __name__ == "__main__":
    main()
