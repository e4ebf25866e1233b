"""Reading image files: each colour mode exactly, one-line errors for unreadable files, and data URIs."""

import base64
import io
import pathlib

import numpy as np
from PIL import Image
import pytest

from taskexpert_jax.errors import UserError
from taskexpert_jax.images import data_uri, list_images, read_image


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


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, rgb, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read_image(_save(tmp_path, "a.png", rgb, exif=exif)), turn(rgb))


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
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "d.tiff"]
    assert list_images(tmp_path / "c.txt") == [tmp_path / "c.txt"]


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
