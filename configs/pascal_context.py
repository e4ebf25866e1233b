"""PASCAL-Context: semantic segmentation, human parts, saliency, normals, boundaries; 512x512, 40 000 steps, batch 4.

  python -m input_pipeline.prepare pascal_context --archive=PASCALContext.tar.gz --data_dir=DATA
  python main.py --config=configs/pascal_context.py:vit_l16 --workdir=DIR --config.dataset.data_dir=DATA

Protocol: the benchmark family's (docs/paper_vs_code.md). A full-size run has not been measured yet.
"""

from ml_collections import ConfigDict

from configs import defaults
from input_pipeline import class_names


def get_config(variant: str = "vit_l16") -> ConfigDict:
    """The config for a backbone variant of `configs.defaults`; `tiny` is the tests' form."""
    config = defaults.base(variant)
    config.tasks = ("semseg", "human_parts", "sal", "normals", "edge")
    config.loss_weights = ConfigDict({"semseg": 1.0, "human_parts": 2.0, "sal": 5.0, "normals": 10.0, "edge": 50.0})
    config.optimizer.learning_rate = 2e-5
    config.dataset = ConfigDict()
    config.dataset.name = "pascal_context"  # module of input_pipeline
    config.dataset.data_dir = "data"  # where `prepare` built it
    config.dataset.fingerprint = ""  # of the data; empty: filled in at start, given: other data are refused
    config.dataset.train_split = "train"
    config.dataset.eval_split = "val"
    config.dataset.semseg_classes = class_names.VOC
    config.dataset.image_size = defaults.whole_patches(config, 512, 512)  # of training and evaluation
    config.dataset.downscale = 1.0  # reduces every image first
    # Decoded examples kept in memory are 2.3 MB each, 23 GB for both splits: only for hosts that have so much to spare.
    config.dataset.cache = False
    config.dataset.threads = 0  # of the input pipeline; 0: chosen by tf.data
    if variant == "tiny":
        config.model.unroll = "no"  # compiles faster, also on CPUs
        config.dataset.image_size = (64, 64)
        config.dataset.downscale = 0.125
        config.dtype = "float32"
        config.batch_size = 2
        config.num_steps = 2
        config.eval.batch_size = 2
    return config
