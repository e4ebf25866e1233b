"""Reading image and array files: each colour mode exactly, ids as stored, one-line errors, names of results."""

import base64
import errno
import io
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
from PIL import Image, ImageFile, ImageOps
import pytest

from input_pipeline import folder
from taskexpert_jax import images
from taskexpert_jax.errors import UserError
from taskexpert_jax.images import data_uri, list_images, read_image, read_numbers, result_names

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _save(tmp_path: pathlib.Path, name: str, array: np.ndarray, mode: str | None = None, **options) -> pathlib.Path:
    image = Image.fromarray(array)
    if mode is not None:
        image = image.convert(mode)
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)


def test_rgb_is_read_as_it_is(tmp_path, rgb):
    read = read_image(_save(tmp_path, "a.png", rgb))
    assert read.dtype == np.uint8 and read.flags.writeable
    np.testing.assert_array_equal(read, rgb)


def test_grey_is_repeated_in_every_channel(tmp_path, rgb):
    read = read_image(_save(tmp_path, "a.png", rgb[..., 0]))
    np.testing.assert_array_equal(read, np.repeat(rgb[..., :1], 3, axis=2))


def test_bilevel_becomes_black_and_white(tmp_path):
    bits = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    np.testing.assert_array_equal(read_image(_save(tmp_path, "a.png", bits, "1"))[..., 1], bits)


def test_palette_is_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2, 1])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png"), [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    )


def test_palette_transparency_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[10, 20, 30], [255, 255, 255]]])


def test_rgba_is_composited_on_white_exactly(tmp_path):
    alphas = np.array([0, 255, 128, 51], np.uint8)
    rgba = np.stack([np.full(4, 200), np.full(4, 0), np.full(4, 100), alphas], axis=-1).astype(np.uint8)[None]
    # round(c * a / 255 + 255 - a): for c = 200, a = 128 that is 100.39 + 127 -> 227
    expected = [[[255, 255, 255], [200, 0, 100], [227, 127, 177], [244, 204, 224]]]
    np.testing.assert_array_equal(read_image(_save(tmp_path, "a.png", rgba)), expected)


def test_grey_with_alpha_is_composited(tmp_path):
    image = Image.new("LA", (2, 1))
    image.putdata([(100, 0), (100, 255)])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[255] * 3, [100] * 3]])


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    wide = np.array([[0, 257, 25700, 65535, 128, 129]], np.uint16)
    np.testing.assert_array_equal(read_image(_save(tmp_path, "a.png", wide))[..., 0], [[0, 1, 100, 255, 0, 1]])


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image.save(tmp_path / "a.jpg", quality=95)
    read = read_image(tmp_path / "a.jpg")
    assert read.shape == (16, 16, 3)
    np.testing.assert_allclose(read[8, 8], [255, 0, 0], atol=4)


def test_floating_point_grey_is_refused(tmp_path):
    path = _save(tmp_path, "a.tif", np.zeros((3, 4), np.float32))
    with pytest.raises(UserError, match=r"a\.tif: .*8 or 16 bits"):
        read_image(path)


@pytest.mark.parametrize("sign", [np.uint32, np.int32, np.int16])
def test_grey_without_a_fixed_range_is_refused_and_never_blackened(tmp_path, sign):
    data = np.arange(6, dtype=sign).reshape(2, 3)
    path = tmp_path / "a.tif"
    if sign is np.int16:
        Image.fromarray(data.astype(np.uint16)).save(path, tiffinfo={339: 2})  # SampleFormat: signed
    else:
        Image.fromarray(data.astype(np.int32), mode="I").save(path)
    with pytest.raises(UserError, match=r"a\.tif: .*8 or 16 bits"):
        read_image(path)


def test_16_bit_pgm_is_scaled(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + np.array([0, 25700, 65535], ">u2").tobytes())
    assert read_image(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 100, 255]


TURNS = [
    (1, lambda a: a),
    (2, lambda a: a[:, ::-1]),
    (3, lambda a: a[::-1, ::-1]),
    (4, lambda a: a[::-1]),
    (5, lambda a: a.swapaxes(0, 1)),
    (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
    (8, lambda a: np.rot90(a, 1)),
]


@pytest.mark.parametrize(("orientation", "turn"), TURNS)
def test_exif_orientation_is_applied_to_images_and_to_numbers(tmp_path, rgb, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path, "a.png", rgb, exif=exif)
    with Image.open(path) as image:
        np.testing.assert_array_equal(ImageOps.exif_transpose(image), turn(rgb))
    read = read_image(path)
    np.testing.assert_array_equal(read, turn(rgb))
    assert read.flags.c_contiguous and images.orientation(path) == orientation
    np.testing.assert_array_equal(read_numbers(_save(tmp_path, "b.png", rgb[..., 0], exif=exif)), turn(rgb[..., 0]))
    if orientation == 1:
        np.testing.assert_array_equal(read_numbers(path), rgb)
    else:
        with pytest.raises(ValueError, match=f"EXIF orientation {orientation}, which turns no vectors"):
            read_numbers(path)


# --- numbers ---


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_gives_the_ids_stored_whatever_its_bits(tmp_path, bits):
    ids = (np.arange(35) % 2**bits).astype(np.uint8).reshape(5, 7)
    stored = read_numbers(_save(tmp_path, "a.png", ids, bits=bits))
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, ids)


