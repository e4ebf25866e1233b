"""PASCAL-Context, multi-task copy (`PASCALContext.tar.gz`): 4998 training and 5105 validation images.

`pascal_archive` has the layout of the archive and decodes its files when the data set is built.
"""

from ml_collections import ConfigDict
import tensorflow_datasets as tfds

from input_pipeline import records
from input_pipeline.pascal_archive import CLASSES, FOLDER, GIVEN, ID_FILES, PUBLISHED_COUNTS, members, read_example
from input_pipeline.records import JPEG, Part

__all__ = [
    "CLASSES",
    "FOLDER",
    "GIVEN",
    "ID_FILES",
    "PARTS",
    "PUBLISHED_COUNTS",
    "Builder",
    "members",
    "read_example",
    "source",
]

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
