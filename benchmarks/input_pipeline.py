"""Training images a second of our input pipeline beside a PyTorch DataLoader's, on the same files, cores and protocol.

  python benchmarks/input_pipeline.py nyud --folder=NYUDv2 --data_dir=DIR
  python benchmarks/input_pipeline.py pascal_context --folder=PASCALContext --data_dir=DIR

FOLDER is the extracted archive, or a part of it. The data set built from it is taken from DIR and is built there first
where it is missing. Both sides deliver batches of 8 at the protocol's size, with all of its transforms; they take
turns, a round each, on the same cores. Needs requirements-benchmarks.txt.
"""

import argparse
from collections.abc import Callable, Iterator
import datetime
import importlib
import itertools
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
import torch
import torch_loader

from input_pipeline import pascal_labels, pipeline, prepare, transforms
from taskexpert_jax import tasks as task_records

BATCH_SIZE = 8
WORKERS = 2
Batches = Iterator[dict[str, Any]]


def reference(dataset: str, folder: pathlib.Path) -> Batches:
    """Endless batches of the PyTorch loader."""
    if dataset == "nyud":
        data = torch_loader.Nyud(folder)
    else:
        data = torch_loader.PascalContext(folder, list(pascal_labels.NORMALS_CLASSES))
    loader = torch_loader.batches(data, BATCH_SIZE, WORKERS)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def configured(dataset: str, data_dir: pathlib.Path, *, cache: bool) -> Any:
    """The shipped config, at batches of 8, reading `data_dir`."""
    config = importlib.import_module(f"configs.{dataset}").get_config("vit_l16")
    config.batch_size = BATCH_SIZE
    config.dataset.data_dir = str(data_dir)
    config.dataset.cache = cache
    return config


def seconds_per_image(batches: Batches, count: int) -> float:
    """Time of `count` batches, by image."""
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - begin) / (count * BATCH_SIZE)


def size_of(batch: dict[str, Any]) -> int:
    """Bytes of a batch's arrays."""
    return sum(value.nbytes for value in batch.values())


def stages(dataset: str, data_dir: pathlib.Path, repeats: int = 64) -> dict[str, float]:
    """Milliseconds an image of each stage of ours, one after the other in one thread; medians."""
    config = configured(dataset, data_dir, cache=False)
    tasks = task_records.from_config(config)
    source = pipeline.open_source(config.dataset, tasks, config.dataset.train_split)
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any], *args: Any, **strengths: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **strengths)
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
        return result

    for position in range(repeats):
        seed = (0, position)
        example = timed("read and decode", source.load, position % len(source))
        example = timed(
            "scale and crop", transforms.random_scale_and_crop, example, tasks, seed, **pipeline.crop_strengths(config)
        )
        example = timed("flip", transforms.flip, example, tasks)
        colours = pipeline.colour_strengths(config)
        image = timed("colours", transforms.photometric_distortion, example["image"], seed, **colours)
        example = timed("invalid marks", transforms.mark_invalid, {**example, "image": image}, tasks)
        timed("padding", transforms.pad_centre, example, tasks, size=tuple(config.dataset.image_size))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(dataset: str, folder: pathlib.Path, data_dir: pathlib.Path, rounds: int, count: int) -> dict[str, Any]:
    """Images a second of each side in each round, and bytes of a batch."""
    sides = {"PyTorch DataLoader, 2 workers": reference(dataset, folder)}
    for name, cache in (("ours, decoding every example", False), ("ours, decoded examples kept", True)):
        config = configured(dataset, data_dir, cache=cache)
        sides[name] = pipeline.train_batches(config, task_records.from_config(config))
        if cache:  # the steady state: every example has been decoded once
            source = pipeline.open_source(config.dataset, task_records.from_config(config), config.dataset.train_split)
            for index in range(len(source)):
                source.load(index)
    sizes = {name: size_of(next(batches)) for name, batches in sides.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, batches in sides.items():
            seconds_per_image(batches, 6)  # workers fill their queues again
            rates[name].append(1 / seconds_per_image(batches, count))
            time.sleep(1.0)  # what was fetched ahead is ready before another side's turn
    return {"images_per_second": rates, "batch_bytes": sizes}


def described() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def table(dataset: str, measured: dict[str, Any], stage_times: dict[str, float]) -> str:
    """The results in Markdown."""
    rates = {name: statistics.median(values) for name, values in measured["images_per_second"].items()}
    base = next(iter(rates.values()))
    lines = [f"| {dataset} | images/s (range) | ratio | MB a batch |", "|---|---|---|---|"]
    for name, values in measured["images_per_second"].items():
        spread = f"{min(values):.0f} to {max(values):.0f}"
        size = measured["batch_bytes"][name] / 1e6
        lines.append(f"| {name} | {rates[name]:.0f} ({spread}) | {rates[name] / base:.1f} | {size:.1f} |")
    parts = ", ".join(f"{name} {value:.1f}" for name, value in stage_times.items())
    return "\n".join([*lines, "", f"Ours in one thread, ms an image: {parts}; in all {sum(stage_times.values()):.1f}."])


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["nyud", "pascal_context"])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="the extracted archive")
    parser.add_argument("--data_dir", type=pathlib.Path, required=True, help="where built data sets are kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=25, help="a round")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the results")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    if not (args.data_dir / args.dataset).is_dir():
        prepare.prepare(args.dataset, args.folder, args.data_dir, allow_subset=True)
    measured = measure(args.dataset, args.folder, args.data_dir, args.rounds, args.batches)
    stage_times = stages(args.dataset, args.data_dir)
    print(table(args.dataset, measured, stage_times))
    if args.output:
        report = {"dataset": args.dataset, **measured, "stage_ms": stage_times, **described()}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
