"""The interface of a decoder; docs/conventions.md has the dims."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

MEMORY = "memory"  # name of the memory's expert slot
GATES = "gates"  # entry of `Aux`: the gate weights, (S, T, B, N, k) float32

# What a decoder returns besides its predictions, by name, such as `GATES`.
Aux = Mapping[str, Any]


class Gating(NamedTuple):
    """Description of a decoder's gates.

    slots: names of the k expert slots that they weight.
    taps: S, the number of taps that have gates.
    stride: side of a token in pixels.
    """

    slots: tuple[str, ...]
    taps: int
    stride: int


class Decoder(nn.Module):
    """Taps of a backbone -> maps of each task.

    The parameters of backbone and decoder share one scope, so their modules have different names. Everything outside
    of the decoder's file asks for what is declared here, and for nothing else.
    """

    def __call__(
        self, taps: tuple[Float[Array, "B h w C"], ...], train: bool
    ) -> tuple[dict[str, Float[Array, "B H W c"]], Aux]:
        """Logits or values of each task, of any size and in the compute dtype, and auxiliary results.

        Training may use the RNG stream `gate_noise`, and updates the collection `batch_stats`.
        """
        raise NotImplementedError

    def penalty(self, aux: Aux, pixels: Callable[[int], Float32[Array, "B N"]]) -> Float32[Array, ""]:
        """Term that is added to the weighted sum of the task losses.

        Args:
          aux: of a forward pass.
          pixels: stride -> number of image pixels in each token; 0 in the padding and for padding examples.
        """
        del aux, pixels
        return jnp.zeros(())

    @property
    def gating(self) -> Gating | None:
        """Description of the gates that `aux` holds as `GATES`; None for a decoder without gates."""
        return None

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the decoder, for the budget."""
        return ("decoder",)

    def part(self, name: str) -> str:
        """The part of `parts` that a parameter belongs to; name: its path, such as `head_depth/logits/bias`."""
        del name
        return "decoder"

    def multiply_adds(self, height: int, width: int) -> Mapping[str, int] | None:
        """Multiply-adds by part of one image's forward pass, by the decoder's definition; see `models.budget`.

        None: those of the traced program, for a decoder of one part.
        """
        del height, width
        return None

    def computed(self, height: int, width: int) -> Mapping[str, int] | None:
        """As `multiply_adds`, what the program computes, where that is less than the definition."""
        return self.multiply_adds(height, width)
