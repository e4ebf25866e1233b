"""Training images/s of our input pipeline and of a PyTorch DataLoader, on the same files, cores and protocol.

  python benchmarks/input_pipeline.py nyud --folder=NYUDv2 --data_dir=DIR
  python benchmarks/input_pipeline.py pascal_context --folder=PASCALContext --data_dir=DIR
  python benchmarks/input_pipeline.py nyud --folder=NYUDv2 --data_dir=DIR --profile     # milliseconds of each stage

--folder is the extracted archive or a part of it. The data set is read from --data_dir, and built there first if it is
missing. Both sides deliver batches of 8 at the protocol's size with all of its transforms; they alternate by rounds on
the same two cores. Needs requirements-benchmarks.txt and Linux.
"""

import argparse
import collections
from collections.abc import Callable, Iterator
import importlib
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
import torch

from benchmarks import machine
from benchmarks.pytorch import loader as torch_loader
from input_pipeline import pascal_archive, pipeline, prepare, records, stream, transforms
from taskexpert_jax import tasks as task_records
from taskexpert_jax.errors import UserError

BATCH_SIZE = 8
CORES = 2  # for both sides; also the reference's number of workers
WARM_UP = 6  # batches before each measurement, more than either side prefetches
CHECKED = 4  # examples compared between both sides
REFERENCE = f"PyTorch DataLoader, {CORES} workers"
DECODING = "ours, decoding every example"
KEPT = "ours, decoded examples kept"
PACKAGES = ("numpy", "opencv-python-headless", "pillow", "tensorflow-cpu", "torch")

Batches = Iterator[dict[str, Any]]


def reference_data(dataset: str, folder: pathlib.Path) -> torch_loader.MultiTaskDataset:
    """The PyTorch data set of the files in a folder."""
    if dataset == "nyud":
        return torch_loader.Nyud(folder)
    return torch_loader.PascalContext(folder, list(pascal_archive.NORMALS_CLASSES))


def configured(dataset: str, data_dir: pathlib.Path, *, cache: bool) -> Any:
    """The shipped config with batches of 8 that reads `data_dir`."""
    config = importlib.import_module(f"configs.{dataset}").get_config("vit_l16")
    config.batch_size = BATCH_SIZE
    config.dataset.data_dir = str(data_dir)
    config.dataset.cache = cache
    return config


def check_same(data: torch_loader.MultiTaskDataset, source: records.Source) -> None:
    """Compares a few decoded examples of both sides.

    Raises:
      UserError: they differ.
    """
    if len(data) != len(source):
        raise UserError(
            f"{len(data)} ids in {data.root / data.id_file}, but {len(source)} built examples; build them again"
        )
    for index in range(min(CHECKED, len(source))):
        ours = source.load(index)
        for part, theirs in data.load(ours["id"]).items():
            # JPEG decoders differ by a level, and our normals are float16.
            tolerance = {"image": 2.0, "normals": 1e-3}.get(part, 0.0)
            if not np.allclose(ours[part].astype(np.float32), theirs, rtol=0, atol=tolerance):
                raise UserError(
                    f"{part} of {ours['id']} differs between {data.root} and the built data; build them again"
                )


class Turn:
    """Cost per image of fetching batches.

    Attributes:
      seconds: wall-clock time.
      core_seconds: CPU time of this process and its workers.
      system_seconds: the kernel's share of it, mostly for fresh pages of memory.
    """

    def __init__(self, batches: Batches, count: int):
        """Fetches `count` batches after a warm-up, then sleeps until the prefetched ones are ready."""
        for _ in range(WARM_UP):
            next(batches)
        begin = clocks()
        for _ in range(count):
            next(batches)
        self.seconds, self.core_seconds, self.system_seconds = (clocks() - begin) / (count * BATCH_SIZE)
        time.sleep(WARM_UP * BATCH_SIZE * self.seconds)


def clocks() -> np.ndarray:
    """Wall-clock, CPU and kernel seconds so far; CPU and kernel time of this process and its workers."""
    this = psutil.Process()
    used = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    system = sum(times.system for times in used)
    return np.array([time.perf_counter(), sum(times.user for times in used) + system, system])


def measure(dataset: str, folder: pathlib.Path, data_dir: pathlib.Path, rounds: int, count: int) -> dict[str, Any]:
    """Results of each side in each round, and the size of its batches."""
    data = reference_data(dataset, folder)
    # The workers must be forked before TensorFlow starts threads.
    loader = iter(torch_loader.batches(data, BATCH_SIZE, CORES, (rounds + 1) * (WARM_UP + count)))
    first = {REFERENCE: next(loader)}
    torch_loader.check(first[REFERENCE], data, BATCH_SIZE)
    sides: dict[str, Batches] = {REFERENCE: loader}
    for name, cache in ((DECODING, False), (KEPT, True)):
        config = configured(dataset, data_dir, cache=cache)
        tasks = task_records.from_config(config)
        source = pipeline.open_source(config.dataset, tasks, config.dataset.train_split)
        check_same(data, source)
        if cache:  # steady state: every example has been decoded once
            for index in range(len(source)):
                source.load(index)
        sides[name] = pipeline.train_batches(config, tasks)
        first[name] = next(sides[name])
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, batches in sides.items():
            turns[name].append(Turn(batches, count))
    return {
        name: {
            "images_per_second": [1 / turn.seconds for turn in turns[name]],
            "times_reference": [
                theirs.seconds / ours.seconds for ours, theirs in zip(turns[name], turns[REFERENCE], strict=True)
            ],
            "core_ms_per_image": [1e3 * turn.core_seconds for turn in turns[name]],
            "system_ms_per_image": [1e3 * turn.system_seconds for turn in turns[name]],
            "batch_bytes": sum(value.nbytes for value in first[name].values()),
        }
        for name in sides
    }


