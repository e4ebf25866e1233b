"""Any bytes in an image, an array, a MATLAB file or a list of ids give a result or one line."""

from collections.abc import Callable
import functools
import io
import pathlib

from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import scipy.io

from input_pipeline import archives, arrays, folder, pascal_archive
from taskexpert_jax import images
from taskexpert_jax.evaluation.scoring import read_prediction
from taskexpert_jax.tasks import build
from tests.fuzz import leaks, mutate

TASKS = ("semseg", "depth", "normals", "edge")
RECORDS = {
    task.name: task
    for task in build(TASKS, loss_weights=dict.fromkeys(TASKS, 1.0), semseg_classes=("a", "b", "c", "d"))
}
SIZE = (6, 7)
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (*SIZE, 3), np.uint8)
IDS = RNG.integers(0, 4, SIZE, np.uint8)


def picture(array: np.ndarray, form: str, mode: str | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, form, **options)
    return file.getvalue()


def array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def matlab(values: object, name: str, *, compressed: bool) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, {name: values}, do_compression=compressed)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PNGS = [
    picture(COLOURS, "PNG"),
    picture(COLOURS, "PNG", "RGBA", exif=turned()),
    picture(COLOURS, "PNG", "P", transparency=b"\x80" * 9),
    picture(IDS.astype(np.uint16) * 999, "PNG", "I;16"),
    picture(IDS, "PNG", bits=4),
    picture(IDS, "PNG", "1"),
]
OTHERS = [
    picture(COLOURS, "JPEG", exif=turned()),
    picture(COLOURS, "JPEG", "CMYK"),
    picture(COLOURS, "GIF"),
    picture(COLOURS, "BMP"),
    picture(COLOURS, "PPM"),
    picture(IDS, "PPM"),
    picture(COLOURS, "WEBP", lossless=True),
    picture(COLOURS, "TIFF"),
    *(picture(COLOURS, "TIFF", compression=of) for of in ("tiff_lzw", "tiff_adobe_deflate", "packbits")),
]


def annotation() -> np.ndarray:
    """PASCAL-Part's struct of one person with a head."""
    parts = np.array([[("head", IDS)]], [("part_name", object), ("mask", object)])
    fields = [("class", object), ("class_ind", object), ("mask", object), ("parts", object)]
    objects = np.array([[("person", 15, IDS, parts)]], fields)
    return np.array([[("image", objects)]], [("imname", object), ("objects", object)])


def label(name: str, path: pathlib.Path) -> np.ndarray:
    return folder.read_label(path, RECORDS[name], SIZE)


def prediction(name: str, path: pathlib.Path) -> np.ndarray:
    return read_prediction(path, RECORDS[name], SIZE)


def member(read: Callable[..., object], path: pathlib.Path) -> object:
    """Reads a file of an archive."""
    return read(path.parent, path.name)


def id_list(path: pathlib.Path) -> object:
    """Opens a folder data set of two images with classes, whose list of ids is mutated."""
    for name in ("room1", "kitchen/2"):
        for part in ("images", "semseg"):
            file = path.parent / part / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    config = ConfigDict(
        {
            "data_dir": str(path.parent),
            "labels": ("semseg",),
            "semseg_classes": ("a", "b"),
            "image_size": (32, 32),
            "downscale": 1.0,
            "zero_is_void": (),
            "depth_max": 80.0,
        }
    )
    return folder.source(config, path.stem)


def reader(read: Callable[..., object], file: str, *seeds: bytes) -> leaks.Reader:
    repair = mutate.with_png_checksums if file.endswith(".png") else None
    return leaks.Reader(read, file, seeds, repair, most_bytes=2**30)  # images have up to 67 megapixels


READERS = [
    reader(images.read_image, "image.png", *PNGS),
    *(reader(images.read_image, f"image{number}.jpg", content) for number, content in enumerate(OTHERS)),
    reader(functools.partial(label, "semseg"), "semseg.png", *PNGS[-2:]),
    reader(functools.partial(label, "normals"), "normals.png", PNGS[0]),
    reader(functools.partial(label, "depth"), "depth.npy", array(IDS.astype(np.float32))),
    reader(functools.partial(prediction, "edge"), "edge.png", PNGS[-1]),
    reader(functools.partial(prediction, "semseg"), "semseg.npy", array(IDS), array(np.eye(4, dtype=np.float16)[IDS])),
    reader(functools.partial(member, functools.partial(archives.read_picture, channels=3)), "picture.png", *PNGS),
    reader(functools.partial(member, arrays.read_depth), "member.npy", array(IDS.astype(np.float32))),
    *(
        reader(functools.partial(member, read), f"{name}{compressed}.mat", matlab(values, name, compressed=compressed))
        for read, name, values in (
            (pascal_archive._read_context, "LabelMap", IDS),
            (pascal_archive._read_human_parts, "anno", annotation()),
        )
        for compressed in (False, True)
    ),
    reader(id_list, "train.txt", b"room1\nkitchen/2\n"),
    reader(functools.partial(member, archives._read_ids), "ids.txt", b"0003\n0001\n"),
]


def test_damaged_images_arrays_and_lists_end_in_one_line(tmp_path: pathlib.Path) -> None:
    assert leaks.leaks(READERS, tmp_path) == []
