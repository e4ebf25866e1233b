"""Statistics that `prepare` reports of a built data set, for images with known statistics."""

import json
import pathlib
import re

import numpy as np
import nyud_layout
from preparing import build
import pytest

from input_pipeline import nyud, prepare, summary

VERSION = str(nyud.Builder.VERSION)


def _known_frames(root: pathlib.Path) -> pathlib.Path:
    """Layout of one training image, wall above, floor below, void at the left, and one larger evaluation image."""
    layout = nyud_layout.write(root, train=["0001"], val=["0002"], height=10, width=20)
    segmentation = np.full((10, 20), 1, np.uint8)  # wall
    segmentation[5:] = 2  # floor
    segmentation[:, :4] = 0  # void: a fifth
    depth = np.full((10, 20), 2.0, np.float32)
    depth[0] = 0  # invalid: a tenth
    depth[1], depth[2] = 0.5, 7.25
    edge = np.zeros((10, 20), np.uint8)
    edge[5] = 255
    nyud_layout.write_part(layout, "segmentation", "0001", segmentation)
    nyud_layout.write_part(layout, "depth", "0001", depth)
    nyud_layout.write_part(layout, "edge", "0001", edge)
    for folder, array in nyud_layout.frame("0002", 30, 40).items():
        nyud_layout.write_part(layout, folder, "0002", np.zeros_like(array) if folder == "depth" else array)
    return layout


def test_the_summary_has_the_frequencies_of_known_frames(tmp_path: pathlib.Path) -> None:
    lines = prepare.prepare("nyud", _known_frames(tmp_path / "NYUDv2"), tmp_path / "built", allow_subset=True)
    section, cells = "", {}
    for line in lines:
        name, *values = re.split(r"  +", line.strip())
        section = section if line.startswith(" ") else name
        cells[name if section == name else (section, name)] = values
    assert cells["examples"] == ["1", "1"]
    assert cells["published"] == ["795", "654"]
    assert (cells["height"], cells["width"]) == (["10", "30"], ["20", "40"])
    semseg = "semantic segmentation"
    assert cells[semseg, "ignored"][0] == "20.00 %"
    assert cells[semseg, "wall"][0] == cells[semseg, "floor"][0] == "50.00 %"
    assert cells[semseg, "otherprop"][0] == "0.00 %"
    assert cells["depth", "invalid"] == ["10.00 %", "100.00 %"]
    assert cells["depth", "least (m)"] == ["0.50", "-"]
    assert cells["depth", "median (m)"] == ["2.00", "-"]
    assert cells["depth", "greatest (m)"] == ["7.25", "-"]
    assert cells["boundaries", "positive"][0] == "10.00 %"
    assert not [name for name in cells if name in ("left out", "counted, evenly spaced")]
    assert re.fullmatch(rf"built {tmp_path}/built/nyud/{VERSION}: \d+ MiB in \d+ s", lines[-1])


def test_the_record_beside_the_data_holds_the_summary(tmp_path: pathlib.Path) -> None:
    fingerprint = build(_known_frames(tmp_path / "NYUDv2"), tmp_path / "built")
    record = json.loads((tmp_path / "built" / "nyud" / VERSION / "prepared.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert (record["dataset"], record["version"], record["fingerprint"]) == ("nyud", VERSION, fingerprint)
    assert record["subset"] is True
    train, val = record["splits"]["train"], record["splits"]["val"]
    assert (train["examples"], train["published"], train["left out"]) == (1, 795, 0)
    semseg = train["labels"]["semseg"]
    assert (semseg["ignored"], semseg["wall"], semseg["bed"]) == (0.2, 0.5, 0.0)
    assert val["labels"]["semseg"]["bed"] == pytest.approx(
        np.mean((labels := nyud_layout.frame("0002", 30, 40)["segmentation"])[labels > 0] == 4)
    )
    invalid = (nyud_layout.frame("0002", 30, 40)["normals"] == 127.5).all(-1).mean()
    assert val["labels"]["normals"] == {"invalid": invalid}


class Flat:
    """Source of 1x2-pixel images of a single class: example i has class i % 3."""

    labels = ("semseg", "sal")

    def __init__(self, count: int):
        self._count = count
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self._count

    def load(self, index: int) -> dict:
        self.loaded.append(index)
        image, classes = np.zeros((1, 2, 3), np.uint8), np.full((1, 2, 1), index % 3, np.uint8)
        example = {"id": str(index), "image": image, "semseg": classes}
        return example if index % 2 else {**example, "sal": np.array([[[0], [1]]], np.uint8)}


def test_of_a_large_set_evenly_spaced_examples_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "MOST_EXAMPLES", 10)
    source = Flat(35)
    tasks = summary.tasks_of(source, ("a", "b", "c", "never"))
    figures = summary.of_split(source, tasks, "train")
    assert sorted(source.loaded) == [0, 3, 7, 10, 14, 17, 21, 24, 28, 31]
    assert (figures["examples"], figures["counted"]) == (35, 10)
    shares = figures["labels"]["semseg"]
    assert shares == {"ignored": 0.0, "a": 0.4, "b": 0.4, "c": 0.2, "never": 0.0}
    assert figures["labels"]["sal"] == {"ignored": 0.5, "positive": 0.5}  # every other image has no label
    rows = [line.split() for line in summary.table({"train": figures}, tasks)]
    assert ["counted,", "evenly", "spaced", "10"] in rows


def test_without_class_names_the_classes_that_occur_have_numbers() -> None:
    source = Flat(6)
    tasks = summary.tasks_of(source, ())
    figures = {"train": summary.of_split(source, tasks, "train"), "val": summary.of_split(Flat(1), tasks, "val")}
    assert figures["train"]["labels"]["semseg"].keys() == {"ignored", "0", "1", "2"}
    lines = summary.table(figures, tasks)
    assert "  2                    33.33 %         -" in lines
    assert not any(line.startswith(("counted", "  3")) for line in lines)
