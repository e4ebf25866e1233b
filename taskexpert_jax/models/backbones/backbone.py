"""The interface of a backbone; docs/conventions.md has the dims."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float
import numpy as np


class Tap(NamedTuple):
    """Shape of a tap: stride in pixels, and channels."""

    stride: int
    channels: int


class Backbone(nn.Module):
    """Normalised image -> taps, the feature maps that a decoder reads, from the shallowest to the deepest.

    The parameters of backbone and decoder share one scope, so their modules have different names. Everything outside
    of the backbone's file asks for what is declared here, and for nothing else.
    """

    def __call__(self, image: Float[Array, "B H W 3"], train: bool) -> tuple[Float[Array, "B _h _w _C"], ...]:
        """The taps, as `taps` describes them. Training may use the RNG stream `drop_path`.

        Args:
          image: normalised, in the compute dtype; sides are multiples of `stride`.
          train: whether stochastic depth is on.
        """
        raise NotImplementedError

    @property
    def stride(self) -> int:
        """Sides of the image are multiples of this, in pixels."""
        raise NotImplementedError

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Shapes of the taps."""
        raise NotImplementedError

    @property
    def layers(self) -> int:
        """Number of layers for layer-wise learning rates: the embeddings and each block."""
        raise NotImplementedError

    def layer(self, name: str) -> int | tuple[int, ...] | None:
        """The layer of a parameter, from 0 for the embeddings; None for parameters of other modules.

        A tuple has the layers along the first axis of a parameter that is stacked by a scan.

        Args:
          name: path of the parameter, such as `blocks/mlp/expand/kernel`.
        """
        raise NotImplementedError

    def multiply_adds(self, height: int, width: int) -> int | None:
        """Multiply-adds of one image's forward pass, see `models.budget`; None: those of the traced program."""
        del height, width
        return None

    @property
    def optional(self) -> tuple[str, ...]:
        """Parameters that other configs of this backbone have, and that weights may therefore hold without use."""
        return ()

    @property
    def of_image_size(self) -> tuple[str, ...]:
        """Parameters whose shape, except for the last axis, depends on the image size."""
        return ()

    def image_size_of(self, arrays: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
        """Height and width of the training images, as far as the shapes of its parameters tell; None if they do not."""
        del arrays
        return None

    def resized(self, name: str, array: np.ndarray) -> np.ndarray:
        """A parameter of `of_image_size`, trained at another image size, for this one's."""
        raise NotImplementedError(name)
