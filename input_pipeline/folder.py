"""Your own data: a folder of images and a folder of labels for each task.

    DATA/train.txt, DATA/val.txt    ids, one per line; an id may contain sub-folders: kitchen/0001
    DATA/images/ID.jpg              or another format that Pillow reads
    DATA/TASK/ID.png or ID.npy      the label, same size as the image; optional for each image

The format of label files is described in docs/add_a_dataset.md; `Task.kind` decodes them.
"""

from collections.abc import Mapping, Sequence
import hashlib
import os
import pathlib
import unicodedata

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from input_pipeline import transforms
from input_pipeline.records import Example, repeated_ids
from taskexpert_jax import images, storage
from taskexpert_jax import paths as user_paths
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import Task, build

LABEL_SUFFIXES = (".png", ".npy")
NOTES = (
    "EXIF orientation: images and labels are turned, each by its own. An image rotated by 180 degrees, mirrored or "
    "square is refused if its label has none.",
)  # for `show --check`


def read_label(path: pathlib.Path, task: Task, size: tuple[int, int], *, zero_is_void: bool = False) -> np.ndarray:
    """Reads a label, (h,w,label_channels) in the task's `label_dtype`; unlabelled pixels are `Task.missing`.

    Args:
      path: a .png or .npy file in the format of docs/add_a_dataset.md.
      task: task of the label.
      size: height and width of the image.
      zero_is_void: in class maps, 0 is unlabelled and classes are numbered from 1.

    Raises:
      UserError: the file cannot be read, has another size or number of channels, or values out of range.
    """
    try:
        values = images.read_numbers(path, ids=np.dtype(task.label_dtype).kind == "u")
    except ValueError as error:
        raise UserError(f"{path}: not a readable label ({error}); replace it, or remove it") from error
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] != task.label_channels or values.dtype.kind not in "biuf":
        raise UserError(
            f"{path}: {values.dtype} of shape {values.shape}, but a label of {task.name} has {task.label_channels} "
            f"number(s) per pixel; save it as {task.kind.label_form}"
        )
    if values.shape[:2] != size:
        height, width = values.shape[:2]
        raise UserError(
            f"{path}: {height}x{width}, but the image is {size[0]}x{size[1]}; save the label in the size of its image"
        )
    try:
        return task.kind.read_label(values, zero_is_void).astype(task.label_dtype)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _check_turned(image: pathlib.Path, orientation: int | None, label: pathlib.Path, size: tuple[int, int]) -> None:
    """Raises UserError for an image turned by its EXIF orientation whose label has none and fits either way."""
    if orientation in (None, 1) or (orientation > 4 and size[0] != size[1]) or images.orientation(label):
        return
    raise UserError(
        f"{image}: EXIF orientation {orientation} turns this image, but {label} has none, so it is unknown whether the "
        "label is turned; save the image as it should be seen, without EXIF orientation"
    )


