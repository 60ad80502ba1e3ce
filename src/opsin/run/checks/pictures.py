"""Checks of the pictures: a sample of them is read as training reads it.

Shapes: H and W sides of a picture in pixels, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsin.data.base import Source, UnreadableImage
from opsin.run.checks.verdict import Verdict
from opsin.run.images import Images
from opsin.run.recipe import Recipe

_SAMPLED = 256
_FEW_OF_A_CLASS = 10
_UNEQUAL = 10
"""Ratio of the largest class to the smallest from which on accuracy hides the small ones."""
_CENTRE, _SPREAD = 1.0, (0.4, 2.5)
"""Normalised pixels have mean 0 and deviation 1; pictures of another kind stay within these bounds."""
_LISTED = 3


@dataclass(frozen=True, slots=True)
class _Sample:
    """Facts about some pictures."""

    read: int
    unreadable: Sequence[str]
    sides: Sequence[int]
    """The shorter side of each."""
    mean: Tensor
    """float [3], in 0..1"""
    std: Tensor
    flat: Sequence[str]
    """Locations of pictures of a single colour."""


def check_pictures(recipe: Recipe, images: Images) -> Iterator[Verdict]:
    """Look at the files, the classes, the sizes and the colours."""
    sample = _read(images.train)
    yield _files(recipe, images, sample)
    if images.train.classes:
        yield _classes(images)
    if not sample.read:
        return
    yield _sizes(recipe, sample)
    yield _colours(images, sample)


def _read(source: Source) -> _Sample:
    unreadable, sides, flat, means, squares = [], [], [], [], []
    indices = torch.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).long().unique().tolist()
    for index in indices:
        try:
            picture = source.read(index)
        except UnreadableImage as error:
            unreadable.append(f"{source.location(index)} ({error})")
            continue
        values = picture.double().flatten(1) / 255
        sides.append(min(picture.shape[1:]))
        means.append(values.mean(1))
        squares.append(values.square().mean(1))
        if int(picture.amax()) == int(picture.amin()):
            flat.append(source.location(index))
    mean = torch.stack(means).mean(0) if means else torch.zeros(3)
    square = torch.stack(squares).mean(0) if means else torch.zeros(3)
    return _Sample(len(sides), unreadable, sorted(sides), mean, (square - mean**2).clamp(min=0).sqrt(), flat)


def _files(recipe: Recipe, images: Images, sample: _Sample) -> Verdict:
    tried = sample.read + len(sample.unreadable)
    val = "no validation images" if images.val is None else f"{len(images.val):,} to validate"
    counts = f"{len(images.train):,} to train, {val}"
    if sample.unreadable:
        share = len(sample.unreadable) / tried
        listed = ", ".join(sample.unreadable[:_LISTED])
        text = f"{len(sample.unreadable)} of {tried} that were read are damaged: {listed}"
        if share > recipe.data.max_unreadable:
            return Verdict(
                "pictures", "fault", f"{text}; data.max_unreadable={recipe.data.max_unreadable:g}: repair them"
            )
        return Verdict("pictures", "look", f"{text}; they are left out and listed in quarantine.txt")
    if len(sample.flat) > tried / 2:
        return Verdict("pictures", "fault", f"{len(sample.flat)} of {tried} have a single colour: {sample.flat[0]}")
    if sample.flat:
        listed = ", ".join(sample.flat[:_LISTED])
        return Verdict("pictures", "look", f"{len(sample.flat)} of {tried} have a single colour: {listed}")
    return Verdict("pictures", "fine", f"{counts}; {tried:,} were read, all well")


def _classes(images: Images) -> Verdict:
    classes, labels = images.train.classes, images.train.labels
    counts = torch.bincount(labels[labels >= 0], minlength=len(classes)).tolist()
    by_size = sorted(zip(counts, classes, strict=True))
    (least, rarest), (most, commonest) = by_size[0], by_size[-1]
    head = f"{len(classes)} classes of {least:,} to {most:,} pictures"
    if images.val is not None and images.val.classes != classes:
        other = set(images.val.classes).symmetric_difference(classes)
        return Verdict("classes", "fault", f"training and validation differ in {', '.join(sorted(other)[:_LISTED])}")
    if least == 0:
        return Verdict("classes", "fault", f"{rarest} has no picture to train on: add some, or remove the class")
    if most > _UNEQUAL * least:
        text = f"{head}: {commonest} has {most / least:,.0f} times the pictures of {rarest}"
        return Verdict("classes", "look", f"{text}; read the accuracy of each class (opsin eval), not the mean alone")
    if least < _FEW_OF_A_CLASS:
        return Verdict("classes", "look", f"{head}: few for {rarest}; more pictures bring more than any setting")
    return Verdict("classes", "fine", head)


def _sizes(recipe: Recipe, sample: _Sample) -> Verdict:
    asked, median = recipe.data.image_size, sample.sides[len(sample.sides) // 2]
    span = f"shorter sides of {sample.sides[0]} to {sample.sides[-1]} px, trained at {asked} px"
    if asked > 2 * median:
        return Verdict(
            "sizes", "look", f"{span}: half of the pictures are enlarged twice and more; lower data.image_size"
        )
    return Verdict("sizes", "fine", span)


def _colours(images: Images, sample: _Sample) -> Verdict:
    mean = (sample.mean - torch.tensor(images.facts.mean, dtype=torch.float64)) / torch.tensor(images.facts.std)
    std = sample.std / torch.tensor(images.facts.std, dtype=torch.float64)
    text = f"normalised pixels have mean {_row(mean)} and deviation {_row(std)}"
    if float(mean.abs().max()) > _CENTRE or not _SPREAD[0] < float(std.min()) <= float(std.max()) < _SPREAD[1]:
        keys = f"data.mean={_list(sample.mean)} data.std={_list(sample.std)}"
        return Verdict("colours", "look", f"{text}, far from 0 and 1: {keys} fit these pictures")
    return Verdict("colours", "fine", text)


def _row(values: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())


def _list(values: Tensor) -> str:
    return f"[{','.join(f'{value:.3f}' for value in values.tolist())}]"
