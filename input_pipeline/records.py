"""What the data set modules share: how to find one, how examples are stored, and random access to what was built.

An example is a dict of NumPy arrays. It is stored as it is needed: label maps ready, rows of pixels as bytes, which
ArrayRecord compresses with zstd. Reading one takes a fifth of the time that PNG files take (benchmarks/README.md).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import functools
import importlib
import importlib.util
import json
import pathlib
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol

import cv2
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from taskexpert_jax.errors import UserError

Example = dict[str, Any]


class Source(Protocol):
    """One split of a data set. Every data set module gives one by `source(config.dataset, split)`.

    Attributes:
      labels: names of the tasks that at least some of the examples have a label for.
    """

    labels: tuple[str, ...]

    def __len__(self) -> int:
        """How many examples the split holds."""
        ...

    def load(self, index: int) -> Example:
        """The decoded example at `index` in [0, len); called by several threads at once.

        It holds `image` (h,w,3) uint8, `id` (str), and the label (h,w,c) of each task that this image has one for, in
        the task's `label_dtype`, with `Task.missing` where a pixel is invalid. The caller does not change the arrays.
        """
        ...


def dataset_module(name: str) -> ModuleType:
    """The module `input_pipeline.NAME`, a data set: it has `source`, and `Builder` if it is built from an archive.

    Raises:
      UserError: there is no such data set.
    """
    path = f"input_pipeline.{name}"
    module = None
    if name.isidentifier() and importlib.util.find_spec(path):
        module = importlib.import_module(path)
    if not hasattr(module, "source"):
        raise UserError(f"unknown data set {name!r}: no file input_pipeline/{name}.py with a function `source`")
    assert module is not None
    return module


class Part(NamedTuple):
    """How a part of an example is stored: the bytes of its rows, (h,w,channels) of `dtype`."""

    dtype: str
    channels: int


PREPARED = "prepared.json"  # beside the records: what `prepare` says of them
_SHARD = 1000  # examples a file
JPEG = Part("jpeg", 3)  # a JPEG file as it came, decoded whenever it is read: a tenth of its pixels' size


class ArchiveBuilder:
    """Writes a TFDS data set example by example; a data set's subclass says its name, version and parts.

    TFDS's own builders collect a split in temporary files, uncompressed, and sort it in memory before they write.

    Attributes:
      PARTS: name -> how it is stored, of everything in an example but `id` and `size`.
    """

    name: ClassVar[str]
    VERSION: ClassVar[tfds.core.Version]
    PARTS: ClassVar[Mapping[str, Part]]

    def __init__(self, directory: pathlib.Path, splits: Iterable[str]):
        """Begins the data set, with these splits, in the existing folder `directory`."""
        # Bytes: TFDS's lists of numbers triple the time to build, and its encoded tensors log a deprecation when read.
        stored = {part: tfds.features.Tensor(shape=(), dtype=np.object_) for part in self.PARTS}
        features = tfds.features.FeaturesDict(
            {"id": tfds.features.Text(), "size": tfds.features.Tensor(shape=(2,), dtype=np.int32), **stored}
        )
        identity = tfds.core.DatasetIdentity(
            name=self.name, version=self.VERSION, data_dir=str(directory), module_name=type(self).__module__
        )
        info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
        self._writer = tfds.core.SequentialWriter(info, _SHARD, file_format="array_record")
        self._writer.initialize_splits(list(splits))

    def add(self, split: str, example: Example) -> None:
        """Appends an example: `id`, and for each part an array (h,w,c), or the bytes of a JPEG file.

        Raises:
          UserError: it cannot be written; the disk may be full.
        """
        encoded, size = {"id": example["id"]}, None
        for name, part in self.PARTS.items():
            value = example[name]
            if part is not JPEG:
                size = value.shape[:2] if size is None else size
                if (*size, part.channels) != value.shape or value.dtype != part.dtype:
                    raise ValueError(f"{example['id']}: {name} is {value.shape} {value.dtype}; size {size}, {part}")
                value = value.tobytes()
            encoded[name] = value
        with _writing():
            self._writer.add_examples({split: [{**encoded, "size": np.asarray(size, np.int32)}]})

    def close(self) -> None:
        """Completes the data set; see `add`."""
        with _writing():
            self._writer.close_all()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Tells what ArrayRecord's and TensorFlow's file systems raise as a fault that the user can mend."""
    try:
        yield
    except (RuntimeError, tf.errors.OpError) as error:
        raise UserError(f"the records cannot be written: {' '.join(str(error).split())}") from error


def _decoded(parts: Mapping[str, Part], serialized: bytes) -> Example:
    """A stored record -> its id and its parts, (h,w,c) arrays over the record's own memory."""
    features = tf.train.Example.FromString(serialized).features.feature
    height, width = features["size"].int64_list.value
    example: Example = {"id": features["id"].bytes_list.value[0].decode()}
    for name, part in parts.items():
        content = np.frombuffer(features[name].bytes_list.value[0], np.uint8)
        if part is JPEG:
            # Labels lie on the pixels as they are stored, whatever orientation a camera has noted beside them.
            picture = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            assert picture is not None  # it was decoded when the data set was built
            example[name] = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        else:
            example[name] = content.view(part.dtype).reshape(height, width, part.channels)
    return example


def _directory(builder: type[ArchiveBuilder], data_dir: str) -> pathlib.Path:
    """The folder of the data set built under `data_dir`.

    Raises:
      UserError: it was not built.
    """
    directory = pathlib.Path(data_dir).expanduser() / builder.name / str(builder.VERSION)
    if not (directory / "dataset_info.json").is_file():
        raise UserError(
            f"no built data set at {directory}; build it with "
            f"`python -m input_pipeline.prepare {builder.name} --archive=PATH --data_dir={data_dir}`"
        )
    return directory


def fingerprint(builder: type[ArchiveBuilder], data_dir: str) -> str:
    """What `prepare` has recorded to tell the data set built under `data_dir` from any other.

    Raises:
      UserError: it was not built, or not by `prepare`.
    """
    path = _directory(builder, data_dir) / PREPARED
    try:
        return json.loads(path.read_text())["fingerprint"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is missing or damaged; delete {path.parent} and build it again") from error


class RecordSource:
    """One split of a data set that was built with `ArchiveBuilder`."""

    def __init__(
        self,
        builder: type[ArchiveBuilder],
        data_dir: str,
        split: str,
        finish: Callable[[Example], Example] = lambda example: example,
    ):
        """Opens the split.

        Args:
          builder: the data set's.
          data_dir: where `prepare` built it.
          split: a split that it has.
          finish: stored parts -> the example, for what is cheaper to compute than to read.

        Raises:
          UserError: the data set was not built under `data_dir`, or has no such split.
        """
        directory = _directory(builder, data_dir)
        built: Any = tfds.builder_from_directory(str(directory))
        if split not in built.info.splits:
            raise UserError(f"{directory} has no split {split!r}; it has {', '.join(sorted(built.info.splits))}")
        # `.data_source` below TFDS's own gives the stored bytes; TFDS would decode them, slowly.
        self._records = built.as_data_source(split=split).data_source
        self._decode = functools.partial(_decoded, builder.PARTS)
        self._finish = finish
        self.labels = tuple(part for part in builder.PARTS if part != "image")

    def __len__(self) -> int:
        return len(self._records)

    def load(self, index: int) -> Example:
        """See `Source.load`."""
        return self._finish(self._decode(self._records[index]))
