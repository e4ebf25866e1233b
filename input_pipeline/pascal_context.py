"""PASCAL-Context, multi-task copy (`PASCALContext.tar.gz`): 4998 training and 5105 validation images.

Layout: `ImageSets/Context/{train,val}.txt` one id per line; for each id `JPEGImages/ID.jpg`, at most 500x500;
`semseg/VOC12/ID.png` or else `semseg/pascal-context/ID.png`, 0 background and 1..20 classes, 255 void;
`human_parts/ID.mat`, PASCAL-Part's struct `anno`; `sal_distill/ID.png`, salient above 127; `normals_distill/ID.png`,
n = 2*v/255 - 1; `pascal-context/trainval/ID.mat`, `LabelMap` of 459 context classes, from which boundaries and the
valid pixels of the normals are computed. `pascal_labels` decodes the files when the data set is built.
"""

from ml_collections import ConfigDict
import tensorflow_datasets as tfds

from input_pipeline import records
from input_pipeline.pascal_labels import CLASSES, members, read_example
from input_pipeline.records import JPEG, Part

__all__ = ["CLASSES", "FOLDER", "ID_FILES", "PARTS", "PUBLISHED_COUNTS", "Builder", "members", "read_example", "source"]

FOLDER = "PASCALContext"
ID_FILES = {"train": "ImageSets/Context/train.txt", "val": "ImageSets/Context/val.txt"}
PUBLISHED_COUNTS = {"train": 4998, "val": 5105}
PARTS = {
    "image": JPEG,
    "semseg": Part("uint8", 1),
    "human_parts": Part("uint8", 1),
    "sal": Part("uint8", 1),
    "normals": Part("float16", 3),
    "edge": Part("uint8", 1),
    "edge_benchmark": Part("uint8", 1),  # ground truth of odsF, different from the training label
}


class Builder(records.ArchiveBuilder):
    """PASCAL-Context: splits `train` and `val`, examples in the order of the id files."""

    name = "pascal_context"
    VERSION = tfds.core.Version("1.0.0")
    PARTS = PARTS


def source(config: ConfigDict, split: str) -> records.RecordSource:
    """A split of the data set built under `config.data_dir` (config: the `dataset` part of the config)."""
    return records.RecordSource(Builder, config.data_dir, split)
