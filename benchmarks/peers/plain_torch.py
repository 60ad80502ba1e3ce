"""Supervised training as a user of PyTorch and torchvision writes it: `plain_torch.py DATA MODEL SIZE BATCH STEPS`."""

import itertools
import os
import sys

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


def main(data: str, model_name: str, size: int, batch: int, steps: int) -> None:
    """Train for `steps` updates."""
    torch.manual_seed(0)
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
    loader = DataLoader(images, batch, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1)
    options = {"img_size": size} if model_name.startswith("vit") else {}
    model = timm.create_model(model_name, num_classes=len(images.classes), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    criterion = nn.CrossEntropyLoss()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for inputs, labels in itertools.islice(batches, steps):
        loss = criterion(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(float(loss))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
