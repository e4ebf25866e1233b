"""Archive of PASCAL-Context's multi-task copy: its layout, and decoding of its files into labels.

Layout: `ImageSets/Context/{train,val}.txt` one id per line; for each id `JPEGImages/ID.jpg`, at most 500x500;
`semseg/VOC12/ID.png` or else `semseg/pascal-context/ID.png`, 0 background and 1..20 classes, 255 void;
`human_parts/ID.mat`, PASCAL-Part's struct `anno`; `sal_distill/ID.png`, salient above 127; `normals_distill/ID.png`,
n = 2*v/255 - 1; `pascal-context/trainval/ID.mat`, `LabelMap` of 459 context classes, from which boundaries and the
valid pixels of the normals are computed.

Labels of the multi-task benchmark: VOC's classes, boundaries of the context labels, human parts of PASCAL-Part, and
normals and saliency distilled from other models. Works without TensorFlow.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import pathlib

import cv2
import numpy as np

from input_pipeline import archives, class_names, matlab
from input_pipeline.archives import AGAIN, Problems
from taskexpert_jax.tasks.metrics.boundary.candidates import region_boundaries
from taskexpert_jax.tasks.metrics.boundary.thinning import thin

cv2.setNumThreads(1)  # examples are read in parallel, so threads within one example only compete

FOLDER = "PASCALContext"
GIVEN = "PASCALContext.tar.gz or the folder extracted from it"  # what --archive takes
ID_FILES = {"train": "ImageSets/Context/train.txt", "val": "ImageSets/Context/val.txt"}
PUBLISHED_COUNTS = {"train": 4998, "val": 5105}
MAX_SIZE = 500  # pixels, longest side of an image
CLASSES = class_names.VOC
VOID = 255
CONTEXT_CLASSES = 459  # of LabelMap, numbered from 1
PERSON = 15  # class index of persons in PASCAL-Part

# fmt: off
# Name of a person's part in PASCAL-Part -> label among the six of `tasks.HUMAN_PARTS`.
_PERSON_PARTS = {
    part: number
    for number, parts in enumerate(
        (
            ("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"),  # head
            ("neck", "torso"),  # torso
            ("luarm", "ruarm"),  # upper arm
            ("lhand", "llarm", "rhand", "rlarm"),  # lower arm
            ("luleg", "ruleg"),  # upper leg
            ("lfoot", "llleg", "rfoot", "rlleg"),  # lower leg
        ),
        start=1,
    )
    for part in parts
}
# Context classes with valid normals: those that also occur in NYUD, on which the normals' teacher was trained.
NORMALS_CLASSES = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56,
    59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124,
    135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213,
    215, 216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269,
    272, 273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323,
    329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403,
    405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
)
# fmt: on
_HAS_NORMALS = np.isin(np.arange(CONTEXT_CLASSES + 1), NORMALS_CLASSES)


def members(example_id: str) -> dict[str, tuple[str, ...]]:
    """Part of an example -> its candidate files in the archive; the first that exists is used."""
    return {
        "image": (f"JPEGImages/{example_id}.jpg",),
        "semseg": (f"semseg/VOC12/{example_id}.png", f"semseg/pascal-context/{example_id}.png"),
        "human_parts": (f"human_parts/{example_id}.mat",),
        "sal": (f"sal_distill/{example_id}.png",),
        "normals": (f"normals_distill/{example_id}.png",),
        "edge": (f"pascal-context/trainval/{example_id}.mat",),
    }


def read_example(root: pathlib.Path, example_id: str) -> dict[str, np.ndarray | bytes]:
    """Reads and checks all files of one example; returns its parts as they are stored.

    Returns:
      image: the bytes of the JPEG file. Labels of its size (h,w): semseg (h,w,1) uint8, void 255; human_parts (h,w,1)
      uint8, 0 background, all 0 for an image without persons; sal and edge (h,w,1) uint8, 0 or 1; edge_benchmark
      (h,w,1) uint8, 0 or 1, the boundaries that odsF is computed on; normals (h,w,3) float16, 0 where invalid.

    Raises:
      Problems: a file is missing, damaged, or has values out of range.
    """
    files = {part: _present(root, alternatives) for part, alternatives in members(example_id).items()}
    read = {
        "image": _read_image,
        "semseg": _read_classes,
        "human_parts": _read_human_parts,
        "sal": functools.partial(archives.read_picture, channels=1),
        "normals": functools.partial(archives.read_picture, channels=3),
        "edge": _read_context,
    }
    decoded = archives.read_all({part: functools.partial(read[part], root, file) for part, file in files.items()})
    size = decoded["image"].shape[:2]
    if max(size) > MAX_SIZE:
        raise Problems(
            [
                f"{files['image']} is {size[0]}x{size[1]}: another copy of PASCAL-Context; get the multi-task copy "
                f"with images of at most {MAX_SIZE}x{MAX_SIZE}"
            ]
        )
    context = decoded["edge"]
    labels = {
        "semseg": decoded["semseg"],
        "human_parts": decoded["human_parts"],
        "sal": saliency(decoded["sal"]),
        "normals": normals(decoded["normals"], context),
        "edge": boundaries(context),
        "edge_benchmark": region_boundaries(context),
    }
    resized = {part: _resized(label, size, cubic=part == "normals") for part, label in labels.items()}
    stored = {part: label.astype(np.float16 if part == "normals" else np.uint8) for part, label in resized.items()}
    return {"image": archives.read_bytes(root, files["image"]), **stored}


def boundaries(context: np.ndarray) -> np.ndarray:
    """Boundaries (h,w) bool of context labels (h,w): non-zero pixels of their Laplacian, thinned."""
    # OpenCV's default: 3x3, four neighbours, mirrored at the border; exact in float32.
    return thin(np.asarray(cv2.Laplacian(context, cv2.CV_32F)) != 0)


def normals(coded: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Decodes normals (h,w,3) uint8 to float32, n = 2 * v / 255 - 1; 0 at context classes without valid normals.

    context: context labels (h,w); another size is resized by nearest neighbour.
    """
    valid = _resized(_HAS_NORMALS[context].astype(np.uint8), coded.shape[:2]) != 0
    return np.where(valid, 2 * coded.astype(np.float32) / 255 - 1, np.float32(0))


