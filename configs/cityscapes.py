"""Cityscapes: semantic segmentation with 19 classes and disparity; 512x1024, half the size of the images.

  python -m input_pipeline.prepare cityscapes --archive=FOLDER --data_dir=DATA
  python main.py --config=configs/cityscapes.py:vit_b16 --workdir=DIR --config.dataset.data_dir=DATA

The images and the disparity of MTMamba's code; augmentation, optimiser and number of steps are those of
configs/pascal_context.py (docs/paper_vs_code.md). Another size: --config.dataset.downscale=0.25
--config.dataset.image_size="(256,512)"; disparities stay pixels of the 1024x2048 images. No full-size run has been
measured yet.
"""

from ml_collections import ConfigDict

from input_pipeline import class_names
from taskexpert_jax import config as fields


def get_config(variant: str = "vit_b16") -> ConfigDict:
    """Builds the config for a backbone variant (`config.VARIANTS`); `tiny` is the variant for tests."""
    config = fields.base(variant, "cityscapes")
    config.tasks = ("semseg", "disparity")
    config.loss_weights = ConfigDict({"semseg": 1.0, "disparity": 1.0})
    config.optimizer.learning_rate = 2e-5
    config.eval.image_means = True
    config.dataset.semseg_classes = class_names.CITYSCAPES
    config.dataset.downscale = 0.5
    config.dataset.image_size = fields.whole_patches(config, 512, 1024)
    config.dataset.cache = False  # decoded examples would take 15 GB of memory, 4 MB each
    if variant == "tiny":
        fields.shrink_for_tests(config, image_size=(64, 128))
        config.dataset.downscale = 0.0625
    return config
