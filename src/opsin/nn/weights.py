"""Weights from a file or another run for a network, and a report of the tensors that fitted.

Shapes: T tokens, D width, C channels, P side of a filter.
"""

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin.errors import CheckpointError, ConfigError
from opsin.nn.backbone import Backbone, ModelConfig, first_line
from opsin.nn.position import resize_grid
from opsin.nn.timm_backbone import TimmBackbone
from opsin.storage.compression import SUFFIX, decompressed

PREFIXES = ("", "backbone.", "module.", "encoder.", "model.", "teacher.backbone.", "student.backbone.")
_CONTAINERS = ("method", "state_dict", "model", "teacher", "target_encoder", "encoder")
_IN_FOLDERS = ("state.pt", f"state.pt{SUFFIX}", "model.safetensors")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class WeightReport:
    """The fate of each tensor. Names are those of the network, without `prefix`."""

    source: str
    prefix: str
    loaded: tuple[str, ...]
    """Tensors filled from the source, with the reshaped ones."""
    missing: tuple[str, ...]
    """Tensors of the network alone: still as initialised."""
    unexpected: tuple[str, ...]
    """Tensors of the source alone, below the prefix."""
    reshaped: tuple[str, ...]
    """Tensors that were reshaped to fit, as `NAME [shape] -> [shape]`."""
    outside: int = 0
    """Number of tensors of the source without the prefix: of other networks."""

    def lines(self) -> list[str]:
        """The report for a reader; one line if everything fitted."""
        total = len(self.loaded) + len(self.missing)
        below = f" below {self.prefix!r}" if self.prefix else ""
        lines = [f"weights: {len(self.loaded)} of {total} tensors from {self.source}{below}"]
        for label, names in (
            ("missing, fresh here", self.missing),
            ("unexpected, not used", self.unexpected),
            ("reshaped", self.reshaped),
        ):
            if names:
                lines.append(f"  {label}: {len(names)} ({_first(names)})")
        return lines


def initialise(backbone: Backbone, config: ModelConfig) -> WeightReport | None:
    """Load the weights that `config.weights` names into `backbone`; return None if it names none.

    Raises:
        ConfigError: pretrained weights do not exist for this model, or cannot be fetched.
        CheckpointError: the file cannot be read or does not fit.
    """
    if config.weights is None:
        return None
    if config.weights != "pretrained":
        network = backbone.network if isinstance(backbone, TimmBackbone) else backbone
        report = load_weights(network, config.weights)
        backbone.loaded = frozenset(report.loaded)
        return report
    if not isinstance(backbone, TimmBackbone):
        raise ConfigError(
            f"model.weights = 'pretrained': only timm has them, not model {config.name!r}; "
            "give a file, or a timm name such as model.name=vit_tiny_patch16_224"
        )
    state = backbone.pretrained_state()
    return _fill(backbone.network, state, f"timm's pretrained {config.name}", PREFIXES)


def load_weights(
    module: nn.Module, reference: str | Path, *, prefix_candidates: Sequence[str] = PREFIXES
) -> WeightReport:
    """Fill `module` from a file, a run directory or a checkpoint directory: wholly or not at all.

    Names in the source may have a prefix: the one that fits most names is used, the first among equals.
    A position embedding for another grid is interpolated; a first filter for other channels becomes
    their mean, scaled to preserve the size of its output.

    Raises:
        CheckpointError: the source is unreadable, a tensor does not fit, or more than half of the tensors are missing.
    """
    return _fill(module, _read(Path(os.path.expanduser(reference))), str(reference), prefix_candidates)


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        if not (inside := [path / name for name in _IN_FOLDERS if (path / name).is_file()]):
            raise CheckpointError(
                f"{path}: holds neither model.safetensors nor state.pt; "
                "name a finished run, or one checkpoint as RUN/checkpoints/step-00000123"
            )
        path = inside[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: does not exist; give a .safetensors, .pt or .pth file, or a run directory")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        file = decompressed(path) if path.suffix == SUFFIX else path
        content: object = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, or is not a torch file, and is not opened for safety; "
            "save its state dict alone, as .safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{path}: cannot be read ({reason}); copy it again, or give another file") from error
    tensors: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    while inner := [tensors[key] for key in _CONTAINERS if isinstance(tensors.get(key), Mapping)]:
        tensors = inner[0]
    state = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no named tensors; give a file with a state dict")
    return state


