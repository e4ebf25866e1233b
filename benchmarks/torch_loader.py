"""Training samples as PyTorch code bases of the field make them: the loader that ours is compared with.

Files of the public archives are read and decoded whenever a sample is asked for, the transforms are OpenCV and NumPy on
float32 maps, `torch.utils.data.DataLoader` gives workers and batches. Written from the protocol in plain style: neither
tuned nor slowed down.
"""

import pathlib
import random
from typing import ClassVar

import cv2
import numpy as np
from PIL import Image
import scipy.io
from skimage.morphology import thin
import torch
from torch.utils.data import DataLoader, Dataset

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
PARTS = {
    **dict.fromkeys(("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"), 1),
    **dict.fromkeys(("neck", "torso"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("lhand", "llarm", "rhand", "rlarm"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("lfoot", "llleg", "rfoot", "rlleg"), 6),
}
Sample = dict[str, np.ndarray]


def read(path: pathlib.Path) -> np.ndarray:
    """A picture as float32, (h,w) or (h,w,3)."""
    return np.array(Image.open(path), dtype=np.float32)


class Nyud(Dataset):
    """NYUD-v2's multi-task copy."""

    size = (448, 576)
    padding: ClassVar = {"image": 0.0, "semseg": 255.0, "edge": 255.0, "depth": 0.0, "normals": 0.0}

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.ids = (root / "gt_sets" / "train.txt").read_text().split()

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, name: str) -> Sample:
        """The decoded labels of an image, each (h,w,c) float32."""
        semseg = read(self.root / "segmentation" / f"{name}.png")[..., None]
        return {
            "image": read(self.root / "images" / f"{name}.png"),
            "semseg": np.where(semseg == 0, 256, semseg) - 1,
            "depth": np.load(self.root / "depth" / f"{name}.npy").astype(np.float32)[..., None],
            "normals": 2 * read(self.root / "normals" / f"{name}.png") / 255 - 1,
            "edge": read(self.root / "edge" / f"{name}.png")[..., None] / 255,
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.load(self.ids[index])
        sample = random_crop(random_scale(sample), self.size)
        if random.random() < 0.5:
            sample = {key: np.ascontiguousarray(value[:, ::-1]) for key, value in sample.items()}
            sample["normals"][..., 0] *= -1
        sample["image"] = distort(sample["image"].astype(np.uint8))
        sample["image"] = (sample["image"].astype(np.float32) / 255 - MEAN) / STD
        sample = mark_invalid(pad(sample, self.size, self.padding))
        return {key: torch.from_numpy(np.ascontiguousarray(v.transpose(2, 0, 1))) for key, v in sample.items()}


class PascalContext(Nyud):
    """PASCAL-Context's multi-task copy: boundaries and human parts are decoded from MATLAB files."""

    size = (512, 512)
    padding: ClassVar = {
        "image": 0.0,
        "semseg": 255.0,
        "human_parts": 255.0,
        "sal": 255.0,
        "edge": 255.0,
        "normals": 0.0,
    }

    def __init__(self, root: pathlib.Path, valid_classes: list[int]):
        self.root = root
        self.ids = (root / "ImageSets" / "Context" / "train.txt").read_text().split()
        self.valid_classes = np.array(valid_classes)

    def load(self, name: str) -> Sample:
        """As above."""
        image = read(self.root / "JPEGImages" / f"{name}.jpg")
        semseg = self.root / "semseg" / "VOC12" / f"{name}.png"
        if not semseg.is_file():
            semseg = self.root / "semseg" / "pascal-context" / f"{name}.png"
        context = scipy.io.loadmat(self.root / "pascal-context" / "trainval" / f"{name}.mat")["LabelMap"]
        laplacian = cv2.Laplacian(context.astype(np.float64), cv2.CV_64F)
        normals = 2 * read(self.root / "normals_distill" / f"{name}.png") / 255 - 1
        if normals.shape[:2] == context.shape:
            normals[~np.isin(context, self.valid_classes)] = 0
        sample = {
            "semseg": read(semseg)[..., None],
            "human_parts": self.human_parts(name, image.shape[:2]),
            "sal": (read(self.root / "sal_distill" / f"{name}.png")[..., None] > 127.5).astype(np.float32),
            "edge": thin(np.abs(laplacian) > 0).astype(np.float32)[..., None],
            "normals": normals,
        }
        size = image.shape[1::-1]
        for key, value in sample.items():
            if value.shape[:2] != image.shape[:2]:
                method = cv2.INTER_CUBIC if key == "normals" else cv2.INTER_NEAREST
                sample[key] = cv2.resize(value, size, interpolation=method).reshape(*image.shape[:2], -1)
        return {"image": image, **sample}

    def human_parts(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """Part ids of all persons, 0 elsewhere."""
        annotation = scipy.io.loadmat(self.root / "human_parts" / f"{name}.mat")["anno"][0][0]
        label = np.zeros((*size, 1), np.float32)
        for thing in annotation["objects"][0]:
            if int(thing["class_ind"].item()) != 15 or not thing["parts"].size:
                continue
            for part in thing["parts"][0]:
                number = PARTS.get(part["part_name"][0])
                if number:
                    label[part["mask"] > 0] = number
        return label


def random_scale(sample: Sample) -> Sample:
    """Image and labels by one factor."""
    scale = random.uniform(0.5, 2.0)
    height, width = sample["image"].shape[:2]
    size = (int(width * scale), int(height * scale))
    result = {}
    for key, value in sample.items():
        method = cv2.INTER_LINEAR if key == "image" else cv2.INTER_NEAREST
        result[key] = cv2.resize(value, size, interpolation=method).reshape(size[1], size[0], -1)
    if "depth" in result:
        result["depth"] = result["depth"] / scale
    return result


def random_crop(sample: Sample, size: tuple[int, int]) -> Sample:
    """A window of at most `size`, redrawn while one class fills more than 0.75 of it."""
    height, width = sample["image"].shape[:2]
    for _ in range(11):
        top, left = random.randint(0, max(height - size[0], 0)), random.randint(0, max(width - size[1], 0))
        window = np.s_[top : top + size[0], left : left + size[1]]
        labels, counts = np.unique(sample["semseg"][window], return_counts=True)
        counts = counts[labels != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    return {key: value[window] for key, value in sample.items()}


def convert(image: np.ndarray, factor: float = 1.0, amount: float = 0.0) -> np.ndarray:
    """factor * image + amount as bytes."""
    return np.clip(image.astype(np.float32) * factor + amount, 0, 255).astype(np.uint8)


def distort(image: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation, hue of an (h,w,3) uint8 image, each with probability one half."""
    if random.random() < 0.5:
        image = convert(image, amount=random.uniform(-32, 32))
    contrast_first = random.random() < 0.5
    if contrast_first and random.random() < 0.5:
        image = convert(image, random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = convert(hsv[..., 1], random.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if random.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + random.randint(-18, 17)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and random.random() < 0.5:
        image = convert(image, random.uniform(0.5, 1.5))
    return image


def pad(sample: Sample, size: tuple[int, int], values: dict[str, float]) -> Sample:
    """Everything in the middle of `size`."""
    height, width = sample["image"].shape[:2]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    borders = (top, size[0] - height - top, left, size[1] - width - left)
    return {
        key: cv2.copyMakeBorder(value, *borders, cv2.BORDER_CONSTANT, value=[values[key]] * 3).reshape(*size, -1)
        for key, value in sample.items()
    }


def mark_invalid(sample: Sample) -> Sample:
    """Ignore values where a label is invalid."""
    sample["normals"][(sample["normals"] == 0).all(-1)] = 255
    if "depth" in sample:
        sample["depth"][sample["depth"] == 0] = -1
    if "human_parts" in sample and not ((sample["human_parts"] != 0) & (sample["human_parts"] != 255)).any():
        sample["human_parts"][:] = 255
    return sample


def batches(dataset: Dataset, batch_size: int, workers: int) -> DataLoader:
    """Shuffled training batches by worker processes."""

    def alone(_: int) -> None:
        cv2.setNumThreads(0)
        torch.set_num_threads(1)

    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        worker_init_fn=alone,
        persistent_workers=True,
    )
