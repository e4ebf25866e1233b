"""The reference for our input pipeline: a PyTorch loader in the style of the field's code.

Every access reads and decodes the archive's files. A sample is float32 maps, transformed by NumPy and OpenCV;
`torch.utils.data.DataLoader` provides worker processes and batches. The protocol is the same as ours. Of two usual
ways to write a step the faster one is taken; nothing is cached or fused.
"""

import abc
import functools
import pathlib
import random
from typing import ClassVar

import cv2
import numpy as np
from PIL import Image
import scipy.io
from skimage.morphology import thin
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
IGNORE = 255
SCALES = (0.5, 2.0)
MAX_CLASS_SHARE = 0.75
REDRAWS = 10
PADDING = {"image": 0, "semseg": IGNORE, "human_parts": IGNORE, "sal": IGNORE, "edge": IGNORE, "depth": 0, "normals": 0}
PERSON = 15
PERSON_PARTS = {
    **dict.fromkeys(("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"), 1),
    **dict.fromkeys(("neck", "torso"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("lhand", "llarm", "rhand", "rlarm"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("lfoot", "llleg", "rfoot", "rlleg"), 6),
}
Sample = dict[str, np.ndarray]  # (h,w,c) float32 each


def read_image(path: pathlib.Path) -> np.ndarray:
    """Reads an image file as (h,w,3) or (h,w,1) float32."""
    image = np.array(Image.open(path), dtype=np.float32)
    return image if image.ndim == 3 else image[..., None]


class MultiTaskDataset(Dataset, abc.ABC):
    """Training samples of a benchmark; subclasses read its files.

    Attributes:
      id_file: ids of the training split, relative to the root.
      size: height and width of the samples.
      classes: number of classes of semantic segmentation.
    """

    id_file: ClassVar[str]
    size: ClassVar[tuple[int, int]]
    classes: ClassVar[int]

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.ids = (root / self.id_file).read_text().split()
        self.transforms = [
            random_scale,
            functools.partial(random_crop, size=self.size),
            random_flip,
            distort_colours,
            normalise,
            functools.partial(pad, size=self.size),
            mark_invalid,
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.load(self.ids[index])
        for transform in self.transforms:
            sample = transform(sample)
        return to_tensors(sample)

    @abc.abstractmethod
    def load(self, example_id: str) -> Sample:
        """Image and labels of an example."""


class Nyud(MultiTaskDataset):
    """NYUD-v2's multi-task copy: PNG files, and depth as NPY files."""

    id_file = "gt_sets/train.txt"
    size = (448, 576)
    classes = 40

    def load(self, example_id: str) -> Sample:
        """See the base class."""
        semseg = read_image(self.root / "segmentation" / f"{example_id}.png") - 1
        semseg[semseg == -1] = IGNORE
        return {
            "image": read_image(self.root / "images" / f"{example_id}.png"),
            "semseg": semseg,
            "depth": np.load(self.root / "depth" / f"{example_id}.npy").astype(np.float32)[..., None],
            "normals": 2 * read_image(self.root / "normals" / f"{example_id}.png") / 255 - 1,
            "edge": read_image(self.root / "edge" / f"{example_id}.png") / 255,
        }


class PascalContext(MultiTaskDataset):
    """PASCAL-Context's multi-task copy: JPEG and PNG files; boundaries and human parts come from MATLAB files."""

    id_file = "ImageSets/Context/train.txt"
    size = (512, 512)
    classes = 21

    def __init__(self, root: pathlib.Path, normals_classes: list[int]):
        """normals_classes: context classes with valid distilled normals."""
        super().__init__(root)
        self.normals_classes = normals_classes

    def load(self, example_id: str) -> Sample:
        """See the base class."""
        image = read_image(self.root / "JPEGImages" / f"{example_id}.jpg")
        semseg = self.root / "semseg" / "VOC12" / f"{example_id}.png"
        if not semseg.is_file():
            semseg = self.root / "semseg" / "pascal-context" / f"{example_id}.png"
        context = scipy.io.loadmat(self.root / "pascal-context" / "trainval" / f"{example_id}.mat")["LabelMap"]
        boundaries = np.abs(cv2.Laplacian(context.astype(np.float32), cv2.CV_32F)) > 0
        sample = {
            "semseg": read_image(semseg),
            "human_parts": self.load_human_parts(example_id, image.shape[:2]),
            "sal": (read_image(self.root / "sal_distill" / f"{example_id}.png") > 127.5).astype(np.float32),
            "normals": 2 * read_image(self.root / "normals_distill" / f"{example_id}.png") / 255 - 1,
            "edge": thin(boundaries).astype(np.float32)[..., None],
        }
        valid = np.isin(context, self.normals_classes).astype(np.uint8)
        sample["normals"][resize(valid, sample["normals"].shape[:2], cv2.INTER_NEAREST) == 0] = 0
        for key, label in sample.items():
            method = cv2.INTER_CUBIC if key == "normals" else cv2.INTER_NEAREST
            sample[key] = resize(label, image.shape[:2], method).reshape(*image.shape[:2], -1)
        return {"image": image, **sample}

    def load_human_parts(self, example_id: str, size: tuple[int, int]) -> np.ndarray:
        """Part ids of all persons, (h,w,1) float32, 0 elsewhere."""
        label = np.zeros((*size, 1), np.float32)
        annotation = scipy.io.loadmat(self.root / "human_parts" / f"{example_id}.mat")["anno"][0, 0]
        for thing in annotation["objects"].ravel():
            if thing["class_ind"].item() == PERSON and thing["parts"].size:
                for part in thing["parts"].ravel():
                    label[part["mask"] > 0] = PERSON_PARTS[part["part_name"].item()]
        return label


def resize(array: np.ndarray, size: tuple[int, int], method: int) -> np.ndarray:
    """The array resized to (height, width); unchanged if it has that size."""
    return array if array.shape[:2] == size else cv2.resize(array, size[::-1], interpolation=method)


def random_scale(sample: Sample) -> Sample:
    """Scales image and labels by one random factor."""
    factor = random.uniform(*SCALES)
    height, width = sample["image"].shape[:2]
    size = (int(height * factor), int(width * factor))
    for key, value in sample.items():
        method = cv2.INTER_LINEAR if key == "image" else cv2.INTER_NEAREST
        sample[key] = resize(value, size, method).reshape(*size, -1)
    if "depth" in sample:
        sample["depth"] = sample["depth"] / factor
    return sample


def random_crop(sample: Sample, size: tuple[int, int]) -> Sample:
    """Crops to at most `size`; the crop is redrawn while one class fills too much of it."""
    height, width = sample["image"].shape[:2]
    spare = max(height - size[0], 0), max(width - size[1], 0)
    if spare == (0, 0):
        return sample

    def draw() -> tuple[slice, slice]:
        top, left = random.randint(0, spare[0]), random.randint(0, spare[1])
        return slice(top, top + size[0]), slice(left, left + size[1])

    window = draw()
    for _ in range(REDRAWS):
        labels, counts = np.unique(sample["semseg"][window], return_counts=True)
        counts = counts[labels != IGNORE]
        if len(counts) > 1 and counts.max() <= MAX_CLASS_SHARE * counts.sum():
            break
        window = draw()
    return {key: value[window] for key, value in sample.items()}


def random_flip(sample: Sample) -> Sample:
    """Mirrors the sample with probability 0.5."""
    if random.random() < 0.5:
        sample = {key: cv2.flip(value, 1).reshape(value.shape) for key, value in sample.items()}
        sample["normals"][..., 0] *= -1
    return sample


def linear(values: np.ndarray, factor: float, amount: float) -> np.ndarray:
    """factor * values + amount, as uint8."""
    return np.clip(values.astype(np.float32) * factor + amount, 0, 255).astype(np.uint8)


def distort_colours(sample: Sample) -> Sample:
    """Changes brightness, contrast, saturation and hue, each with probability 0.5."""
    image = sample["image"].astype(np.uint8)
    brightness, contrast, saturation, hue = (random.random() < 0.5 for _ in range(4))
    contrast_last = random.random() < 0.5
    if brightness:
        image = linear(image, 1, random.uniform(-32, 32))
    if contrast and not contrast_last:
        image = linear(image, random.uniform(0.5, 1.5), 0)
    if saturation or hue:
        colours = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if saturation:
            colours[..., 1] = linear(colours[..., 1], random.uniform(0.5, 1.5), 0)
        if hue:
            colours[..., 0] = (colours[..., 0].astype(np.int16) + random.randrange(-18, 18)) % 180
        image = cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)
    if contrast and contrast_last:
        image = linear(image, random.uniform(0.5, 1.5), 0)
    return {**sample, "image": image.astype(np.float32)}


def normalise(sample: Sample) -> Sample:
    """Normalises the image by ImageNet's mean and standard deviation."""
    image = sample["image"] / 255
    image -= MEAN
    image /= STD
    return {**sample, "image": image}


def pad(sample: Sample, size: tuple[int, int]) -> Sample:
    """Pads the sample to `size`, centred."""
    height, width = sample["image"].shape[:2]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    borders = (top, size[0] - height - top, left, size[1] - width - left)
    padded = {}
    for key, value in sample.items():
        border = cv2.copyMakeBorder(value, *borders, cv2.BORDER_CONSTANT, value=[PADDING[key]] * 3)
        padded[key] = border.reshape(*size, value.shape[2])
    return padded


def mark_invalid(sample: Sample) -> Sample:
    """Sets ignore values where labels are invalid."""
    normals = sample["normals"]
    normals[normals[..., 0] ** 2 + normals[..., 1] ** 2 + normals[..., 2] ** 2 == 0] = IGNORE
    if "depth" in sample:
        sample["depth"][sample["depth"] == 0] = -1
    if "human_parts" in sample:
        parts = sample["human_parts"]
        if ((parts == 0) | (parts == IGNORE)).all():
            parts[:] = IGNORE
    return sample


def to_tensors(sample: Sample) -> dict[str, torch.Tensor]:
    """The sample as (c,h,w) tensors."""
    return {key: torch.from_numpy(value.transpose(2, 0, 1)) for key, value in sample.items()}


def start_worker(number: int) -> None:
    """Limits a worker to one core, because OpenCV's threads would compete with the other workers."""
    del number
    cv2.setNumThreads(0)


def batches(dataset: MultiTaskDataset, batch_size: int, workers: int, count: int) -> DataLoader:
    """`count` shuffled batches, without a pause between epochs."""
    order = RandomSampler(dataset, num_samples=count * batch_size)
    return DataLoader(
        dataset, batch_size, sampler=order, num_workers=workers, drop_last=True, worker_init_fn=start_worker
    )


def check(batch: dict[str, torch.Tensor], dataset: MultiTaskDataset, batch_size: int) -> None:
    """Asserts shapes, dtypes and label values of a batch."""
    for key, tensor in batch.items():
        channels = 3 if key in ("image", "normals") else 1
        assert tensor.shape == (batch_size, channels, *dataset.size), (key, tensor.shape)
        assert tensor.dtype == torch.float32, (key, tensor.dtype)
    classes = {"semseg": dataset.classes, "human_parts": 7, "sal": 2, "edge": 2}
    for key, number in classes.items():
        if key in batch:
            values = set(batch[key].unique().tolist())
            assert values <= {*range(number), IGNORE}, (key, values)
    length = batch["normals"].norm(dim=1)
    ignored = (batch["normals"] == IGNORE).all(dim=1)
    assert (ignored | ((length > 0) & (length < 2))).all()
    if "depth" in batch:
        assert ((batch["depth"] == -1) | (batch["depth"] > 0)).all()
    assert batch["image"].abs().max() < 3
