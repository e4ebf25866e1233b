"""Your own data: a folder of images with the labels of any tasks, laid out as docs/add_a_dataset.md says.

  python -m input_pipeline.show configs/folder.py --output=OUT --config.dataset.data_dir=DATA \\
    --config.tasks="('semseg','depth')" --config.dataset.semseg_classes="('road','grass')"
  python main.py --config=configs/folder.py:vit_b16 --workdir=DIR ...the same --config changes...

Or write a file of your own beside this one, which calls `folder.get_config(variant)` and changes what differs.
"""

from ml_collections import ConfigDict

from taskexpert_jax import config as fields


def get_config(variant: str = "vit_b16") -> ConfigDict:
    """The config for a backbone variant (`config.VARIANTS`); `tiny` shows in a minute whether all fits together."""
    config = fields.base(variant, "folder")
    config.tasks = ("semseg",)  # those that the folder has labels for
    config.loss_weights = ConfigDict(  # the benchmark family's; those of other tasks are not read
        {"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0, "human_parts": 2.0, "sal": 5.0}
    )
    config.dataset.labels = config.get_ref("tasks")  # those of the tasks, always
    # Whole patches; larger images are reduced until they fit.
    config.dataset.image_size = fields.whole_patches(config, 448, 576)
    config.dataset.cache = False  # True takes 4 MB a 640x480 image with classes, depth and normals
    if variant == "tiny":
        fields.shrink_for_tests(config, image_size=(96, 128))
        config.log.images = 0
    return config
