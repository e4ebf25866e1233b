"""All config fields: name -> default, rule and meaning; and the backbone variants.

A config is `base("vit_l16", "nyud")`, modified by a file in configs/ and by --config.FIELD=VALUE on the command line.
"""

from collections.abc import Mapping
import itertools
from typing import Any

from ml_collections import ConfigDict

from taskexpert_jax.config.balancing_fields import BALANCING, METHOD, METHODS
from taskexpert_jax.config.field import REQUIRED, Field
from taskexpert_jax.config.model_fields import BACKBONE, BACKBONES, DECODER, DECODERS, MODEL, VARIANTS
from taskexpert_jax.config.rules import (
    choice,
    flag,
    local_path,
    matching,
    names,
    number,
    numbers,
    path,
    size,
    text,
    whole,
)

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
    **MODEL,
    BALANCING: METHOD,
    **{
        name: field for of in (BACKBONES, DECODERS, METHODS) for fields in of.values() for name, field in fields.items()
    },
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
    "eval.image_means": Field(
        False,
        flag(),
        "--mode=evaluate also reports errors of depth, disparity and normals as means over images (docs/metrics.md)",
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
    "nyud13": _ON_DISK,
    "cityscapes": _ON_DISK,
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


_CHOICES = {BACKBONE: BACKBONES, DECODER: DECODERS, BALANCING: METHODS, "dataset.name": DATA_SETS}


def further_fields(values: Mapping[str, Any]) -> dict[str, Mapping[str, Field] | None]:
    """By `model.backbone`, `model.decoder`, `balancing` and `dataset.name`: the fields that their values bring.

    None where the value is none of the project's own, so that its fields are not known here.
    """
    chosen = {field: values.get(field) for field in _CHOICES}
    return {field: _CHOICES[field].get(of) if isinstance(of, str) else None for field, of in chosen.items()}


def fields_of(values: Mapping[str, Any]) -> dict[str, Field]:
    """All fields of a config with these values, except the loss weights: of its backbone, decoder and data set only."""
    chosen = {name: field for fields in further_fields(values).values() for name, field in (fields or {}).items()}
    others = {name for known in _CHOICES.values() for fields in known.values() for name in fields} - chosen.keys()
    return {name: field for name, field in {**FIELDS, **chosen}.items() if name not in others}


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults by field, for all fields of such a config that have one; without an unknown variant's sizes."""
    found = {name: field.default for name, field in fields_of(values).items() if field.default is not REQUIRED}
    variant = values.get("variant")
    if isinstance(variant, str) and variant in VARIANTS:
        found |= {f"model.{name}": value for name, value in VARIANTS[variant].items()}
    return found


def first_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field for a run that was saved before the field existed: its first default."""
    values = {BACKBONE: MODEL[BACKBONE].default, DECODER: MODEL[DECODER].default, BALANCING: METHOD.default, **values}
    first = {name: field.first for name, field in fields_of(values).items() if field.first is not None}
    methods = {name: field.default for fields in METHODS.values() for name, field in fields.items()}
    return methods | defaults(values) | first


def base(variant: str, data_set: str) -> ConfigDict:
    """The config of a backbone variant (`VARIANTS`) and a data set, with all defaults.

    It has the fields of every decoder and balancing method, so that these can be changed on the command line. The
    caller adds the fields without a default: `tasks`, `loss_weights` and `dataset.image_size`.

    Raises:
      ValueError: an unknown variant, with the known ones.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)} (as in nyud.py:vit_b16)")
    chosen = {"variant": variant, "dataset.name": data_set}
    chosen[BACKBONE] = VARIANTS[variant].get("backbone", MODEL[BACKBONE].default)
    for decoder, method in itertools.product(DECODERS, METHODS):
        chosen |= defaults({**chosen, DECODER: decoder, BALANCING: method})
    return nested(chosen)


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
