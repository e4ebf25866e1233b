"""Data set -> batches of NumPy arrays, for training (endless, random) and for evaluation (each example once).

A training batch is a function of the seed and the step: the epoch's order is a stateless permutation, and every random
transform draws from (seed, position in the stream). So a run resumes at any step at once, and the global batch is the
same for any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
import os
import re
from typing import Any

import numpy as np
import tensorflow as tf

from input_pipeline import records, transforms
from input_pipeline.records import Example, Source
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import Task

Batch = dict[str, np.ndarray]
Position = Any  # tf.Tensor, int64 scalar: place in the stream of examples; TensorFlow's types lack its arithmetic

# The accelerators are JAX's; TensorFlow would take their memory.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

# Streams of random numbers of one seed.
_ORDER, _SCALE, _CROP, _FLIP = range(4)

_TOO_LARGE = "does not fit"

# Decoded examples of the splits opened so far in this process, by what they depend on.
_kept: dict[str, "KeptSource"] = {}


class ReducedSource:
    """A source whose frames are reduced by `factor`, with the labels of the given tasks only."""

    def __init__(self, source: Source, tasks: Sequence[Task], factor: float):
        self._source = source
        self._tasks = tasks
        self._factor = factor

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: tf.Tensor) -> Example:
        """See `Source.load`."""
        example = self._source.load(index)
        example = {name: example[name] for name in ["image", "id", *(task.name for task in self._tasks)]}
        return transforms.downscale(example, self._tasks, self._factor)


class KeptSource:
    """A source that decodes every example once and keeps it in memory from then on."""

    def __init__(self, source: Source):
        self._source = source
        self._spec = _element_spec(source)
        self._examples: list[tuple[Any, ...] | None] = [None] * len(source)

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: tf.Tensor) -> Example:
        """See `Source.load`."""
        names = sorted(self._spec)

        def decode() -> list[tf.Tensor]:
            example = self._source.load(index)
            values = [example[name] for name in names]
            stored = tf.numpy_function(self._keep, [index, *values], tf.bool)
            with tf.control_dependencies([stored]):
                return [tf.identity(value) for value in values]

        def fetch() -> list[tf.Tensor]:
            return tf.numpy_function(self._fetch, [index], [self._spec[name].dtype for name in names])

        is_kept = tf.numpy_function(lambda i: self._examples[i] is not None, [index], tf.bool)
        is_kept.set_shape(())
        example = dict(zip(names, tf.cond(is_kept, fetch, decode), strict=True))
        for name, spec in self._spec.items():
            example[name].set_shape(spec.shape)
        return example

    def _keep(self, index: int, *values: Any) -> bool:
        self._examples[index] = values
        return True

    def _fetch(self, index: int) -> tuple[Any, ...] | None:
        return self._examples[index]


def _element_spec(source: Source) -> Any:
    """Name -> tf.TensorSpec of the source's examples."""
    return tf.data.Dataset.range(1).map(source.load).element_spec


def open_source(config: Any, tasks: Sequence[Task], split: str) -> Source:
    """The split of `config.name`, reduced by `config.downscale` and, with `config.cache`, kept in memory once decoded.

    config: the `dataset` part of the config.

    Raises:
      UserError: an unknown data set, one without the label of a task, or a downscale outside of (0, 1].
    """
    if not 0 < config.downscale <= 1:
        raise UserError(f"config.dataset.downscale={config.downscale} must be in (0, 1]")
    key = "\n".join([config.to_json_best_effort(sort_keys=True), split, *(task.name for task in tasks)])
    if config.cache and key in _kept:
        return _kept[key]
    opened: Source = records.dataset_module(config.name).source(config, split)
    labels = _element_spec(opened).keys() - {"image", "id"}
    for task in tasks:
        if task.name not in labels:
            raise UserError(f"data set {config.name!r} has no labels for task {task.name!r}; it has {sorted(labels)}")
    opened = ReducedSource(opened, tasks, config.downscale)
    if config.cache:
        opened = _kept[key] = KeptSource(opened)
    return opened