class FolderSource:
    """One split of a folder; see `records.Source`. An example has no entry for a label that is missing.

    Attributes:
      files: id of each example, and its files: "image", and one per task that has a label.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, Mapping[str, pathlib.Path]]],
        tasks: Sequence[Task],
        largest: tuple[float, float],
        zero_is_void: Sequence[str],
    ):
        """Holds the files that `source` found.

        Args:
          files: id of each example, and its files: "image", and one per task that has a label.
          tasks: all tasks of the split.
          largest: height and width; larger images are downscaled to fit.
          zero_is_void: names of the tasks in whose class maps 0 is unlabelled.
        """
        self.labels = tuple(task.name for task in tasks)
        self.files = files
        self._tasks = tasks
        self._largest = largest
        self._zero_is_void = zero_is_void

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Example:
        """See `records.Source.load`."""
        example_id, files = self.files[index]
        image, orientation = images.read_oriented(files["image"])
        size = (image.shape[0], image.shape[1])
        example: Example = {"id": example_id, "image": image}
        labelled = [task for task in self._tasks if task.name in files]
        for task in labelled:
            void = task.name in self._zero_is_void
            example[task.name] = read_label(files[task.name], task, size, zero_is_void=void)
            _check_turned(files["image"], orientation, files[task.name], size)
        factor = min(1.0, self._largest[0] / size[0], self._largest[1] / size[1])
        return transforms.downscale(example, labelled, factor)


def source(config: ConfigDict, split: str) -> FolderSource:
    """A split of the folder `config.data_dir`; the file SPLIT.txt lists its images.

    config: the `dataset` part of the config. Images that still exceed `image_size` after `downscale` are downscaled
    further until they fit. Only the labels named in `labels` are read.

    Raises:
      UserError: no folder, no id list, an id without image, or a task without any label in the split.
    """
    root = user_paths.local(config.data_dir, "config.dataset.data_dir")
    if storage.is_bucket(root):
        raise UserError(
            f"config.dataset.data_dir={root}: files of a bucket are read from a copy on the disk; set "
            "--config.dataset.local_cache=auto, or a folder for the copy"
        )
    tasks = build(
        config.labels,
        loss_weights=dict.fromkeys(config.labels, 1.0),
        semseg_classes=config.semseg_classes,
        depth_max=config.depth_max,
    )
    ids = _ids(root, split)
    paths = {"image": _paths(root / "images", ids, images.SUFFIXES)}
    paths |= {task.name: _paths(root / task.name, ids, LABEL_SUFFIXES) for task in tasks}
    missing = [example_id for example_id in ids if example_id not in paths["image"]]
    if missing:
        suffix = pathlib.PurePath(missing[0]).suffix.lower() in images.SUFFIXES
        what_to_do = "write ids without suffix" if suffix else "add the image or remove the id"
        what_to_do = "separate sub-folders by / in the ids" if "\\" in missing[0] else what_to_do
        raise UserError(
            f"{root / split}.txt: no image {root / 'images'}/{missing[0]:.200}.jpg, .png or the like "
            f"({len(missing)} of {len(ids)} ids have none); {what_to_do}"
        )
    for task in tasks:
        if task.name in config.zero_is_void and not task.class_names:
            raise UserError(f"config.dataset.zero_is_void: {task.name!r} has no classes, name tasks that have")
        if not paths[task.name]:
            raise UserError(
                f"{root / task.name}: no label of {task.name}, ID.png or ID.npy, for any of the {len(ids)} images of "
                f"{split}.txt; add some or remove {task.name!r} from config.tasks"
            )
    files = [(name, {part: found[name] for part, found in paths.items() if name in found}) for name in ids]
    height, width = config.image_size
    return FolderSource(files, tasks, (height / config.downscale, width / config.downscale), config.zero_is_void)


def fingerprint(config: ConfigDict) -> str:
    """Fingerprint of the folder: a hash of the ids and of the files' suffixes and sizes, not of their content.

    Warns of ids that occur twice in a split, and of those in both splits.
    """
    content = hashlib.sha256()
    splits = {split: source(config, split).files for split in (config.train_split, config.eval_split)}
    for line in repeated_ids({split: [example_id for example_id, _ in files] for split, files in splits.items()}):
        logging.warning(line)
    for split in (config.train_split, config.eval_split):
        for example_id, files in splits[split]:
            sizes = [f"{part}={path.suffix}:{path.stat().st_size}" for part, path in sorted(files.items())]
            content.update("\n".join([split, example_id, *sizes, ""]).encode())
    return f"sizes-{content.hexdigest()[:32]}"


def _ids(root: pathlib.Path, split: str) -> list[str]:
    """Ids of a split, in the order of its list."""
    if not root.is_dir():
        raise UserError(f"no folder {root}; set the folder with your data: --config.dataset.data_dir=FOLDER")
    path = root / f"{split}.txt"
    if not path.is_file():
        raise UserError(f"no id list {path}; create it with the ids of the images of {split!r}, one per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, one id per line") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise UserError(f"{path} is empty; add the ids of the images of {split!r}, one per line")
    return ids


def _paths(folder: pathlib.Path, ids: Sequence[str], suffixes: Sequence[str]) -> dict[str, pathlib.Path]:
    """Id -> file, for the ids that have one."""
    # Lists each folder of ids once, because a look-up per file is slow on network file systems. Other folders are not
    # entered: links may lead from there to anywhere.
    present: dict[str, list[str]] = {}
    dangling = set()
    for parent in {os.path.dirname(example_id) for example_id in ids if _stays_inside(example_id)}:
        inside = folder / parent
        for entry in images.entries(inside) if os.path.isdir(inside) else ():  # False too for names that are too long
            missing = entry.is_symlink() and not os.path.exists(entry.path)
            if missing:
                dangling.add(os.path.join(parent, entry.name))
            if not entry.name.startswith(".") and (missing or entry.is_file()):
                stem, suffix = os.path.splitext(entry.name)
                present.setdefault(os.path.join(parent, stem), []).append(suffix)
    spelt = {unicodedata.normalize("NFC", name): name for name in present}
    paths = {}
    for example_id in ids:
        other = spelt.get(unicodedata.normalize("NFC", example_id))
        if example_id not in present and other is not None:
            raise UserError(
                f"{folder}: no file has the id {example_id!a}, but one is named {other!a}, the same in "
                "another Unicode normal form; name ids and files alike"
            )
        found = present.get(example_id, [])
        usable = sorted(suffix for suffix in found if suffix.lower() in suffixes)
        if len(usable) > 1:
            raise UserError(f"{folder / example_id}: there are {' and '.join(usable)}; keep one of them")
        if found and not usable:
            raise UserError(f"{folder / example_id}{found[0]}: convert this file to {' or '.join(suffixes)}")
        if usable and f"{example_id}{usable[0]}" in dangling:
            raise UserError(f"{folder / example_id}{usable[0]}: a link to a file that is missing; restore the file")
        if usable:
            paths[example_id] = folder / f"{example_id}{usable[0]}"
    return paths


def _stays_inside(example_id: str) -> bool:
    """True for ids that name a file below the folder, in its only form."""
    path = pathlib.PurePosixPath(example_id)
    return (
        path.as_posix() == example_id and ".." not in path.parts and not path.is_absolute() and "\0" not in example_id
    )
