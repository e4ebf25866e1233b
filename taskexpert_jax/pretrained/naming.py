"""Tensor names of published ViTs, mapped to our parameters.

  AugReg        .npz with the names of google-research/vision_transformer
  timm          also the files of DINOv2, DINOv3, DeiT and MAE: `blocks.0.attn.qkv.weight`
  Hugging Face  transformers' ViTModel and Dinov2Model, `encoder.layer.0.attention.attention.query.weight`, and
                DINOv3ViTModel, `layer.0.attention.q_proj.weight`

All are pre-norm ViTs with the same computation. The final norm and all heads are dropped, because our taps have their
own norms. The class token and its position are dropped if `config.model.class_token` is False, as in the code of the
benchmark's other methods.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.models.backbones.vit import POSITIONS, Architecture, ViT
from taskexpert_jax.pretrained.assemble import Family, Part, Shape, Tensors
from taskexpert_jax.pretrained.positions import PositionTable

Array = np.ndarray
BLOCKS = "blocks/"


@dataclasses.dataclass(frozen=True)
class _Names:
    """PyTorch names. Those from `norm1` on are appended to `block`; `.weight` and `.bias` of layers are omitted."""

    patch: str
    class_token: str
    registers: str
    positions: str
    block: str
    norm1: str
    qkv: tuple[str, ...]  # one fused layer, or three
    out: str
    norm2: str
    expand: str
    contract: str
    layer_scales: tuple[str, str]
    dropped: str
    # Possible numbers of positions before those of the patches, in files with a class token; 1 is the class token's.
    before: tuple[int, ...] = (1,)
    gate: str = "mlp.gate"  # the third layer of a SwiGLU
    # None: q, k and v have the biases of their layers. Else the keys have none: names of the biases of q and v, or of
    # one for all whose part for the keys is masked; empty for no bias.
    biases: tuple[str, ...] | None = None


_TIMM = _Names(
    patch="patch_embed.proj",
    class_token="cls_token",
    registers="reg_token",
    positions="pos_embed",
    block="blocks.{}.",
    norm1="norm1",
    qkv=("attn.qkv",),
    out="attn.proj",
    norm2="norm2",
    expand="mlp.fc1",
    contract="mlp.fc2",
    layer_scales=("ls1.gamma", "ls2.gamma"),
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
    norm1="layernorm_before",
    qkv=tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    out="attention.output.dense",
    norm2="layernorm_after",
    expand="intermediate.dense",
    contract="output.dense",
    layer_scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    dropped=r"embeddings\.(cls_token|mask_token)|(layernorm|pooler|classifier|decoder)\..*",
)
_HF_DINOV2 = dataclasses.replace(_HF_VIT, norm1="norm1", norm2="norm2", expand="mlp.fc1", contract="mlp.fc2")

# DINOv3 (arXiv 2508.10104): its authors' names, timm's and Hugging Face's. The keys have no bias.
_DINOV3 = dataclasses.replace(
    _TIMM,
    registers="storage_tokens",
    biases=("attn.qkv.bias",),
    dropped=r"cls_token|mask_token|rope_embed\.periods|(norm|cls_norm|local_cls_norm|head|projectors)\..*|"
    r"blocks\.\d+\.attn\.qkv\.bias_mask",
)
_DINOV3_GATED = dataclasses.replace(_DINOV3, gate="mlp.w1", expand="mlp.w2", contract="mlp.w3")
_TIMM_DINOV3 = dataclasses.replace(_TIMM, layer_scales=("gamma_1", "gamma_2"), biases=())
_HF_DINOV3 = dataclasses.replace(
    _HF_DINOV2,
    patch="embeddings.patch_embeddings",
    block="layer.{}.",
    qkv=tuple(f"attention.{name}_proj" for name in "qkv"),
    out="attention.o_proj",
    expand="mlp.up_proj",
    contract="mlp.down_proj",
    gate="mlp.gate_proj",
    biases=("attention.q_proj.bias", "attention.v_proj.bias"),
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
        scheme = dataclasses.replace(scheme, biases=("attn.q_bias", "attn.v_bias"))
    if f"{prefix}blocks.0.mlp.fc1_g.weight" in names:
        scheme = dataclasses.replace(scheme, gate="mlp.fc1_g", expand="mlp.fc1_x")
    return scheme


def ends_in(name: str, anchor: str) -> bool:
    """True if a tensor's name is `anchor`, with or without a prefix."""
    return name == anchor or name.endswith((f".{anchor}", f"/{anchor}"))


# --- PyTorch ---


