"""Your own data: a folder of images with labels of any tasks, in the layout of docs/add_a_dataset.md.

  python -m input_pipeline.show configs/folder.py --output=OUT --config.dataset.data_dir=DATA \\
    --config.tasks="('semseg','depth')" --config.dataset.semseg_classes="('road','grass')"
  python main.py --config=configs/folder.py:vit_b16 --workdir=DIR ...the same --config changes...

Or add a config file to this folder that calls `folder.get_config(variant)` and changes fields.
"""

from ml_collections import ConfigDict

from taskexpert_jax import config as fields


def get_config(variant: str = "vit_b16") -> ConfigDict:
    """Builds the config for a backbone variant (`config.VARIANTS`); `tiny` checks data and tasks within a minute."""
    config = fields.base(variant, "folder")
    config.tasks = ("semseg",)  # tasks with labels in the folder
    config.loss_weights = ConfigDict(  # of the multi-task benchmarks; unused for tasks not selected
        {"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0, "human_parts": 2.0, "sal": 5.0}
    )
    config.dataset.labels = config.get_ref("tasks")  # always equal to the tasks
    # A multiple of the patch size; larger images are downscaled to fit.
    config.dataset.image_size = fields.whole_patches(config, 448, 576)
    config.dataset.cache = False  # True takes 4 MB of memory per 640x480 image with classes, depth and normals
    if variant == "tiny":
        fields.shrink_for_tests(config, image_size=(96, 128))
        config.log.images = 0
    return config
