"""Batches of NumPy arrays for training (endless, shuffled, augmented) and for evaluation (each example once).

A training batch is a function of seed and step (`stream`). A run therefore resumes at any step without replaying the
stream, and the global batch does not depend on the number of processes. Each process reads only its own rows.

Examples are decoded and transformed with NumPy and OpenCV; tf.data provides threads, batching and prefetching.
"""

import atexit
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import os
from typing import Any
import weakref

from absl import logging
from ml_collections import ConfigDict
import numpy as np
import tensorflow as tf

from input_pipeline import local_cache, records, stream
from input_pipeline.records import Example, Source
from input_pipeline.sources import KeptSource, ReducedSource, ReplacingSource
from taskexpert_jax.config import frame_size
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import Task

Batch = dict[str, np.ndarray]

# Hides accelerators from TensorFlow, which would allocate the memory that JAX needs.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

_FIRST_BATCHES = 50  # in which every task should have a valid label

# Iterators in use. They are closed at exit: TensorFlow's threads call back into Python, and on an interpreter that is
# shutting down this aborts the program, whatever its exit status.
_iterating: "weakref.WeakSet[Any]" = weakref.WeakSet()

# Cached splits of this process; the key is the data config, the split and the tasks.
_kept: dict[str, KeptSource] = {}


@atexit.register
def _end_iterations() -> None:
    for batches in list(_iterating):
        batches.close()


def with_benchmark_labels(tasks: Sequence[Task], source: Source) -> tuple[Task, ...]:
    """The tasks, plus one for each separate boundary-benchmark label (`Task.benchmark_label`) of the source."""
    benchmarked = [task for task in tasks if task.boundary_benchmark and task.benchmark_label in source.labels]
    return (*tasks, *(dataclasses.replace(task, name=task.benchmark_label) for task in benchmarked))


def open_source(config: ConfigDict, tasks: Sequence[Task], split: str) -> Source:
    """Opens a split of `config.name`, downscaled by `config.downscale` and cached in memory if `config.cache`.

    config: the `dataset` part of the config.

    Raises:
      UserError: an unknown data set, or one without labels for a task; data in a bucket that cannot be read or copied.
    """
    config = local_cache.located(config)
    key = "\n".join([config.to_json_best_effort(sort_keys=True), split, *(task.name for task in tasks)])
    if config.cache and key in _kept:
        return _kept[key]
    opened: Source = records.dataset_module(config.name).source(config, split)
    for task in tasks:
        if task.name not in opened.labels:
            has = ", ".join(opened.labels)
            raise UserError(f"data set {config.name!r} has no labels for task {task.name!r}; it has {has}")
    opened = ReducedSource(opened, with_benchmark_labels(tasks, opened), config.downscale)
    if config.cache:
        opened = _kept[key] = KeptSource(opened)
    return opened


def record_fingerprint(config: ConfigDict) -> None:
    """Sets `config.dataset.fingerprint`, which records the data of a run.

    The fingerprint is `fingerprint(config.dataset)` of the data set's module, or the one recorded by `prepare` for data
    built from an archive. Data sets with neither have no such field, and nothing is set.

    config: the whole config.

    Raises:
      UserError: the field is the fingerprint of other data, or the data are missing.
    """
    dataset = config.dataset
    module = records.dataset_module(dataset.name)
    data = local_cache.located(dataset)
    if hasattr(module, "fingerprint"):
        found = module.fingerprint(data)
    elif hasattr(module, "Builder"):
        found = records.fingerprint(module.Builder, data.data_dir)
    else:
        return
    if dataset.fingerprint not in ("", found):
        raise UserError(
            f"config.dataset.fingerprint={dataset.fingerprint}, but the data of {dataset.name!r} have {found}; "
            "set the data_dir of the intended data, or leave the field empty to use these"
        )
    dataset.fingerprint = found


def _spec(tasks: Sequence[Task], size: tuple[int, int]) -> dict[str, tf.TensorSpec]:
    """Shapes and dtypes of a finished example."""
    spec = {
        "image": tf.TensorSpec((*size, 3), tf.uint8),
        "window": tf.TensorSpec((4,), tf.int32),
        "mask": tf.TensorSpec((), tf.float32),
        "id": tf.TensorSpec((), tf.string),
    }
    return spec | {task.name: tf.TensorSpec((*size, task.label_channels), task.label_dtype) for task in tasks}


