"""All config fields: name -> default, rule and meaning; and the backbone variants.

A config is `base("vit_l16", "nyud")`, modified by a file in configs/ and by --config.FIELD=VALUE on the command line.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from taskexpert_jax.config.rules import (
    SIZE,
    Rule,
    choice,
    flag,
    local_path,
    matching,
    names,
    number,
    numbers,
    odd,
    path,
    size,
    text,
    whole,
)

REQUIRED: Any = None  # no default: the variant or the config file sets the value
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Field(NamedTuple):
    """One field: its default (REQUIRED: none), its rule and its meaning.

    `first` is the field's first default, if that has changed: the value of runs from before the field existed.
    """

    default: Any
    rule: Rule
    meaning: str
    first: Any = None


# Defaults are the protocol of the benchmark's methods (docs/paper_vs_code.md).
FIELDS: Mapping[str, Field] = {
    "variant": Field(REQUIRED, text(), "name of the size; recorded in config.json and printed at start"),
    "seed": Field(0, whole(0, 2**32 - 1), "seed of parameters, stochastic depth, data order and augmentation"),
    "dtype": Field(
        "bfloat16", choice("float32", "bfloat16"), "dtype of the computation; parameters are always float32"
    ),
    "batch_size": Field(4, whole(1), "global batch size, over all devices and hosts"),
    "num_steps": Field(40_000, whole(1), "optimiser steps"),
    "accumulate_steps": Field(1, whole(1), "micro-batches per step, if a batch exceeds memory; divides batch_size"),
    "tasks": Field(REQUIRED, names(), "tasks to learn"),
    # loss_weights.TASK: see LOSS_WEIGHT below.
    "edge_pos_weight": Field(0.95, number(above=0, below=1), "weight of the positive pixels in the boundary loss"),
    # --- data set; more fields in DATA_SETS below ---
    "dataset.name": Field(REQUIRED, text(), "module of input_pipeline"),
    "dataset.fingerprint": Field(
        "", text(empty=True), "identifies the data; empty: set at start; otherwise different data are refused"
    ),
    "dataset.train_split": Field("train", text(), "split to train on"),
    "dataset.eval_split": Field("val", text(), "split to evaluate"),
    "dataset.semseg_classes": Field(
        (), names(empty=True), "class names in the order of their numbers in the label maps"
    ),
    "dataset.image_size": Field(
        REQUIRED, size(), "height and width in training and evaluation, in pixels; multiples of patch_size"
    ),
    "dataset.depth_max": Field(
        80.0, number(above=0), "metres; valid depth is more than 0 and less than this, in training and evaluation"
    ),
    "dataset.downscale": Field(1.0, number(0.01, 1), "reduces every image first"),
    "dataset.cache": Field(False, flag(), "keep decoded examples in memory"),
    "dataset.threads": Field(0, whole(0, 1024), "threads of the input pipeline; 0: chosen by tf.data"),
    # --- model: backbone ---
    "model.width": Field(REQUIRED, whole(1, SIZE), "C, channels of the tokens"),
    "model.depth": Field(REQUIRED, whole(1, SIZE), "transformer blocks"),
    "model.heads": Field(REQUIRED, whole(1, SIZE), "attention heads; divides width"),
    "model.mlp_ratio": Field(4, whole(1, SIZE), "MLP width over C"),
    "model.patch_size": Field(REQUIRED, whole(1, SIZE), "P, in pixels"),
    "model.layer_scale": Field(0.0, number(0), "LayerScale's initial factor on a block's residuals; 0: no LayerScale"),
    "model.class_token": Field(
        False, flag(), "a class token that takes part in the attention; the benchmark's methods drop it"
    ),
    "model.registers": Field(0, whole(0, SIZE), "register tokens"),
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
    "model.attention": Field(
        "auto",
        choice("auto", "xla", "cudnn", "splash"),
        "cudnn: fused, bfloat16 on NVIDIA GPUs; splash: fused, on TPUs; xla: any device; "
        "auto: cudnn where available (Ampere and later), else xla",
    ),
    "model.remat": Field(
        False, flag(), "recompute blocks in the backward pass: less memory, about a third more compute"
    ),
    "model.unroll": Field(
        "auto", choice("auto", "yes", "no"), "unroll the scans over blocks and taps; auto: in training on CPUs"
    ),
    # --- model: decoder ---
    "model.taps": Field(4, whole(1, SIZE), "S: the experts see the tokens after each depth / S blocks; divides depth"),
    "model.feature_width": Field(REQUIRED, whole(1, SIZE), "D, channels of experts, memory and heads"),
    "model.norm": Field(
        "batch", choice("batch", "layer"), "normalisation of experts and heads; batch: over the global batch"
    ),
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
    "model.head_upsample": Field(4, whole(1, 64), "upsampling of the memory before a head's 3x3 convolution"),
    # --- optimiser ---
    "optimizer.algorithm": Field(
        "adam", choice("adam", "adamw"), "adam: the protocol's, with an L2 term; adamw: decoupled weight decay"
    ),
    "optimizer.learning_rate": Field(2e-5, number(0), "peak learning rate, before the decay"),
    "optimizer.schedule": Field("polynomial", choice("polynomial", "cosine"), "decay to 0 at num_steps"),
    "optimizer.schedule_power": Field(0.9, number(0), "p of learning_rate * (1 - step / num_steps) ** p"),
    "optimizer.warmup_steps": Field(0, whole(0), "linear rise from 0 before the decay; the protocol has none"),
    "optimizer.weight_decay": Field(1e-6, number(0), "adam: L2 term added to the gradient; adamw: decay of kernels"),
    "optimizer.clip_norm": Field(10.0, number(0), "global gradient norm, before the L2 term; 0: no clipping"),
    "optimizer.backbone_rate": Field(1.0, number(0), "factor on the backbone's learning rate"),
    "optimizer.layer_decay": Field(1.0, number(0, 1), "further factor for each block below the last"),
    "optimizer.ema_decay": Field(0.0, number(0, below=1), "evaluate a moving average of the parameters; 0: off"),
    # --- augmentation, in training only ---
    "augment.scale_min": Field(0.5, number(0.1, 10), "smallest random scale of image and labels"),
    "augment.scale_max": Field(2.0, number(0.1, 10), "largest; drawn uniformly"),
    "augment.crop_max_class_share": Field(
        0.75, number(above=0, high=1), "crops with a larger share of one class are redrawn; 1: no crop is redrawn"
    ),
    "augment.crop_redraws": Field(10, whole(0), "largest number of redraws"),
    "augment.flip_probability": Field(0.5, number(0, 1), "probability of a horizontal flip"),
    "augment.photometric_probability": Field(
        0.5, number(0, 1), "probability of each of the four colour jitters below; 0: none"
    ),
    "augment.brightness": Field(32.0, number(0, 255), "largest change, on a scale of 0 to 255"),
    "augment.contrast_min": Field(0.5, number(0, 10), "smallest factor"),
    "augment.contrast_max": Field(1.5, number(0, 10), "largest; drawn uniformly"),
    "augment.saturation_min": Field(0.5, number(0, 10), "smallest factor"),
    "augment.saturation_max": Field(1.5, number(0, 10), "largest; drawn uniformly"),
    "augment.hue": Field(18, whole(0, 180), "largest change, on a scale of 0 to 180"),
    # --- devices along each mesh axis; -1: all remaining devices ---
    "mesh.data": Field(-1, whole(-1), "copies of the model, each with its share of the batch"),
    "mesh.fsdp": Field(1, whole(-1), "shards of parameters and optimiser state; also splits the batch"),
    "mesh.tensor": Field(1, whole(-1), "shards of attention heads, MLPs and feature maps"),
    "mesh.slices": Field(
        0,
        whole(0),
        "groups of devices that a slower network joins; 0: TPU slices or nodes of GPUs, as the devices report",
    ),
    "mesh.fsdp_slices": Field(1, whole(1), "slices that fsdp spans; data spans the others"),
    # --- evaluation and inference ---
    "eval.batch_size": Field(8, whole(1), "global batch size"),
    "eval.every_steps": Field(
        2_000, whole(0), "steps between evaluations during training; also at the end; 0: only there"
    ),
    "eval.max_examples": Field(0, whole(0), "0: the whole split"),
    "eval.flip": Field(False, flag(), "average predictions with those of the flipped image"),
    "eval.scales": Field(
        (1.0,),
        numbers("give one or more factors in [0.1, 10]; (1.0,) is the original size", 0.1, 10),
        "average predictions over the image resized by each of these factors",
    ),
    "eval.image_size": Field(
        (),
        size(empty=True, words="give a height and a width in pixels, or () for dataset.image_size"),
        "frames larger than dataset.image_size: sliding-window inference; (): dataset.image_size",
    ),
    "eval.overlap": Field(
        1 / 3,
        number(0, below=1, words="must be a fraction of a window's side, in [0, 1)"),
        "smallest overlap of neighbouring windows, as a fraction of their sides",
    ),
    "eval.params_dtype": Field(
        "float32",
        choice("float32", "bfloat16"),
        "dtype of parameters in --mode=evaluate, predict and export; bfloat16: half the memory",
    ),
    "eval.boundary.odsf": Field(True, flag(), "run the boundary benchmark in --mode=evaluate; about 0.5 s per image"),
    "eval.boundary.labels": Field(
        "lines", choice("regions", "lines"), "lines: nonzero pixels are boundaries; regions: where the label changes"
    ),
    "eval.boundary.quantise": Field(
        "truncate", choice("truncate", "round"), "255 times the probability to 8 bits: fraction cut off, or rounded"
    ),
    "eval.boundary.max_dist": Field(
        0.0075,
        number(above=0, below=1, words="must be a fraction of the diagonal, in (0, 1)"),
        "largest distance of matched pixels, as a fraction of the image's diagonal",
    ),
    # --- run ---
    "checkpoint.every_steps": Field(
        2_000,
        whole(0),
        "steps between checkpoints; also at the end; 0: only there; the latest two and the best are kept",
    ),
    "checkpoint.best_task": Field(
        "semseg", text(), "the best checkpoint is the best one by this task's published metric"
    ),
    "guard.skip_steps": Field(0, whole(0), "NaN/Inf steps to skip; one more stops the run (docs/resume.md)"),
    "guard.skip_examples": Field(0, whole(0), "unreadable training examples to replace; one more stops the run"),
    "guard.spike_factor": Field(4.0, number(0), "report losses above this times the running mean; 0: never"),
    "guard.stall_seconds": Field(600.0, number(0), "warn after this long without a step; 0: never"),
    "profile.first_step": Field(0, whole(0), "first step of the first profile (docs/profile.md); 0: no profiles"),
    "profile.steps": Field(5, whole(1, 1_000), "steps of a profile"),
    "profile.every": Field(0, whole(0), "steps from the start of a profile to that of the next; 0: a single profile"),
    "log.every_steps": Field(
        50, whole(0), "steps between scalars and progress lines; 0: with evaluations and checkpoints alone"
    ),
    "log.images": Field(4, whole(0), "evaluation examples drawn to TensorBoard (and W&B) at each evaluation; 0: none"),
    "log.wandb": Field(
        "",
        matching(r"|([\w.-]+/)?[^/\\#?%:\s]{1,128}", "must be PROJECT or ENTITY/PROJECT, or empty: no W&B"),
        "project on Weights & Biases: PROJECT or ENTITY/PROJECT; empty: none (docs/logging.md)",
    ),
}

LOSS_WEIGHT = Field(REQUIRED, number(0), "loss_weights.TASK: weight of a task's loss in the total")

_ON_DISK = {
    "dataset.data_dir": Field("data", path(), "directory of the data, on a disk or gs://BUCKET/NAME"),
    "dataset.local_cache": Field(
        "auto",
        local_path(empty=True),
        "where a host copies data of a bucket once: a folder; auto: in ~/.cache; empty: read from the bucket",
    ),
}

# Further fields by dataset.name. A data set of your own may have any fields.
DATA_SETS: Mapping[str, Mapping[str, Field]] = {
    "nyud": _ON_DISK,
    "pascal_context": _ON_DISK,
    "folder": {
        **_ON_DISK,
        "dataset.labels": Field((), names(empty=True), "label folders to read; all tasks must be among them"),
        "dataset.zero_is_void": Field(
            (), names(empty=True), "tasks in whose label maps 0 is unlabelled and the classes count from 1"
        ),
    },
    "scenes": {
        "dataset.seed": Field(0, whole(0), "seed of the scenes"),
        "dataset.train_scenes": Field(1_500, whole(1, 10_000_000), "scenes to train on"),
        "dataset.val_scenes": Field(200, whole(1, 10_000_000), "scenes to evaluate"),
        "dataset.variety": Field(
            "usual", choice("usual", "wide"), "wide: light, view and clutter change by scene (docs/scenes.md)"
        ),
    },
}


_DINOV2 = {"layer_scale": 1e-5, "class_token": True}
_DINOV2_REGISTERS = {**_DINOV2, "registers": 4}

# name -> width C, depth, heads, patch size P, feature width D, gate width; then other fields of `model`.
# D of ViT-L is set by the published budget (420 M parameters, 622 G multiply-adds); the others have D = C / 2.
_VARIANTS: Mapping[str, tuple[Any, ...]] = {
    "vit_ti16": (192, 12, 3, 16, 96, 48, {}),
    "vit_s16": (384, 12, 6, 16, 192, 96, {}),
    "vit_b16": (768, 12, 12, 16, 384, 192, {}),
    "vit_l16": (1024, 24, 16, 16, 480, 256, {}),
    # DINOv2 (arXiv 2304.07193; registers: 2309.16588) and MAE (2111.06377) were trained with a class token.
    "dinov2_s14": (384, 12, 6, 14, 192, 96, _DINOV2),
    "dinov2_b14": (768, 12, 12, 14, 384, 192, _DINOV2),
    "dinov2_l14": (1024, 24, 16, 14, 480, 256, _DINOV2),
    "dinov2_s14_reg4": (384, 12, 6, 14, 192, 96, _DINOV2_REGISTERS),
    "dinov2_b14_reg4": (768, 12, 12, 14, 384, 192, _DINOV2_REGISTERS),
    "dinov2_l14_reg4": (1024, 24, 16, 14, 480, 256, _DINOV2_REGISTERS),
    "mae_b16": (768, 12, 12, 16, 384, 192, {"class_token": True}),
    "mae_l16": (1024, 24, 16, 16, 480, 256, {"class_token": True}),
    "tiny": (32, 4, 2, 16, 16, 8, {}),  # for tests: has every part, too small to learn
}
VARIANTS = tuple(_VARIANTS)
_SIZES = ("width", "depth", "heads", "patch_size", "feature_width", "gate.width")


def fields_of(data_set: str) -> dict[str, Field]:
    """All fields of a config for a data set, except the loss weights."""
    return {**FIELDS, **DATA_SETS.get(data_set, {})}


def defaults(variant: str, data_set: str) -> dict[str, Any]:
    """Defaults by field, for all fields that have one; without the model's sizes if the variant is unknown."""
    found = {name: field.default for name, field in fields_of(data_set).items() if field.default is not REQUIRED}
    if variant in _VARIANTS:
        *sizes, different = _VARIANTS[variant]
        model = dict(zip(_SIZES, sizes, strict=True)) | different
        found |= {f"model.{name}": value for name, value in model.items()}
    return found


