"""Fields that every config has, with the benchmark family's protocol as default, and the backbone variants.

A config is `base("vit_l16")` changed by a benchmark's own file. Every field is read by the program, and
`--config.field=value` changes it on the command line.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

_DINOV2 = {"layer_scale": 1e-5, "class_token": True}
_DINOV2_REGISTERS = {**_DINOV2, "registers": 4}

# name -> width C, depth, heads, patch size P, feature width D, gate width; then fields of `model` that differ.
# D of ViT-L is set by the published budget (420 M parameters, 622 G multiply-adds); the others have D = C / 2.
_VARIANTS = {
    "vit_ti16": (192, 12, 3, 16, 96, 48),
    "vit_s16": (384, 12, 6, 16, 192, 96),
    "vit_b16": (768, 12, 12, 16, 384, 192),
    "vit_l16": (1024, 24, 16, 16, 480, 256),
    # As DINOv2 was trained (arXiv 2304.07193; registers: 2309.16588) and MAE (2111.06377): with their class token.
    "dinov2_s14": (384, 12, 6, 14, 192, 96, _DINOV2),
    "dinov2_b14": (768, 12, 12, 14, 384, 192, _DINOV2),
    "dinov2_l14": (1024, 24, 16, 14, 480, 256, _DINOV2),
    "dinov2_s14_reg4": (384, 12, 6, 14, 192, 96, _DINOV2_REGISTERS),
    "dinov2_b14_reg4": (768, 12, 12, 14, 384, 192, _DINOV2_REGISTERS),
    "dinov2_l14_reg4": (1024, 24, 16, 14, 480, 256, _DINOV2_REGISTERS),
    "mae_b16": (768, 12, 12, 16, 384, 192, {"class_token": True}),
    "mae_l16": (1024, 24, 16, 16, 480, 256, {"class_token": True}),
    "tiny": (32, 4, 2, 16, 16, 8),  # for tests: everything there, nothing learned
}
VARIANTS = tuple(_VARIANTS)


def base(variant: str) -> ConfigDict:
    """The common fields for a backbone variant (`VARIANTS`).

    Raises:
      ValueError: an unknown variant, with the known ones.
    """
    if variant not in _VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)} (as in nyud.py:vit_b16)")
    config = ConfigDict()
    config.variant = variant  # recorded in config.json and printed at start
    config.seed = 0  # of parameters, stochastic depth, data order and augmentation
    config.dtype = "bfloat16"  # of the computation: bfloat16 or float32; parameters are float32 always
    config.batch_size = 4  # global: over all devices and hosts
    config.num_steps = 40_000  # optimiser steps
    config.accumulate_steps = 1  # micro-batches a step, for batches that do not fit; divides batch_size
    config.edge_pos_weight = 0.95  # share of the positive pixels in the boundary loss
    config.model = _model(*_VARIANTS[variant])
    config.optimizer = ConfigDict()
    config.optimizer.algorithm = "adam"  # adam: the protocol's, with an L2 term; adamw: decay beside the gradient
    config.optimizer.learning_rate = 2e-5  # at step 0
    config.optimizer.schedule = "polynomial"  # polynomial or cosine, to 0 at num_steps
    config.optimizer.schedule_power = 0.9  # lr = learning_rate * (1 - step / num_steps) ** schedule_power
    config.optimizer.warmup_steps = 0  # linear rise from 0 before the decay; the protocol has none
    config.optimizer.weight_decay = 1e-6  # adam: L2 term added to the gradient; adamw: decay of kernels
    config.optimizer.clip_norm = 10.0  # of the whole gradient, before the L2 term; 0 turns it off
    config.optimizer.backbone_rate = 1.0  # factor on the backbone's learning rate, beside the new parts'
    config.optimizer.layer_decay = 1.0  # further factor for each block below the last
    config.optimizer.ema_decay = 0.0  # evaluate a moving average of the parameters; 0: the parameters themselves
    config.augment = ConfigDict()  # training only
    config.augment.scale_min = 0.5  # one random scale for the image and every label
    config.augment.scale_max = 2.0  # drawn evenly from scale_min to this
    config.augment.crop_max_class_share = 0.75  # crops on which one class fills more are redrawn; 1: any crop will do
    config.augment.crop_redraws = 10  # how often at most
    config.augment.flip_probability = 0.5  # horizontal
    config.augment.photometric_probability = 0.5  # of each of the four changes of colour below; 0: none
    config.augment.brightness = 32.0  # at most so much is added or taken away, of 255
    config.augment.contrast_min = 0.5  # factor, before or after the changes of colour
    config.augment.contrast_max = 1.5  # drawn evenly from contrast_min to this
    config.augment.saturation_min = 0.5  # factor
    config.augment.saturation_max = 1.5  # as with contrast
    config.augment.hue = 18  # at most so much is added or taken away, of 180
    config.mesh = ConfigDict()  # devices along each axis; -1: all that remain
    config.mesh.data = -1  # copies of the model, each with its share of the batch
    config.mesh.fsdp = 1  # shards of parameters and optimiser state; also splits the batch
    config.mesh.tensor = 1  # shards of attention heads, MLPs and feature maps
    config.eval = ConfigDict()
    config.eval.batch_size = 8  # global
    config.eval.every_steps = 2_000  # during training, and at the end
    config.eval.max_examples = 0  # 0: the whole split
    config.eval.flip = False  # average predictions with those for the mirrored image
    config.eval.scales = (1.0,)  # average predictions for the image resized by each of these
    config.eval.image_size = ()  # frames larger than dataset.image_size are seen in windows of that size; (): as large
    config.eval.overlap = 1 / 3  # of neighbouring windows at least, as a share of their sides
    config.eval.params_dtype = "float32"  # of parameters in --mode=evaluate and predict; bfloat16: half the memory
    config.eval.boundary = ConfigDict()  # the boundary benchmark, of --mode=evaluate
    config.eval.boundary.odsf = True  # whether it is run: about half a second of a core for a full-size image
    config.eval.boundary.labels = "lines"  # lines: what is not 0 is a boundary; regions: where the label changes
    config.eval.boundary.max_dist = 0.0075  # between matched pixels, as a share of the image's diagonal
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 2_000  # and at the end; the latest and the best are kept
    config.checkpoint.best_task = "semseg"  # the best checkpoint is kept by this task's published metric
    config.guard = ConfigDict()  # what to do about what goes wrong: docs/resume.md
    config.guard.skip_steps = 0  # steps with a loss or gradient that is not finite that are left out; one more stops
    config.guard.skip_examples = 0  # training examples that cannot be read that are replaced; one more stops
    config.guard.spike_factor = 4.0  # a step's loss above so many times the running mean is noted; 0: none
    config.guard.stall_seconds = 600.0  # after so long without a step a warning says what it waits for; 0: never
    config.log = ConfigDict()
    config.log.every_steps = 50  # scalars and progress
    config.log.images = 4  # evaluation examples drawn to TensorBoard at each evaluation; 0: none
    return config


def whole_patches(config: ConfigDict, height: int, width: int) -> tuple[int, int]:
    """The size with its sides rounded up to whole patches of the config's backbone: 14 makes 448x588 of 448x576."""
    patch = config.model.patch_size
    return -(-height // patch) * patch, -(-width // patch) * patch


def _model(
    width: int,
    depth: int,
    heads: int,
    patch: int,
    feature_width: int,
    gate_width: int,
    different: Mapping[str, object] = MappingProxyType({}),
) -> ConfigDict:
    model = ConfigDict()
    model.width = width  # C
    model.depth = depth  # transformer blocks
    model.heads = heads  # of attention; divides width
    model.mlp_ratio = 4  # MLP width over C
    model.patch_size = patch  # P
    model.layer_scale = 0.0  # LayerScale's initial factor, on what a block adds; 0: none
    model.class_token = False  # a class token that takes part in the attention; the family drops it
    model.registers = 0  # further such tokens
    model.image_mean = (0.485, 0.456, 0.406)  # of red, green and blue in 0..1, taken from the image: ImageNet's
    model.image_std = (0.229, 0.224, 0.225)  # and what the difference is divided by
    model.pretrained = ""  # the backbone's weights: a file, or a finished run's directory; empty: random ones
    model.pretrained_fresh = ""  # regex of the backbone's parameters that stay random all the same
    model.drop_path = 0.15  # stochastic depth of the last block; rises linearly from 0
    model.taps = 4  # S: after each depth / S blocks the experts look at the tokens; divides depth
    model.feature_width = feature_width  # D, of experts, memory and heads
    model.norm = "batch"  # of experts and heads: batch (over the global batch) or layer
    model.experts = 5  # K
    model.expert_kernel = 3  # of the experts' second convolution
    model.gate = ConfigDict()
    model.gate.input = "both"  # local (the token), context (the image's mean), or both
    model.gate.granularity = "token"  # weights by token, by image, static (learned, input-blind), uniform (no gate)
    model.gate.width = gate_width  # hidden units
    model.gate.top_k = 0  # 0: softmax over all experts; k: over the k largest
    model.gate.init = "random"  # random, or even: at first every choice has the same weight everywhere
    model.gate.temperature = 1.0  # the logits are divided by it
    model.gate.noise = 0.0  # standard deviation of the noise that training adds to the logits
    model.gate.balance = 0.0  # weight of the loss that evens out how much the choices are used over a batch
    model.memory = ConfigDict()
    model.memory.init = "learned"  # learned (a vector a task) or zeros
    model.memory.read = "conv1x1"  # how the memory becomes expert K+1: conv1x1, conv3x3, identity; none: no memory
    model.memory.write = "residual"  # residual, gated or replace
    model.head_upsample = 4  # of the memory before the head's 3x3 convolution
    model.attention = "auto"  # cudnn: fused, bfloat16 on NVIDIA GPUs; splash: fused, on TPUs; xla: any device; auto:
    # cudnn where there is one (Ampere and later), else xla
    model.remat = False  # recompute blocks in the backward pass: less memory, about a third more compute
    model.unroll = "auto"  # write the scans out: yes, no, auto (on CPUs, where loops run on one core)
    model.update(different)
    return model
