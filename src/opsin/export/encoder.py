"""Trained networks as files that others can read: the weights of a run, and an encoder with its preprocessing.

Shapes: B images, C channels, H x W pixels, S side of the network's input, N patches, D width, K classes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

import opsin.nn.models  # noqa: F401  encoder.json may name each of its networks
from opsin.data.base import DataFacts
from opsin.data.views.colour import Normalize
from opsin.data.views.crops import CenterCrop, cut_batch
from opsin.errors import CheckpointError, ConfigError, DataError
from opsin.nn.backbone import Backbone, ModelConfig, Tokens
from opsin.nn.heads import Classifier
from opsin.nn.timm_backbone import TimmBackbone
from opsin.settings.family import Settings
from opsin.storage.files import write_atomic

FORMAT = 1
"""Version of the export folder; it rises when an older opsin cannot read the folder."""

CARD_FILE = "encoder.json"
BACKBONE_FILE = "backbone.safetensors"
HEAD_FILE = "head.safetensors"

Images: TypeAlias = Tensor | Sequence[Image.Image | NDArray[np.uint8]]
"""uint8 [B, 3, H, W]; float [B, 3, H, W] in 0..1; or pictures of any sizes: Pillow's, or uint8 arrays [H, W, 3]."""


class HeadCard(Settings):
    """The form of the classifier of an encoder."""

    scale: float
    """Factor on the logits."""
    bias: bool
    """True if the classifier adds a bias."""


class EncoderCard(Settings):
    """`encoder.json`: the network and the preparation of its images."""

    format: int = FORMAT
    """Version of the folder."""
    method: str
    """Name of the method that trained the network."""
    recipe: str
    """Fingerprint of the recipe of the training."""
    model: ModelConfig
    """Settings of the backbone."""
    width: int
    """D, the size of a feature vector."""
    image_size: int
    """S, the side of the network's input in pixels."""
    resize: int
    """Shorter side in pixels of the image whose centre is cut out."""
    mean: tuple[float, ...]
    """Mean of each channel, in 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, in 0..1."""
    classes: tuple[str, ...]
    """Names of the classes of the training images; empty without labels."""
    head: HeadCard | None = None
    """The classifier; null without one."""
    sha256: dict[str, str] = {}
    """Check sum of each weights file."""


def write_model(path: Path, method: nn.Module) -> None:
    """Write all weights of `method` as safetensors. Equal weights give equal bytes, on any device.

    Tensors that share memory are each written whole, in the contiguous format.
    """
    write_atomic(path, _pack(method.state_dict()))


def describe_encoder(
    backbone: Backbone,
    *,
    head: Classifier | None,
    model: ModelConfig,
    facts: DataFacts,
    resize: int,
    method: str,
    recipe: str,
) -> EncoderCard:
    """The card of a network, without check sums."""
    return EncoderCard(
        method=method,
        recipe=recipe,
        model=model.model_copy(update={"weights": None}),
        width=backbone.width,
        image_size=facts.image_size,
        resize=resize,
        mean=facts.mean,
        std=facts.std,
        classes=facts.classes,
        head=None if head is None else HeadCard(scale=head.scale, bias=head.linear.bias is not None),
    )


