"""What the data set modules share: how to find one, how to build one in parallel, and random access to what was built.

A record is read by its index with the GIL held for the read alone; parsing and decoding are TensorFlow operations, so
tf.data runs them in parallel.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import importlib
import importlib.util
import os
import pathlib
from types import ModuleType
from typing import Any, Protocol, TypeVar

import tensorflow as tf
import tensorflow_datasets as tfds
import tqdm

from taskexpert_jax.errors import UserError

Example = dict[str, tf.Tensor]
T = TypeVar("T")


class Source(Protocol):
    """One split of a data set. Every data set module gives one by `source(config.dataset, split)`."""

    def __len__(self) -> int:
        """How many examples the split holds."""
        ...

    def load(self, index: tf.Tensor) -> Example:
        """The decoded example at `index`, an int64 scalar in [0, len). Traced into a tf.data map.

        It holds `image` (h,w,3) uint8, `id` (a string) and the label (h,w,c) of every task that the data set has.
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


def read_in_parallel(read: Callable[[str], T], ids: Sequence[str], title: str) -> Iterator[tuple[int, T]]:
    """(position, read(id)) for each id, in order, read by as many threads as there are cores, with a progress bar."""
    workers = os.cpu_count() or 1
    chunk = 8 * workers  # a few at a time, so that the examples waiting to be written stay few
    bar = tqdm.tqdm(total=len(ids), desc=title, unit=" examples", mininterval=1.0)
    with bar, futures.ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(ids), chunk):
            for position, example in enumerate(pool.map(read, ids[start : start + chunk]), start):
                yield position, example
                bar.update()


class RecordSource:
    """One split of a built data set; `decode` turns stored features into the decoded example."""

    def __init__(self, dataset: str, version: str, data_dir: str, split: str, decode: Callable[[Any], Example]):
        """Opens the split.

        Raises:
          UserError: the data set was not built under `data_dir`, or has no such split.
        """
        directory = pathlib.Path(data_dir).expanduser() / dataset / version
        if not (directory / "dataset_info.json").is_file():
            raise UserError(
                f"no built data set at {directory}; build it with "
                f"`python -m input_pipeline.prepare {dataset} --archive=PATH --data_dir={data_dir}`"
            )
        builder: Any = tfds.builder_from_directory(str(directory))
        if split not in builder.info.splits:
            raise UserError(f"{directory} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}")
        # `.data_source` below TFDS's own gives the stored bytes; TFDS would decode them in Python.
        self._records = builder.as_data_source(split=split).data_source
        self._features = builder.info.features
        self._decode = decode

    def __len__(self) -> int:
        return len(self._records)

    def load(self, index: tf.Tensor) -> Example:
        """See `Source.load`."""
        serialized = tf.numpy_function(self._records.__getitem__, [index], tf.string)
        serialized.set_shape(())
        return self._decode(self._features.deserialize_example(serialized))