def _rows_of_process(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(f"a batch of {batch_size} cannot be split over {process_count} processes; make it a multiple")
    return batch_size // process_count


def _stream_seed(seed: int, stream: int, counter: Position) -> Any:
    """A seed of its own for each counter of each stream; (2,) int64."""
    return tf.random.fold_in(tf.constant([seed, stream], tf.int64), counter, alg="philox")


def _shuffled_index(position: Position, seed: int, count: int) -> Any:
    """Index of the example at a position of the endless stream: every epoch is a permutation of its own."""
    epoch_seed = _stream_seed(seed, _ORDER, position // count)
    shuffle = tf.random.experimental.index_shuffle  # pyright: ignore[reportAttributeAccessIssue]
    return shuffle(position % count, epoch_seed, count - 1)


def _train_example(source: Source, config: Any, tasks: Sequence[Task], position: Position) -> Example:
    """The augmented example at a position of the stream."""
    size, augment = tuple(config.dataset.image_size), config.augment
    example = source.load(_shuffled_index(position, config.seed, len(source)))

    def seed(stream: int) -> transforms.Seed:
        return _stream_seed(config.seed, stream, position)

    del example["id"]
    example = transforms.random_scale(
        example, tasks, seed(_SCALE), scale_min=augment.scale_min, scale_max=augment.scale_max
    )
    example = transforms.random_crop(example, tasks, seed(_CROP), size=size)
    example = transforms.random_flip(example, tasks, seed(_FLIP), probability=augment.flip_probability)
    example = transforms.pad_centre(example, tasks, size=size)
    example = transforms.mark_invalid(example, tasks)
    return {**example, "mask": tf.constant(1.0)}


def _eval_example(
    source: Source, size: tuple[int, int], tasks: Sequence[Task], count: int, position: Position
) -> Example:
    """The padded example at a position; from `count` on, the last one again with mask 0 and no id."""
    example = source.load(tf.minimum(position, count - 1))
    height, width = tf.unstack(tf.shape(example["image"])[:2])
    fits = (height <= size[0]) & (width <= size[1])
    message = f"example {{}} is {{}}x{{}} and {_TOO_LARGE} config.dataset.image_size {size[0]}x{size[1]}"
    checked = tf.debugging.Assert(fits, [tf.strings.format(message, (example["id"], height, width))])
    with tf.control_dependencies([checked]):  # else padding could fail first, with a message of its own
        example = transforms.pad_centre(example, tasks, size=size)
    example = transforms.mark_invalid(example, tasks)
    real = position < count
    return {**example, "mask": tf.cast(real, tf.float32), "id": tf.where(real, example["id"], "")}


def _batches(
    positions: tf.data.Dataset, load: Callable[[Position], Example], rows: int, threads: int
) -> Iterator[Batch]:
    dataset = positions.map(load, num_parallel_calls=threads or tf.data.AUTOTUNE, deterministic=True)
    dataset = dataset.batch(rows, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    # One example a thread: threads inside single operations would only get in each other's way.
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = threads or os.cpu_count() or 1
    invalid = tf.errors.InvalidArgumentError  # `tf` is gone when Python closes a generator at exit
    try:
        batch: Any
        for batch in dataset.with_options(options).as_numpy_iterator():
            if "id" in batch:
                batch["id"] = np.array([example_id.decode() for example_id in batch["id"]])
            yield batch
    except invalid as error:
        if found := re.search(rf"\[(example .* {_TOO_LARGE} [^\]]*)\]", error.message):
            raise UserError(found[1].replace('\\"', "")) from error
        raise


def train_batches(
    config: Any, tasks: Sequence[Task], *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """The training batches from `start_step` on, without end: this process's rows of each global batch.

    Returns:
      image (b,H,W,3) uint8, each task's label (b,H,W,c), window (b,4) int32, mask (b,) float32 of ones;
      b = config.batch_size / process_count.

    Raises:
      UserError: the batch cannot be split over the processes; the data set is missing or lacks a task's labels.
    """
    rows = _rows_of_process(config.batch_size, process_count)
    source = open_source(config.dataset, tasks, config.dataset.train_split)

    def load(row: Position) -> Example:
        position = (row // rows) * config.batch_size + process_index * rows + row % rows
        return _train_example(source, config, tasks, position)

    positions = tf.data.Dataset.range(start_step * rows, np.iinfo(np.int64).max)
    return _batches(positions, load, rows, config.dataset.threads)


def eval_batches(
    config: Any,
    tasks: Sequence[Task],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    split: str | None = None,
) -> Iterator[Batch]:
    """Every example of the split once and in order, or the first `config.eval.max_examples` of them (0: all).

    The last batch is filled up with examples of mask 0 and id "". Every process gets as many batches.

    Args:
      batch_size: the global one; a process gets its rows of it.
      split: config.dataset.eval_split if None.

    Returns:
      as `train_batches`, and id (b,) str.

    Raises:
      UserError: as `train_batches`; while iterating, a frame larger than config.dataset.image_size.
    """
    rows = _rows_of_process(batch_size, process_count)
    source = open_source(config.dataset, tasks, split or config.dataset.eval_split)
    count = min(len(source), config.eval.max_examples or len(source))
    size = tuple(config.dataset.image_size)

    def load(row: Position) -> Example:
        position = (row // rows) * batch_size + process_index * rows + row % rows
        return _eval_example(source, size, tasks, count, position)

    positions = tf.data.Dataset.range(-(-count // batch_size) * rows)
    return _batches(positions, load, rows, config.dataset.threads)
