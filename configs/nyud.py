"""NYUD-v2: semantic segmentation, depth, surface normals, boundaries; 448x576, 40 000 steps, global batch 4.

  python -m input_pipeline.prepare nyud --archive=NYUDv2.tar.gz --data_dir=DATA
  python main.py --config=configs/nyud.py:vit_l16 --workdir=DIR --config.dataset.data_dir=DATA

Protocol of the multi-task benchmarks (docs/paper_vs_code.md). No full-size run has been measured yet; docs/results.md
has the measured runs.
"""

from ml_collections import ConfigDict

from input_pipeline import class_names
from taskexpert_jax import config as fields


def get_config(variant: str = "vit_l16") -> ConfigDict:
    """Builds the config for a backbone variant (`config.VARIANTS`); `tiny` is the variant for tests."""
    config = fields.base(variant, "nyud")
    config.tasks = ("semseg", "depth", "normals", "edge")
    config.loss_weights = ConfigDict({"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0})
    config.optimizer.learning_rate = 1e-5
    config.eval.boundary.labels = "regions"  # the benchmarks evaluate NYUD's drawn boundary lines this way too
    config.eval.boundary.max_dist = 0.011
    config.dataset.semseg_classes = class_names.NYUD
    config.dataset.image_size = fields.whole_patches(config, 448, 576)
    config.dataset.cache = True  # about 3 MB of memory per image
    if variant == "tiny":
        fields.shrink_for_tests(config, image_size=(64, 80))
        config.dataset.downscale = 0.125
    return config
