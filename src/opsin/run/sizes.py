"""Sizes of a training, from a small network and small images to large ones, for each method that has them.

A size is a set of recipe keys that go together. `opsin.run.choice` takes the largest one that the time allows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Size:
    """Keys for a network and its images."""

    image_size: int
    network: Mapping[str, object]
    """Keys of `model`."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Further dotted keys that suit the network; they are taken with it alone."""
    warm_up: float = 0.0
    """Share of the epochs in which the learning rate rises."""

    def __str__(self) -> str:
        widths = self.network.get("widths", self.network.get("width"))
        shown = "" if widths is None else f" {'/'.join(map(str, widths)) if isinstance(widths, list) else widths}"
        return f"{self.image_size} px, {self.network['name']}{shown}"


def _convnet(*widths: int, convs: tuple[int, int, int] = (2, 2, 2)) -> Mapping[str, object]:
    return {"name": "convnet", "widths": list(widths), "convs": list(convs)}


def _vit(width: int, heads: int, patch: int, depth: int = 12) -> Mapping[str, object]:
    return {"name": "vit", "width": width, "heads": heads, "patch": patch, "depth": depth, "drop_path": 0.1}


_SUPERVISED = (
    Size(32, _convnet(32, 64, 128)),
    Size(32, _convnet(64, 128, 256)),
    Size(48, _convnet(64, 128, 256)),
    Size(64, _convnet(64, 128, 256)),
    Size(64, _convnet(64, 256, 256, convs=(2, 3, 3))),
    Size(96, _convnet(64, 256, 256, convs=(2, 3, 3))),
    Size(128, {"name": "resnet18"}),
    Size(160, {"name": "resnet18"}),
    Size(192, {"name": "resnet34"}),
    Size(224, {"name": "resnet50"}),
)

_SMALL_HEAD: Mapping[str, object] = {"method.hidden": 512, "method.bottleneck": 128}
# The settings of the published runs, which need a GPU.
_PUBLISHED: Mapping[str, object] = {
    "method.views.local_count": 8,
    "method.views.global_scale": [0.4, 1.0],
    "method.views.local_scale": [0.05, 0.4],
    "optim.name": "adamw",
    "optim.lr": 0.0005,
    "optim.lr_batch_size": 256,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.clip_norm": 3.0,
    "optim.clip": "each",
    "optim.schedule.name": "cosine",
    "optim.schedule.end": 0.001,
}

_DINO = (
    Size(32, _convnet(32, 64, 128), _SMALL_HEAD, warm_up=0.1),
    Size(32, _convnet(64, 128, 256), _SMALL_HEAD, warm_up=0.1),
    Size(48, _convnet(64, 128, 256), _SMALL_HEAD, warm_up=0.1),
    Size(64, _convnet(64, 128, 256), _SMALL_HEAD, warm_up=0.1),
    Size(96, {"name": "resnet18"}, _SMALL_HEAD, warm_up=0.1),
    Size(128, _vit(192, 3, 16), _PUBLISHED, warm_up=0.1),
    Size(224, _vit(384, 6, 16), _PUBLISHED, warm_up=0.1),
)

SIZES: Mapping[str, tuple[Size, ...]] = {"supervised": _SUPERVISED, "dino": _DINO}
"""The sizes of each method by its name, the fastest first."""
