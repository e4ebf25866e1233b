"""Image and array files: lists and reads a user's files, and embeds images in HTML pages."""

import base64
from collections.abc import Iterator, Sequence
import io
import pathlib
import struct
import tokenize

import numpy as np
from PIL import Image, ImageOps

from taskexpert_jax.errors import UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")

# Pillow's errors for files that are not images, truncated or corrupt: a broken PNG header is a SyntaxError.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def list_images(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The image files at `path`: the file itself, or the images in the folder (without sub-folders), sorted by name.

    In a folder, images are files with one of `SUFFIXES`, upper or lower case; hidden files are omitted. A single file
    may have any suffix.

    Raises:
      UserError: nothing at `path`, or a folder without images.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give an image or a folder of images")
    found = sorted(
        entry
        for entry in path.iterdir()
        if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )
    if not found:
        raise UserError(f"{path}: no images in this folder; supported suffixes: {' '.join(SUFFIXES)}")
    return found


def read_image(path: str | pathlib.Path) -> np.ndarray:
    """Reads an image as (H, W, 3) uint8 sRGB, with its EXIF orientation applied.

    All colour modes become RGB; transparency is composited on white; 16-bit grey is scaled to 8 bits (65535 -> 255).
    For an animation the first frame is read.

    Raises:
      UserError: the file is missing, not an image, truncated, or without a fixed range (floating-point grey).
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable image ({_first_line(error)}); replace or remove it") from error


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
    """Yields (name, image) of each readable file, and appends the errors of the others to `failures`.

    Names are for folders of results: file names without suffix, or with it if two would otherwise be the same.
    """
    whole = len({path.stem for path in paths}) < len(paths)
    for path in paths:
        try:
            image = read_image(path)
        except UserError as error:
            failures.append(error)
        else:
            yield path.name if whole else path.stem, image


def data_uri(image: Image.Image, *, lossless: bool) -> str:
    """Encodes an image as a `data:` URI to embed in a page: PNG if lossless, else JPEG of quality 85."""
    file = io.BytesIO()
    if lossless:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=85)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def read_numbers(path: pathlib.Path, *, palettes: bool = True) -> np.ndarray:
    """Reads the stored values of a .npy file or an image, (h, w) or (h, w, c).

    Palette images give their indices, 16-bit grey all bits, 16-bit RGB the upper 8.

    Raises:
      ValueError: a file that is missing, damaged or of another format, or a palette image unless `palettes`.
    """
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        with Image.open(path) as image:
            if palettes or image.mode != "P":
                return np.asarray(image)
    except (*UNREADABLE, tokenize.TokenError, MemoryError) as error:  # the last two: damaged .npy headers
        raise ValueError(_first_line(error)) from error
    raise ValueError("is a palette image, whose values are indices of colours; save it as grey or RGB")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ValueError("floating-point grey has no fixed range: save it with 8 or 16 bits")
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
