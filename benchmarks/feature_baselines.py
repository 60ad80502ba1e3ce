"""What k-NN and a linear probe reach without any training: on raw pixels and on a random vision transformer.

    python benchmarks/feature_baselines.py data/cifar10 [--size 32] [--bank 10000] [--queries 2000]

Scores of learned features mean something only above these.
"""

import argparse
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from opsin.data.base import DataFacts, Source
from opsin.data.loading import EvaluationData, LoadingPlan
from opsin.data.sources.open import open_sources
from opsin.evaluation.features import FeatureNetwork, extract
from opsin.evaluation.knn import score_neighbours
from opsin.evaluation.labelled import LabelledImages
from opsin.evaluation.linear import score_linear
from opsin.nn.backbone import Backbone, Tokens
from opsin.nn.vit import ViTConfig
from opsin.reporting.teller import CommandTeller
from opsin.training.evaluator import Labelled, LabelledChoice

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pixels(nn.Module):
    """The normalised pixels themselves."""

    def encode(self, images: Tensor) -> Tokens:
        """[B, C, S, S] to pooled features [B, C * S * S]."""
        return Tokens(images.flatten(1), images.flatten(2).mT)


class Bare(nn.Module):
    """A backbone as it is."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def encode(self, images: Tensor) -> Tokens:
        """[B, C, S, S] to features."""
        tokens: Tokens = self.backbone(images)
        return tokens


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled images, as data.path wants them")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: 32)")
    parser.add_argument("--bank", type=int, help="learn from at most so many images")
    parser.add_argument("--queries", type=int, help="score at most so many images")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    arguments = parser.parse_args()
    labelled = open_labelled(
        arguments.data, arguments.size, LabelledChoice(arguments.data, 0.2, arguments.bank, arguments.queries)
    )
    torch.manual_seed(arguments.seed)
    patch = max(side for side in range(1, arguments.size // 8 + 1) if arguments.size % side == 0)
    vit = ViTConfig(width=192, depth=6, heads=3, patch=patch)
    networks: dict[str, FeatureNetwork] = {
        "raw pixels": Pixels(),
        "random ViT, class token": Bare(vit.build(image_size=arguments.size)),
        "random ViT, mean of patches": Bare(vit.model_copy(update={"pool": "mean"}).build(image_size=arguments.size)),
    }
    counts = f"{labelled.queries.facts.samples:,} images, learned from {labelled.bank.facts.samples:,}"
    print(f"| {counts} | k-NN (k 20) top-1 | linear top-1 |")
    print("|---|---|---|")
    for name, network in networks.items():
        print(f"| {name} | {' | '.join(f'{100 * top1:.2f} %' for top1 in scores_of(network, labelled))} |", flush=True)


def open_labelled(path: str, size: int, choice: LabelledChoice) -> Labelled:
    """The labelled images of a path, `size` pixels wide."""
    opened = open_sources(path, cache=Path("~/.cache/opsin").expanduser())
    print(opened.said, file=sys.stderr)

    def still(source: Source) -> EvaluationData:
        facts = DataFacts(source.classes, len(source), size, 3, MEAN, STD)
        plan = LoadingPlan(source=source, facts=facts, device=torch.device("cpu"), teller=CommandTeller())
        return EvaluationData(plan, resize=size)

    images = LabelledImages(opened.train, opened.val, open_path=lambda path: opened, still=still)
    return images(choice, "data")


def scores_of(network: FeatureNetwork, labelled: Labelled) -> list[float]:
    """Top-1 of k-NN and of the linear probe."""
    read = partial(extract, network, autocast=nullcontext, device=torch.device("cpu"))
    bank, queries = read(labelled.bank), read(labelled.queries)
    with torch.no_grad():
        hits = [score(bank, queries) for score in (score_neighbours, score_linear)]
    return [found.right[1] / found.images for found in hits]


if __name__ == "__main__":
    main()
