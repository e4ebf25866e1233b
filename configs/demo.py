"""Demo: a small TaskExpert on the built-in scenes, all six tasks, a few minutes on two CPU cores, no download.

  python main.py --config=configs/demo.py --workdir=runs/demo

`make demo` runs all steps. The scenes are small images, hence patches of 8 pixels and few, narrow layers.
"""

from ml_collections import ConfigDict

from input_pipeline.scenes import CLASSES
from taskexpert_jax import config as fields


def get_config(variant: str = "demo") -> ConfigDict:
    """Builds the demo's config; `tiny` is the variant for tests.

    Raises:
      ValueError: another variant.
    """
    if variant not in ("demo", "tiny"):
        raise ValueError(f"unknown variant {variant!r}: choose demo or tiny (as in configs/demo.py:tiny)")
    config = fields.base("tiny", "scenes")
    config.variant = variant
    config.dtype = "float32"
    config.tasks = ("semseg", "depth", "normals", "edge", "human_parts", "sal")
    # Differ from the protocol's weights: training from scratch takes minutes only, so slow tasks get larger weights.
    config.loss_weights = ConfigDict(
        {"semseg": 3.0, "depth": 3.0, "normals": 5.0, "edge": 20.0, "human_parts": 6.0, "sal": 30.0}
    )
    config.dataset.semseg_classes = CLASSES
    config.dataset.image_size = (96, 128)  # scenes are rendered at this size
    config.dataset.cache = True  # render each scene once
    config.dataset.threads = 2
    config.augment.scale_min = 1.0  # the scenes vary enough without augmentation
    config.augment.scale_max = 1.0
    config.augment.photometric_probability = 0.0
    config.model.width = 128
    config.model.depth = 4
    config.model.heads = 4
    config.model.patch_size = 8
    config.model.drop_path = 0.0
    config.model.feature_width = 32
    config.model.experts = 5
    config.model.gate.width = 32
    config.model.head_upsample = 2
    config.optimizer.learning_rate = 2.5e-3
    config.optimizer.warmup_steps = 50
    config.batch_size = 8
    config.num_steps = 1_600
    config.eval.batch_size = 20
    config.log.every_steps = 100
    config.eval.every_steps = 1_600
    config.checkpoint.every_steps = 400
    if variant == "tiny":
        config.model.unroll = "no"  # compiles faster, also on CPUs
        config.dataset.train_scenes = 8
        config.dataset.val_scenes = 4
        config.dataset.image_size = (32, 48)
        config.model.width, config.model.depth, config.model.heads = 32, 4, 2
        config.model.feature_width = config.model.gate.width = 16
        config.batch_size = 4
        config.num_steps = 4
        config.eval.batch_size = 4
        config.eval.every_steps = config.checkpoint.every_steps = 4
    return config
