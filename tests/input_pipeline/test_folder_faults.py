"""Folder data set: what is wrong in it is said in one line."""

from collections.abc import Callable
import pathlib
import re

import numpy as np
import pytest

from configs import folder as folder_config
from input_pipeline import folder, pipeline, show
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import from_config
from tests.input_pipeline.labelled_folder import ALL, CLASSES, HEIGHT, WIDTH, save


def spoilt(root: pathlib.Path, fault: str) -> None:
    """Introduces one fault."""
    semseg, depth = root / "semseg" / "a" / "5.png", root / "depth" / "a" / "5.npy"
    size = (HEIGHT, WIDTH)
    damage: dict[str, Callable[[], object]] = {
        "no list": (root / "val.txt").unlink,
        "empty list": lambda: (root / "val.txt").write_text("\n"),
        "no image": lambda: (root / "val.txt").write_text("a/5\nb/6\n"),
        "suffix": lambda: (root / "val.txt").write_text("a/5.png\n"),
        "no label": semseg.unlink,
        "two files": lambda: save(semseg.with_suffix(".npy"), np.zeros(size, np.uint8)),
        "format": lambda: semseg.rename(semseg.with_suffix(".tif")),
        "broken png": lambda: semseg.write_bytes(semseg.read_bytes()[:100]),
        "broken npy": lambda: depth.write_bytes(b"not an array"),
        "broken image": lambda: (root / "images/a/5.png").write_bytes(b"not a picture"),
        "size": lambda: save(semseg, np.zeros((HEIGHT, WIDTH + 1), np.uint8)),
        "channels": lambda: save(semseg, np.zeros((*size, 3), np.uint8)),
        "class": lambda: save(semseg, np.full(size, 4, np.uint8)),
        "negative": lambda: (semseg.unlink(), save(semseg.with_suffix(".npy"), np.full(size, -2))),
        "fractions": lambda: (semseg.unlink(), save(semseg.with_suffix(".npy"), np.ones(size))),
        "grey mask": lambda: save(root / "edge/a/5.png", np.full(size, 37, np.uint8)),
        "mixed mask": lambda: save(root / "sal/a/5.png", np.uint8([[0, 1, 255] * (WIDTH // 3)] * HEIGHT)),
        "millimetres": lambda: save(depth, np.linspace(600, 8000, HEIGHT * WIDTH, dtype=np.float32).reshape(size)),
        "near millimetres": lambda: save(depth, np.arange(50, 50 + HEIGHT * WIDTH, dtype=np.float32).reshape(size)),
        "far": lambda: save(depth, np.linspace(100, 300, HEIGHT * WIDTH, dtype=np.float32).reshape(size)),
        "8 bits": lambda: (depth.unlink(), save(depth.with_suffix(".png"), np.ones(size, np.uint8))),
        "long normals": lambda: save(root / "normals/a/5.npy", np.full((*size, 3), 127.0, np.float32)),
    }
    damage[fault]()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("no list", r"no id list \S+/val.txt; .*'val'.* one per line"),
        ("empty list", r"\S+/val.txt is empty; .*'val'"),
        (
            "no image",
            r"\S+/val.txt: no image \S+/images/b/6.jpg, .png or the like \(1 of 2 ids.*; add the image or remove",
        ),
        ("suffix", r"\S+/val.txt: no image .*; write ids without suffix"),
        ("no label", r"\S+/semseg: no label of semseg, .* for any of the 1 images of val.txt; add some or remove"),
        ("two files", r"\S+/semseg/a/5: there are .npy and .png; keep one"),
        ("format", r"\S+/semseg/a/5.tif: convert this file to .png or .npy"),
        ("broken png", r"\S+/semseg/a/5.png: not a readable label \(.*\); replace it, or remove it"),
        ("broken npy", r"\S+/depth/a/5.npy: not a readable label \(.*\); replace it, or remove it"),
        ("broken image", r"\S+/images/a/5.png: not a readable"),
        ("size", r"\S+/semseg/a/5.png: 32x49, .*32x48; .*size of its image"),
        ("channels", r"\S+/semseg/a/5.png: uint8 of shape \(32, 48, 3\), .*semseg has 1 .*; save it as"),
        ("class", r"\S+/semseg/a/5.png: holds 4, .*0 to 3, .*255"),
        ("negative", r"\S+/semseg/a/5.npy: holds -2, .*4 classes"),
        ("fractions", r"\S+/semseg/a/5.npy: holds floating-point"),
        ("grey mask", r"\S+/edge/a/5.png: holds 37; .*0 and 255, .*0 and 1, .*128"),
        ("mixed mask", r"\S+/sal/a/5.png: holds 0, 1, 255; .*0 and 255"),
        (
            "millimetres",
            r"\S+/depth/a/5.npy: depths of 600 to 8000 m, .*depth_max=80 m; .*divide them by 1000",
        ),
        ("near millimetres", r"\S+/depth/a/5.npy: depths of 50 to 1585 m, .*millimetres, divide them by 1000"),
        ("far", r"\S+/depth/a/5.npy: depths of 100 to 300 m, .*if they are metres, set --config.dataset.depth_max"),
        ("8 bits", r"\S+/depth/a/5.png: .*8 bits.*16.*millimetres"),
        ("long normals", r"\S+/normals/a/5.npy: .*beyond 1; "),
    ],
)
def test_a_fault_is_one_line_that_says_what_where_and_what_to_do(config, root, fault, line):
    spoilt(root, fault)
    with pytest.raises(UserError) as raised:
        list(pipeline.eval_batches(config, from_config(config), batch_size=1))
    assert re.match(line, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_folder_is_said_with_the_field_that_names_it(config):
    config.dataset.data_dir = "/nowhere"
    with pytest.raises(UserError, match=r"/nowhere.*--config.dataset.data_dir="):
        folder.source(config.dataset, "train")


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa/5  \r\n\r\n\t4\n", "\ufeff\n a/5\n4".encode(), b"a/5\r4"])
def test_an_id_list_may_have_a_mark_blank_lines_and_any_line_ends(config, root, content):
    (root / "val.txt").write_bytes(content)
    assert [example_id for example_id, _ in folder.source(config.dataset, "val").files] == ["a/5", "4"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a/5\n".encode("utf-16"), r"\S+/val.txt is not UTF-8 text; save it as UTF-8"),
        (b"a\\5\n", r"\S+/val.txt: no image .*; separate sub-folders by / in the ids"),
        (
            "cafe\u0301\n".encode(),
            r"\S+/images: no file has the id 'cafe\\u0301', but one is named 'caf\\xe9', .*normal form",
        ),
    ],
)
def test_ids_in_another_writing_get_a_hint(config, root, content, line):
    (root / "images/a/5.png").rename(root / "images/caf\u00e9.png")
    (root / "val.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"^{line}"):
        folder.source(config.dataset, "val")


def test_a_label_that_is_named_in_another_normal_form_is_not_left_out(config, root):
    (root / "images/a/5.png").rename(root / "images/caf\u00e9.png")
    (root / "semseg/a/5.png").rename(root / "semseg/cafe\u0301.png")
    (root / "val.txt").write_text("4\ncaf\u00e9\n")
    with pytest.raises(UserError, match=r"/semseg: no file has the id 'caf\\xe9', but one is named 'cafe\\u0301'"):
        folder.source(config.dataset, "val")


def test_zero_is_void_is_refused_for_tasks_without_classes(config):
    config.dataset.zero_is_void = ("semseg", "depth")
    with pytest.raises(UserError, match=r"zero_is_void: 'depth' has no classes"):
        folder.source(config.dataset, "val")


def test_ids_that_occur_twice_or_in_both_splits_are_warned_of_once(config, root, capsys):
    pipeline.record_fingerprint(config)
    assert capsys.readouterr().err == ""
    config.dataset.fingerprint = ""
    (root / "train.txt").write_text("4\n1\na/2\n1\n4\n1\n")
    (root / "val.txt").write_text("a/5\na/2\n")
    pipeline.record_fingerprint(config)
    assert capsys.readouterr().err.splitlines() == [
        "warning: train lists 2 id(s) more than once, first '4': they count each time",
        "warning: train and val share 1 id(s), first 'a/2': scores will be too good",
    ]
    assert show.check(config) == []
    assert "warning: train and val share 1 id(s), first 'a/2'" in capsys.readouterr().out


def test_the_fingerprint_tells_folders_apart(root: pathlib.Path) -> None:
    config = folder_config.get_config("tiny").dataset
    config.data_dir, config.labels, config.semseg_classes = str(root), ALL, CLASSES
    before = folder.fingerprint(config)
    assert folder.fingerprint(config) == before
    (root / "semseg" / "3.b.png").unlink()
    without_label = folder.fingerprint(config)
    (root / "train.txt").write_text("1\na/2\n4\n")
    assert len({before, without_label, folder.fingerprint(config)}) == 3
