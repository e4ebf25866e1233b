"""The model's input by its config: frame sizes and normalisation."""

from typing import NamedTuple

from ml_collections import ConfigDict

from taskexpert_jax.config.field import IMAGENET_MEAN, IMAGENET_STD


class Normalisation(NamedTuple):
    """Per-channel mean and standard deviation for RGB in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalisation(IMAGENET_MEAN, IMAGENET_STD)


def normalisation(config: ConfigDict) -> Normalisation:
    """`config.model.image_mean` and `config.model.image_std`."""
    return Normalisation(tuple(config.model.image_mean), tuple(config.model.image_std))


def frame_size(config: ConfigDict) -> tuple[int, int]:
    """Height and width of evaluation frames: `eval.image_size`, or `dataset.image_size` if it is empty."""
    height, width = tuple(config.eval.image_size) or tuple(config.dataset.image_size)
    return height, width


def whole_patches(config: ConfigDict, height: int, width: int) -> tuple[int, int]:
    """Rounds a size up to whole patches of the config's backbone: 448x576 -> 448x588 for patch size 14."""
    patch = config.model.patch_size
    return -(-height // patch) * patch, -(-width // patch) * patch
