"""Supervised training with Lightning's loop: `lightning_loop.py DATA MODEL SIZE BATCH STEPS`."""

import os
import sys
import tempfile

import lightning
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


class Classifier(lightning.LightningModule):
    """A network of timm with cross-entropy."""

    def __init__(self, model_name: str, classes: int, size: int) -> None:
        super().__init__()
        options = {"img_size": size} if model_name.startswith("vit") else {}
        self.model = timm.create_model(model_name, num_classes=classes, **options)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        loss = F.cross_entropy(self.model(batch[0]), batch[1], label_smoothing=0.1)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


def main(data: str, model_name: str, size: int, batch: int, steps: int) -> None:
    """Train for `steps` updates."""
    lightning.seed_everything(0)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.35, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = ImageFolder(data, transform)
    workers = os.cpu_count() or 1
    loader = DataLoader(images, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            default_root_dir=folder,
            gradient_clip_val=1.0,
            enable_progress_bar=False,
        )
        trainer.fit(Classifier(model_name, len(images.classes), size), loader)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