def saliency(shares: np.ndarray) -> np.ndarray:
    """Binary saliency, uint8, 0 or 1: the teacher's probability, stored as bytes, above one half."""
    return (shares > 255 // 2).astype(np.uint8)


def human_parts(annotation: np.ndarray) -> np.ndarray:
    """Part labels of all persons, (h,w) uint8, 0 background; (1,1) if no person has parts.

    annotation: PASCAL-Part's struct `anno` as read by SciPy; later parts and persons overwrite earlier ones.

    Raises:
      KeyError: the name of a missing field.
      ValueError: an unknown part, or masks that are empty or differ in size.
    """
    label = None
    for name, mask in _parts_of_persons(annotation):
        if name not in _PERSON_PARTS:
            raise ValueError(f"a person with the part {name!r}, which is no part of PASCAL-Part")
        label = np.zeros(mask.shape, np.uint8) if label is None else label
        if mask.shape != label.shape or mask.ndim != 2 or not mask.size:
            sizes = " and ".join("x".join(map(str, shape)) for shape in dict.fromkeys((label.shape, mask.shape)))
            raise ValueError(f"masks of {sizes}, which should all have the size of the image")
        label[mask != 0] = _PERSON_PARTS[name]
    return np.zeros((1, 1), np.uint8) if label is None else label


def _parts_of_persons(annotation: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and mask of all parts of all persons in PASCAL-Part's struct `anno`, in order."""
    for image in _structs(annotation, "anno", ("objects",)):
        for found in _structs(image["objects"], "anno.objects", ("class_ind", "parts")):
            if np.ravel(found["class_ind"]).tolist() == [PERSON]:
                for part in _structs(found["parts"], "anno.objects.parts", ("part_name", "mask")):
                    yield "".join(map(str, np.ravel(part["part_name"]))), np.asarray(part["mask"])


def _structs(array: np.ndarray, path: str, fields: Sequence[str]) -> list[Mapping[str, np.ndarray]]:
    """Structs of a struct array as SciPy reads it; none for MATLAB's empty array [].

    Raises:
      KeyError: a field is missing.
    """
    if not array.size:
        return []
    for field in fields:
        if field not in (array.dtype.names or ()):
            raise KeyError(f"{path}.{field}")
    return list(array.flat)


def _resized(label: np.ndarray, size: tuple[int, ...], *, cubic: bool = False) -> np.ndarray:
    """Resizes a label (h,w) or (h,w,c) to (height, width), by nearest neighbour or `cubic`; returns (h,w,c)."""
    if label.shape[:2] != size:
        # The same call as the benchmark, because its INTER_NEAREST takes the upper-left pixel.
        label = label.astype(np.uint8) if label.dtype == np.bool_ else label
        label = cv2.resize(label, size[::-1], interpolation=cv2.INTER_CUBIC if cubic else cv2.INTER_NEAREST)
    return label if label.ndim == 3 else label[..., None]


def _present(root: pathlib.Path, files: Sequence[str]) -> str:
    """The first file that exists, or all names joined by " or " for the message that none exists."""
    return next((file for file in files if (root / file).is_file()), " or ".join(files))


def _read_image(root: pathlib.Path, member: str) -> np.ndarray:
    image = archives.read_picture(root, member, 3)
    if not archives.read_bytes(root, member).startswith(b"\xff\xd8"):  # stored unchanged, decoded as JPEG
        raise Problems([f"{member} is an image but not a JPEG file; {AGAIN}"])
    return image


def _read_classes(root: pathlib.Path, member: str) -> np.ndarray:
    stored = archives.read_picture(root, member, 1, ids=True)
    if np.any(wrong := (stored >= len(CLASSES)) & (stored != VOID)):
        last = len(CLASSES) - 1
        raise Problems([f"{member} has class {stored[wrong][0]}, beyond 0 to {last} and {VOID} (void); {AGAIN}"])
    return stored


def _read_context(root: pathlib.Path, member: str) -> np.ndarray:
    """Context labels (h,w) uint16, 0 to 459."""
    stored = _read_variable(root, member, "LabelMap")
    if stored.ndim != 2 or not stored.size or stored.dtype.kind not in "buif":
        raise Problems([f"{member} has a LabelMap of {stored.dtype} {stored.shape}, not (height, width); {AGAIN}"])
    with np.errstate(invalid="ignore"):  # NaN is reported below
        context = stored.astype(np.uint16)
    if np.any(wrong := (context != stored) | (context > CONTEXT_CLASSES)):
        value = stored[wrong][0]
        raise Problems([f"{member} has the label {value} in LabelMap, beyond 0 to {CONTEXT_CLASSES}; {AGAIN}"])
    return context


def _read_human_parts(root: pathlib.Path, member: str) -> np.ndarray:
    annotation = _read_variable(root, member, "anno")
    try:
        return human_parts(annotation)
    except KeyError as error:
        raise Problems([f"{member} has no field {error.args[0]}; {AGAIN}"]) from error
    except ValueError as error:
        raise Problems([f"{member} has {error}; {AGAIN}"]) from error


def _read_variable(root: pathlib.Path, member: str, name: str) -> np.ndarray:
    """Variable `name` of a MATLAB file, see `matlab.read_variable`."""
    content = archives.read_bytes(root, member)
    try:
        stored = matlab.read_variable(content, name)
    except ValueError as error:
        raise Problems([f"{member} is corrupt, it does not load as a MATLAB file ({error}); {AGAIN}"]) from error
    if stored is None:
        raise Problems([f"{member} has no field {name}; {AGAIN}"])
    return stored
