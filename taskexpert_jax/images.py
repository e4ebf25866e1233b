"""Image and array files: lists and reads a user's files, and embeds images in HTML pages."""

import base64
from collections.abc import Iterator, Sequence
import contextlib
import io
import math
import os
import pathlib
from typing import BinaryIO, NamedTuple

from absl import logging
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from taskexpert_jax import paths, storage
from taskexpert_jax.errors import StoreError, UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's decoders of SUFFIXES; no others are tried
MOST_PIXELS = 2**26  # per image: 67 megapixels; a PNG of 300 kB may hold so many, and their predictions take 1.8 GB

# EXIF orientation -> the upright image, from an array (h, w, ...).
_UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    """Files and folders in a folder; raises UserError without permission to list it."""
    try:
        return list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be listed: {error.strerror}; check its permissions") from error


def list_images(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The image files at `path`: the file itself, or the images in the folder (without sub-folders), sorted by name.

    In a folder, images are files with one of `SUFFIXES`, upper or lower case; hidden files are omitted. Links to files
    that are missing are listed, because reading them names them. A single file may have any suffix.

    Raises:
      UserError: nothing at `path`, or a folder without images or that cannot be listed.
    """
    path = _named(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give an image or a folder of images")
    there = storage.files_in(path) if storage.is_bucket(path) else map(pathlib.Path, entries(path))
    found = sorted(
        entry
        for entry in there
        if entry.suffix.lower() in SUFFIXES
        and not entry.name.startswith(".")
        and (storage.is_bucket(entry) or entry.is_file() or (entry.is_symlink() and not entry.exists()))
    )
    if not found:
        raise UserError(f"{path}: no images in this folder; supported suffixes: {' '.join(SUFFIXES)}")
    return found


def _named(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path that a program's user wrote, or a path of a listing as it is."""
    return path if isinstance(path, pathlib.Path) else paths.local(os.fspath(path), "image")


@contextlib.contextmanager
def decoder_errors() -> Iterator[None]:
    """Raises ValueError, with one line, for any exception in its body: decoders raise all types on damaged files.

    A store that does not give the file says nothing about it: StoreError remains what it is.
    """
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(" ".join(text.split())[:200] or type(error).__name__) from error


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
      image: its first frame.
      rescaled_bits: 2 or 4 for grey PNGs of so many bits, whose values Pillow has rescaled to brightness, 0 to 255.
    """

    image: Image.Image
    rescaled_bits: int | None

    def ids(self) -> np.ndarray:
        """The numbers stored: indices of palettes, and grey without rescaling; uint8 for 1 to 8 bits."""
        numbers = np.asarray(self.image, np.uint8 if self.image.mode == "1" else None)
        return numbers // np.uint8(255 // (2**self.rescaled_bits - 1)) if self.rescaled_bits else numbers


@contextlib.contextmanager
def decoded(file: pathlib.Path | BinaryIO, formats: tuple[str, ...] = FORMATS) -> Iterator[Decoded]:
    """Opens an image and decodes its first frame, for use within the body; errors of the body count as the decoder's.

    Raises:
      ValueError: missing, damaged, in none of the formats, or of more than `MOST_PIXELS`.
    """
    with decoder_errors():
        if isinstance(file, pathlib.Path) and storage.is_bucket(file):
            file = file.open("rb")  # Pillow opens paths of a disk
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError as error:
            raise ValueError(f"is damaged, or none of {', '.join(formats)}") from error
        with image:
            _check_size(image.height, image.width)
            rawmode = image.tile[0].args if image.format == "PNG" and image.tile else None
            image.load()
            yield Decoded(image, {"L;2": 2, "L;4": 4}.get(rawmode) if isinstance(rawmode, str) else None)


def orientation(path: pathlib.Path) -> int | None:
    """EXIF orientation of an image, 1 (upright) to 8; None if it has none, as any other file.

    Raises:
      ValueError: see `decoded`.
    """
    if path.suffix.lower() == ".npy":
        return None
    with decoded(path) as found:
        return _orientation(found.image)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image as (H, W, 3) uint8 sRGB, with its EXIF orientation applied.

    All colour modes become RGB; transparency is composited on white; 16-bit grey is scaled to 8 bits (65535 -> 255).
    For an animation the first frame is read.

    Raises:
      UserError: the file is missing, not an image, truncated, too large, or without a fixed range (grey of 32 bits).
    """
    return read_oriented(_named(path))[0]


def as_rgb(image: str | os.PathLike[str] | Image.Image | np.ndarray) -> np.ndarray:
    """An image of any form as (H, W, 3) uint8: a file, an image of Pillow, or RGB, RGBA or grey (H, W) uint8.

    Files and images of Pillow are converted as in `read_image`.

    Raises:
      UserError: the file is unreadable, see `read_image`, or the array is none of an image; more than `MOST_PIXELS`.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        try:
            with decoder_errors():
                _check_size(image.height, image.width)
                return _upright(image)
        except ValueError as error:
            raise UserError(f"not a readable image ({error})") from error
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image must be a path, an image of Pillow or an array, not {type(image).__name__}")
    if np.ma.is_masked(image):
        raise UserError("the array of an image has masked pixels, of which the model knows nothing: fill them first")
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4) or not image.size:
        raise UserError(
            f"an array of an image must be (H, W, 3) uint8, with values from 0 to 255, not {image.shape} {image.dtype}"
        )
    try:
        _check_size(*image.shape[:2])
    except ValueError as error:
        raise UserError(f"the array of an image has {error}") from error
    return _rgb(Image.fromarray(image[:, :, 0] if image.ndim == 3 and channels == 1 else image))


def read_data(data: bytes) -> np.ndarray:
    """As `read_image`, from the bytes of a file."""
    try:
        with decoded(io.BytesIO(data)) as found:
            return _upright(found.image)
    except ValueError as error:
        raise UserError(f"not a readable image ({error})") from error


def read_oriented(path: pathlib.Path) -> tuple[np.ndarray, int | None]:
    """The result of `read_image`, and the EXIF orientation that was applied, see `orientation`."""
    try:
        with decoded(path) as found:
            return _upright(found.image), _orientation(found.image)
    except StoreError:
        raise
    except ValueError as error:
        if not path.exists():
            raise UserError(f"{path}: no such image") from None
        raise UserError(f"{path}: not a readable image ({error}); replace or remove it") from error


def fit(image: np.ndarray, size: tuple[int, int], largest: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Centres an image in a frame padded with 0, and resizes it to fit where needed.

    The frame has the model's `size` if the image fits, else `largest`. An image that fits and fills at least half of
    `size` in one direction is not resampled, so that predictions for images of a data set equal those of evaluation.

    Args:
      image: (h, w, 3) uint8.
      size: height and width that the model was trained for.
      largest: height and width, at least `size`, of frames for larger images.

    Returns:
      (H, W, 3) uint8, and the window (4,) int32: top, left, height, width of the image in the frame.
    """
    frame_size = size if image.shape[0] <= size[0] and image.shape[1] <= size[1] else largest
    scale = min(frame_size[0] / image.shape[0], frame_size[1] / image.shape[1])
    if scale < 1 or (scale >= 2 and frame_size == size):
        resized = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        resample = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
        image = np.asarray(Image.fromarray(image).resize(resized, resample))
    rows, columns = image.shape[:2]
    top, left = (frame_size[0] - rows) // 2, (frame_size[1] - columns) // 2
    frame = np.zeros((*frame_size, 3), np.uint8)
    frame[top : top + rows, left : left + columns] = image
    return frame, np.array([top, left, rows, columns], np.int32)


def read_each(paths: Sequence[pathlib.Path], failures: list[UserError]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, image) of each readable file; logs the errors of the others and appends them to `failures`.

    Names are those of `result_names`.

    Raises:
      StoreError: a bucket that cannot be read: the next image would fail too.
    """
    for name, path in zip(result_names(paths), paths, strict=True):
        try:
            image = read_image(path)
        except StoreError:
            raise
        except UserError as error:
            logging.error("%s", error)
            failures.append(error)
        else:
            yield name, image


def result_names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Names for the folders of the files' results, which no two share and of which none leads elsewhere.

    They are the file names without suffix, or with it if two would otherwise be the same or one would be `.` or `..`.
    Bytes that are not UTF-8 become `\\xff`, because no page and no terminal can show them.
    """
    stems = {path.stem for path in paths}
    whole = len(stems) < len(paths) or not stems.isdisjoint({".", ".."})
    names = [path.name if whole else path.stem for path in paths]
    return [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]


def data_uri(image: Image.Image, *, lossless: bool) -> str:
    """Encodes an image as a `data:` URI to embed in a page: PNG if lossless, else JPEG of quality 85."""
    file = io.BytesIO()
    if lossless:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=85)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def read_numbers(path: pathlib.Path, *, ids: bool = True) -> np.ndarray:
    """Reads the stored values of a .npy file or a PNG, (h, w) or (h, w, c).

    Grey of 16 bits gives all bits, 16-bit RGB the upper 8. The EXIF orientation is applied to grey and refused for RGB,
    because it does not say in which frame vectors are.

    Args:
      path: a .npy file, or a PNG with any other suffix.
      ids: the values are class ids: a palette PNG gives its indices, and grey of 1, 2 or 4 bits the numbers stored.
        Otherwise such files are refused, except 1 bit, which gives booleans, because their values have no fixed range.

    Raises:
      ValueError: a file that is missing, damaged or of another format, or refused as said above.
    """
    if path.suffix.lower() == ".npy":
        with decoder_errors(), path.open("rb") as file:
            return read_array(file)
    with decoded(path, ("PNG",)) as found:
        if not ids and found.image.mode == "P":
            raise ValueError("is a palette image, whose values are indices of colours; save it as grey or RGB")
        if not ids and found.rescaled_bits:
            raise ValueError(f"has {found.rescaled_bits} bits per pixel; save it with 8 or 16 bits")
        numbers = found.ids() if ids else np.asarray(found.image)
        tag = _orientation(found.image) or 1
        if tag > 1 and numbers.ndim > 2:  # are the vectors those of the upright image? The file does not say
            raise ValueError(f"has the EXIF orientation {tag}, which turns no vectors; save it upright, without it")
        return np.ascontiguousarray(_UPRIGHT[tag](numbers))


