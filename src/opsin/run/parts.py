"""The parts of a recipe: what training, tuning and evaluation all build first."""

from dataclasses import dataclass

import torch

from opsin.clock.seeding import fold_in
from opsin.clock.timeline import Timeline
from opsin.data.base import DataFacts
from opsin.methods.base import Method
from opsin.run.images import Images, open_images
from opsin.run.numerics import Numerics, choose_numbers, move, settle_numerics
from opsin.run.recipe import Recipe
from opsin.storage.teller import Teller
from opsin.training.freeze import LayerFreezer
from opsin.training.memory import save_memory
from opsin.training.stages import plan_stages, plan_time


@dataclass(frozen=True, slots=True)
class Parts:
    """A recipe with its images, its steps and its method, as this machine computes them."""

    recipe: Recipe
    images: Images
    timeline: Timeline
    method: Method
    """On its device, with the weights from before step 0 that follow from the seed."""
    freezer: LayerFreezer
    numerics: Numerics


def build_parts(recipe: Recipe, teller: Teller, images: Images | None = None) -> Parts:
    """The parts of `recipe`, in reading order; `teller` reports what `auto` became.

    `images` are its images if they are open already; their size is that of the recipe whatever it was before.

    Raises:
        ConfigError: settings do not fit together, the data, or this machine.
        DataError: the images cannot be used.
    """
    device, number_format = choose_numbers(recipe, teller)
    images = open_images(recipe, teller) if images is None else images.sized(recipe.data.image_size)
    timeline = plan_time(recipe, images.train, teller)
    method = build_method(recipe, images.facts)
    freezer = plan_stages(recipe.optim.schedule, timeline, method)
    numerics = settle_numerics(recipe, method, device, number_format, teller)
    save_memory(recipe.memory, method)
    return Parts(recipe, images, timeline, move(method, numerics), freezer, numerics)


def build_method(recipe: Recipe, facts: DataFacts) -> Method:
    """The method with fresh weights that follow from the seed."""
    torch.manual_seed(fold_in(recipe.seed, "weights"))
    return recipe.method.build(recipe.model, facts)
