"""A recipe of its own with all that settings can hold, for the tests of reading and writing recipes."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from opsin.errors import ConfigError
from opsin.settings.family import Family, Settings
from opsin.settings.layers import read


class Shape(Family, ABC):
    """A family inside the members of another one."""

    warmup: float = Field(0.0, ge=0)

    @abstractmethod
    def at(self) -> float: ...


class Flat(Shape):
    name: Literal["flat"] = "flat"

    def at(self) -> float:
        return 1.0


class Wave(Shape):
    name: Literal["wave"] = "wave"
    end: float = 0.0

    def at(self) -> float:
        return self.end


class MethodConfig(Family, ABC):
    weights: str | None = None

    @abstractmethod
    def build(self) -> str: ...


class Plain(MethodConfig):
    name: Literal["supervised"] = "supervised"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target given to all classes. A second sentence.

    A second paragraph.
    """

    def build(self) -> str:
        return "supervised"


class Dino(MethodConfig):
    name: Literal["dino"] = "dino"
    teacher_temp: float = Field(0.04, gt=0)
    """Temperature of the teacher."""
    shape: Shape = Wave(end=0.5)

    def build(self) -> str:
        return "dino"


class NetConfig(Family, ABC):
    @abstractmethod
    def width(self) -> int: ...


class Own(NetConfig):
    name: Literal["own"] = "own"
    depth: int = 12

    def width(self) -> int:
        return self.depth


class Zoo(NetConfig):
    name: str = "resnet50"
    pooling: str = "mean"

    def width(self) -> int:
        return 2048


class Optim(Settings):
    lr: float = Field(0.1, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    nesterov: bool = False
    clip: float | None = None


class Stage(Settings):
    epochs: int = Field(gt=0)
    train: list[str] = []
    shape: Shape | None = None


class Probe(Family, ABC):
    every: int = 1

    @abstractmethod
    def score(self) -> float: ...


class Knn(Probe):
    name: Literal["knn"] = "knn"
    k: int = Field(20, gt=0)

    def score(self) -> float:
        return 0.0


class Linear(Probe):
    name: Literal["linear"] = "linear"

    def score(self) -> float:
        return 0.0


class Recipe(Settings):
    seed: int = 0
    """Start of all random numbers."""
    epochs: int = Field(1, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int | Literal["auto"] = "auto"
    path: Path = Path("images")
    title: str = ""
    device: str = Field("cpu", pattern="^(cpu|cuda)$")
    method: MethodConfig = Plain(label_smoothing=0.1)
    model: NetConfig = Own()
    optim: Optim = Optim(lr=0.5)
    shape: Shape | None = None
    stages: list[Stage] = []
    evaluators: dict[str, Probe] = {"knn": Knn(k=5)}

    @model_validator(mode="after")
    def _few_seeds(self) -> "Recipe":
        if self.seed == 13:
            raise ValueError("13 is unlucky; choose another seed")
        return self


class Bare(Settings):
    optim: Stage
    method: MethodConfig
    model: NetConfig = Own()


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, *overrides: str) -> Recipe:
    return read(str(path), overrides, Recipe, shipped=path.parent / "shipped")


def faults(path: Path, *overrides: str) -> list[str]:
    """The faults, with the temporary folder taken out of them."""
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    return [fault.replace(f"{path.parent}/", "") for fault in caught.value.faults]
