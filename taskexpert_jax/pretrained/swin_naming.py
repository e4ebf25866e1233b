"""Tensor names of published Swin Transformers, mapped to our parameters.

  Microsoft     the authors' files, `layers.0.blocks.0.attn.qkv.weight`; the merging belongs to the stage before it
  timm          the same, but the merging belongs to the stage that it begins
  Hugging Face  transformers' SwinModel, `encoder.layers.0.blocks.0.attention.self.query.weight`

The final norm and heads are dropped, because our neck and decoders have their own norms; so are buffers of indices and
masks.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.models.backbones.swin import MLP_RATIO, PATCH, Swin
from taskexpert_jax.pretrained.assemble import Family, Part, Shape, Tensors
from taskexpert_jax.pretrained.naming import ends_in, joined_heads

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class _Names:
    """Names of modules; those of a block are appended to `layers`.N.blocks.N."""

    patch: str
    patch_norm: str
    layers: str
    norm1: str
    qkv: tuple[str, ...]  # one fused layer, or three
    table: str
    out: str
    norm2: str
    expand: str
    contract: str
    dropped: str


_TIMM = _Names(
    patch="patch_embed.proj",
    patch_norm="patch_embed.norm",
    layers="layers",
    norm1="norm1",
    qkv=("attn.qkv",),
    table="attn.relative_position_bias_table",
    out="attn.proj",
    norm2="norm2",
    expand="mlp.fc1",
    contract="mlp.fc2",
    dropped=r"(norm|norm\d|head)\..*|.*\.(attn_mask|relative_position_index|relative_coords_table)",
)
_HUGGING_FACE = _Names(
    patch="embeddings.patch_embeddings.projection",
    patch_norm="embeddings.norm",
    layers="encoder.layers",
    norm1="layernorm_before",
    qkv=tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    table="attention.self.relative_position_bias_table",
    out="attention.output.dense",
    norm2="layernorm_after",
    expand="intermediate.dense",
    contract="output.dense",
    dropped=r"embeddings\.mask_token|(layernorm|pooler|classifier|decoder)\..*|.*\.relative_position_index",
)


def recognise(tensors: Tensors, model: Swin, image_size: tuple[int, int] | None, where: str) -> Family:
    """The naming scheme of a file's tensors, for the given Swin Transformer.

    Args:
      tensors: of the file, by name.
      model: the backbone.
      image_size: not used; nothing depends on it.
      where: the file, for messages.

    Raises:
      UserError: the file has no known patch embedding, or several.
    """
    del image_size
    schemes = (_TIMM, _HUGGING_FACE)
    found = [(n, s) for n in sorted(tensors) for s in schemes if ends_in(n, f"{s.patch}.weight")]
    if len(found) != 1:
        listed = ", ".join(name for name, _ in found[:4]) or f"its tensors: {', '.join(sorted(tensors)[:4])}, ..."
        raise UserError(
            f"{where} has {len(found)} patch embeddings of a Swin Transformer ({listed}): use a file with one, named "
            "as in Microsoft's files, timm or Hugging Face"
        )
    ((name, scheme),) = found
    prefix = name.removesuffix(f"{scheme.patch}.weight")
    if scheme is _HUGGING_FACE:
        return _family("Hugging Face SwinModel", scheme, model, prefix, merged_before=True)
    merged_before = f"{prefix}layers.0.downsample.reduction.weight" in tensors
    title = "Microsoft's names" if merged_before else "timm's names"
    return _family(title, scheme, model, prefix, merged_before=merged_before)


def _family(title: str, names: _Names, model: Swin, prefix: str, *, merged_before: bool) -> Family:
    """merged_before: whether a merging belongs to the stage before it."""
    width = model.architecture.width
    parts = [
        Part(
            "embedding/kernel",
            None,
            {f"{names.patch}.weight": (width, 3, PATCH, PATCH)},
            lambda kernel: kernel.transpose(2, 3, 1, 0),
        ),
        Part("embedding/bias", None, {f"{names.patch}.bias": (width,)}, _as_it_is),
        *_norm("embedding_norm", names.patch_norm, width),
    ]
    for stage, (tap, depth) in enumerate(zip(model.taps, model.architecture.depths, strict=True)):
        if stage:
            at = f"{names.layers}.{stage - merged_before}.downsample"
            kernel: Shape = (tap.channels, 2 * tap.channels)
            parts += _norm(f"merging_{stage}/norm", f"{at}.norm", 2 * tap.channels)
            parts.append(Part(f"merging_{stage}/reduce/kernel", None, {f"{at}.reduction.weight": kernel}, np.transpose))
        for block in range(depth):
            parts += _block(names, model, stage, block)
    return Family(title, parts, names.dropped, prefix)


def _norm(ours: str, theirs: str, width: int, pair: int | None = None) -> list[Part]:
    kinds = {"scale": "weight", "bias": "bias"}
    return [Part(f"{ours}/norm/{own}", pair, {f"{theirs}.{kind}": (width,)}, _as_it_is) for own, kind in kinds.items()]


def _block(names: _Names, model: Swin, stage: int, block: int) -> list[Part]:
    width, heads, window = model.taps[stage].channels, model.architecture.heads[stage], model.architecture.window
    hidden, pair = MLP_RATIO * width, block // 2
    ours, theirs = f"stage_{stage}/{('plain', 'shifted')[block % 2]}", f"{names.layers}.{stage}.blocks.{block}"

    def part(own: str, name: str, shape: Shape, build: Callable[..., Array] = _as_it_is) -> Part:
        return Part(f"{ours}/{own}", pair, {f"{theirs}.{name}": shape}, build)

    def joined(own: str, kind: str, *shape: int) -> Part:
        rows = 3 * width // len(names.qkv)
        sources: Mapping[str, Shape] = {f"{theirs}.{name}.{kind}": (rows, *shape) for name in names.qkv}
        return Part(f"{ours}/{own}", pair, sources, functools.partial(joined_heads, heads=heads))

    return [
        *_norm(f"{ours}/norm1", f"{theirs}.{names.norm1}", width, pair),
        *_norm(f"{ours}/norm2", f"{theirs}.{names.norm2}", width, pair),
        joined("attention/qkv_kernel", "weight", width),
        joined("attention/qkv_bias", "bias"),
        part("attention/relative_position_bias", names.table, ((2 * window - 1) ** 2, heads)),
        part("attention/out/kernel", f"{names.out}.weight", (width, width), np.transpose),
        part("attention/out/bias", f"{names.out}.bias", (width,)),
        part("mlp/expand/kernel", f"{names.expand}.weight", (hidden, width), np.transpose),
        part("mlp/expand/bias", f"{names.expand}.bias", (hidden,)),
        part("mlp/contract/kernel", f"{names.contract}.weight", (width, hidden), np.transpose),
        part("mlp/contract/bias", f"{names.contract}.bias", (width,)),
    ]


def _as_it_is(array: Array) -> Array:
    return array
