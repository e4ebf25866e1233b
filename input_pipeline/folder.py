"""Your own data: a folder of images, and beside it a folder of labels for each task that has some.

    DATA/train.txt, DATA/val.txt    ids, one a line; an id may contain sub-folders: kitchen/0001
    DATA/images/ID.jpg              or another format that Pillow reads
    DATA/TASK/ID.png or ID.npy      the label, as large as the image; an image may lack it

docs/add_a_dataset.md says how label files are coded; the kind of the task's values (`Task.kind`) reads them.
"""

from collections.abc import Mapping, Sequence
import hashlib
import os
import pathlib

from ml_collections import ConfigDict
import numpy as np

from input_pipeline import transforms
from input_pipeline.records import Example
from taskexpert_jax import images
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import Task, build

LABEL_SUFFIXES = (".png", ".npy")


def read_label(path: pathlib.Path, task: Task, size: tuple[int, int], *, zero_is_void: bool = False) -> np.ndarray:
    """The label of a file: (h,w,label_channels) in the task's `label_dtype`, `Task.missing` where it has none.

    Args:
      path: a .png or .npy file, coded as docs/add_a_dataset.md says.
      task: whose label it is.
      size: height and width of the image.
      zero_is_void: of a map of classes: 0 is unlabelled and the classes count from 1.

    Raises:
      UserError: a file that cannot be read, of another size or number of channels, or with values out of range.
    """
    try:
        values = images.read_numbers(path)
    except ValueError as error:
        raise UserError(f"{path}: not a readable label ({error}); replace it, or remove it") from error
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] != task.label_channels or values.dtype.kind not in "biuf":
        raise UserError(
            f"{path}: {values.dtype} of shape {values.shape}, but a label of {task.name} has {task.label_channels} "
            f"number(s) a pixel; save it as {task.kind.label_form}"
        )
    if values.shape[:2] != size:
        height, width = values.shape[:2]
        raise UserError(
            f"{path}: {height}x{width}, but the image is {size[0]}x{size[1]}; a label must be as large as its image"
        )
    try:
        return task.kind.read_label(values, zero_is_void).astype(task.label_dtype)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


class FolderSource:
    """One split of a folder; see `records.Source`. A label that an image lacks is absent from its example.

    Attributes:
      files: for each example its id, and its file of "image" and of every task that it has a label for.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, Mapping[str, pathlib.Path]]],
        tasks: Sequence[Task],
        largest: tuple[float, float],
        zero_is_void: Sequence[str],
    ):
        """Takes what `source` found.

        Args:
          files: for each example its id, and the files of "image" and of the tasks that it has a label for.
          tasks: the records of all of them.
          largest: height and width that an image is reduced to fit.
          zero_is_void: names of tasks in whose maps 0 is unlabelled.
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
        image = images.read_image(files["image"])
        size = (image.shape[0], image.shape[1])
        example: Example = {"id": example_id, "image": image}
        labelled = [task for task in self._tasks if task.name in files]
        for task in labelled:
            void = task.name in self._zero_is_void
            example[task.name] = read_label(files[task.name], task, size, zero_is_void=void)
        factor = min(1.0, self._largest[0] / size[0], self._largest[1] / size[1])
        return transforms.downscale(example, labelled, factor)


def source(config: ConfigDict, split: str) -> FolderSource:
    """A split of the folder `config.data_dir`: its file SPLIT.txt says which images.

    config: the `dataset` part of the config. Images that, reduced by `downscale`, do not fit `image_size` are reduced
    until they do. Of the folder's labels those named in `labels` are read.

    Raises:
      UserError: no folder, no id list, an id without image, or a task that no image of the split has a label for.
    """
    root = pathlib.Path(config.data_dir).expanduser()
    tasks = build(config.labels, loss_weights=dict.fromkeys(config.labels, 1.0), semseg_classes=config.semseg_classes)
    ids = _ids(root, split)
    paths = {"image": _paths(root / "images", ids, images.SUFFIXES)}
    paths |= {task.name: _paths(root / task.name, ids, LABEL_SUFFIXES) for task in tasks}
    lacking = [example_id for example_id in ids if example_id not in paths["image"]]
    if lacking:
        suffix = pathlib.PurePath(lacking[0]).suffix.lower() in images.SUFFIXES
        what_to_do = "write ids without suffix" if suffix else "add the image or remove the id"
        raise UserError(
            f"{root / split}.txt: no image {root / 'images' / lacking[0]}.jpg, .png or the like "
            f"({len(lacking)} of {len(ids)} ids have none); {what_to_do}"
        )
    for task in tasks:
        if not paths[task.name]:
            raise UserError(
                f"{root / task.name}: no label of {task.name}, ID.png or ID.npy, for any of the {len(ids)} images of "
                f"{split}.txt; add some or remove {task.name!r} from config.tasks"
            )
    files = [(name, {part: found[name] for part, found in paths.items() if name in found}) for name in ids]
    height, width = config.image_size
    return FolderSource(files, tasks, (height / config.downscale, width / config.downscale), config.zero_is_void)


def fingerprint(config: ConfigDict) -> str:
    """What tells this folder from others: a hash of the ids and of the files' names and sizes, not of their content."""
    content = hashlib.sha256()
    for split in (config.train_split, config.eval_split):
        for example_id, files in source(config, split).files:
            sizes = [f"{part}={path.suffix}:{path.stat().st_size}" for part, path in sorted(files.items())]
            content.update("\n".join([split, example_id, *sizes, ""]).encode())
    return f"sizes-{content.hexdigest()[:32]}"


def _ids(root: pathlib.Path, split: str) -> list[str]:
    """The ids of a split, in the order of its list."""
    if not root.is_dir():
        raise UserError(f"no folder {root}; give the one with your data: --config.dataset.data_dir=FOLDER")
    path = root / f"{split}.txt"
    if not path.is_file():
        raise UserError(f"no id list {path}; write into it the ids of the images of {split!r}, one a line")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise UserError(f"{path} is empty; write into it the ids of the images of {split!r}, one a line")
    return ids


def _paths(folder: pathlib.Path, ids: Sequence[str], suffixes: Sequence[str]) -> dict[str, pathlib.Path]:
    """Id -> its file, for the ids that have one."""
    # The folder is listed once: on a network, asking for each file takes long.
    present: dict[str, list[str]] = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        inside = pathlib.Path(parent).relative_to(folder)
        for name in sorted(names):
            if not name.startswith("."):
                stem, suffix = os.path.splitext(name)
                present.setdefault((inside / stem).as_posix(), []).append(suffix)
    paths = {}
    for example_id in ids:
        there = present.get(example_id, [])
        usable = [suffix for suffix in there if suffix.lower() in suffixes]
        if len(usable) > 1:
            raise UserError(f"{folder / example_id}: there are {' and '.join(usable)}; keep one of them")
        if there and not usable:
            raise UserError(f"{folder / example_id}{there[0]}: convert this file to {' or '.join(suffixes)}")
        if usable:
            paths[example_id] = folder / f"{example_id}{usable[0]}"
    return paths