def export_encoder(folder: Path, card: EncoderCard, backbone: Backbone, head: Classifier | None) -> None:
    """Write `backbone.safetensors`, `head.safetensors` with a head, and `encoder.json`.

    timm loads the backbone of a `vit` or of any timm name (`checkpoint_path=`, `num_classes=0`).
    `encoder.json` comes last and holds the check sums: a folder that has it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {BACKBONE_FILE: _pack(_network(backbone).state_dict())}
    if head is not None:
        files[HEAD_FILE] = _pack(head.state_dict())
    for name, data in files.items():
        write_atomic(folder / name, data)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_card(folder / CARD_FILE, card.model_copy(update={"sha256": sums}))


def write_card(path: Path, card: EncoderCard) -> None:
    """Write the card as JSON."""
    write_atomic(path, (card.model_dump_json(indent=2) + "\n").encode())


def build_networks(card: EncoderCard) -> tuple[Backbone, Classifier | None]:
    """The networks of a card with fresh weights: the backbone and, if the card has one, the head."""
    backbone = card.model.build(image_size=card.image_size, channels=len(card.mean))
    if card.head is None:
        return backbone, None
    return backbone, Classifier(card.width, len(card.classes), scale=card.head.scale, bias=card.head.bias)


def load_export(folder: Path) -> "Encoder":
    """The encoder of an export folder, on the CPU.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or of a newer opsin.
    """
    card = read_card(folder / CARD_FILE)
    backbone, head = build_networks(card)
    _fill(_network(backbone), folder / BACKBONE_FILE, card)
    if head is not None:
        _fill(head, folder / HEAD_FILE, card)
    return Encoder(card, backbone, head)


class Encoder:
    """A trained network with its own preprocessing: images of any size in, features out.

    Resizes the shorter side, cuts out the centre and normalises as the validation of the run did.
    Float images are rounded to 8 bits first. Gives tensors without gradient, on its device.
    """

    def __init__(self, card: EncoderCard, backbone: Backbone, head: Classifier | None = None) -> None:
        self.card = card
        self.classes = card.classes
        self.backbone = backbone.eval().requires_grad_(False)
        self.head = None if head is None else head.eval().requires_grad_(False)
        self._crop = CenterCrop(size=card.image_size, resize=card.resize, flip="none")
        self.to(torch.device("cpu"))

    def to(self, device: torch.device | str) -> "Encoder":
        """The same encoder, moved to `device`."""
        self._device = torch.device(device)
        self.backbone.to(self._device)
        if self.head is not None:
            self.head.to(self._device)
        self._normalize = Normalize(self.card.mean, self.card.std, device=self._device)
        return self

    def __call__(self, images: Images, *, batch_size: int = 64) -> Tensor:
        """One feature vector per image: float32 [B, D], not normalised.

        Raises:
            DataError: an image has a form that `Images` does not list.
        """
        return torch.cat([tokens.pooled for tokens in self._run(images, batch_size)])

    def tokens(self, images: Images, *, batch_size: int = 64) -> Tokens:
        """Features of the image [B, D] and of each cell of the final grid [B, N, D], row by row."""
        parts = list(self._run(images, batch_size))
        return Tokens(torch.cat([part.pooled for part in parts]), torch.cat([part.patches for part in parts]))

    def classify(self, images: Images, *, batch_size: int = 64) -> Tensor:
        """Probabilities float32 [B, K] of `classes`.

        Raises:
            ConfigError: the encoder has no classifier.
        """
        if self.head is None:
            raise ConfigError(
                f"this encoder was trained with {self.card.method} and has no classifier; use its features"
            )
        with torch.no_grad():
            return torch.cat([self.head(tokens.pooled).softmax(1) for tokens in self._run(images, batch_size)])

    def prepare(self, images: Images) -> Tensor:
        """Input of the network: float32 [B, 3, S, S], normalised, on the device."""
        pixels = _pixels(images) if isinstance(images, Tensor) else map(_picture, images)
        cuts = [self._cut(image) for image in pixels]
        return self._normalize.bytes(torch.cat(cuts).to(self._device))

    @torch.no_grad()
    def _run(self, images: Images, batch_size: int) -> Iterator[Tokens]:
        if len(images) == 0:
            raise DataError("images: the list is empty; give at least one")
        for start in range(0, len(images), batch_size):
            tokens: Tokens = self.backbone(self.prepare(images[start : start + batch_size]))
            yield tokens

    def _cut(self, image: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to [B, C, S, S]."""
        heights, widths = (torch.full((len(image),), side) for side in image.shape[-2:])
        boxes = self._crop.draw(heights, widths, torch.zeros(len(image), 0))
        return cut_batch(image, boxes, self._crop)


def _pixels(images: Tensor) -> list[Tensor]:
    """A batch as uint8 [B, 3, H, W], alone in a list."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images: a tensor of shape {list(images.shape)}; give [B, 3, H, W]")
    if images.dtype == torch.uint8:
        return [images.cpu()]
    if not images.is_floating_point():
        raise DataError(f"images: a tensor of {images.dtype}; give uint8, or floats in 0..1")
    # Resizing may overshoot a little; normalised images and those in 0..255 are far outside.
    low, high = images.min().item(), images.max().item()
    if low < -0.5 or high > 1.5:
        raise DataError(f"images: values from {low:g} to {high:g}; give floats in 0..1, not normalised, or uint8")
    return [images.mul(255).round().clamp(0, 255).to(torch.uint8).cpu()]


def _picture(image: Image.Image | NDArray[np.uint8]) -> Tensor:
    """One picture as uint8 [1, 3, H, W]."""
    if isinstance(image, Image.Image):
        if image.mode == "F" or image.mode.startswith("I"):
            raise DataError(f"images: a picture of mode {image.mode}; convert it to 8 bits")
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        array = np.array(upright.convert("RGB"))
    else:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise DataError(f"images: an array of {array.dtype} {list(array.shape)}; give uint8 [H, W, 3]")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))[None]


def _network(backbone: Backbone) -> nn.Module:
    """The module whose keys other programs understand."""
    return backbone.network if isinstance(backbone, TimmBackbone) else backbone


def _pack(state: Mapping[str, Tensor]) -> bytes:
    # safetensors orders tensors by itself, but several metadata keys by a hash that changes: one key.
    # It refuses shared memory and other memory formats, hence the copy.
    plain = torch.contiguous_format
    return save({name: state[name].detach().cpu().clone(memory_format=plain) for name in state}, {"format": "pt"})


def read_card(path: Path) -> EncoderCard:
    """The card at `path`.

    Raises:
        CheckpointError: missing, damaged, or of a newer opsin.
    """
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text)["format"]
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give a folder that opsin export wrote"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a description of an encoder; export the run again") from error
    if not isinstance(version, int) or version > FORMAT:
        raise CheckpointError(f"{path}: format {version}, this opsin reads up to {FORMAT}; install a newer opsin")
    try:
        return EncoderCard.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise CheckpointError(f"{path}: {key}: {fault['msg']}; export the run again") from error


def _fill(network: nn.Module, path: Path, card: EncoderCard) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); export the run again") from error
    if hashlib.sha256(data).hexdigest() != card.sha256.get(path.name):
        raise CheckpointError(f"{path}: its check sum is not that of {CARD_FILE}; copy or export it again")
    try:
        network.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{path}: does not fit model {card.model.name!r} ({reason}); export the run again"
        ) from error
