"""Generates the golden values: losses, gradients, metrics and the boundary benchmark on synthetic inputs.

    python -m tests.golden.make

writes the files to its own folder, from `definitions.py` and `boundary_definition.py`, which are independent of the
package. Both agree with the published code: losses, gradients and metrics of six batches with the tasks of NYUD and
PASCAL-Context to 5e-7 (float32 rounding), the boundary benchmark's numbers of pixels on 17 images and 84 small
hand-made cases exactly. Pairs are those of a maximum matching, of which the published code misses a few at random.

Files:
  losses_metrics.json  inputs: task -> checksum. losses: task -> loss of each case. metrics: task -> values over all
                       cases.
  gradients.npz        task -> gradient of each case with respect to the prediction, (cases, B, H, W, c) float32
  boundary/            NAME_label.png, NAME_prediction.png: 8-bit inputs; counts.npz: NAME -> (3, 101) pairs, true and
                       predicted pixels at each threshold; scores.json: scores of all images together
"""

import json
import pathlib
import zlib

import numpy as np
from PIL import Image
from scipy import ndimage

from input_pipeline import scenes
from tests.golden import boundary_definition, definitions

FOLDER = pathlib.Path(__file__).resolve().parent
CASES = ("plain", "an image without labels", "no positive pixel")
CHANNELS = {"semseg": 21, "sal": 2, "edge": 1, "normals": 3, "depth": 1}
SIZE = (2, 6, 8)  # B, H, W
MAX_DIST = 0.02  # fraction of the diagonal: 2.4 pixels


def inputs(task: str) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (cases, B, H, W, c) and labels (cases, B, H, W, c_label) of all `CASES`, float32.

    A fifth of each label is ignored, and predictions are correlated with the labels.
    """
    rng = np.random.default_rng(list(CHANNELS).index(task))
    channels, pixels = CHANNELS[task], (len(CASES), *SIZE)
    noise = 4 * rng.random((*pixels, channels)) - 2
    if task == "depth":
        label = 9 * rng.random((*pixels, 1))
        label[rng.random(pixels) < 0.1] = 0
        label[rng.random(pixels) < 0.1] = 90
        prediction = label + noise
    elif task == "normals":
        label = 2 * rng.random((*pixels, 3)) - 1
        label /= np.sqrt((label**2).sum(axis=-1, keepdims=True))
        prediction = 3 * label + noise
    else:
        classes = max(channels, 2)
        label = np.floor(classes * rng.random((*pixels, 1)))
        prediction = noise + 1.5 * (label == np.arange(classes)[-channels:])
        if classes == 2:
            label[2, label[2] == 1] = 0
    label[rng.random(pixels) < 0.2] = definitions.ignore_value(task)
    label[1, 0] = definitions.ignore_value(task)
    return prediction.astype(np.float32), label.astype(np.float32)


def checksum(task: str) -> int:
    """Checksum of the inputs, to detect a NumPy version whose random numbers differ from those of the golden values."""
    return zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in inputs(task)))


def boundary_inputs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (imperfect prediction, label), uint8 (72, 96): classes of rendered scenes, shapes, and an empty label."""
    labels = {f"scene{i}": scenes.render(i, height=72, width=96)["semseg"][..., 0] for i in range(3)}
    y, x = np.mgrid[:72, :96]
    labels["shapes"] = ((x - 30) ** 2 + (y - 36) ** 2 < 400).astype(np.uint8) + 2 * (x > y + 20) + 4 * (x % 40 == 0)
    labels["empty"] = np.zeros((72, 96), np.uint8)
    return {name: (_noisy(label, seed), label.astype(np.uint8)) for seed, (name, label) in enumerate(labels.items())}


def _noisy(label: np.ndarray, seed: int) -> np.ndarray:
    """Soft prediction of the label's boundaries: displaced, blurred, with gaps and false lines."""
    rng = np.random.default_rng(seed)
    truth = boundary_definition.boundaries(label)
    shifted = np.roll(truth, (seed + 1, -seed), axis=(0, 1))
    gaps = ndimage.gaussian_filter(rng.random(label.shape), 4) > 0.49
    lines = ndimage.gaussian_filter(np.where(gaps, shifted, 0.3 * truth).astype(float), 1.0)
    false = ndimage.gaussian_filter(rng.random(label.shape), 1.5)
    strength = 0.8 * lines / max(lines.max(), 0.1) + 6 * np.maximum(false - 0.56, 0)
    return np.clip(255 * strength, 0, 255).astype(np.uint8) // 4 * 4  # creates ties and halves the size of the files


def main() -> None:
    written, gradients = {"inputs": {}, "losses": {}, "metrics": {}}, {}
    for task in CHANNELS:
        predictions, labels = inputs(task)
        losses, slopes = zip(*map(definitions.loss, [task] * len(CASES), predictions, labels), strict=True)
        written["inputs"][task], written["losses"][task] = checksum(task), losses
        written["metrics"][task] = definitions.metrics(task, np.concatenate(predictions), np.concatenate(labels))
        gradients[task] = np.array(slopes, np.float32)
    (FOLDER / "losses_metrics.json").write_text(json.dumps(written, indent=1) + "\n")
    np.savez_compressed(FOLDER / "gradients.npz", **gradients)

    folder = FOLDER / "boundary"
    folder.mkdir(exist_ok=True)
    counts = {}
    for name, (prediction, label) in boundary_inputs().items():
        Image.fromarray(prediction).save(folder / f"{name}_prediction.png")
        Image.fromarray(label).save(folder / f"{name}_label.png")
        counts[name] = boundary_definition.image_counts(prediction, label, MAX_DIST).astype(np.uint16)
    np.savez_compressed(folder / "counts.npz", **counts)
    scores = boundary_definition.scores(np.array(list(counts.values()), int))
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
