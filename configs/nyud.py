"""NYUD-v2: semantic segmentation, depth, surface normals, boundaries; 448x576, 40 000 steps, global batch 4.

  python -m input_pipeline.prepare nyud --archive=NYUDv2.tar.gz --data_dir=DATA
  python main.py --config=configs/nyud.py:vit_l16 --workdir=DIR --config.dataset.data_dir=DATA

Protocol: the benchmark family's (docs/paper_vs_code.md). A full-size run has not been measured yet; what has been is in
docs/results.md.
"""

from ml_collections import ConfigDict

from configs import defaults
from input_pipeline import class_names


def get_config(variant: str = "vit_l16") -> ConfigDict:
    """The config for a backbone variant of `configs.defaults`; `tiny` is the tests' form."""
    config = defaults.base(variant)
    config.tasks = ("semseg", "depth", "normals", "edge")
    config.loss_weights = ConfigDict({"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0})
    config.optimizer.learning_rate = 1e-5
    config.eval.boundary.labels = "regions"  # so the field reads NYUD's drawn lines too
    config.eval.boundary.max_dist = 0.011
    config.dataset = ConfigDict()
    config.dataset.name = "nyud"  # module of input_pipeline
    config.dataset.data_dir = "data"  # where `prepare` built it
    config.dataset.fingerprint = ""  # of the data; empty: filled in at start, given: other data are refused
    config.dataset.train_split = "train"
    config.dataset.eval_split = "val"
    config.dataset.semseg_classes = class_names.NYUD
    config.dataset.image_size = defaults.whole_patches(config, 448, 576)  # of training and evaluation
    config.dataset.downscale = 1.0  # reduces every frame first; 0.5 with image_size (224, 288) is the half-size run
    config.dataset.cache = True  # keep decoded examples in memory (about 3 MB a frame)
    config.dataset.threads = 0  # of the input pipeline; 0: chosen by tf.data
    if variant == "tiny":
        config.model.unroll = "no"  # compiles faster, also on CPUs
        config.dataset.image_size = (64, 80)
        config.dataset.downscale = 0.125
        config.dtype = "float32"
        config.batch_size = 2
        config.num_steps = 2
        config.eval.batch_size = 2
    return config