def _fill(module: nn.Module, state: Mapping[str, Tensor], source: str, prefixes: Sequence[str]) -> WeightReport:
    own = module.state_dict()
    # In our own files, the tensors of a timm network have one more prefix.
    candidates = [prefix + inner for prefix in prefixes for inner in ("", "network.")]
    prefix = max(candidates, key=lambda candidate: sum(candidate + name in state for name in own))
    found = {name: state[prefix + name] for name in own if prefix + name in state}
    if 2 * len(found) < len(own):
        raise CheckpointError(
            f"{source}: has {len(found)} of the {len(own)} tensors of the network; it lacks "
            f"{_first([name for name in own if name not in found])} and has {_first(list(state))}; "
            "give weights of the same model"
        )
    first_filter = next((name for name, tensor in own.items() if tensor.ndim == 4), None)
    computed: frozenset[str] = getattr(module, "computed", frozenset())
    fitted = {
        name: own[name].clone() if name in computed else _fit(name, tensor, own[name], first_filter)
        for name, tensor in found.items()
    }
    faults = [
        f"{name} {list(found[name].shape)} instead of {list(own[name].shape)}"
        for name, value in fitted.items()
        if value is None
    ]
    if faults:
        raise CheckpointError(
            f"{source}: tensors do not fit: {_first(faults)}; set the model's keys as they were for these weights"
        )
    with torch.no_grad():
        for name, value in fitted.items():
            assert value is not None
            own[name].copy_(value)
    below = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    return WeightReport(
        source,
        prefix,
        loaded=tuple(fitted),
        missing=tuple(name for name in own if name not in found),
        unexpected=tuple(name for name in below if name not in own),
        reshaped=tuple(
            f"{name} {list(found[name].shape)} -> {list(own[name].shape)}"
            for name in fitted
            if found[name].shape != own[name].shape
        ),
        outside=len(state) - len(below),
    )


def _fit(name: str, tensor: Tensor, own: Tensor, first_filter: str | None) -> Tensor | None:
    """The tensor in the shape of `own`; None if it cannot be reshaped faithfully."""
    if tensor.shape == own.shape:
        return tensor
    if name.rpartition(".")[2] == "pos_embed":
        return _resize_positions(tensor, own)
    if name == first_filter:
        return _change_channels(tensor, own)
    return None


def _resize_positions(tensor: Tensor, own: Tensor) -> Tensor | None:
    """Position embeddings [1, T, D] for the grid of `own`; None if a grid is not square."""
    if tensor.ndim != 3 or tensor.shape[0] != own.shape[0] or tensor.shape[2] != own.shape[2]:
        return None
    (prefix, side), (own_prefix, own_side) = _square(tensor.shape[1]), _square(own.shape[1])
    # Before the grid: no token, a class token, or a class token and four registers.
    if {prefix, own_prefix} - {0, 1, 5}:
        return None
    grid = resize_grid(tensor[0, prefix:].float().reshape(side, side, -1), own_side, own_side)
    value = own.float().clone()
    shared = min(prefix, own_prefix)
    value[0, :shared] = tensor[0, :shared]
    value[0, own_prefix:] = grid.flatten(0, 1)
    return value


def _square(tokens: int) -> tuple[int, int]:
    """Number of tokens before the grid, and the side of the largest square grid."""
    side = math.isqrt(tokens)
    return tokens - side * side, side


def _change_channels(tensor: Tensor, own: Tensor) -> Tensor | None:
    """Filters [D, C, P, P] for the channels of `own`; None if more than C differs."""
    if tensor.ndim != 4 or tensor.shape[0] != own.shape[0] or tensor.shape[2:] != own.shape[2:]:
        return None
    mean = tensor.float().mean(dim=1, keepdim=True) * (tensor.shape[1] / own.shape[1])
    return mean.expand_as(own)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
