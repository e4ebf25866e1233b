"""Fields of the model: those of all models, of each backbone and of each decoder; and the backbone variants."""

from collections.abc import Mapping
from typing import Any

from taskexpert_jax.config.field import IMAGENET_MEAN, IMAGENET_STD, REQUIRED, Field
from taskexpert_jax.config.rules import SIZE, choice, flag, matching, number, numbers, odd, path, text, whole, wholes

BACKBONE, DECODER = "model.backbone", "model.decoder"  # fields that say which of the others there are
_NAME = matching(r"[a-z]\w*", "must be a name of lower-case letters, digits and underscores")

MODEL: Mapping[str, Field] = {
    BACKBONE: Field("vit", _NAME, "architecture of the backbone, a row of models/backbones/__init__.py"),
    DECODER: Field("taskexpert", _NAME, "architecture of the decoder, a row of models/decoders/__init__.py"),
    "model.patch_size": Field(REQUIRED, whole(1, SIZE), "P, in pixels; sides of images are multiples of it"),
    "model.image_mean": Field(
        IMAGENET_MEAN,
        numbers("give three numbers, for red, green and blue in [0, 1]", count=3),
        "per-channel mean for RGB in [0, 1]; default: ImageNet's",
    ),
    "model.image_std": Field(
        IMAGENET_STD,
        numbers("give three numbers of 0.001 or more, for red, green and blue in [0, 1]", 0.001, count=3),
        "per-channel standard deviation for RGB in [0, 1]",
    ),
    "model.pretrained": Field(
        "",
        path(empty=True, hub=True),
        "backbone weights: a file, a finished run's directory, a released folder or hf://OWNER/NAME; empty: random",
    ),
    "model.pretrained_fresh": Field("", text(empty=True), "regex of the backbone parameters that stay random"),
    "model.drop_path": Field(0.15, number(0, below=1), "stochastic depth of the last block; rises linearly from 0"),
    "model.remat": Field(
        False, flag(), "recompute blocks in the backward pass: less memory, about a third more compute"
    ),
    "model.unroll": Field(
        "auto", choice("auto", "yes", "no"), "unroll the scans over blocks and taps; auto: in training on CPUs"
    ),
    "model.feature_width": Field(REQUIRED, whole(1, SIZE), "D, channels of experts, memory and heads"),
    "model.norm": Field(
        "batch", choice("batch", "layer"), "normalisation in the decoder; batch: over the global batch"
    ),
    "model.head_upsample": Field(4, whole(1, 64), "upsampling before a head's 3x3 convolution"),
}

# Further fields by model.backbone. A backbone of your own may have any fields.
BACKBONES: Mapping[str, Mapping[str, Field]] = {
    "vit": {
        "model.width": Field(REQUIRED, whole(1, SIZE), "C, channels of the tokens"),
        "model.depth": Field(REQUIRED, whole(1, SIZE), "transformer blocks"),
        "model.heads": Field(REQUIRED, whole(1, SIZE), "attention heads; divides width"),
        "model.mlp_ratio": Field(4, whole(1, SIZE), "MLP width over C"),
        "model.layer_scale": Field(0.0, number(0), "initial factor of LayerScale; 0: no LayerScale"),
        "model.class_token": Field(
            False, flag(), "a class token that takes part in the attention; the benchmark's methods drop it"
        ),
        "model.registers": Field(0, whole(0, SIZE), "register tokens"),
        "model.positions": Field(
            "learned", choice("learned", "rotary"), "learned: position embeddings; rotary: DINOv3's, for any image size"
        ),
        "model.mlp": Field("gelu", choice("gelu", "swiglu"), "swiglu: gated, with a third dense layer"),
        "model.norm_epsilon": Field(1e-6, number(above=0, below=1), "epsilon of the backbone's layer norms"),
        "model.taps": Field(
            4, whole(1, SIZE), "S: the decoder sees the tokens after each depth / S blocks; divides depth"
        ),
        "model.attention": Field(
            "auto",
            choice("auto", "xla", "cudnn", "splash"),
            "cudnn: fused, bfloat16 on NVIDIA GPUs; splash: fused, on TPUs; xla: any device; "
            "auto: cudnn where available (Ampere and later), else xla",
        ),
    },
    "swin": {
        "model.swin.width": Field(REQUIRED, whole(1, SIZE), "C of the first stage; doubles from stage to stage"),
        "model.swin.depths": Field(REQUIRED, wholes(4, multiple_of=2), "blocks of each stage"),
        "model.swin.heads": Field(REQUIRED, wholes(4), "attention heads of each stage; divide its channels"),
        "model.swin.window": Field(7, whole(2, SIZE), "side of a window in tokens"),
        "model.grid_stride": Field(16, whole(1, SIZE), "stride of the decoder's grid; the taps are resized to it"),
    },
}

