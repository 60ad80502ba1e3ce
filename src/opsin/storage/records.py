"""Small JSON files of a known shape, such as `best.json`: one reader and one writer for all of them."""

import json
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from opsin.errors import RunError
from opsin.storage.files import write_atomic

Shape = TypeVar("Shape")


class RecordFormat(Generic[Shape]):
    """The file format of a type: a dataclass, or lists and dictionaries of them. Unknown fields are ignored."""

    def __init__(self, shape: type[Shape], *, indent: int | None = None) -> None:
        self._shape = shape
        self._indent = indent

    @cached_property
    def _adapter(self) -> TypeAdapter[Shape]:
        return TypeAdapter(self._shape)

    def parse(self, data: bytes) -> Shape:
        """Return the value that `data` holds.

        Raises:
            ValueError: it is not JSON, or a field is missing or has a wrong value; one line that names the field.
        """
        try:
            return self._adapter.validate_json(data)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            field = ".".join(map(str, fault["loc"]))
            raise ValueError(f"{field}: {fault['msg']}" if field else fault["msg"]) from None

    def read(self, path: Path, advice: str) -> Shape:
        """Return the value that the file holds.

        Raises:
            FileNotFoundError: there is no such file.
            RunError: it is damaged; the message ends with `advice`.
        """
        try:
            return self.parse(path.read_bytes())
        except ValueError as error:
            raise RunError(f"{path}: is damaged ({error}); {advice}") from error

    def dump(self, value: Shape) -> bytes:
        """Return the content of a file that holds `value`."""
        facts = self._adapter.dump_python(value, mode="json", by_alias=True)
        return (json.dumps(facts, indent=self._indent) + "\n").encode()

    def write(self, path: Path, value: Shape) -> None:
        """Replace the file, whole or not at all.

        Raises:
            OSError: it cannot be written; the old content stays.
        """
        write_atomic(path, self.dump(value))
