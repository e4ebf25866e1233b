"""Training batches from processes that augment frames with the project's own transforms, a batch each.

Threads do not suffice: a core augments some 700 frames of 212x280 a second, but Python's global lock is held for a
third of that, so that threads together stay below 2000. Frames and batches are files that all processes map into
memory.
"""

import collections
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
import contextlib
import functools
import json
import multiprocessing
import pathlib
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from benchmarks.ladder.packed import LABELS, Frames
from input_pipeline import stream
from taskexpert_jax.tasks import Task, from_config

Batch = dict[str, np.ndarray]
_folder = pathlib.Path()  # of this process, set by `_start`
_ids: list[str] = []


class Feeder:
    """Batches of the training split, in the order and with the augmentation of `pipeline.train_batches`.

    Args:
      folder: has the decoded frames (`packed.unpack`), and gets the batches.
      ids: of the training split.
      config: decides the shapes: image size, batch, tasks.
      workers: number of processes.
    """

    def __init__(self, folder: pathlib.Path, ids: list[str], config: ConfigDict, workers: int):
        self._slots = [slot(folder, number, config) for number in range(workers + 3)]
        self._pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(folder, ids)
        )
        for _ in range(workers):  # they import while the first rung is compiled
            self._pool.submit(_start, folder, ids)

    def batches(self, config: ConfigDict) -> Generator[Batch, None, None]:
        """`config.num_steps` batches of the config's seed."""
        text = json.dumps(config.to_dict())
        names = ["image", "window", "mask", *config.tasks]
        free, waiting = collections.deque(range(len(self._slots))), collections.deque[tuple[int, Future[None]]]()
        asked = 0
        try:
            for _ in range(config.num_steps):
                while free and asked < config.num_steps:
                    number = free.popleft()
                    position = asked * config.batch_size
                    waiting.append((number, self._pool.submit(_fill, text, number, position)))
                    asked += 1
                number, filled = waiting.popleft()
                filled.result()
                batch = {name: self._slots[number][name].copy() for name in names}
                free.append(number)
                yield batch
        finally:
            for _, filled in waiting:
                if not filled.cancel():
                    filled.exception()  # waits: the slots are used again

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)


def slot(folder: pathlib.Path, number: int, config: ConfigDict | None = None) -> Batch:
    """Arrays of a batch in files; config: makes them."""
    files = {name: folder / f"slot{number}_{name}.npy" for name in ("image", "window", "mask", *LABELS)}
    if config is None:
        return {name: np.load(file, mmap_mode="r+") for name, file in files.items()}
    size = (config.batch_size, *config.dataset.image_size)
    kinds = {"image": ((*size, 3), np.uint8), "window": ((size[0], 4), np.int32), "mask": (size[:1], np.float32)}
    kinds |= {task.name: ((*size, task.label_channels), task.label_dtype) for task in all_tasks(config)}
    made: Mapping[str, Any] = {
        name: np.lib.format.open_memmap(files[name], "w+", dtype, shape) for name, (shape, dtype) in kinds.items()
    }
    return {name: np.asarray(array) for name, array in made.items()}


def all_tasks(config: ConfigDict) -> tuple[Task, ...]:
    """Records of all tasks with packed labels; a rung may have one of them alone."""
    every = config.copy_and_resolve_references()
    every.tasks = LABELS
    return from_config(every)


def one_ahead(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """The batches, each copied by a thread while the caller works with the one before it."""
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        following = pool.submit(next, batches, None)
        stack.callback(batches.close)
        stack.callback(lambda: following.exception())
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def _start(folder: pathlib.Path, ids: list[str]) -> None:
    """Prepares a worker process, which must not use the accelerator."""
    global _folder, _ids
    import jax

    jax.config.update("jax_platforms", "cpu")
    _folder, _ids = folder, ids
    _frames()


@functools.cache
def _frames() -> Frames:
    return Frames(_folder, "train", _ids)


@functools.cache
def _slot(number: int) -> Batch:
    return {name: np.asarray(array) for name, array in slot(_folder, number).items()}


@functools.lru_cache(maxsize=4)
def _configured(text: str) -> tuple[ConfigDict, tuple[Task, ...]]:
    config = ConfigDict(json.loads(text))
    return config, from_config(config)


def _fill(text: str, number: int, position: int) -> None:
    """Writes the batch that starts at a position of the stream to a slot."""
    config, tasks = _configured(text)
    arrays = _slot(number)
    for row in range(config.batch_size):
        example = stream.train_example(_frames(), config, tasks, position + row)
        for name in ("image", "window", "mask", *config.tasks):
            arrays[name][row] = example[name]
