"""Tensor names of published Swin Transformers, mapped to our parameters.

  Microsoft     the authors' files, `layers.0.blocks.0.attn.qkv.weight`; the merging belongs to the stage before it
  timm          the same, but the merging belongs to the stage that it begins
  Hugging Face  transformers' SwinModel, `encoder.layers.0.blocks.0.attention.self.query.weight`

The final norm and heads are dropped, because our neck and decoders have their own norms; so are buffers of indices and
masks.
"""

import dataclasses

import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.models.backbones.swin import MLP_RATIO, PATCH, Swin
from taskexpert_jax.pretrained.assemble import Family, Part, Shape, Tensors
from taskexpert_jax.pretrained.torch_blocks import Block, BlockNames, block_parts, ends_in, norm_parts, patch_parts


@dataclasses.dataclass(frozen=True)
class _Names:
    """Names of modules; those of a block, `layers` and `table`, are appended to `stages`.N.blocks.N."""

    patch: str
    patch_norm: str
    stages: str
    layers: BlockNames
    table: str
    dropped: str


_TIMM = _Names(
    patch="patch_embed.proj",
    patch_norm="patch_embed.norm",
    stages="layers",
    layers=BlockNames("norm1", ("attn.qkv",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
    table="attn.relative_position_bias_table",
    dropped=r"(norm|norm\d|head)\..*|.*\.(attn_mask|relative_position_index|relative_coords_table)",
)
_HUGGING_FACE = _Names(
    patch="embeddings.patch_embeddings.projection",
    patch_norm="embeddings.norm",
    stages="encoder.layers",
    layers=BlockNames(
        norm1="layernorm_before",
        qkv=tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
        out="attention.output.dense",
        norm2="layernorm_after",
        expand="intermediate.dense",
        contract="output.dense",
    ),
    table="attention.self.relative_position_bias_table",
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
    swin = model.architecture
    parts = [
        *patch_parts("embedding", names.patch, swin.width, PATCH),
        *norm_parts("embedding_norm", names.patch_norm, swin.width),
    ]
    for stage, (tap, depth) in enumerate(zip(model.taps, swin.depths, strict=True)):
        if stage:
            at = f"{names.stages}.{stage - merged_before}.downsample"
            kernel: Shape = (tap.channels, 2 * tap.channels)
            parts += norm_parts(f"merging_{stage}/norm", f"{at}.norm", 2 * tap.channels)
            parts.append(Part(f"merging_{stage}/reduce/kernel", None, {f"{at}.reduction.weight": kernel}, np.transpose))
        heads = swin.heads[stage]
        table: Shape = ((2 * swin.window - 1) ** 2, heads)
        for index in range(depth):
            ours = f"stage_{stage}/{('plain', 'shifted')[index % 2]}/"
            theirs = f"{names.stages}.{stage}.blocks.{index}."
            block = Block(ours, theirs, index // 2, tap.channels, heads, MLP_RATIO * tap.channels)
            parts += block_parts(block, names.layers)
            parts.append(block.part("attention/relative_position_bias", names.table, table))
    return Family(title, parts, names.dropped, prefix)
