"""The fingerprint of a data set depends on its content only; a run records it and refuses other data."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import nyud_layout
from PIL import Image
from preparing import build
import pytest

from configs import demo
from configs import nyud as nyud_config
from input_pipeline import nyud, pipeline, records
from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import workdir
from tests import random_runs, xla

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return nyud_layout.write(tmp_path / "NYUDv2", train=("0003", "0001", "0002"), val=("0004",))


def _change_a_pixel(layout: pathlib.Path) -> None:
    array = np.array(Image.open(layout / "normals" / "0001.png"))
    array[29, 39, 2] ^= 1
    nyud_layout.write_part(layout, "normals", "0001", array)


def _change_the_order(layout: pathlib.Path) -> None:
    (layout / "gt_sets" / "train.txt").write_text("0001\n0003\n0002\n")


def _move_to_the_other_split(layout: pathlib.Path) -> None:
    (layout / "gt_sets" / "train.txt").write_text("0003\n0001\n")
    (layout / "gt_sets" / "val.txt").write_text("0002\n0004\n")


def _rename(layout: pathlib.Path) -> None:
    for path in list(layout.glob("*/0004.*")):
        path.rename(path.with_stem("0005"))
    (layout / "gt_sets" / "val.txt").write_text("0005\n")


@pytest.mark.parametrize("change", [_change_a_pixel, _change_the_order, _move_to_the_other_split, _rename])
def test_a_change_of_the_data_changes_the_fingerprint(layout: pathlib.Path, tmp_path: pathlib.Path, change) -> None:
    before = build(layout, tmp_path / "before")
    change(layout)
    assert build(layout, tmp_path / "after") != before


def test_the_same_content_in_other_files_has_the_same_fingerprint(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = build(layout, tmp_path / "before")
    path = layout / "edge" / "0001.png"
    size = path.stat().st_size
    Image.open(path).save(path, compress_level=0)
    assert path.stat().st_size != size
    (layout / "gt_sets" / "val.txt").write_text("0004")
    (layout / "images" / "9999.png").write_text("of no split")
    assert build(layout, tmp_path / "after") == before


def test_without_the_record_the_data_set_must_be_built_again(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    build(layout, tmp_path / "built")
    (record,) = (tmp_path / "built").rglob("prepared.json")
    record.write_text("{}")
    with pytest.raises(UserError, match=r"prepared.json .*/nyud/"):
        records.fingerprint(nyud.Builder, str(tmp_path / "built"))
    with pytest.raises(UserError, match=r"absent.*python -m input_pipeline.prepare nyud"):
        records.fingerprint(nyud.Builder, str(tmp_path / "absent"))


def test_a_run_records_the_data_that_it_sees(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fingerprint = build(layout, tmp_path / "built")
    config = nyud_config.get_config("tiny")
    config.dataset.data_dir = str(tmp_path / "built")
    pipeline.record_fingerprint(config)
    assert config.dataset.fingerprint == fingerprint
    pipeline.record_fingerprint(config)  # accepted: equal to the fingerprint of the data
    config.dataset.fingerprint = "0123"
    with pytest.raises(UserError, match=rf"^config.dataset.fingerprint=0123.*{fingerprint}"):
        pipeline.record_fingerprint(config)
    scenes = demo.get_config("tiny")
    pipeline.record_fingerprint(scenes)
    assert scenes.dataset.fingerprint == "scenes-1"


def _main(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "main.py", *arguments]
    env = xla.environment()
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)


def test_data_that_were_moved_are_still_the_same(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = nyud_config.get_config("tiny")
    config.dataset.data_dir = str(tmp_path / "first")
    build(layout, tmp_path / "first")
    pipeline.record_fingerprint(config)
    workdir.claim(tmp_path / "run", config)
    (tmp_path / "first").rename(tmp_path / "moved")
    again = nyud_config.get_config("tiny")
    again.dataset.data_dir = str(tmp_path / "moved")
    pipeline.record_fingerprint(again)
    workdir.claim(tmp_path / "run", again)
    assert workdir.note_other_data(tmp_path / "run", again.dataset.fingerprint) == ""


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_data_only(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Training refuses other data; evaluation reports them."""
    first = build(layout, tmp_path / "first")
    _change_a_pixel(layout)
    second = build(layout, tmp_path / "second")
    config = nyud_config.get_config("tiny")
    config.dataset.data_dir = str(tmp_path / "first")
    pipeline.record_fingerprint(config)
    random_runs.save(config, tmp_path / "run")  # like a workdir of training
    run = f"--workdir={tmp_path / 'run'}"
    others = f"--config.dataset.data_dir={tmp_path / 'second'}"
    refused = _main("--config=configs/nyud.py:tiny", run, others)
    assert refused.returncode == 2
    assert f"\n  dataset.fingerprint was '{first}', is '{second}'\n" in refused.stderr
    done = _main(run, others, "--mode=evaluate")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"{second}.*{first}", done.stderr)
