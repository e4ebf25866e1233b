"""PASCAL-Context's files: labels follow their definitions for all file types and sizes; faults are reported."""

from collections.abc import Callable
import pathlib
import re
from typing import Any

import cv2
import numpy as np
import pascal_layout
from pascal_layout import PERSON, SHEEP, save_image, save_matrix
from PIL import Image
import pytest
from skimage import morphology

from input_pipeline import archives, pascal_archive

ID = "2008_000003"  # an example with persons and with a VOC mask


def read(layout: pathlib.Path, example_id: str = ID) -> dict[str, Any]:
    return pascal_archive.read_example(layout, example_id)


def faults(layout: pathlib.Path, example_id: str = ID) -> tuple[str, ...]:
    with pytest.raises(archives.Problems) as caught:
        read(layout, example_id)
    return caught.value.lines


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return pascal_layout.write(tmp_path / "PASCALContext")


def test_boundaries_of_random_maps_follow_the_definition() -> None:
    """Regions of all sizes: several may meet at a pixel, where the Laplacian may cancel to 0."""
    random = np.random.default_rng(0)
    for scale in (1, 2, 3, 7, 20):
        for classes in (2, 3, 459):
            coarse = random.integers(1, classes + 1, (80 // scale + 1, 90 // scale + 1)).astype(np.uint16)
            context = np.kron(coarse, np.ones((scale, scale), np.uint16))[:80, :90]
            padded = np.pad(context.astype(np.int64), 1, mode="reflect")
            laplacian = (
                padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * padded[1:-1, 1:-1]
            )
            np.testing.assert_array_equal(pascal_archive.boundaries(context), morphology.thin(laplacian != 0))


def test_the_benchmark_has_boundaries_of_its_own(layout: pathlib.Path) -> None:
    """Pixels whose context label differs from the pixel to the right, below, or diagonally below right."""
    context = np.zeros((30, 40), np.uint16) + 1
    context[10:, 20:] = 7
    save_matrix(layout / "pascal-context" / "trainval" / f"{ID}.mat", LabelMap=context)
    expected = np.zeros((30, 40), np.uint8)
    expected[9, 19:] = 1
    expected[9:, 19] = 1
    np.testing.assert_array_equal(read(layout)["edge_benchmark"][..., 0], expected)


def human_parts(layout: pathlib.Path, anno: object) -> np.ndarray:
    """Label (h,w) of an annotation, written to a file and read."""
    save_matrix(layout / "human_parts" / f"{ID}.mat", anno=anno)
    return read(layout)["human_parts"][..., 0]


def mask(top: int, bottom: int, dtype: type = np.uint8, on: float = 1) -> np.ndarray:
    """Mask of 30x40 pixels that is `on` in rows top to bottom."""
    rows = np.zeros((30, 40), dtype)
    rows[top:bottom] = on
    return rows


def test_each_name_of_a_part_has_its_number(layout: pathlib.Path) -> None:
    numbers = {name: number for number, names in pascal_layout.PARTS.items() for name in names}
    assert len(numbers) == 24
    parts = [(name, mask(row, row + 1)) for row, name in enumerate(numbers)]
    label = human_parts(layout, pascal_layout.annotation([(PERSON, parts)]))
    np.testing.assert_array_equal(label[:, 0], [*numbers.values(), *[0] * 6])


def test_later_parts_and_persons_cover_earlier_ones(layout: pathlib.Path) -> None:
    first = (PERSON, [("torso", mask(0, 20)), ("head", mask(0, 8))])
    second = (PERSON, [("lfoot", mask(5, 12)), ("luleg", mask(10, 15))])
    label = human_parts(layout, pascal_layout.annotation([first, second]))
    np.testing.assert_array_equal(label[:, 7], [1] * 5 + [6] * 5 + [5] * 5 + [2] * 5 + [0] * 10)


def test_only_parts_of_persons_count(layout: pathlib.Path) -> None:
    sheep = (SHEEP, [("head", mask(0, 30)), ("lfuleg", mask(3, 9))])
    objects = [(PERSON, []), sheep, (PERSON, [("neck", mask(4, 6))]), sheep, (SHEEP, [])]
    label = human_parts(layout, pascal_layout.annotation(objects))
    np.testing.assert_array_equal(label[:, 0], [0] * 4 + [2] * 2 + [0] * 24)


@pytest.mark.parametrize(
    "objects", [[], [(PERSON, [])], [(SHEEP, [("head", mask(0, 30))])], [(PERSON, [("head", mask(0, 0))])]]
)
def test_without_parts_of_persons_the_label_is_empty(layout: pathlib.Path, objects: pascal_layout.Objects) -> None:
    label = human_parts(layout, pascal_layout.annotation(objects))
    np.testing.assert_array_equal(label, np.zeros((30, 40)))


def test_matlabs_empty_array_stands_for_no_objects_and_no_parts(layout: pathlib.Path) -> None:
    nobody, torso = pascal_layout.annotation([]), (PERSON, [("torso", mask(0, 9))])
    nobody["objects"][0, 0] = np.zeros((0, 0))
    assert not human_parts(layout, nobody).any()
    somebody = pascal_layout.annotation([(PERSON, []), torso])
    somebody["objects"][0, 0]["parts"][0, 0] = np.zeros((0, 0))
    np.testing.assert_array_equal(human_parts(layout, somebody)[:, 0], [2] * 9 + [0] * 21)


def test_a_missing_class_is_none_of_persons(layout: pathlib.Path) -> None:
    anno = _person(("head", mask(0, 9)))
    anno["objects"][0, 0]["class_ind"][0, 0] = np.zeros((0, 0))
    assert not human_parts(layout, anno).any()


@pytest.mark.parametrize(("dtype", "on"), [(np.uint8, 1), (np.uint8, 255), (bool, 1), (np.float64, 1), (np.int16, -1)])
def test_masks_of_any_type_are_on_where_they_are_not_zero(layout: pathlib.Path, dtype: type, on: float) -> None:
    label = human_parts(layout, pascal_layout.annotation([(PERSON, [("rfoot", mask(2, 5, dtype, on))])]))
    np.testing.assert_array_equal(label[:, 0], [0] * 2 + [6] * 3 + [0] * 25)


def test_objects_may_stand_below_each_other(layout: pathlib.Path) -> None:
    anno = pascal_layout.annotation([(PERSON, [("head", mask(0, 9))]), (PERSON, [("neck", mask(9, 20))])])
    anno["objects"][0, 0] = anno["objects"][0, 0].T
    np.testing.assert_array_equal(human_parts(layout, anno)[:, 0], [1] * 9 + [2] * 11 + [0] * 10)


def test_the_mask_of_voc_is_preferred(layout: pathlib.Path) -> None:
    save_image(layout / "semseg" / "pascal-context" / f"{ID}.png", np.full((30, 40), 7, np.uint8))
    np.testing.assert_array_equal(read(layout)["semseg"][..., 0], pascal_layout.example(ID)["semseg"])
    (layout / "semseg" / "VOC12" / f"{ID}.png").unlink()
    np.testing.assert_array_equal(read(layout)["semseg"], np.full((30, 40, 1), 7))


def test_other_kinds_of_files_decode_to_the_same_labels(layout: pathlib.Path) -> None:
    """Palette images of VOC; doubles, MATLAB's default; context label 0, which is unlabelled."""
    expected, held = read(layout), pascal_layout.example(ID)
    palette = Image.fromarray(held["semseg"])
    palette.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    palette.save(layout / "semseg" / "VOC12" / f"{ID}.png")
    save_matrix(layout / "pascal-context" / "trainval" / f"{ID}.mat", LabelMap=held["context"].astype(np.float64))
    parts = read(layout)
    assert all(np.array_equal(parts[part], expected[part]) for part in expected)
    save_matrix(layout / "pascal-context" / "trainval" / f"{ID}.mat", LabelMap=np.zeros((30, 40), np.uint16))
    assert not read(layout)["normals"].any() and not read(layout)["edge"].any()


def nearest(label: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest neighbour that takes the upper-left pixel, as the protocol's resize."""
    rows = np.arange(height) * label.shape[0] // height
    columns = np.arange(width) * label.shape[1] // width
    return label[rows][:, columns]


@pytest.mark.parametrize("size", [(31, 40), (15, 20), (60, 80), (500, 3)])
def test_labels_of_another_size_are_resized_to_the_image(layout: pathlib.Path, size: tuple[int, int]) -> None:
    """Decoded at their own size, then resized by nearest neighbour, normals by cubic interpolation."""
    small, held = read(layout), pascal_layout.example(ID, *size)
    save_image(layout / "semseg" / "VOC12" / f"{ID}.png", held["semseg"])
    np.testing.assert_array_equal(read(layout)["semseg"][..., 0], nearest(held["semseg"], 30, 40))
    save_image(layout / "sal_distill" / f"{ID}.png", held["sal"])
    np.testing.assert_array_equal(read(layout)["sal"][..., 0], nearest(held["sal"] > 127, 30, 40))
    save_matrix(layout / "human_parts" / f"{ID}.mat", anno=pascal_layout.annotation(held["objects"]))
    parts = nearest(pascal_layout.human_parts(held["objects"], *size), 30, 40)
    np.testing.assert_array_equal(read(layout)["human_parts"][..., 0], parts)
    np.testing.assert_array_equal(read(layout)["normals"], small["normals"])  # unchanged so far
    np.testing.assert_array_equal(read(layout)["edge"], small["edge"])
    save_matrix(layout / "pascal-context" / "trainval" / f"{ID}.mat", LabelMap=held["context"])
    edges = morphology.thin(np.abs(cv2.Laplacian(held["context"], cv2.CV_64F)) > 0)
    np.testing.assert_array_equal(read(layout)["edge"][..., 0], nearest(edges, 30, 40))
    context = nearest(held["context"], 30, 40)  # another size than the normals
    valid = np.isin(context, pascal_archive.NORMALS_CLASSES)
    np.testing.assert_array_equal((read(layout)["normals"] != 0).any(axis=-1), valid)
    save_image(layout / "normals_distill" / f"{ID}.png", held["normals"])
    valid = np.isin(held["context"], pascal_archive.NORMALS_CLASSES)[..., None]
    vectors = cv2.resize((2.0 * held["normals"] / 255 - 1) * valid, (40, 30), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(read(layout)["normals"].astype(np.float64), vectors, rtol=0, atol=1e-3)


def _cut(share: float) -> Callable[[pathlib.Path], None]:
    def cut(path: pathlib.Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return cut


def _flip_a_bit(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _save(**variables: Any) -> Callable[[pathlib.Path], None]:
    return lambda path: save_matrix(path, **variables)


def _draw(array: np.ndarray) -> Callable[[pathlib.Path], None]:
    return lambda path: save_image(path, array)


def _without(*path_of_fields: str) -> np.ndarray:
    """Annotation of a person, with the last field of the path renamed."""
    anno = pascal_layout.annotation([(PERSON, [("head", mask(0, 9))])])
    structs = anno
    for field in path_of_fields[:-1]:
        structs = structs[field][0, 0]
    structs.dtype.names = tuple("other" if name == path_of_fields[-1] else name for name in structs.dtype.names)
    return anno


def _person(*parts: tuple[str, np.ndarray]) -> np.ndarray:
    return pascal_layout.annotation([(PERSON, parts)])


def _label_map(value: float, dtype: type = np.uint16) -> np.ndarray:
    context = np.full((30, 40), 7, dtype)
    context[3, 4] = value
    return context


JPEG, VOC, PART = f"JPEGImages/{ID}.jpg", f"semseg/VOC12/{ID}.png", f"human_parts/{ID}.mat"
CONTEXT, SALIENCY = f"pascal-context/trainval/{ID}.mat", f"sal_distill/{ID}.png"
NORMALS = f"normals_distill/{ID}.png"
IMAGE = "is corrupt.*decode"
MATRIX = "is corrupt.*MATLAB"
COLOURS = np.zeros((30, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("member", "damage", "fault"),
    [
        (JPEG, pathlib.Path.unlink, "is missing"),
        (JPEG, _cut(0.9), IMAGE),
        (JPEG, lambda path: path.write_text("<html>not found</html>"), IMAGE),
        (
            JPEG,
            lambda path: Image.fromarray(COLOURS).save(path, "PNG"),
            "is .*not a JPEG",
        ),
        (
            JPEG,
            _draw(np.zeros((480, 640, 3), np.uint8)),
            "is 480x640: .*at most 500x500",
        ),
        (VOC, _flip_a_bit, IMAGE),
        (VOC, _draw(COLOURS), "has 3 channels instead of 1"),
        (
            VOC,
            _draw(np.full((30, 40), 21, np.uint8)),
            r"has class 21, .*0 to 20 and 255 \(void\)",
        ),
        (SALIENCY, pathlib.Path.unlink, "is missing"),
        (SALIENCY, _cut(0.5), IMAGE),
        (NORMALS, pathlib.Path.unlink, "is missing"),
        (NORMALS, _flip_a_bit, IMAGE),
        (CONTEXT, pathlib.Path.unlink, "is missing"),
        (CONTEXT, _cut(0.9), MATRIX),
        (CONTEXT, _flip_a_bit, MATRIX),
        (CONTEXT, lambda path: path.write_bytes(b""), MATRIX),
        (CONTEXT, lambda path: path.write_text("<html>not found</html>" * 9), MATRIX),
        (CONTEXT, _save(Labels=_label_map(7)), "has no field LabelMap;"),
        (
            CONTEXT,
            _save(LabelMap=np.zeros((0, 0))),
            r"has a LabelMap of float64 \(0, 0\)",
        ),
        (
            CONTEXT,
            _save(LabelMap=np.zeros((30, 40, 3), np.uint16)),
            r"has a LabelMap of uint16 \(30, 40, 3\)",
        ),
        (
            CONTEXT,
            _save(LabelMap={"text": 3}),
            r"has a LabelMap of \[\('text', 'O'\)\] \(1, 1\)",
        ),
        (
            CONTEXT,
            _save(LabelMap=_label_map(460)),
            "has the label 460 in LabelMap, .*0 to 459",
        ),
        (
            CONTEXT,
            _save(LabelMap=_label_map(-1, np.int16)),
            "has the label -1 in LabelMap, .*0 to 459",
        ),
        (
            CONTEXT,
            _save(LabelMap=_label_map(np.nan, np.float64)),
            "has the label nan in LabelMap, .*0 to 459",
        ),
        (
            CONTEXT,
            _save(LabelMap=_label_map(6.5, np.float64)),
            "has the label 6.5 in LabelMap, .*0 to 459",
        ),
        (PART, pathlib.Path.unlink, "is missing"),
        (PART, _cut(0.5), MATRIX),
        (PART, _flip_a_bit, MATRIX),
        (PART, _save(annotation=7), "has no field anno;"),
        (PART, _save(anno=7), "has no field anno.objects;"),
        (PART, _save(anno=_without("objects")), "has no field anno.objects;"),
        (PART, _save(anno=_without("objects", "parts")), "has no field anno.objects.parts;"),
        (
            PART,
            _save(anno=_without("objects", "class_ind")),
            "has no field anno.objects.class_ind;",
        ),
        (
            PART,
            _save(anno=_without("objects", "parts", "mask")),
            "has no field anno.objects.parts.mask;",
        ),
        (
            PART,
            _save(anno=_person(("head", mask(0, 9)), ("tail", mask(0, 9)))),
            "has a person with the part 'tail'",
        ),
        (
            PART,
            _save(anno=_person(("head", mask(0, 9)), ("neck", np.ones((30, 41))))),
            "has masks of 30x40 and 30x41",
        ),
        (
            PART,
            _save(anno=_person(("head", np.ones((0, 0))))),
            "has masks of 0x0",
        ),
    ],
)
def test_a_fault_of_a_file_is_named(
    layout: pathlib.Path, member: str, damage: Callable[[pathlib.Path], Any], fault: str
) -> None:
    damage(layout / member)
    (line,) = faults(layout)
    assert re.match(rf"{member} {fault}", line), line


def test_without_either_mask_both_are_named(layout: pathlib.Path) -> None:
    (layout / VOC).unlink()
    context = VOC.replace("VOC12", "pascal-context")
    (line,) = faults(layout)
    assert line.startswith(f"{VOC} or {context} is missing")
    assert pascal_archive.members(ID)["semseg"] == (VOC, context)


def test_all_faults_of_an_example_are_named(layout: pathlib.Path) -> None:
    for member in (JPEG, VOC, PART, SALIENCY, NORMALS, CONTEXT):
        (layout / member).write_bytes(b"")
    assert {line.split()[0] for line in faults(layout)} == {JPEG, VOC, PART, SALIENCY, NORMALS, CONTEXT}


@pytest.mark.parametrize("member", [PART, CONTEXT])
def test_random_damage_to_a_matlab_file_is_a_fault_or_changes_nothing(layout: pathlib.Path, member: str) -> None:
    expected, content = read(layout), (layout / member).read_bytes()
    random, caught = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(random.integers(1, 4)):
            damaged[random.integers(116, len(damaged))] = random.integers(256)  # the header before it is free text
        (layout / member).write_bytes(damaged)
        try:
            parts = read(layout)
        except archives.Problems:
            caught += 1
        else:
            assert all(np.array_equal(parts[part], expected[part]) for part in expected)
    assert caught > 100
