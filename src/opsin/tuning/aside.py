"""A run that is assembled to be measured, beside any run directory."""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from opsin.reporting.console import Console
from opsin.reporting.journal import Journal
from opsin.run.assemble import assemble
from opsin.run.recipe import Recipe
from opsin.storage.directory import RunDirectory
from opsin.training.loop import Run


@contextmanager
def assembled_aside(recipe: Recipe, console: Console) -> Iterator[Run]:
    """The run of `recipe` in a directory of its own, which is removed.

    Raises:
        ConfigError: as `assemble`; so DataError and CheckpointError.
    """
    with tempfile.TemporaryDirectory(prefix="opsin-tune-", ignore_cleanup_errors=True) as folder:
        directory = RunDirectory(Path(folder))
        with closing(Journal(directory.path, teller=console)) as journal:
            yield assemble(recipe, directory, journal, console, fingerprint="")
