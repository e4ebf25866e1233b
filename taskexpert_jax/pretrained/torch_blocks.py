"""Blocks and patch embeddings in PyTorch weight files, mapped to our parameters; ViT and Swin share them."""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import numpy as np

from taskexpert_jax.pretrained.assemble import Part, Shape

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockNames:
    """Names of a block's layers, without the block's own name and without `.weight` and `.bias`.

    Attributes:
      norm1, out, norm2, expand, contract: layer norms, the attention's output, the layers of the MLP.
      qkv: one fused layer, or three.
      layer_scales: LayerScale's factors.
      gate: the third layer of a SwiGLU.
      biases: None if q, k and v have the biases of their layers. Else the keys have none: the biases of q and v, or one
        for all whose part for the keys is masked; empty for no bias.
    """

    norm1: str
    qkv: tuple[str, ...]
    out: str
    norm2: str
    expand: str
    contract: str
    layer_scales: tuple[str, str] = ("", "")
    gate: str = ""
    biases: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Block:
    """A block's place and shape: our name and the file's, index in our stacked arrays, C, heads, hidden units."""

    ours: str
    theirs: str
    index: int
    width: int
    heads: int
    hidden: int

    def part(self, own: str, name: str, shape: Shape, build: Callable[..., Array] | None = None) -> Part:
        """One of the block's parameters, from one tensor."""
        return Part(self.ours + own, self.index, {self.theirs + name: shape}, build or as_it_is)


def block_parts(block: Block, names: BlockNames, *, gated: bool = False, scaled: bool = False) -> list[Part]:
    """All parameters of a block; gated: of a SwiGLU; scaled: with LayerScale."""
    width, hidden = block.width, block.hidden
    layers = {"mlp/expand": (names.expand, hidden, width), "mlp/contract": (names.contract, width, hidden)}
    layers["attention/out"] = (names.out, width, width)
    if gated:
        layers["mlp/gate"] = (names.gate, hidden, width)
    parts = [_joined(block, names, "attention/qkv_kernel", "weight", width), _biases(block, names)]
    for ours, (theirs, rows, columns) in layers.items():
        parts.append(block.part(f"{ours}/kernel", f"{theirs}.weight", (rows, columns), np.transpose))
        parts.append(block.part(f"{ours}/bias", f"{theirs}.bias", (rows,)))
    for ours, theirs in (("norm1", names.norm1), ("norm2", names.norm2)):
        parts += norm_parts(block.ours + ours, block.theirs + theirs, width, block.index)
    if scaled:
        scales = zip(("layer_scale1", "layer_scale2"), names.layer_scales, strict=True)
        parts += [block.part(ours, theirs, (width,)) for ours, theirs in scales]
    return parts


def patch_parts(ours: str, theirs: str, width: int, patch: int) -> list[Part]:
    """Kernel and bias of a patch embedding."""
    kernel: Mapping[str, Shape] = {f"{theirs}.weight": (width, 3, patch, patch)}
    return [
        Part(f"{ours}/kernel", None, kernel, lambda kernel: kernel.transpose(2, 3, 1, 0)),
        Part(f"{ours}/bias", None, {f"{theirs}.bias": (width,)}, as_it_is),
    ]


def norm_parts(ours: str, theirs: str, width: int, index: int | None = None) -> list[Part]:
    """Scale and bias of a layer norm; index: in our stacked arrays, None where it is not stacked."""
    kinds = {"scale": "weight", "bias": "bias"}
    return [Part(f"{ours}/norm/{own}", index, {f"{theirs}.{kind}": (width,)}, as_it_is) for own, kind in kinds.items()]


def _joined(block: Block, names: BlockNames, ours: str, kind: str, *shape: int) -> Part:
    """The part of q, k and v from one tensor or three; rows are q, k, v, each by head."""
    rows = 3 * block.width // len(names.qkv)
    sources: Mapping[str, Shape] = {f"{block.theirs}{name}.{kind}": (rows, *shape) for name in names.qkv}
    return Part(block.ours + ours, block.index, sources, functools.partial(_joined_heads, heads=block.heads))


def _biases(block: Block, names: BlockNames) -> Part:
    if names.biases is None:
        return _joined(block, names, "attention/qkv_bias", "bias")
    rows = 3 * block.width if len(names.biases) == 1 else block.width
    sources: Mapping[str, Shape] = {block.theirs + name: (rows,) for name in names.biases}
    build = functools.partial(_without_key_bias, width=block.width, heads=block.heads)
    return Part(block.ours + "attention/qkv_bias", block.index, sources, build)


def _joined_heads(*rows: Array, heads: int) -> Array:
    """Kernels (3 * C or C each, C) -> (C, 3, heads, C / heads); biases (3 * C or C each,) -> (3, heads, C / heads)."""
    stacked = np.concatenate(rows)
    split = stacked.reshape(3, heads, -1, *stacked.shape[1:])
    return np.moveaxis(split, -1, 0) if stacked.ndim == 2 else split


def _without_key_bias(*biases: Array, width: int, heads: int) -> Array:
    """Biases (3 * C,) of q, k and v, or (C,) each of q and v, or none -> (3, heads, C / heads), 0 for the keys."""
    zeros = np.zeros(width, np.float32)
    if len(biases) == 1:
        query, _, value = np.split(biases[0], 3)
    else:
        query, value = biases or (zeros, zeros)
    return np.stack([query, zeros, value]).reshape(3, heads, -1)


def as_it_is(array: Array) -> Array:
    """The tensor itself."""
    return array


def ends_in(name: str, anchor: str) -> bool:
    """True if a tensor's name is `anchor`, with or without a prefix."""
    return name == anchor or name.endswith((f".{anchor}", f"/{anchor}"))
