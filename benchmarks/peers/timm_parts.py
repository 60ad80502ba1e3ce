"""Supervised training with timm's loader, mixer and optimizer: `timm_parts.py DATA MODEL SIZE BATCH STEPS`.

timm's own training script is not part of its package; these are the parts that it is made of, with its settings.
"""

import itertools
import os
import sys

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, dispatch_clip_grad


def main(data: str, model_name: str, size: int, batch: int, steps: int) -> None:
    """Train for `steps` updates."""
    torch.manual_seed(0)
    options = {"img_size": size} if model_name.startswith("vit") else {}
    model = timm.create_model(model_name, num_classes=10, **options)
    images = create_dataset("", root=data, is_training=True)
    loader = create_loader(
        images,
        input_size=(3, size, size),
        batch_size=batch,
        is_training=True,
        scale=(0.35, 1.0),
        hflip=0.5,
        color_jitter=0.0,
        num_workers=os.cpu_count() or 1,
        use_prefetcher=False,
        persistent_workers=True,
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    criterion = LabelSmoothingCrossEntropy(0.1)
    losses = AverageMeter()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for inputs, labels in itertools.islice(batches, steps):
        loss = criterion(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=1.0)
        optimizer.step()
        losses.update(loss.item(), len(labels))
    print(losses.avg)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
