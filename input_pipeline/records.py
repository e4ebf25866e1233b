"""Data set interface and storage: look-up of data set modules, writing of examples, random access to built data.

An example is a dict of NumPy arrays. Labels are stored ready for use, as raw bytes of pixel rows, which ArrayRecord
compresses with zstd. Reading takes a fifth of the time of PNG files (benchmarks/README.md).
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import errno
import functools
import importlib
import importlib.util
import itertools
import pathlib
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol

import cv2
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from taskexpert_jax import json_file, paths, storage
from taskexpert_jax.errors import StoreError, UserError, disk_refusal, shown

Example = dict[str, Any]


class Source(Protocol):
    """One split of a data set, returned by `source(config.dataset, split)` of every data set module.

    Attributes:
      labels: names of the tasks with a label in at least some examples.
    """

    labels: tuple[str, ...]

    def __len__(self) -> int:
        """Number of examples in the split."""
        ...

    def load(self, index: int) -> Example:
        """Decodes the example at `index` in [0, len); called by several threads at once.

        Returns `image` (h,w,3) uint8, `id` (str), and the label (h,w,c) of each task that is labelled for this image,
        in the task's `label_dtype`, with `Task.missing` at invalid pixels. The caller must not change the arrays.
        """
        ...


def repeated_ids(splits: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each split in which ids occur several times, and for each pair of splits that share ids.

    splits: name of each split -> its ids.
    """
    lines = []
    for split, ids in splits.items():
        if again := [example_id for example_id, times in collections.Counter(ids).items() if times > 1]:
            lines.append(f"{split} lists {len(again)} id(s) more than once, first {again[0]!r}: they count each time")
    for (one, ids), (other, others) in itertools.combinations(splits.items(), 2):
        seen = set(ids)
        if shared := [example_id for example_id in dict.fromkeys(others) if example_id in seen]:
            lines.append(f"{one} and {other} share {len(shared)} id(s), first {shared[0]!r}: scores will be too good")
    return lines


def dataset_module(name: str) -> ModuleType:
    """Imports the data set module `input_pipeline.NAME`: it has `source`, and `Builder` if it is built from an archive.

    Raises:
      UserError: unknown data set.
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
    """Storage format of a part of an example: the bytes of an array (h,w,channels) of `dtype`."""

    dtype: str
    channels: int


PREPARED = "prepared.json"  # in the folder of the records: fingerprint and statistics, written by `prepare`
COMPLETE = "dataset_info.json"  # TFDS's; in a bucket it is written after all others
_SHARD = 1000  # examples per file
JPEG = Part("jpeg", 3)  # the unchanged JPEG file, decoded at every read; a tenth of the size of its pixels


class ArchiveBuilder:
    """Writes a TFDS data set example by example; subclasses define name, version and parts.

    TFDS's own builders first collect a split in uncompressed temporary files and sort it in memory.

    Attributes:
      PARTS: name -> storage format of every part of an example except `id` and `size`.
    """

    name: ClassVar[str]
    VERSION: ClassVar[tfds.core.Version]
    PARTS: ClassVar[Mapping[str, Part]]

    @classmethod
    def folder(cls) -> str:
        """Folder of the data set below `data_dir`: NAME/VERSION."""
        return f"{cls.name}/{cls.VERSION}"

    def __init__(self, directory: pathlib.Path, splits: Iterable[str]):
        """Starts a data set with these splits in the existing folder `directory`."""
        # Raw bytes, because TFDS's lists of numbers triple the build time and its encoded tensors log a deprecation.
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
        """Appends an example: `id`, and for each part an array (h,w,c) or the bytes of a JPEG file.

        Raises:
          UserError: the example cannot be written, for example because the disk is full.
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
        """Completes the data set; raises as `add`."""
        with _writing():
            self._writer.close_all()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Converts write errors of ArrayRecord and TensorFlow to UserError, because the user can fix them."""
    try:
        yield
    except (RuntimeError, tf.errors.OpError) as error:
        reason = disk_refusal(error) or " ".join(str(error).split())
        raise UserError(f"the records cannot be written: {reason}; nothing was built") from error


def _decoded(parts: Mapping[str, Part], serialized: bytes) -> Example:
    """Decodes a record to its id and parts, (h,w,c) arrays that are views of the record's bytes (JPEG: decoded)."""
    features = tf.train.Example.FromString(serialized).features.feature
    height, width = features["size"].int64_list.value
    example: Example = {"id": features["id"].bytes_list.value[0].decode()}
    for name, part in parts.items():
        content = np.frombuffer(features[name].bytes_list.value[0], np.uint8)
        if part is JPEG:
            # Labels refer to the stored pixels, so the EXIF orientation is ignored.
            image = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            assert image is not None  # it was decoded once when the data set was built
            example[name] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        else:
            example[name] = content.view(part.dtype).reshape(height, width, part.channels)
    return example


