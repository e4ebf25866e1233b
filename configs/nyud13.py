"""NYUv2 with 13 classes, MTAN's and LibMTL's copy: semantic segmentation, depth, surface normals; 288x384.

  python -m input_pipeline.prepare nyud13 --archive=FOLDER --data_dir=DATA
  python main.py --config=configs/nyud13.py:vit_b16 --workdir=DIR --config.dataset.data_dir=DATA

The data and metrics of MTAN and LibMTL; model, losses and training are those of configs/nyud.py
(docs/paper_vs_code.md). No full-size run has been measured yet.
"""

from ml_collections import ConfigDict

from input_pipeline import class_names
from taskexpert_jax import config as fields


def get_config(variant: str = "vit_b16") -> ConfigDict:
    """Builds the config for a backbone variant (`config.VARIANTS`); `tiny` is the variant for tests."""
    config = fields.base(variant, "nyud13")
    config.tasks = ("semseg", "depth", "normals")
    config.loss_weights = ConfigDict({"semseg": 1.0, "depth": 1.0, "normals": 10.0})
    config.optimizer.learning_rate = 1e-5
    config.eval.image_means = True
    config.dataset.semseg_classes = class_names.NYUD13
    config.dataset.image_size = fields.whole_patches(config, 288, 384)
    config.dataset.cache = True  # about 1.5 MB of memory per image
    if variant == "tiny":
        fields.shrink_for_tests(config, image_size=(64, 64))
        config.dataset.downscale = 0.125
    return config