def first_values(variant: str, data_set: str) -> dict[str, Any]:
    """Values by field for a run that was saved before the field existed: its first default."""
    first = {name: field.first for name, field in fields_of(data_set).items() if field.first is not None}
    return defaults(variant, data_set) | first


def base(variant: str, data_set: str) -> ConfigDict:
    """The config of a backbone variant (`VARIANTS`) and a data set, with all defaults.

    The caller adds the fields without a default: `tasks`, `loss_weights` and `dataset.image_size`.

    Raises:
      ValueError: an unknown variant, with the known ones.
    """
    if variant not in _VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)} (as in nyud.py:vit_b16)")
    return nested({"variant": variant, "dataset.name": data_set, **defaults(variant, data_set)})


def nested(flat: Mapping[str, Any]) -> ConfigDict:
    """Nests fields given by full name: for {"model.gate.width": 8}, `config.model.gate.width` is 8."""
    config = ConfigDict()
    for name, value in flat.items():
        *groups, last = name.split(".")
        group = config
        for each in groups:
            if each not in group:
                group[each] = ConfigDict()
            group = group[each]
        group[last] = value
    return config


def shrink_for_tests(config: ConfigDict, image_size: tuple[int, int]) -> None:
    """Reduces the config of the variant `tiny` to train and evaluate two steps within a minute on a CPU."""
    config.model.unroll = "no"  # compiles faster, also on CPUs
    config.dataset.image_size = image_size
    config.dtype = "float32"
    config.batch_size = config.num_steps = config.eval.batch_size = 2
