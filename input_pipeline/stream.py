"""Examples of training and evaluation at their positions in the stream, from a source of decoded examples.

An epoch's order is a stateless permutation, and every random transform draws from (seed, position in the stream), so an
example is a function of both. Needs no TensorFlow.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
import numpy as np

from input_pipeline import transforms
from input_pipeline.transforms import Example
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import Task

if TYPE_CHECKING:
    from input_pipeline.records import Source

_ORDER = 0  # random stream of the epoch order; `transforms` uses the others


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Indices of an epoch's examples: a permutation that depends on seed and epoch only."""
    return transforms.generator((seed, epoch), _ORDER).permutation(count)


def shuffled_index(position: int, seed: int, count: int) -> int:
    """Index of the example at a position of the endless shuffled stream of `count` examples."""
    epoch, place = divmod(position, count)
    return int(_epoch_order(seed, epoch, count)[place])


def crop_strengths(config: ConfigDict) -> dict[str, Any]:
    """Arguments of `transforms.random_scale_and_crop` from a config."""
    augment = config.augment
    return {
        "size": tuple(config.dataset.image_size),
        "scale_min": augment.scale_min,
        "scale_max": augment.scale_max,
        "max_class_share": augment.crop_max_class_share,
        "redraws": augment.crop_redraws,
    }


def colour_strengths(config: ConfigDict) -> dict[str, Any]:
    """Arguments of `transforms.photometric_distortion` from a config."""
    augment = config.augment
    return {
        "brightness": augment.brightness,
        "contrast": (augment.contrast_min, augment.contrast_max),
        "saturation": (augment.saturation_min, augment.saturation_max),
        "hue": augment.hue,
        "probability": augment.photometric_probability,
    }


def augmented(example: Example, config: ConfigDict, tasks: Sequence[Task], position: int) -> Example:
    """Applies the protocol's training transforms, in order, to the example at a position of the stream."""
    seed = (config.seed, position)
    example = transforms.random_scale_and_crop(example, tasks, seed, **crop_strengths(config))
    example = transforms.random_flip(example, tasks, seed, probability=config.augment.flip_probability)
    image = transforms.photometric_distortion(example["image"], seed, **colour_strengths(config))
    example = transforms.mark_invalid({**example, "image": image}, tasks)
    return transforms.pad_centre(example, tasks, size=tuple(config.dataset.image_size))


def train_example(source: Source, config: ConfigDict, tasks: Sequence[Task], position: int) -> Example:
    """Augmented example at a position of the stream, with mask 1."""
    example = source.load(shuffled_index(position, config.seed, len(source)))
    example = augmented(example, config, tasks, position)
    return {**example, "mask": np.float32(1)}


def eval_example(source: Source, size: tuple[int, int], tasks: Sequence[Task], count: int, position: int) -> Example:
    """Padded example at a position; from `count` on, a repetition of the last one with mask 0 and an empty id."""
    example = source.load(min(position, count - 1))
    height, width = example["image"].shape[:2]
    if height > size[0] or width > size[1]:
        raise UserError(
            f"example {example['id']} is {height}x{width}, larger than evaluation frames of {size[0]}x{size[1]}; "
            "for sliding-window inference set "
            f"--config.eval.image_size='({max(height, size[0])},{max(width, size[1])})'"
        )
    example = transforms.pad_centre(transforms.mark_invalid(example, tasks), tasks, size=size)
    real = position < count
    return {**example, "mask": np.float32(real), "id": example["id"] if real else ""}
