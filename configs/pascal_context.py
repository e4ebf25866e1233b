"""PASCAL-Context: semantic segmentation, human parts, saliency, normals, boundaries; 512x512, 40 000 steps, batch 4.

  python -m input_pipeline.prepare pascal_context --archive=PASCALContext.tar.gz --data_dir=DATA
  python main.py --config=configs/pascal_context.py:vit_l16 --workdir=DIR --config.dataset.data_dir=DATA

Protocol of the multi-task benchmarks (docs/paper_vs_code.md). No full-size run has been measured yet.
"""

from ml_collections import ConfigDict

from input_pipeline import class_names
from taskexpert_jax import config as fields


def get_config(variant: str = "vit_l16") -> ConfigDict:
    """Builds the config for a backbone variant (`config.VARIANTS`); `tiny` is the variant for tests."""
    config = fields.base(variant, "pascal_context")
    config.tasks = ("semseg", "human_parts", "sal", "normals", "edge")
    config.loss_weights = ConfigDict({"semseg": 1.0, "human_parts": 2.0, "sal": 5.0, "normals": 10.0, "edge": 50.0})
    config.optimizer.learning_rate = 2e-5
    config.dataset.semseg_classes = class_names.VOC
    config.dataset.image_size = fields.whole_patches(config, 512, 512)
    config.dataset.cache = False  # decoded examples would take 23 GB of memory, 2.3 MB each
    if variant == "tiny":
        fields.shrink_for_tests(config, image_size=(64, 64))
        config.dataset.downscale = 0.125
    return config
