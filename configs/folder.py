"""Your own data: a folder of images with the labels of any tasks, laid out as docs/add_a_dataset.md says.

  python -m input_pipeline.show configs/folder.py --output=OUT --config.dataset.data_dir=DATA \\
    --config.tasks="('semseg','depth')" --config.dataset.semseg_classes="('road','grass')"
  python main.py --config=configs/folder.py:vit_b16 --workdir=DIR ...the same --config changes...

Or write a file of your own beside this one, which calls `folder.get_config(variant)` and changes what differs.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(variant: str = "vit_b16") -> ConfigDict:
    """The config for a backbone variant of `configs.defaults`; `tiny` shows in a minute whether all fits together."""
    config = defaults.base(variant)
    config.tasks = ("semseg",)  # those that the folder has labels for
    config.loss_weights = ConfigDict(  # the benchmark family's; those of other tasks are not read
        {"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0, "human_parts": 2.0, "sal": 5.0}
    )
    config.dataset = ConfigDict()
    config.dataset.name = "folder"  # module of input_pipeline
    config.dataset.fingerprint = ""  # of the files; empty: filled in at start, given: other data are refused
    config.dataset.data_dir = "data"  # with train.txt, val.txt, images/ and a folder for each task
    config.dataset.train_split = "train"  # its ids are in train.txt
    config.dataset.eval_split = "val"
    config.dataset.labels = config.get_ref("tasks")  # label folders to read: those of the tasks, always
    config.dataset.semseg_classes = ()  # names of the classes, in the order of their numbers in the label maps
    config.dataset.zero_is_void = ()  # tasks in whose label maps 0 is unlabelled and the classes count from 1
    # Whole patches; larger images are reduced until they fit.
    config.dataset.image_size = defaults.whole_patches(config, 448, 576)
    config.dataset.downscale = 1.0  # reduces every image first
    config.dataset.cache = False  # keep decoded examples: 4 MB for 640x480 with classes, depth, normals
    config.dataset.threads = 0  # of the input pipeline; 0: chosen by tf.data
    if variant == "tiny":
        config.model.unroll = "no"  # compiles faster, also on CPUs
        config.dataset.image_size = (96, 128)
        config.dtype = "float32"
        config.batch_size = 2
        config.num_steps = 2
        config.eval.batch_size = 2
        config.log.images = 0
    return config
