"""Training images a second of our input pipeline beside a PyTorch DataLoader's, on the same files, cores and protocol.

  python benchmarks/input_pipeline.py nyud --folder=NYUDv2 --data_dir=DIR
  python benchmarks/input_pipeline.py pascal_context --folder=PASCALContext --data_dir=DIR
  python benchmarks/input_pipeline.py nyud --folder=NYUDv2 --data_dir=DIR --profile     # milliseconds of each stage

FOLDER is the extracted archive, or a part of it. The data set built from it is taken from DIR and is built there first
where it is missing. Both sides deliver batches of 8 at the protocol's size, with all of its transforms; they take
turns, a round each, on the same two cores. Needs requirements-benchmarks.txt, and Linux.
"""

import argparse
import collections
from collections.abc import Callable, Iterator
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
import torch

from benchmarks.pytorch import loader as torch_loader
from input_pipeline import pascal_labels, pipeline, prepare, records, transforms
from taskexpert_jax import tasks as task_records
from taskexpert_jax.errors import UserError

BATCH_SIZE = 8
CORES = 2  # both sides run on so many, the reference with as many workers
WARM_UP = 6  # batches before each measurement: more than either side fetches ahead
CHECKED = 4  # examples that are compared
REFERENCE = f"PyTorch DataLoader, {CORES} workers"
DECODING = "ours, decoding every example"
KEPT = "ours, decoded examples kept"
PACKAGES = ("numpy", "opencv-python-headless", "pillow", "tensorflow-cpu", "torch")

Batches = Iterator[dict[str, Any]]


def reference_data(dataset: str, folder: pathlib.Path) -> torch_loader.MultiTaskDataset:
    """The PyTorch data set of the files in a folder."""
    if dataset == "nyud":
        return torch_loader.Nyud(folder)
    return torch_loader.PascalContext(folder, list(pascal_labels.NORMALS_CLASSES))


def configured(dataset: str, data_dir: pathlib.Path, *, cache: bool) -> Any:
    """The shipped config with batches of 8, reading `data_dir`."""
    config = importlib.import_module(f"configs.{dataset}").get_config("vit_l16")
    config.batch_size = BATCH_SIZE
    config.dataset.data_dir = str(data_dir)
    config.dataset.cache = cache
    return config


def check_same(data: torch_loader.MultiTaskDataset, source: records.Source) -> None:
    """Compares a few decoded examples of both sides.

    Raises:
      UserError: they are not the same.
    """
    if len(data) != len(source):
        raise UserError(
            f"{len(data)} ids in {data.root / data.id_file}, but {len(source)} built examples; build them anew"
        )
    for index in range(min(CHECKED, len(source))):
        ours = source.load(index)
        for part, theirs in data.load(ours["id"]).items():
            # Decoders of JPEG differ in a last bit, and our normals are float16.
            tolerance = {"image": 2.0, "normals": 1e-3}.get(part, 0.0)
            if not np.allclose(ours[part].astype(np.float32), theirs, rtol=0, atol=tolerance):
                raise UserError(f"{part} of {ours['id']} differs between {data.root} and what was built; build it anew")


class Turn:
    """What taking batches costs an image.

    Attributes:
      seconds: by the clock.
      core_seconds: of all cores, by this process and its workers; system_seconds: the kernel's share of it, which
        mostly goes into fresh pages of memory.
    """

    def __init__(self, batches: Batches, count: int):
        """Takes `count` batches after a few others, and rests until what is fetched ahead is ready."""
        for _ in range(WARM_UP):
            next(batches)
        begin = clocks()
        for _ in range(count):
            next(batches)
        self.seconds, self.core_seconds, self.system_seconds = (clocks() - begin) / (count * BATCH_SIZE)
        time.sleep(WARM_UP * BATCH_SIZE * self.seconds)


def clocks() -> np.ndarray:
    """Seconds so far by the clock, of all cores by this process and its workers, and of these in the kernel."""
    this = psutil.Process()
    used = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    system = sum(times.system for times in used)
    return np.array([time.perf_counter(), sum(times.user for times in used) + system, system])