def _batches(
    load: Callable[[int], Example], spec: dict[str, tf.TensorSpec], positions: tf.data.Dataset, rows: int, threads: int
) -> Iterator[Batch]:
    """Batches of `rows` examples load(position), in order, loaded by several threads; re-raises errors of `load`."""
    failures: dict[int, BaseException] = {}

    def arrays(position: np.int64) -> list[Any]:
        try:
            example = load(int(position))
        except BaseException as error:
            failures[int(position)] = error
            raise
        return [example[name] for name in spec]

    def tensors(position: tf.Tensor) -> dict[str, tf.Tensor]:
        values = tf.numpy_function(arrays, [position], [part.dtype for part in spec.values()], stateful=False)
        return {
            name: tf.ensure_shape(value, part.shape) for (name, part), value in zip(spec.items(), values, strict=True)
        }

    dataset = positions.map(tensors, num_parallel_calls=threads or tf.data.AUTOTUNE, deterministic=True)
    dataset = dataset.batch(rows, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    # Each thread loads one example; threads within single operations would only compete.
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = threads or os.cpu_count() or 1

    def iterate() -> Iterator[Batch]:
        try:
            batch: Any
            for batch in dataset.with_options(options).as_numpy_iterator():
                batch["id"] = np.array([example_id.decode() for example_id in batch["id"]])
                yield batch
        except tf.errors.OpError:
            if failures:
                raise failures[min(failures)] from None  # the first by position, not by time
            raise

    batches = iterate()
    _iterating.add(batches)
    return batches


def train_batches(
    config: ConfigDict, tasks: Sequence[Task], *, start_step: int = 0, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[Batch]:
    """Endless training batches from `start_step` on: this process's rows of each global batch.

    Args:
      rows: indices of this process's rows in the global batch, see `processes.batch_rows`; None for all.

    Returns:
      image (b,H,W,3) uint8, each task's label (b,H,W,c), window (b,4) int32, mask (b,) float32 of ones, id (b,) str;
      b = len(rows).

    Raises:
      UserError: the data set or a task's labels are missing; while iterating, more than `config.guard.skip_examples`
        examples cannot be read.
    """
    own = range(config.batch_size) if rows is None else rows
    split = config.dataset.train_split
    opened = open_source(config.dataset, tasks, split)
    source = ReplacingSource(opened, f"{split} of {config.dataset.name}", config.guard.skip_examples)

    def load(row: int) -> Example:
        position = (row // len(own)) * config.batch_size + int(own[row % len(own)])
        return stream.train_example(source, config, tasks, position)

    positions = tf.data.Dataset.range(start_step * len(own), np.iinfo(np.int64).max)
    spec = _spec(tasks, tuple(config.dataset.image_size))
    batches = _batches(load, spec, positions, len(own), config.dataset.threads)
    return _noting_unlabelled(batches, tasks, min(_FIRST_BATCHES, config.num_steps))


def _noting_unlabelled(batches: Iterator[Batch], tasks: Sequence[Task], count: int) -> Iterator[Batch]:
    """Yields the batches; after the first `count` it warns of tasks that none of them has a valid label of."""
    unseen = list(tasks)
    for number, batch in enumerate(batches, start=1):
        unseen = [task for task in unseen if not (batch[task.name] != task.ignore).all(axis=-1).any()]
        if number == count:
            for task in unseen:
                logging.warning(
                    f"{task.name}: no valid label in the first {count} training batches, so it is not learned; check "
                    "them: `python -m input_pipeline.show CONFIG --output=DIR --check`"
                )
            unseen = []
        yield batch


class EvalBatches(Iterator[Batch]):
    """Batches of one pass over a split; `examples`: number of examples, without padding."""

    def __init__(self, batches: Iterator[Batch], examples: int):
        self._batches, self.examples = batches, examples

    def __next__(self) -> Batch:
        return next(self._batches)


def eval_batches(
    config: ConfigDict,
    tasks: Sequence[Task],
    *,
    batch_size: int,
    rows: Sequence[int] | np.ndarray | None = None,
    split: str | None = None,
) -> EvalBatches:
    """Evaluation batches: each example of the split once, in order; at most `config.eval.max_examples` (0: all).

    The last batch is padded with examples of mask 0 and id "". All processes get the same number of batches. The frame
    size is `config.eval.image_size`, or `config.dataset.image_size` if that is empty.

    Args:
      batch_size: global batch size.
      rows: as in `train_batches`.
      split: None for config.dataset.eval_split.

    Returns:
      as `train_batches`, plus the `Task.benchmark_label` if the data set has one.

    Raises:
      UserError: as `train_batches`; while iterating, an image larger than the frame.
    """
    own = range(batch_size) if rows is None else rows
    size = frame_size(config)
    dataset = config.dataset.copy_and_resolve_references()
    dataset.image_size = size  # otherwise `folder` would downscale images to the model's own size
    source = open_source(dataset, tasks, split or dataset.eval_split)
    labelled = with_benchmark_labels(tasks, source)
    count = min(len(source), config.eval.max_examples or len(source))

    def load(row: int) -> Example:
        position = (row // len(own)) * batch_size + int(own[row % len(own)])
        return stream.eval_example(source, size, labelled, count, position)

    positions = tf.data.Dataset.range(-(-count // batch_size) * len(own))
    return EvalBatches(_batches(load, _spec(labelled, size), positions, len(own), config.dataset.threads), count)