def directory(builder: type[ArchiveBuilder], data_dir: str) -> pathlib.Path:
    """Folder of the data set built under `data_dir`.

    Raises:
      UserError: the data set has not been built, or the bucket cannot be read.
    """
    folder = paths.local(data_dir, "config.dataset.data_dir") / builder.folder()
    if not (folder / COMPLETE).is_file():
        again = f"`python -m input_pipeline.prepare {builder.name} --archive=PATH --data_dir={data_dir}`"
        if storage.is_bucket(folder) and folder.is_dir():
            raise UserError(
                f"the data set at {folder} is incomplete, its upload was interrupted; resume it with {again}"
            )
        raise UserError(f"no built data set at {folder}; build it with {again}")
    return folder


def fingerprint(builder: type[ArchiveBuilder], data_dir: str) -> str:
    """Fingerprint of the data set built under `data_dir`, as recorded by `prepare`.

    Raises:
      UserError: the data set has not been built, or its record is missing or damaged.
    """
    path = directory(builder, data_dir) / PREPARED
    try:
        return json_file.read(path, {"fingerprint": str})["fingerprint"]
    except StoreError:
        raise
    except (OSError, json_file.MalformedError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); delete {path.parent} and build it again") from error


class RecordSource:
    """One split of a data set built by `ArchiveBuilder`."""

    def __init__(
        self,
        builder: type[ArchiveBuilder],
        data_dir: str,
        split: str,
        finish: Callable[[Example], Example] = lambda example: example,
    ):
        """Opens the split.

        Args:
          builder: builder of the data set.
          data_dir: folder in which `prepare` built it.
          split: name of the split.
          finish: stored parts -> example; computes what is cheaper to compute than to read.

        Raises:
          UserError: the data set has not been built under `data_dir`, has no such split, or is damaged.
        """
        folder = directory(builder, data_dir)
        try:
            built: Any = tfds.builder_from_directory(str(folder))
            splits = sorted(built.info.splits)
            # The inner `.data_source` returns the stored bytes; TFDS's own decodes them, slowly.
            found = built.as_data_source(split=split).data_source if split in splits else None
        except StoreError:
            raise
        except Exception as error:  # TFDS and protobuf raise many types
            if storage.is_bucket(folder) and (reason := disk_refusal(error)):
                raise StoreError(errno.EIO, reason, str(folder)) from error
            raise UserError(
                f"{folder} is damaged ({' '.join(str(error).split())[:300]}); delete it and build it again"
            ) from error
        if found is None:
            raise UserError(f"{folder} has no split {split!r}; it has {shown(', '.join(splits))}")
        self._folder, self._records = folder, found
        self._decode = functools.partial(_decoded, builder.PARTS)
        self._finish = finish
        self.labels = tuple(part for part in builder.PARTS if part != "image")

    def __len__(self) -> int:
        return len(self._records)

    def load(self, index: int) -> Example:
        """See `Source.load`.

        Raises:
          UserError: the file of the record has been deleted or is damaged; a StoreError in a bucket, which may not have
            answered.
        """
        try:
            example = self._decode(self._records[index])
        except Exception as error:  # ArrayRecord and protobuf raise many types
            fault = f"record {index} cannot be read ({' '.join(str(error).split())[:300]})"
            if storage.is_bucket(self._folder):
                raise StoreError(errno.EIO, f"{fault}; start again, or build it again", str(self._folder)) from error
            raise UserError(f"{self._folder}: {fault}; restore the folder, or delete it and build it again") from error
        return self._finish(example)
