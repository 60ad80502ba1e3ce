"""Settings as frozen pydantic models, and families of them, chosen by `name`."""

import inspect
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema


class Settings(BaseModel):
    """A group of keys. The docstring under each attribute documents the key everywhere.

    Text is never taken for a number nor a number for true or false; whole numbers serve as floats; floats are finite.
    """

    # No validate_default: strict JSON would refuse a default that is a Path, because it is not text.
    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _check_range(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 < low <= high:
        raise ValueError(f"[{low:g}, {high:g}] does not fit; must be two numbers above 0, the smaller one first")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_check_range)]
"""Two numbers above 0, from and to."""


class Family(Settings):
    """A choice between groups of settings, made by the key `name`.

    A direct subclass is the family's root, and a field annotated with the root accepts any member that exists when a
    value is validated. A member says `name: Literal["dino"] = "dino"`. At most one member says `name: str = "..."`;
    it takes every other name.
    """

    name: str
    """Name of the member."""

    @classmethod
    def members(cls) -> "dict[str, type[Self]]":
        """Every named member by its name, sorted.

        Raises:
            TypeError: two different classes claim one name.
        """
        found: dict[str, type[Self]] = {}
        for member in cls._concrete():
            for name in member._own_names():
                other = found.get(name, member)
                # A module or notebook cell that runs again defines the same class again; the newer one counts.
                if _full_name(other) != _full_name(member):
                    raise TypeError(
                        f"{_full_name(other)} and {_full_name(member)} are both the {cls.noun()} {name!r}; rename one"
                    )
                found[name] = member
        return dict(sorted(found.items()))

    @classmethod
    def fallback(cls) -> "type[Self] | None":
        """The member that takes every name that no other member has."""
        return next((member for member in reversed(cls._concrete()) if not member._own_names()), None)

    @classmethod
    def member(cls, name: object) -> "type[Self] | None":
        """The member that `name` selects; None if it selects none."""
        return cls.members().get(name) or cls.fallback() if isinstance(name, str) else None

    @classmethod
    def root(cls) -> type["Family"]:
        """The direct subclass of `Family` at or above this class."""
        return next(base for base in cls.__mro__ if issubclass(base, Family) and base._is_root())

    @classmethod
    def noun(cls) -> str:
        """The noun for a member in messages: `method` for `MethodConfig`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__.removesuffix("Config")).lower()

    @classmethod
    def _is_root(cls) -> bool:
        # By name: pydantic asks while `Family` itself is being made.
        return any((base.__module__, base.__qualname__) == (__name__, "Family") for base in cls.__bases__)

    @classmethod
    def _concrete(cls) -> list[type[Self]]:
        """The members at and below this class, in order of definition."""
        lineage = cls.__mro__[: cls.__mro__.index(cls.root())]
        is_named = any("name" in inspect.get_annotations(base) for base in lineage)
        below = [member for child in cls.__subclasses__() for member in child._concrete()]
        return [cls, *below] if is_named and not inspect.isabstract(cls) else below

    @classmethod
    def _own_names(cls) -> tuple[str, ...]:
        """The names of a member's `Literal`; none for the one that takes every other name."""
        annotation = cls.model_fields["name"].annotation
        return get_args(annotation) if get_origin(annotation) is Literal else ()

    @classmethod
    def _select(cls, value: object, info: core_schema.ValidationInfo) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            example = value if value in cls.members() else next(iter(cls.members()), "...")
            raise PydanticCustomError("group_type", "must be a group of keys", {"example": example})
        name = value.get("name")
        member = cls.member(name)
        if member is None:
            known: dict[str, Any] = {"noun": cls.noun(), "known": list(cls.members())}
            fault = PydanticCustomError("unknown_member", "unknown {noun}", known)
            raise ValidationError.from_exception_data(
                cls.__name__, [InitErrorDetails(type=fault, loc=("name",), input=name)]
            )
        # Strict JSON takes a list for a tuple and text for a path; strict Python does not.
        return member.model_validate_json(json.dumps(value)) if info.mode == "json" else member.model_validate(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Members are looked up at each validation, so that those defined after the recipe's model take part.
        return core_schema.with_info_plain_validator_function(cls._select) if cls._is_root() else handler(source)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        if not cls._is_root():
            return handler(schema)
        members = cls.members()
        choices = {_full_name(member): handler(member.__pydantic_core_schema__) for member in members.values()}
        fallback = cls.fallback()
        if fallback is not None:
            other = handler.resolve_ref_schema(handler(fallback.__pydantic_core_schema__))
            # The fallback takes every name but those of the members.
            other["properties"]["name"]["not"] = {"enum": list(members)}
            choices[_full_name(fallback)] = other
        # Not `oneOf`: a recipe that extends another may leave the name to it, and its keys fit several members.
        return {"anyOf": list(choices.values()), "discriminator": {"propertyName": "name"}}


@dataclass(frozen=True, slots=True)
class Shape:
    """The kind of a key's value: settings, a list, a table (a dict with free keys) or a leaf."""

    kind: Literal["settings", "list", "table", "leaf"]
    item: Any
    """The settings class, or the annotation of an entry."""
    is_optional: bool = False


def shape_of(annotation: Any) -> Shape:
    """The shape behind an annotation; `X | None` has the shape of X."""
    if get_origin(annotation) is Annotated:
        return shape_of(get_args(annotation)[0])
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        others = [argument for argument in arguments if argument is not type(None)]
        inner = shape_of(others[0]) if len(others) == 1 else Shape("leaf", annotation)
        return Shape(inner.kind, inner.item, is_optional=len(others) < len(arguments))
    origin = get_origin(annotation) or annotation
    if not isinstance(origin, type):
        return Shape("leaf", annotation)
    if issubclass(origin, Settings):
        return Shape("settings", origin)
    if issubclass(origin, Mapping) and len(arguments) == 2:
        return Shape("table", arguments[1])
    if issubclass(origin, Sequence) and arguments:
        return Shape("list", arguments[0])
    return Shape("leaf", annotation)


def keys(model: type[Settings]) -> list[str]:
    """Every dotted key that a recipe of this model may give; the keys of all members for a family."""
    found: dict[str, None] = {}
    choices: list[type[Settings]] = [model]
    if issubclass(model, Family) and model.root() is model:
        choices = [*model.members().values(), *filter(None, [model.fallback()])]
    for choice in choices:
        for name, field in choice.model_fields.items():
            shape = shape_of(field.annotation)
            inner = [f"{name}.{key}" for key in keys(shape.item)] if shape.kind == "settings" else [name]
            found.update(dict.fromkeys(inner))
    return list(found)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
