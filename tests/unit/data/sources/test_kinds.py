"""Kinds of storage: those that come with opsin, and those that are found because they are imported."""

import gc
from pathlib import Path

import pytest
import torch

from opsin.data.sources.digits import load_digits
from opsin.data.sources.kinds import Asked, SourceKind, own_kinds
from opsin.data.sources.labels import Opened
from opsin.data.sources.open import open_sources
from opsin.errors import ConfigError
from opsin.run.recipe import read


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"data.kind: 'foldr' does not fit; must be one of auto, .*did you mean"):
        read("quickstart", ["data.kind=foldr"])
    assert read("quickstart", ["data.kind=digits"]).data.kind == "digits"


def test_a_kind_of_ones_own_is_known_while_its_class_exists(tmp_path: Path) -> None:
    class Tape(SourceKind):
        name = "tape"

        @classmethod
        def recognises(cls, path: Path) -> bool:
            return path.suffix == ".tape"

        @classmethod
        def open(cls, asked: Asked) -> Opened:
            return Opened("tape", load_digits(), None, f"found a tape at {asked.path} ({asked.labels})")

    class Cassette(Tape):
        name = "cassette"

    assert own_kinds() == {"tape": Tape, "cassette": Cassette}
    (tmp_path / "a.tape").touch()
    for kind in ("auto", "tape"):
        opened = open_sources(str(tmp_path / "a.tape"), kind=kind, cache=tmp_path)
        assert opened.said.startswith(f"found a tape at {tmp_path / 'a.tape'} (auto)")
        assert torch.equal(opened.train.labels, load_digits().labels)
    assert read("quickstart", ["data.kind=tape"]).data.kind == "tape"
    del Tape, Cassette
    gc.collect()
    assert own_kinds() == {}