def test_numbers_that_are_no_ids_need_a_range(tmp_path):
    """2 and 4 bits have no standard range; 1 bit is a mask."""
    ids = np.uint8([[0, 1, 1]])
    assert read_numbers(_save(tmp_path, "a.png", ids, bits=1), ids=False).tolist() == [[False, True, True]]
    for bits in (2, 4):
        with pytest.raises(ValueError, match=rf"has {bits} bits per pixel; save it with 8 or 16"):
            read_numbers(_save(tmp_path, "a.png", ids, bits=bits), ids=False)
    with pytest.raises(ValueError, match="is a palette image"):
        read_numbers(_save(tmp_path, "a.png", ids, "P"), ids=False)


def test_a_label_of_another_format_than_png_is_refused(tmp_path):
    """JPEG changes ids."""
    path = _save(tmp_path, "a.jpg", np.uint8([[0, 3]])).rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="none of PNG"):
        read_numbers(path)


@pytest.mark.parametrize("shape", ["(10**12, 10)", "(-1, 3)", "(2, 5)", "(" * 300, "(3,) * 9**9"])
def test_an_array_shorter_than_its_header_says_is_refused(tmp_path, shape):
    """NumPy would allocate the first, and guess the length of the second."""
    if shape.startswith("(10**12"):
        shape = f"({10**12}, 10)"
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(373) + "\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 36)
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$"):
        read_numbers(path)


# --- files ---


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.gif")[0, 0], [255, 0, 0])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.gif", "a.tif", "a.webp"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5])
def test_a_file_cut_short_is_named_in_one_line(tmp_path, name, kept):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    path = _save(tmp_path, name, noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [TypeError, RecursionError, MemoryError, SystemError, struct.error, SyntaxError])
def test_any_exception_of_a_decoder_is_one_line(tmp_path, rgb, monkeypatch, error):
    def load(image):
        raise error("first\nsecond")

    path = _save(tmp_path, "a.png", rgb)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UserError, match=r"a\.png: not a readable image \(first second\); replace"):
        read_image(path)


def test_formats_that_are_not_documented_are_refused(tmp_path, rgb):
    path = _save(tmp_path, "a.dds", rgb).rename(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: .*none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"):
        read_image(path)


def test_a_small_file_that_expands_to_a_huge_image_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (8193, 8192)).save(path)
    assert path.stat().st_size < 20_000
    for read, kind in ((read_image, UserError), (read_numbers, ValueError)):
        with pytest.raises(kind, match=r"8192x8193 pixels, but at most 67 megapixels are read: reduce it"):
            read(path)


def test_warnings_of_pillow_about_metadata_are_not_shown(tmp_path):
    """They name no file, and what they tell of is not used."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=b"\x80\xff")
    code = f"from PIL import Image; Image.open({str(tmp_path / 'a.png')!r}).convert('RGB')"
    reading = f"images.read_image({str(tmp_path / 'a.png')!r})"
    ours = f"from taskexpert_jax import command_line, images; command_line.ended(lambda: {reading}); {code}"
    shown = [
        subprocess.run([sys.executable, "-W", "always", "-c", way], capture_output=True, text=True, cwd=ROOT).stderr
        for way in (code, ours)
    ]
    assert "Palette images with Transparency" in shown[0] and shown[1] == ""


def test_each_unreadable_image_is_logged_in_a_line_and_the_others_are_read(tmp_path, capsys):
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(b"no picture")
    Image.new("RGB", (4, 3)).save(tmp_path / "b.png")
    failures = []
    assert [name for name, _ in images.read_each(list_images(tmp_path), failures)] == ["b"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": not")[0] for line in lines] == [
        f"error: {tmp_path / name}" for name in ("a.png", "c.png")
    ]
    assert [f"error: {failure}" for failure in failures] == lines


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.png", "b.jpg"], ["a", "b"]),
        (["a.png", "a.jpg"], ["a.png", "a.jpg"]),
        (["...png", "b.png"], ["...png", "b.png"]),  # the first's stem is `..`
        (["..png"], ["..png"]),
        ([b"caf\xe9.png", b"caf\xe8.png"], ["caf\\xe9", "caf\\xe8"]),
    ],
)
def test_names_of_results_stay_in_their_folder_and_can_be_shown(files, names):
    assert result_names([pathlib.Path("images") / os.fsdecode(file) for file in files]) == names


def test_a_text_file_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UserError, match=r"a\.png: not a readable image"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"b\.png: no such "):
        read_image(tmp_path / "b.png")


def test_list_images_is_sorted_and_omits_other_files(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.txt", ".hidden.png", "d.tiff"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "linked.png").symlink_to("folder.png")
    (tmp_path / "missing.png").symlink_to("nowhere")  # is named when it is read
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "d.tiff", "missing.png"]
    with pytest.raises(UserError, match=r"missing\.png: no such image"):
        read_image(tmp_path / "missing.png")
    assert list_images(tmp_path / "c.txt") == [tmp_path / "c.txt"]


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    def scandir(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", scandir)  # because root may list every folder
    line = rf"^{tmp_path}: this folder cannot be listed: Permission denied; check its permissions$"
    for listing in (list_images, lambda path: folder._paths(path, ["a"], (".png",))):
        with pytest.raises(UserError, match=line):
            listing(tmp_path)


def test_list_images_says_what_it_looked_for(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}: no images .*\.png"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        list_images(tmp_path / "nowhere")


@pytest.mark.parametrize(("lossless", "kind"), [(True, "png"), (False, "jpeg")])
def test_a_data_uri_is_a_file_of_its_kind(rgb, lossless, kind):
    head, _, content = data_uri(Image.fromarray(rgb), lossless=lossless).partition(",")
    assert head == f"data:image/{kind};base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.format == kind.upper() and image.size == (9, 7)
        assert np.array_equal(image, rgb) == lossless