def read_array(file: BinaryIO) -> np.ndarray:
    """Reads a .npy file.

    Raises:
      ValueError: damaged, shorter than its header says, or with Python objects.
    """
    with decoder_errors():
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"is a .npy file of version {version[0]}.{version[1]}; save it with np.save")
        shape, _, dtype = readers[version](file)
        start = file.tell()
        there, said = file.seek(0, io.SEEK_END) - start, math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or said > there:  # NumPy would allocate first, or guess a negative length
            raise ValueError(f"is cut short: {there} bytes, but its shape is {shape} of {dtype}")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_size(height: int, width: int) -> None:
    """Raises ValueError for an image without pixels, or with more than are read."""
    if not height * width:
        raise ValueError(f"{height}x{width}, no pixels")
    if height * width > MOST_PIXELS:
        raise ValueError(f"{height}x{width} pixels, but at most {MOST_PIXELS / 1e6:.0f} megapixels are read: reduce it")


def _upright(image: Image.Image) -> np.ndarray:
    """The image as `read_image` returns it."""
    return np.ascontiguousarray(_UPRIGHT[_orientation(image) or 1](_rgb(image)))


def _orientation(image: Image.Image) -> int | None:
    tag = image.getexif().get(ExifTags.Base.Orientation)
    return tag if tag in _UPRIGHT else None


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # Pillow scales PPM to 16 bits
        raise ValueError("grey of 32 bits or with a sign has no fixed range: save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion of 16-bit grey clips at 255 instead of scaling.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        grey = ((wide + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
