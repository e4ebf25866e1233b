"""Pretrained weights in a bucket: the same arrays as from the disk, and one line if they cannot be read."""

import json
import shutil

import numpy as np
import pytest

from taskexpert_jax import release, storage
from taskexpert_jax.errors import UserError
from tests import random_runs
from tests.pretrained import tiny_vit


@pytest.mark.parametrize("name", ["augreg.npz", "timm.safetensors", "timm.pth", "hugging_face.bin"])
def test_a_file_gives_the_arrays_that_it_gives_on_a_disk(bucket, tmp_path, name):
    tiny_vit.WRITERS[name](tmp_path / name)
    storage.copy_tree(tmp_path, storage.path(bucket))
    found, expected = tiny_vit.read(f"{bucket}/{name}"), tiny_vit.read(tmp_path / name)
    assert found.arrays.keys() == expected.arrays.keys()
    for key, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[key], array)
    assert f"{bucket}/{name}" in found.report and "/tmp" not in found.report


def test_a_folder_as_of_hugging_face_gives_its_weights_and_their_normalisation(bucket, tmp_path):
    tiny_vit.WRITERS["hugging_face.safetensors"](tmp_path / "model.safetensors")
    recorded = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recorded))
    storage.copy_tree(tmp_path, storage.path(bucket))
    report = tiny_vit.read(bucket).report
    assert f"{bucket}/model.safetensors (" in report
    assert "pretrained on: mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6) (preprocessor_config.json)" in report


def test_a_run_and_its_release_give_their_backbone(bucket, tmp_path):
    config = tiny_vit.tiny_config()
    random_runs.save(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copies" / "run")
    release.release(tmp_path / "run", tmp_path / "copies" / "released")
    storage.copy_tree(tmp_path / "copies", storage.path(bucket))
    expected = tiny_vit.read(tmp_path / "run")
    for name, kind in (("run", "a run of this project at step 0"), ("released", "a released model at step 0")):
        found = tiny_vit.read(f"{bucket}/{name}")
        assert f"{bucket}/{name} ({kind})" in found.report
        for key, array in expected.arrays.items():
            np.testing.assert_array_equal(found.arrays[key], array)


@pytest.mark.parametrize("name", ["", "/nothing.npz", "/nothing.safetensors"])
def test_what_is_missing_or_refused_is_one_line(bucket, failing_store, name):
    with pytest.raises(UserError, match=rf"^config\.model\.pretrained={bucket}{name}") as found:
        tiny_vit.read(f"{bucket}{name}")
    assert "\n" not in str(found.value)
    failing_store.refuse(403)
    with pytest.raises(UserError, match=rf"{bucket}{name}.* no permission \(HTTP 403\)") as found:
        tiny_vit.read(f"{bucket}{name}")
    assert "\n" not in str(found.value)
