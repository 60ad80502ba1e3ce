"""Code of other packages: every entry point of the group `opsin` is imported before a recipe is read.

A subclass is found once it is imported: methods, networks, monitors and evaluators by `Family`, kinds of storage by
`data.kind`, sinks by the run. docs/EXTENDING.md shows each.
"""

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from opsin.errors import ConfigError

GROUP = "opsin"
"""Name of the group of entry points."""


@cache
def import_extensions() -> None:
    """Import the modules that installed packages name in the group; later calls do nothing.

    Raises:
        ConfigError: one cannot be imported.
    """
    for point in entry_points(group=GROUP):
        try:
            importlib.import_module(point.module)
        except Exception as error:  # the code of another package may raise anything
            package = "a package" if point.dist is None else point.dist.name
            raise ConfigError(
                f"{package}: its entry point {point.name} = {point.value} of the group {GROUP!r} cannot be imported: "
                f"{type(error).__name__}: {error}; repair or uninstall {package}"
            ) from error


def subclasses(base: type[Any]) -> list[Any]:
    """Every imported class below `base`, however far; `base` may be abstract."""
    return [found for child in base.__subclasses__() for found in (child, *subclasses(child))]