# Further fields by model.decoder. A decoder of your own may have any fields.
DECODERS: Mapping[str, Mapping[str, Field]] = {
    "baseline": {},
    "mlore": {
        "model.mlore.ranks": Field(
            tuple(range(16, 129, 8)), wholes(), "ranks of the low-rank experts, one number for each expert"
        ),
        "model.mlore.task_rank": Field(72, whole(1, SIZE), "rank of the convolution that a task has for itself"),
        "model.mlore.top_k": Field(9, whole(0), "experts that a router keeps for an image; 0: all"),
        "model.mlore.balance": Field(3e-4, number(0), "weight of the load-balancing loss over a batch"),
        "model.mlore.merge": Field(
            "inference",
            choice("inference", "always", "never"),
            "when the paths of a mixture run as one convolution of each image and task; the results are the same",
        ),
    },
    "taskexpert": {
        "model.experts": Field(5, whole(1, SIZE), "K, number of experts"),
        "model.expert_kernel": Field(3, odd(1, 99), "kernel size of the experts' second convolution"),
        "model.gate.input": Field(
            "both", choice("local", "context", "both"), "local: the token; context: the image's mean feature"
        ),
        "model.gate.granularity": Field(
            "token",
            choice("token", "image", "static", "uniform"),
            "weights per token, per image, static (learned, independent of the input) or uniform (no gate)",
        ),
        "model.gate.width": Field(REQUIRED, whole(1, SIZE), "hidden units"),
        "model.gate.top_k": Field(0, whole(0), "0: softmax over all experts; k: over the k largest"),
        "model.gate.init": Field(
            "even", choice("random", "even"), "even: all experts start with the same weight", first="random"
        ),
        "model.gate.temperature": Field(1.0, number(0.001, 1000), "divides the logits"),
        "model.gate.noise": Field(0.0, number(0), "standard deviation of the noise added to the logits in training"),
        "model.gate.balance": Field(0.0, number(0), "weight of the load-balancing loss over a batch"),
        "model.memory.init": Field("learned", choice("learned", "zeros"), "learned: a vector per task"),
        "model.memory.read": Field(
            "conv1x1",
            choice("conv1x1", "conv3x3", "identity", "none"),
            "memory as expert K + 1; none: not read by the gates, only accumulates the taps' features",
        ),
        "model.memory.write": Field(
            "gated",
            choice("gated", "residual", "replace"),
            "update of the memory at each tap; gated: a learned sigmoid blends it in, residual: it is added",
            first="residual",
        ),
    },
}

_DINOV2 = {"layer_scale": 1e-5, "class_token": True}
_DINOV2_REGISTERS = {**_DINOV2, "registers": 4}
_DINOV3 = {**_DINOV2_REGISTERS, "positions": "rotary", "norm_epsilon": 1e-5}
_DINOV3_PLUS = {**_DINOV3, "mlp": "swiglu"}


def _vit(
    width: int, depth: int, heads: int, patch: int, features: int, gate: int, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of a ViT: C, number of blocks and heads, P; the decoder's D and gate width; others that differ."""
    sizes = {"width": width, "depth": depth, "heads": heads, "patch_size": patch}
    return {**sizes, "feature_width": features, "gate.width": gate, **(more or {})}


def _swin(width: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> dict[str, Any]:
    """Fields of a Swin Transformer; D is half the channels at stride 16."""
    sizes = {"swin.width": width, "swin.depths": depths, "swin.heads": heads}
    return {"backbone": "swin", "patch_size": 32, **sizes, "feature_width": 2 * width, "gate.width": width}


# name -> fields of `model`. D of ViT-L is set by the published budget (420 M parameters, 622 G multiply-adds); the
# others have D = C / 2.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "vit_ti16": _vit(192, 12, 3, 16, 96, 48),
    "vit_s16": _vit(384, 12, 6, 16, 192, 96),
    "vit_b16": _vit(768, 12, 12, 16, 384, 192),
    "vit_l16": _vit(1024, 24, 16, 16, 480, 256),
    # DINOv2 (arXiv 2304.07193; registers: 2309.16588) and MAE (2111.06377) were trained with a class token.
    "dinov2_s14": _vit(384, 12, 6, 14, 192, 96, _DINOV2),
    "dinov2_b14": _vit(768, 12, 12, 14, 384, 192, _DINOV2),
    "dinov2_l14": _vit(1024, 24, 16, 14, 480, 256, _DINOV2),
    "dinov2_s14_reg4": _vit(384, 12, 6, 14, 192, 96, _DINOV2_REGISTERS),
    "dinov2_b14_reg4": _vit(768, 12, 12, 14, 384, 192, _DINOV2_REGISTERS),
    "dinov2_l14_reg4": _vit(1024, 24, 16, 14, 480, 256, _DINOV2_REGISTERS),
    # DINOv3 (arXiv 2508.10104).
    "dinov3_s16": _vit(384, 12, 6, 16, 192, 96, _DINOV3),
    "dinov3_splus16": _vit(384, 12, 6, 16, 192, 96, _DINOV3_PLUS),
    "dinov3_b16": _vit(768, 12, 12, 16, 384, 192, _DINOV3),
    "dinov3_l16": _vit(1024, 24, 16, 16, 480, 256, _DINOV3),
    "dinov3_hplus16": _vit(1280, 32, 20, 16, 480, 256, _DINOV3_PLUS),
    "mae_b16": _vit(768, 12, 12, 16, 384, 192, {"class_token": True}),
    "mae_l16": _vit(1024, 24, 16, 16, 480, 256, {"class_token": True}),
    # Swin (arXiv 2103.14030), with windows of 7; of 12 in the weights for 384x384.
    "swin_t": _swin(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": _swin(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": _swin(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": _swin(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "tiny": _vit(32, 4, 2, 16, 16, 8),  # for tests: has every part, too small to learn
}