def _torch(title: str, names: _Names, backbone: Architecture, prefix: str, table: PositionTable) -> Family:
    width, patch = backbone.width, backbone.patch_size
    parts = [
        Part(
            "patches/embedding/kernel",
            None,
            {f"{names.patch}.weight": (width, 3, patch, patch)},
            lambda kernel: kernel.transpose(2, 3, 1, 0),
        ),
        Part("patches/embedding/bias", None, {f"{names.patch}.bias": (width,)}, _as_it_is),
        *_tokens(names.class_token, names.registers, names.positions, backbone, table),
    ]
    for block in range(backbone.depth):
        parts += _torch_block(names, backbone, block)
    return Family(title, parts, names.dropped, prefix)


def _torch_block(names: _Names, backbone: Architecture, block: int) -> list[Part]:
    width, heads, hidden = backbone.width, backbone.heads, backbone.mlp_ratio * backbone.width
    at = names.block.format(block)

    def part(ours: str, theirs: str, shape: Shape, build: Callable[..., Array] = _as_it_is) -> Part:
        return Part(BLOCKS + ours, block, {at + theirs: shape}, build)

    def joined(ours: str, kind: str, *shape: int) -> Part:
        """The part of q, k and v from one tensor or three; rows are q, k, v, each by head."""
        rows = 3 * width // len(names.qkv)
        sources: Mapping[str, Shape] = {f"{at}{name}.{kind}": (rows, *shape) for name in names.qkv}
        return Part(BLOCKS + ours, block, sources, functools.partial(joined_heads, heads=heads))

    parts = [
        part("attention/out/kernel", f"{names.out}.weight", (width, width), np.transpose),
        part("attention/out/bias", f"{names.out}.bias", (width,)),
        part("mlp/expand/kernel", f"{names.expand}.weight", (hidden, width), np.transpose),
        part("mlp/expand/bias", f"{names.expand}.bias", (hidden,)),
        part("mlp/contract/kernel", f"{names.contract}.weight", (width, hidden), np.transpose),
        part("mlp/contract/bias", f"{names.contract}.bias", (width,)),
        joined("attention/qkv_kernel", "weight", width),
    ]
    if names.biases is None:
        parts.append(joined("attention/qkv_bias", "bias"))
    else:
        rows = 3 * width if len(names.biases) == 1 else width
        sources: Mapping[str, Shape] = {at + name: (rows,) for name in names.biases}
        build = functools.partial(_without_key_bias, width=width, heads=heads)
        parts.append(Part(BLOCKS + "attention/qkv_bias", block, sources, build))
    if backbone.mlp == "swiglu":
        parts.append(part("mlp/gate/kernel", f"{names.gate}.weight", (hidden, width), np.transpose))
        parts.append(part("mlp/gate/bias", f"{names.gate}.bias", (hidden,)))
    for ours, theirs in (("norm1", names.norm1), ("norm2", names.norm2)):
        parts.append(part(f"{ours}/norm/scale", f"{theirs}.weight", (width,)))
        parts.append(part(f"{ours}/norm/bias", f"{theirs}.bias", (width,)))
    if backbone.layer_scale:
        scales = zip(("layer_scale1", "layer_scale2"), names.layer_scales, strict=True)
        parts += [part(ours, theirs, (width,)) for ours, theirs in scales]
    return parts


def joined_heads(*rows: Array, heads: int) -> Array:
    """Kernels (3 * C or C each, C) -> (C, 3, heads, C / heads); biases (3 * C or C each,) -> (3, heads, C / heads)."""
    stacked = np.concatenate(rows)
    split = stacked.reshape(3, heads, -1, *stacked.shape[1:])
    return np.moveaxis(split, -1, 0) if stacked.ndim == 2 else split


def _without_key_bias(*biases: Array, width: int, heads: int) -> Array:
    """Biases (3 * C,) of q, k and v, or (C,) each of q and v, or none -> (3, heads, C / heads), 0 for the keys."""
    query, value = (biases[0][:width], biases[0][2 * width :]) if len(biases) == 1 else biases or (np.zeros(width),) * 2
    return np.stack([query, np.zeros(width), value]).reshape(3, heads, -1).astype(np.float32)


# --- AugReg ---


def _augreg(backbone: Architecture, prefix: str, table: PositionTable) -> Family:
    width, patch = backbone.width, backbone.patch_size
    parts = [
        Part("patches/embedding/kernel", None, {_AUGREG_PATCH: (patch, patch, 3, width)}, _as_it_is),
        Part("patches/embedding/bias", None, {"embedding/bias": (width,)}, _as_it_is),
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

    def part(ours: str, theirs: str, shape: Shape, build: Callable[..., Array] = _as_it_is) -> Part:
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


def _as_it_is(array: Array) -> Array:
    return array
