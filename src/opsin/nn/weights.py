"""Weights from a file or another run into a network, with an account of what fitted.

Shapes: T tokens, D width, C channels, P side of a filter.
"""

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin.errors import CheckpointError, ConfigError
from opsin.nn.backbone import Backbone, ModelConfig
from opsin.nn.position import resize_grid
from opsin.nn.timm_backbone import TimmBackbone
from opsin.storage.compression import SUFFIX, decompressed

PREFIXES = ("", "backbone.", "module.", "encoder.", "model.", "teacher.backbone.", "student.backbone.")
_CONTAINERS = ("method", "state_dict", "model", "teacher", "target_encoder", "encoder")
_IN_FOLDERS = ("state.pt", f"state.pt{SUFFIX}", "model.safetensors")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Reshaped:
    """A tensor that was laid out anew to fit."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {list(self.before)} -> {list(self.after)}"


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What became of each tensor. Names are the network's own, without `prefix`."""

    source: str
    prefix: str
    loaded: tuple[str, ...]
    """Filled from the source, the reshaped ones included."""
    missing: tuple[str, ...]
    """In the network only: still as initialised."""
    unexpected: tuple[str, ...]
    """In the source only, below the prefix."""
    reshaped: tuple[Reshaped, ...]
    outside: int = 0
    """Tensors of the source that do not start with the prefix: other networks."""

    def lines(self) -> list[str]:
        """The report for a reader; one line where everything fitted."""
        total = len(self.loaded) + len(self.missing)
        below = f" below {self.prefix!r}" if self.prefix else ""
        lines = [f"weights: {len(self.loaded)} of {total} tensors from {self.source}{below}"]
        for label, names in (
            ("missing, fresh here", self.missing),
            ("unexpected, not used", self.unexpected),
            ("reshaped", [str(change) for change in self.reshaped]),
        ):
            if names:
                lines.append(f"  {label}: {len(names)} ({_first(names)})")
        return lines


def initialise(backbone: Backbone, config: ModelConfig) -> WeightReport | None:
    """Load what `config.weights` names into `backbone`; nothing where it names nothing.

    Raises:
        ConfigError: pretrained weights were asked for where there are none, or no network.
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
            f"model.weights = 'pretrained': model {config.name!r} has none; "
            "give a file, or a timm name such as model.name=vit_tiny_patch16_224"
        )
    state = backbone.pretrained_state()
    return _fill(backbone.network, state, f"timm's pretrained {config.name}", PREFIXES)


def load_weights(
    module: nn.Module, reference: str | Path, *, prefix_candidates: Sequence[str] = PREFIXES
) -> WeightReport:
    """Fill `module` from a file, a run directory or a checkpoint directory: wholly or not at all.

    Of the prefixes that the names in the source may have, the one that fits most names is taken, the
    first among equals. A position embedding for another grid is interpolated; a first filter for
    other channels gets their mean, scaled to keep the size of its output.

    Raises:
        CheckpointError: unreadable; a tensor of another shape; fewer than half of the tensors found.
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
            f"{path}: holds more than tensors, or is no torch file, and is not opened for safety; "
            "save its state dict alone, as .safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); copy it again, or give another file") from error
    while isinstance(content, Mapping) and (key := next((c for c in _CONTAINERS if _holds(content, c)), None)):
        content = content[key]
    tensors = dict(content) if isinstance(content, Mapping) else {}
    state = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no named tensors; give a file with a state dict")
    return state


def _holds(content: Mapping[str, object], key: str) -> bool:
    return isinstance(content.get(key), Mapping)


def _fill(module: nn.Module, state: Mapping[str, Tensor], source: str, prefixes: Sequence[str]) -> WeightReport:
    own = module.state_dict()
    # A timm network lies one level deeper in our own files.
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
            f"{source}: of another shape: {_first(faults)}; set the model's keys as they were for these weights"
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
            Reshaped(name, tuple(found[name].shape), tuple(own[name].shape))
            for name in fitted
            if found[name].shape != own[name].shape
        ),
        outside=len(state) - len(below),
    )


def _fit(name: str, tensor: Tensor, own: Tensor, first_filter: str | None) -> Tensor | None:
    """The tensor in the shape of `own`; none where there is no faithful way."""
    if tensor.shape == own.shape:
        return tensor
    if name.rpartition(".")[2] == "pos_embed":
        return _resize_positions(tensor, own)
    if name == first_filter:
        return _change_channels(tensor, own)
    return None


def _resize_positions(tensor: Tensor, own: Tensor) -> Tensor | None:
    """Position embeddings [1, T, D] for the grid of `own`; none where these are not square grids."""
    if tensor.ndim != 3 or tensor.shape[0] != own.shape[0] or tensor.shape[2] != own.shape[2]:
        return None
    (prefix, side), (own_prefix, own_side) = _square(tensor.shape[1]), _square(own.shape[1])
    # Before the grid: nothing, a class token, or a class token and four registers.
    if {prefix, own_prefix} - {0, 1, 5}:
        return None
    grid = resize_grid(tensor[0, prefix:].float().reshape(side, side, -1), own_side, own_side)
    value = own.float().clone()
    shared = min(prefix, own_prefix)
    value[0, :shared] = tensor[0, :shared]
    value[0, own_prefix:] = grid.flatten(0, 1)
    return value


def _square(tokens: int) -> tuple[int, int]:
    """Tokens before the grid, and the side of the largest square grid."""
    side = math.isqrt(tokens)
    return tokens - side * side, side


def _change_channels(tensor: Tensor, own: Tensor) -> Tensor | None:
    """Filters [D, C, P, P] for as many channels as `own` has; none where more than C differs."""
    if tensor.ndim != 4 or tensor.shape[0] != own.shape[0] or tensor.shape[2:] != own.shape[2:]:
        return None
    mean = tensor.float().mean(dim=1, keepdim=True) * (tensor.shape[1] / own.shape[1])
    return mean.expand_as(own)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
