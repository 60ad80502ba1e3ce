"""DINO as lightly-train does it: `lightly_dino.py DATA MODEL SIZE BATCH STEPS`."""

import sys
import tempfile

import lightly_train


def main(data: str, model_name: str, size: int, batch: int, steps: int) -> None:
    """Pretrain for `steps` updates."""
    local = max(16, size * 96 // 224 // 16 * 16)
    with tempfile.TemporaryDirectory() as folder:
        lightly_train.pretrain(
            out=f"{folder}/run",
            data=data,
            model=f"timm/{model_name}",
            method="dino",
            epochs=1,
            batch_size=batch,
            accelerator="cpu",
            precision="32-true",
            trainer_args={"limit_train_batches": steps},
            method_args={"output_dim": 1024},
            transform_args={"image_size": (size, size), "local_view": {"num_views": 6, "view_size": (local, local)}},
            model_args={"img_size": size, "dynamic_img_size": True} if model_name.startswith("vit") else None,
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
