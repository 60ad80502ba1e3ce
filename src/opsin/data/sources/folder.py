"""Folders of images, whose names are classes or splits.

Splits. If DIR has a folder `train`, then `train` trains and the first of `val`, `valid`, `validation`, `test`
validates. A folder `train` between other folders with images is a class, unless one of those names is there too:
that is an error, since it can be read in two ways.

Classes. The folders directly below DIR (or below DIR/train) are the classes if every image lies exactly one folder
deep; otherwise the images have no labels. `labels` overrides this: `folders` takes the first folder
as the class at any depth, `none` takes no labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsin.data.sources.files import SUFFIXES, find_images, label_files
from opsin.data.sources.labels import TRAIN, VALIDATION, Labels, Opened, choose_validation, counted, describe
from opsin.errors import DataError


def open_folder(path: Path, labels: Labels = "auto") -> Opened:
    """Open the images below a folder.

    Raises:
        DataError: no images, an unclear layout, or labels in one split only.
    """
    layout = _find_splits(path)
    images = _list_images(layout.train)
    names = _class_names(layout.train, images, labels)
    train = label_files(layout.train, images, names)
    val = None
    if layout.val is not None:
        val_images = _list_images(layout.val)
        val_names = None if names is None else _class_names(layout.val, val_images, labels)
        if names is not None and val_names is None:
            raise DataError(
                f"{layout.val}: no class folders, but {layout.train} has them; validation images need "
                f"the same classes: sort them into class folders, or set data.path={layout.train} to hold out "
                f"some training images"
            )
        val = label_files(layout.val, val_images, val_names, classes=train.classes)
    found = "images without labels" if names is None else counted(len(train.classes), "class folder")
    why = _why_unlabelled(layout.train, images) if names is None and labels == "auto" else ""
    return Opened("folder", train, val, describe(f"found {found} in {path}", train, val, why, layout.note))


@dataclass(frozen=True)
class _Layout:
    train: Path
    val: Path | None
    note: str = ""


def _find_splits(path: Path) -> _Layout:
    folders = {entry.name.lower(): entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."}
    if TRAIN not in folders:
        return _Layout(path, None)
    chosen = choose_validation(folders)
    splits = {TRAIN, *VALIDATION}
    others = [entry.name for name, entry in sorted(folders.items()) if name not in splits and _has_image(entry)]
    if others and chosen is not None:
        raise DataError(
            f"{path}: folders {TRAIN} and {chosen} stand beside {', '.join(others[:3])}, so they may be splits "
            f"or classes; move the others away, or set data.path to the folder that holds the class folders"
        )
    if others:
        return _Layout(path, None)
    unused = [folders[name].name for name in VALIDATION if name in folders and name != chosen]
    if any(entry.suffix.lower() in SUFFIXES for entry in path.iterdir()):
        unused.append(f"images directly in {path}")
    note = f"not used: {', '.join(unused)}" if unused else ""
    return _Layout(folders[TRAIN], folders[chosen] if chosen else None, note)


def _has_image(folder: Path) -> bool:
    return next(find_images(folder), None) is not None


def _list_images(root: Path) -> list[str]:
    images = sorted(find_images(root))
    if not images:
        raise DataError(
            f"{root}: no images in this folder; data.path needs files with one of the endings "
            f"{' '.join(sorted(SUFFIXES))}, a .csv list or .parquet files: check the path"
        )
    return images


def _class_names(root: Path, images: Sequence[str], labels: Labels) -> list[str | None] | None:
    if labels == "none" or (labels == "auto" and _misplaced(images)):
        return None
    loose = [image for image in images if "/" not in image]
    if loose:
        shown = ", ".join(str(root / image) for image in loose[:3]) + (", ..." if len(loose) > 3 else "")
        raise DataError(
            f"{root}: {len(loose)} of {len(images)} images are not in a class folder ({shown}); "
            f"data.labels=folders needs one for every image: move them, or set data.labels=none"
        )
    return [image.split("/", 1)[0] for image in images]


def _misplaced(images: Sequence[str]) -> list[str]:
    return [image for image in images if image.count("/") != 1]


def _why_unlabelled(root: Path, images: Sequence[str]) -> str:
    misplaced = _misplaced(images)
    if len(misplaced) == len(images) and not any("/" in image for image in images):
        return ""
    return (
        f"no class folders, since {len(misplaced)} of {len(images)} images are not exactly one folder deep "
        f"({root / misplaced[0]}): data.labels=folders makes the first folder the class"
    )