class Stages:
    """CPU milliseconds of the calling thread by stage."""

    def __init__(self):
        self.total: dict[str, float] = collections.defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any], *args: Any, **strengths: Any) -> Any:
        """Calls the function and adds its time to the stage `name`; returns its result."""
        begin = time.thread_time()
        result = function(*args, **strengths)
        self.total[name] += 1e3 * (time.thread_time() - begin)
        return result

    def means(self, images: int) -> dict[str, float]:
        """Milliseconds per image by stage."""
        return {name: total / images for name, total in self.total.items()}


def profile_ours(dataset: str, data_dir: pathlib.Path, count: int) -> dict[str, float]:
    """Milliseconds per image of our stages, run in sequence in one thread; means over `count` batches."""
    config = configured(dataset, data_dir, cache=False)
    tasks = task_records.from_config(config)
    source = records.dataset_module(dataset).source(config.dataset, config.dataset.train_split)
    stages = Stages()
    for batch in range(count):
        examples = []
        for position in range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE):
            seed = (config.seed, position)
            stored = stages.timed("read record", lambda p=position: source._records[p % len(source)])
            example = stages.timed("decode", lambda s=stored: source._finish(source._decode(s)))
            example = transforms.fill_missing(example, tasks)
            strengths = stream.crop_strengths(config)
            example = stages.timed(
                "scale and crop", transforms.random_scale_and_crop, example, tasks, seed, **strengths
            )
            probability = config.augment.flip_probability
            example = stages.timed("flip", transforms.random_flip, example, tasks, seed, probability=probability)
            colours = stream.colour_strengths(config)
            image = stages.timed("colours", transforms.photometric_distortion, example["image"], seed, **colours)
            example = stages.timed("invalid marks", transforms.mark_invalid, {**example, "image": image}, tasks)
            size = tuple(config.dataset.image_size)
            examples.append(stages.timed("padding", transforms.pad_centre, example, tasks, size=size))
        names = [name for name in examples[0] if name != "id"]
        stages.timed("batch copy", lambda e=examples, n=names: [np.stack([each[name] for each in e]) for name in n])
    return stages.means(count * BATCH_SIZE)


def profile_reference(dataset: str, folder: pathlib.Path, count: int) -> dict[str, float]:
    """Milliseconds per image of the reference's stages, like `profile_ours`."""
    data = reference_data(dataset, folder)
    torch_loader.start_worker(0)
    stages = Stages()
    for batch in range(count):
        samples = []
        for position in range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE):
            sample = stages.timed("read and decode", data.load, data.ids[position % len(data)])
            for transform in data.transforms:
                function = getattr(transform, "func", transform)  # unwraps functools.partial
                sample = stages.timed(function.__name__.replace("_", " "), transform, sample)
            samples.append(stages.timed("to tensors", torch_loader.to_tensors, sample))
        stages.timed("batch copy", torch.utils.data.default_collate, samples)
    return stages.means(count * BATCH_SIZE)


def table(dataset: str, measured: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        f"| {dataset} | images/s (range) | speed-up (range) | core ms per image (kernel) | MB per batch |",
        "|---|---|---|---|---|",
    ]
    for name, side in measured.items():
        rates, ratios = side["images_per_second"], side["times_reference"]
        rate = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        core, system = (statistics.median(side[f"{kind}_ms_per_image"]) for kind in ("core", "system"))
        lines.append(f"| {name} | {rate} | {ratio} | {core:.1f} ({system:.1f}) | {side['batch_bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


def stage_line(name: str, stages: dict[str, float]) -> str:
    """Times of the stages as one line."""
    parts = ", ".join(f"{stage} {time:.2f}" for stage, time in stages.items())
    return f"{name}, ms per image in one thread: {parts}; total {sum(stages.values()):.1f}"


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["nyud", "pascal_context"])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="the extracted archive")
    parser.add_argument("--data_dir", type=pathlib.Path, required=True, help="directory of built data sets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=25, help="batches per round")
    parser.add_argument("--profile", action="store_true", help="time the stages instead")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the results")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    report = {"dataset": args.dataset, **machine.described(*PACKAGES)}
    try:
        if not (args.data_dir / args.dataset).is_dir():
            prepare.prepare(args.dataset, args.folder, args.data_dir, allow_subset=True)
        if args.profile:
            report["stage_ms"] = {
                "reference": profile_reference(args.dataset, args.folder, args.batches),
                "ours": profile_ours(args.dataset, args.data_dir, args.batches),
            }
            print(*(stage_line(name, stages) for name, stages in report["stage_ms"].items()), sep="\n")
        else:
            report["sides"] = measure(args.dataset, args.folder, args.data_dir, args.rounds, args.batches)
            print(table(args.dataset, report["sides"]))
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