def measure(dataset: str, folder: pathlib.Path, data_dir: pathlib.Path, rounds: int, count: int) -> dict[str, Any]:
    """What each side did in each round, and how large its batches are."""
    data = reference_data(dataset, folder)
    # Its workers are forked before TensorFlow has threads.
    loader = iter(torch_loader.batches(data, BATCH_SIZE, CORES, (rounds + 1) * (WARM_UP + count)))
    first = {REFERENCE: next(loader)}
    torch_loader.check(first[REFERENCE], data, BATCH_SIZE)
    sides: dict[str, Batches] = {REFERENCE: loader}
    for name, cache in ((DECODING, False), (KEPT, True)):
        config = configured(dataset, data_dir, cache=cache)
        tasks = task_records.from_config(config)
        source = pipeline.open_source(config.dataset, tasks, config.dataset.train_split)
        check_same(data, source)
        if cache:  # the steady state: every example has been decoded once
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
    """Milliseconds of the calling thread by stage."""

    def __init__(self):
        self.total: dict[str, float] = collections.defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any], *args: Any, **strengths: Any) -> Any:
        """The function's result; its time counts for the stage `name`."""
        begin = time.thread_time()
        result = function(*args, **strengths)
        self.total[name] += 1e3 * (time.thread_time() - begin)
        return result

    def means(self, images: int) -> dict[str, float]:
        """By image."""
        return {name: total / images for name, total in self.total.items()}


def profile_ours(dataset: str, data_dir: pathlib.Path, count: int) -> dict[str, float]:
    """Milliseconds an image of each stage of ours, one after the other in one thread; means of `count` batches."""
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
            strengths = pipeline.crop_strengths(config)
            example = stages.timed(
                "scale and crop", transforms.random_scale_and_crop, example, tasks, seed, **strengths
            )
            probability = config.augment.flip_probability
            example = stages.timed("flip", transforms.random_flip, example, tasks, seed, probability=probability)
            colours = pipeline.colour_strengths(config)
            image = stages.timed("colours", transforms.photometric_distortion, example["image"], seed, **colours)
            example = stages.timed("invalid marks", transforms.mark_invalid, {**example, "image": image}, tasks)
            size = tuple(config.dataset.image_size)
            examples.append(stages.timed("padding", transforms.pad_centre, example, tasks, size=size))
        names = [name for name in examples[0] if name != "id"]
        stages.timed("batch copy", lambda e=examples, n=names: [np.stack([each[name] for each in e]) for name in n])
    return stages.means(count * BATCH_SIZE)


def profile_reference(dataset: str, folder: pathlib.Path, count: int) -> dict[str, float]:
    """Milliseconds an image of each stage of the reference, as above."""
    data = reference_data(dataset, folder)
    torch_loader.start_worker(0)
    stages = Stages()
    for batch in range(count):
        samples = []
        for position in range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE):
            sample = stages.timed("read and decode", data.load, data.ids[position % len(data)])
            for transform in data.transforms:
                function = getattr(transform, "func", transform)  # below functools.partial
                sample = stages.timed(function.__name__.replace("_", " "), transform, sample)
            samples.append(stages.timed("to tensors", torch_loader.to_tensors, sample))
        stages.timed("batch copy", torch.utils.data.default_collate, samples)
    return stages.means(count * BATCH_SIZE)


def described() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    root = pathlib.Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],  # before the measurement: of other programs
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "commit": subprocess.run(command, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def table(dataset: str, measured: dict[str, Any]) -> str:
    """The measurement in Markdown."""
    lines = [
        f"| {dataset} | images/s (range) | times the reference (range) | core ms an image (kernel) | MB a batch |",
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
    """Times of stages in words."""
    parts = ", ".join(f"{stage} {time:.2f}" for stage, time in stages.items())
    return f"{name}, ms an image in one thread: {parts}; in all {sum(stages.values()):.1f}"


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["nyud", "pascal_context"])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="the extracted archive")
    parser.add_argument("--data_dir", type=pathlib.Path, required=True, help="where built data sets are kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=25, help="a round")
    parser.add_argument("--profile", action="store_true", help="measure the stages instead")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the results")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    report = {"dataset": args.dataset, **described()}
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
