"""Tensor names of published ViTs, mapped to our parameters.

  AugReg        .npz with the names of google-research/vision_transformer
  timm          also the files of DINOv2, DINOv3, DeiT and MAE: `blocks.0.attn.qkv.weight`
  Hugging Face  transformers' ViTModel and Dinov2Model, `encoder.layer.0.attention.attention.query.weight`, and
                DINOv3ViTModel, `layer.0.attention.q_proj.weight`

All are pre-norm ViTs with the same computation. The final norm and all heads are dropped, because our taps have their
own norms. The class token and its position are dropped if `config.model.class_token` is False, as in the code of the
benchmark's other methods.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.models.backbones.vit import POSITIONS, Architecture, ViT
from taskexpert_jax.pretrained.assemble import Family, Part, Shape, Tensors
from taskexpert_jax.pretrained.positions import PositionTable
from taskexpert_jax.pretrained.torch_blocks import Block, BlockNames, as_it_is, block_parts, ends_in, patch_parts

Array = np.ndarray
BLOCKS = "blocks/"


@dataclasses.dataclass(frozen=True)
class _Names:
    """PyTorch names; those of `layers` are appended to `block`.

    before: possible numbers of positions before those of the patches, in files with a class token; 1 is the class
      token's.
    """

    patch: str
    class_token: str
    registers: str
    positions: str
    block: str
    layers: BlockNames
    dropped: str
    before: tuple[int, ...] = (1,)


_TIMM = _Names(
    patch="patch_embed.proj",
    class_token="cls_token",
    registers="reg_token",
    positions="pos_embed",
    block="blocks.{}.",
    layers=BlockNames(
        norm1="norm1",
        qkv=("attn.qkv",),
        out="attn.proj",
        norm2="norm2",
        expand="mlp.fc1",
        contract="mlp.fc2",
        layer_scales=("ls1.gamma", "ls2.gamma"),
        gate="mlp.gate",
    ),
    # MAE's full pretraining model includes a decoder, DINOv2's file a mask token.
    dropped=r"cls_token|mask_token|(norm|fc_norm|head|pre_logits|decoder\w*)\..*|decoder_pos_embed",
    before=(0, 1),  # timm's `no_embed_class` is 0: DeiT III; the default and the first DeiT, DINO and MAE are 1
)
_TIMM_REGISTERS = dataclasses.replace(_TIMM, before=(0,))  # all of timm's models with registers have no_embed_class
_DINOV2 = dataclasses.replace(_TIMM, registers="register_tokens", before=(1,))
_HF_VIT = _Names(
    patch="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    registers="embeddings.register_tokens",
    positions="embeddings.position_embeddings",
    block="encoder.layer.{}.",
    layers=BlockNames(
        norm1="layernorm_before",
        qkv=tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
        out="attention.output.dense",
        norm2="layernorm_after",
        expand="intermediate.dense",
        contract="output.dense",
        layer_scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        gate="mlp.gate",
    ),
    dropped=r"embeddings\.(cls_token|mask_token)|(layernorm|pooler|classifier|decoder)\..*",
)


def _with_layers(names: _Names, **layers: Any) -> _Names:
    """The names, with other names of some layers of a block."""
    return dataclasses.replace(names, layers=dataclasses.replace(names.layers, **layers))


_HF_DINOV2 = _with_layers(_HF_VIT, norm1="norm1", norm2="norm2", expand="mlp.fc1", contract="mlp.fc2")

# DINOv3 (arXiv 2508.10104): its authors' names, timm's and Hugging Face's. The keys have no bias.
_DINOV3 = dataclasses.replace(
    _with_layers(_TIMM, biases=("attn.qkv.bias",)),
    registers="storage_tokens",
    dropped=r"cls_token|mask_token|rope_embed\.periods|(norm|cls_norm|local_cls_norm|head|projectors)\..*|"
    r"blocks\.\d+\.attn\.qkv\.bias_mask",
)
_DINOV3_GATED = _with_layers(_DINOV3, gate="mlp.w1", expand="mlp.w2", contract="mlp.w3")
_TIMM_DINOV3 = _with_layers(_TIMM, layer_scales=("gamma_1", "gamma_2"), biases=())
_HF_DINOV3 = dataclasses.replace(
    _with_layers(
        _HF_DINOV2,
        qkv=tuple(f"attention.{name}_proj" for name in "qkv"),
        out="attention.o_proj",
        expand="mlp.up_proj",
        contract="mlp.down_proj",
        gate="mlp.gate_proj",
        biases=("attention.q_proj.bias", "attention.v_proj.bias"),
    ),
    patch="embeddings.patch_embeddings",
    block="layer.{}.",
    dropped=r"embeddings\.(cls_token|mask_token)|norm\..*",
)

_AUGREG_PATCH = "embedding/kernel"


def recognise(tensors: Tensors, model: ViT, image_size: tuple[int, int] | None, where: str) -> Family:
    """The naming scheme of a file's tensors, for the given ViT.

    Args:
      tensors: of the file, by name.
      model: the backbone.
      image_size: height and width of the images that the file's model is built for; None if not recorded.
      where: the file, for messages.

    Raises:
      UserError: the file has no known patch embedding, or several.
    """
    backbone, names = model.architecture, set(tensors)
    anchors = [f"{form.patch}.weight" for form in (_TIMM, _HF_VIT, _HF_DINOV3)] + [_AUGREG_PATCH]
    found = [(name, anchor) for name in sorted(names) for anchor in anchors if ends_in(name, anchor)]
    if len(found) != 1:
        listed = ", ".join(name for name, _ in found[:4]) or f"its tensors: {', '.join(sorted(names)[:4])}, ..."
        raise UserError(
            f"{where} has {len(found)} patch embeddings of a ViT ({listed}): use a file with one ViT, named as in "
            "AugReg's .npz, timm or Hugging Face"
        )
    ((name, anchor),) = found
    prefix = name.removesuffix(anchor)
    kernel = tensors[name].shape
    patch_size = kernel[0 if anchor == _AUGREG_PATCH else -1] if all(kernel) and kernel else backbone.patch_size

    def table(before: tuple[int, ...], class_token: str) -> PositionTable:
        before = before if prefix + class_token in names else (0,)
        return PositionTable(where, before, patch_size, model.grid, image_size)

    if anchor == _AUGREG_PATCH:
        return _augreg(backbone, prefix, table((1,), "cls"))
    if anchor.startswith(_TIMM.patch):
        if prefix + _DINOV3.registers in names:
            gated = f"{prefix}blocks.0.mlp.w1.weight" in names
            title, scheme = "DINOv3's own names", _DINOV3_GATED if gated else _DINOV3
        elif f"{prefix}blocks.0.gamma_1" in names:
            title, scheme = "timm's names, DINOv3", _timm_dinov3(names, prefix)
        elif prefix + _DINOV2.registers in names:
            title, scheme = "DINOv2's own names, registers", _DINOV2
        else:
            title, scheme = "timm's names", _TIMM_REGISTERS if prefix + _TIMM.registers in names else _TIMM
    elif anchor == f"{_HF_DINOV3.patch}.weight":
        title, scheme = "Hugging Face DINOv3ViTModel", _HF_DINOV3
    elif f"{prefix}encoder.layer.0.norm1.weight" in names:
        title, scheme = "Hugging Face Dinov2Model", _HF_DINOV2
    else:
        title, scheme = "Hugging Face ViTModel", _HF_VIT
    return _torch(title, scheme, backbone, prefix, table(scheme.before, scheme.class_token))


def _timm_dinov3(names: set[str], prefix: str) -> _Names:
    """timm's names of DINOv3, which has a gate in its MLPs or not, and biases of q and v or none."""
    scheme = _TIMM_DINOV3
    if f"{prefix}blocks.0.attn.q_bias" in names:
        scheme = _with_layers(scheme, biases=("attn.q_bias", "attn.v_bias"))
    if f"{prefix}blocks.0.mlp.fc1_g.weight" in names:
        scheme = _with_layers(scheme, gate="mlp.fc1_g", expand="mlp.fc1_x")
    return scheme


