"""The columns of a parquet file that hold the images and the labels.

The hub layout: an image is a struct `{bytes, path}` or plain bytes; the schema's metadata under `huggingface`
names images and the classes of integer labels.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from opsin.data.sources.labels import Labels
from opsin.errors import DataError

_LABEL_NAMES = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True)
class Columns:
    """`image` is the path of the bytes (`img.bytes`, or `img` for plain bytes); `classes` names integer labels."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def find_columns(
    file: Path, schema: pa.Schema, labels: Labels, *, image_column: str | None, label_column: str | None
) -> Columns:
    """Return the columns to read: the given ones, else the only ones that fit.

    Raises:
        DataError: no image column, several that fit, or one of a wrong type.
    """
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    image = _image_column(file, schema, image_column)
    label = None if labels == "none" else _label_column(file, schema, features, label_column)
    inner = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
    named = label is not None and pa.types.is_integer(schema.field(label).type)
    names = (features.get(label) or {}).get("names") if named else None
    return Columns(inner, label, tuple(names) if names else None)


def _image_column(file: Path, schema: pa.Schema, wanted: str | None) -> str:
    fitting: list[str] = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted is not None:
        _check_present(file, schema, wanted, "data.image_column")
        if wanted not in fitting:
            raise DataError(
                f"{file}: column {wanted!r} is {schema.field(wanted).type}; data.image_column needs bytes or "
                f"a struct with bytes: set it to {_one_of(fitting) or 'a column of encoded images'}"
            )
        return wanted
    if not fitting:
        raise DataError(
            f"{file}: no column of images among {', '.join(schema.names)}; one must be bytes or a struct with bytes: "
            f"store the encoded images in the file, or list their paths in a .csv"
        )
    if len(fitting) > 1:
        raise DataError(
            f"{file}: columns {', '.join(fitting)} may all hold the images; set data.image_column={_one_of(fitting)}"
        )
    return fitting[0]


def _label_column(file: Path, schema: pa.Schema, features: dict[str, object], wanted: str | None) -> str | None:
    if wanted is not None:
        _check_present(file, schema, wanted, "data.label_column")
        fitting = [wanted]
    else:
        fitting = [name for name in schema.names if _is_class_label(features.get(name))]
        fitting = fitting or [name for name in schema.names if name in _LABEL_NAMES]
    if not fitting:
        return None
    if len(fitting) > 1:
        raise DataError(
            f"{file}: columns {', '.join(fitting)} may all hold the labels; set data.label_column={_one_of(fitting)}"
        )
    if not _names_classes(schema.field(fitting[0]).type):
        raise DataError(
            f"{file}: label column {fitting[0]!r} is {schema.field(fitting[0]).type}; labels are whole numbers or "
            f"text: set data.label_column to another column, or data.labels=none"
        )
    return fitting[0]


def _check_present(file: Path, schema: pa.Schema, column: str, key: str) -> None:
    if column not in schema.names:
        raise DataError(f"{file}: no column {column!r}; set {key} to one of {', '.join(schema.names)}")


def _one_of(names: Iterable[str]) -> str:
    return " or ".join(names)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_class_label(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel"


def _names_classes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _names_classes(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))
