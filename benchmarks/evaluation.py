"""Times of the metrics.

  python benchmarks/evaluation.py boundary                                # built-in scenes, in both benchmarks' sizes
  python benchmarks/evaluation.py boundary --protocol=nyud --folder=DIR   # DIR/predictions/ID.png, DIR/labels/ID.png
  python benchmarks/evaluation.py meters                                  # all others, compared with loops in PyTorch

boundary: all 101 thresholds of an image on one core, compared with the MATLAB original: 95 s per NYUD image and 14 s
per PASCAL-Context image on one core of an AMD EPYC, nearly all of it in its compiled matching. Seconds are CPU time,
so other programs on the machine have little influence.
"""

import argparse
from collections.abc import Iterable, Iterator
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from scipy import ndimage

from input_pipeline import scenes
from taskexpert_jax import images
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks.metrics.boundary import counts as boundary
from taskexpert_jax.tasks.metrics.boundary.matching import Matcher, shortest_pairs

Example = tuple[str, np.ndarray, np.ndarray]  # id, prediction, label
MATCHERS: dict[str, Matcher] = {
    "most_pairs": boundary.most_pairs,
    "shortest_pairs": shortest_pairs,
    "most_pairs_outlier_graph": boundary.most_pairs_outlier_graph,
}


class Protocol(NamedTuple):
    """A benchmark's boundary evaluation."""

    height: int
    width: int
    max_dist: float
    label: str  # label of the scenes that is matched
    original_seconds: float  # per image


PROTOCOLS = {
    "nyud": Protocol(425, 560, 0.011, "edge", 95.0),
    "pascal_context": Protocol(375, 500, 0.0075, "semseg", 14.0),
}


def made_up_prediction(edge: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A plausible prediction for a boundary, (H, W) bool to uint8: bent, blurred, with gaps and false lines."""

    def field(scale: float) -> np.ndarray:
        smooth = ndimage.gaussian_filter(rng.standard_normal(edge.shape), scale)
        return smooth / smooth.std()

    y, x = np.indices(edge.shape)
    bent = ndimage.map_coordinates(edge.astype(np.float32), [y + 3 * field(12), x + 3 * field(12)], order=1)
    blurred = np.minimum(4 * ndimage.gaussian_filter(bent, 1.5), 1)  # the centre of a one-pixel line has 0.27
    false_lines = np.exp(-((field(8) / 0.2) ** 2))
    seen = np.clip(0.6 + 0.4 * field(15), 0, 1) * blurred + np.clip(0.3 * field(15), 0, 1) * false_lines
    return boundary.quantise(np.clip(seen + 0.02 * np.abs(field(1)), 0, 1))


def scene_examples(protocol: Protocol, count: int) -> Iterator[Example]:
    """Built-in scenes with made-up predictions."""
    for index in range(count):
        scene = scenes.render(index, height=protocol.height, width=protocol.width)
        prediction = made_up_prediction(scene["edge"][..., 0] > 0, np.random.default_rng(index))
        yield scene["id"], prediction, scene[protocol.label][..., 0]


def folder_examples(folder: pathlib.Path, count: int) -> Iterator[Example]:
    """Predictions and labels of a folder; a missing label raises UserError."""
    for path in images.list_images(folder / "predictions")[:count]:
        label = folder / "labels" / f"{path.stem}.png"
        if not label.exists():
            raise UserError(f"{label}: label missing for the prediction {path}")
        yield path.stem, *(np.array(Image.open(file)) for file in (path, label))


def time_boundary(name: str, protocol: Protocol, examples: Iterable[Example], matcher: Matcher) -> None:
    """Prints the time of each image and the mean."""
    seconds, parts = [], []
    for example_id, prediction, label in examples:
        if not seconds:  # warm-up: compiles or loads the loops
            boundary.image_counts(prediction[:40, :40], label[:40, :40], 0.1, matcher=matcher)
        start = time.thread_time()
        counts = boundary.image_counts(prediction, label, protocol.max_dist, matcher=matcher)
        seconds.append(time.thread_time() - start)
        parts.append(counts)
        predicted, true = int(counts.sumP[0, 50]), int(counts.sumR[0, 50])
        print(f"  {example_id}  {seconds[-1]:.3f} s  pixels at 0.5: {predicted} predicted, {true} true", flush=True)
    mean, score = statistics.mean(seconds), boundary.odsf(boundary.BoundaryCounts.join(parts))
    spread = f"{min(seconds):.3f} to {max(seconds):.3f}, {len(seconds)} images"
    ratio = f"{protocol.original_seconds:g} s, {protocol.original_seconds / mean:.0f} times that"
    print(f"{name}: {mean:.3f} s an image ({spread}); the original: {ratio}; odsF {100 * score:.2f}")


def run_boundary(arguments: argparse.Namespace) -> None:
    if arguments.folder and not arguments.protocol:
        raise UserError("--folder needs --protocol=nyud or pascal_context, which sets the matching distance")
    for name in [arguments.protocol] if arguments.protocol else PROTOCOLS:
        protocol = PROTOCOLS[name]
        if arguments.folder:
            examples = folder_examples(arguments.folder, arguments.images)
        else:
            examples = scene_examples(protocol, arguments.images)
        time_boundary(name, protocol, examples, MATCHERS[arguments.matcher])


def run_meters(arguments: argparse.Namespace) -> None:
    from benchmarks.pytorch import meters  # needs PyTorch

    meters.run(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="METRIC")
    command = commands.add_parser("boundary", help="odsF, all thresholds of an image on one core")
    command.add_argument("--images", type=int, default=8, help="number of images (default 8)")
    command.add_argument("--protocol", choices=PROTOCOLS, help="one benchmark only")
    command.add_argument("--folder", type=pathlib.Path, help="your own images instead of the scenes")
    command.add_argument("--matcher", choices=MATCHERS, default="most_pairs", help="matching of pixels")
    command.set_defaults(run=run_boundary)
    command = commands.add_parser("meters", help="the metrics of all tasks but odsF, a batch of full-size maps")
    command.add_argument("--rounds", type=int, default=5, help="number of rounds (default 5)")
    command.set_defaults(run=run_meters)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