# --- PyTorch ---


def _torch(title: str, names: _Names, backbone: Architecture, prefix: str, table: PositionTable) -> Family:
    width = backbone.width
    parts = [
        *patch_parts("patches/embedding", names.patch, width, backbone.patch_size),
        *_tokens(names.class_token, names.registers, names.positions, backbone, table),
    ]
    for index in range(backbone.depth):
        block = Block(BLOCKS, names.block.format(index), index, width, backbone.heads, backbone.mlp_ratio * width)
        gated, scaled = backbone.mlp == "swiglu", bool(backbone.layer_scale)
        parts += block_parts(block, names.layers, gated=gated, scaled=scaled)
    return Family(title, parts, names.dropped, prefix)


# --- AugReg ---


def _augreg(backbone: Architecture, prefix: str, table: PositionTable) -> Family:
    width, patch = backbone.width, backbone.patch_size
    parts = [
        Part("patches/embedding/kernel", None, {_AUGREG_PATCH: (patch, patch, 3, width)}, as_it_is),
        Part("patches/embedding/bias", None, {"embedding/bias": (width,)}, as_it_is),
        *_tokens("cls", "registers", "Transformer/posembed_input/pos_embedding", backbone, table),
    ]
    for block in range(backbone.depth):
        parts += _augreg_block(backbone, block)
    dropped = r"cls|(head|pre_logits|Transformer/encoder_norm)/.*"
    return Family("AugReg's names", parts, dropped, prefix, trained_with="AugReg's ViTs were trained with 0.5 and 0.5")


def _augreg_block(backbone: Architecture, block: int) -> list[Part]:
    width, heads, hidden = backbone.width, backbone.heads, backbone.mlp_ratio * backbone.width
    at, attention = f"Transformer/encoderblock_{block}/", "MultiHeadDotProductAttention_1"
    each = width // heads

    def part(ours: str, theirs: str, shape: Shape, build: Callable[..., Array] = as_it_is) -> Part:
        return Part(BLOCKS + ours, block, {f"{at}{theirs}": shape}, build)

    def joined(ours: str, kind: str, shape: Shape) -> Part:
        sources = {f"{at}{attention}/{name}/{kind}": shape for name in ("query", "key", "value")}
        return Part(BLOCKS + ours, block, sources, lambda *qkv: np.stack(qkv, axis=-3))

    parts = [
        joined("attention/qkv_kernel", "kernel", (width, heads, each)),
        joined("attention/qkv_bias", "bias", (heads, each)),
        part(
            "attention/out/kernel",
            f"{attention}/out/kernel",
            (heads, each, width),
            lambda kernel: kernel.reshape(width, width),
        ),
        part("attention/out/bias", f"{attention}/out/bias", (width,)),
    ]
    for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
        parts += [part(f"{ours}/norm/{kind}", f"{theirs}/{kind}", (width,)) for kind in ("scale", "bias")]
    for ours, theirs, sizes in (("expand", "Dense_0", (width, hidden)), ("contract", "Dense_1", (hidden, width))):
        parts.append(part(f"mlp/{ours}/kernel", f"MlpBlock_3/{theirs}/kernel", sizes))
        parts.append(part(f"mlp/{ours}/bias", f"MlpBlock_3/{theirs}/bias", sizes[1:]))
    if backbone.layer_scale:  # AugReg has none, so these are reported as missing
        parts += [part(name, name, (width,)) for name in ("layer_scale1", "layer_scale2")]
    return parts


# --- tokens and positions, for all naming schemes ---


def _tokens(
    class_token: str, registers: str, positions: str, backbone: Architecture, table: PositionTable
) -> list[Part]:
    """Parts for the position embeddings (1, N, C), and for the class and register tokens of the backbone."""
    width = backbone.width
    shape: Shape = (1, None, width)
    parts = []
    if backbone.positions == "learned":
        parts.append(Part(POSITIONS, None, {positions: shape}, table.patches))
    elif backbone.class_token:
        parts.append(Part("patches/class_token", None, {class_token: (1, 1, width)}, lambda token: token[0, 0]))
    if backbone.class_token and backbone.positions == "learned":
        sources = {class_token: (1, 1, width), positions: shape}
        parts.append(Part("patches/class_token", None, sources, table.placed_class_token))
    if backbone.registers:
        sources = {registers: (1, backbone.registers, width)}
        parts.append(Part("patches/registers", None, sources, lambda tokens: tokens[0]))
    return parts
