"""Exported models: run without the package, compared with prediction."""

from collections.abc import Callable
import errno
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from taskexpert_jax import export, predict
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import inference, steps
from taskexpert_jax.exporting import jax_program, program
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs import tree
from taskexpert_jax.runs.load import load
from taskexpert_jax.tasks import from_config
from tests import random_runs

ROOT = pathlib.Path(__file__).parents[1]
WITH_JAX_ALONE = """
import os, pathlib, sys
for name in ("taskexpert_jax", "flax", "ml_collections", "clu", "optax", "orbax", "absl", "tensorflow", "safetensors"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
example = pathlib.Path("run_exported.py").read_text()
for folder in sys.argv[1:]:
    os.chdir(folder)
    exec(example)
    os.chdir("..")
"""


class Exported(NamedTuple):
    """A folder of `--mode=export`, as it is read without the package."""

    folder: pathlib.Path
    program: jax_export.Exported
    call: Callable
    parameters: dict
    signature: dict


def read(folder):
    exported = jax_export.deserialize(bytearray((folder / "program.jax_export").read_bytes()))
    parameters = dict(np.load(folder / "parameters.npz"))
    signature = json.loads((folder / "signature.json").read_text())
    return Exported(folder, exported, jax.jit(exported.call), parameters, signature)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, workdir, state) of a small model with random parameters."""
    config = random_runs.padded_scenes()
    config.tasks = ("semseg", "depth", "normals", "sal")
    config.model.depth = config.model.taps = config.model.experts = 1
    workdir = tmp_path_factory.mktemp("export") / "run"
    return config, workdir, random_runs.save(config, workdir)


@pytest.fixture(scope="module")
def exported(run):
    config, workdir, _ = run
    export.export(config, workdir, "best", workdir / "exported")
    return read(workdir / "exported")


def batch(frame, count=3):
    """Random frames, and windows of other sizes inside them."""
    height, width = frame
    images = np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8)
    return images, np.array([[i, 2 * i, height - 3 * i, width - 5 * i] for i in range(count)], np.int32)


def predicted(config, workdir, images, windows):
    """Predictions of the package for a batch."""
    mesh = sharding.one_device_mesh()
    with sharding.use(mesh):
        model, variables, _ = load(config, workdir, "best", mesh)
        step = steps.make_predict_step(model.tasks, inference.make_inference(model, config), mesh)
        return jax.device_get(step(variables, {"image": images, "window": windows}))


def test_the_example_of_the_page_predicts_with_jax_alone(run, exported, tmp_path):
    """Bit for bit as `predict`, whose arrays have the image's size: resized in the test."""
    config, workdir, _ = run
    sizes = {"fits": (30, 44), "reduced": (90, 150), "enlarged": (10, 11)}
    (tmp_path / "images").mkdir()
    for name, size in sizes.items():
        image = np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / name).mkdir()
        (tmp_path / name / "room.png").symlink_to(tmp_path / "images" / f"{name}.png")
        (tmp_path / name / "exported").symlink_to(exported.folder)
    _, _, rest = (ROOT / "docs" / "export.md").read_text().partition("```python run_exported.py\n")
    (tmp_path / "run_exported.py").write_text(rest.partition("```")[0])
    done = subprocess.run(
        [sys.executable, "-c", WITH_JAX_ALONE, *sizes],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "depth (30, 44) float32 metres, (H, W) float32" in done.stdout.splitlines()
    predict.predict(config, workdir, "best", tmp_path / "images", tmp_path / "predictions")
    for name, size in sizes.items():
        for task in from_config(config):
            found = task.kind.resize(np.load(tmp_path / name / f"{task.name}.npy"), *size)
            wanted = np.load(tmp_path / "predictions" / name / f"{task.name}.npy")
            np.testing.assert_array_equal(found, wanted, strict=True)


def test_any_batch_size_and_window_and_all_platforms(run, exported):
    config, workdir, _ = run
    assert exported.program.platforms == ("cpu", "cuda", "tpu")
    images, windows = batch(config.dataset.image_size)
    outputs = jax.device_get(exported.call(exported.parameters, images, windows))
    wanted = predicted(config, workdir, images, windows)
    assert outputs.keys() == {*config.tasks, *(f"{task}_nonfinite" for task in config.tasks)}
    for task in config.tasks:
        np.testing.assert_array_equal(outputs[task], wanted.values[task], strict=True)
        assert outputs[f"{task}_nonfinite"].tolist() == [False] * len(images)


def test_the_parameters_are_beside_the_program_and_not_in_it(run, exported):
    config, _, state = run
    trained = tree.arrays({"params": state.params, "batch_stats": state.batch_stats})
    assert exported.parameters.keys() == trained.keys()
    for name, array in exported.parameters.items():
        np.testing.assert_array_equal(array, trained[name])
    content = (exported.folder / "program.jax_export").read_bytes()
    assert not any(array.tobytes() in content for array in exported.parameters.values() if array.nbytes > 64)
    zeros = jax.tree.map(np.zeros_like, exported.parameters)
    assert not exported.call(zeros, *batch(config.dataset.image_size))["depth"].any()


def test_the_program_has_no_folder_of_this_machine(exported):
    content = (exported.folder / "program.jax_export").read_bytes()
    assert b"vit.py" in content
    assert str(ROOT).encode() not in content and b"site-packages" not in content


def test_a_nan_in_a_prediction_is_flagged(run, exported):
    """Class ids hide it."""
    parameters = dict(exported.parameters)
    name = next(name for name in parameters if "head_semseg" in name and name.endswith("logits/bias"))
    parameters[name] = np.full_like(parameters[name], np.nan)
    outputs = exported.call(parameters, *batch(run[0].dataset.image_size))
    assert outputs["semseg"].dtype == np.uint8
    assert outputs["semseg_nonfinite"].tolist() == [True] * 3
    assert outputs["depth_nonfinite"].tolist() == [False] * 3


def test_the_signature_describes_the_program(run, exported):
    config, _, state = run
    signature, program = exported.signature, exported.program
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
    assert signature["outputs"].keys() == outputs.keys()
    of = {**dict(zip(("image", "window"), program.in_avals[-2:], strict=True)), **outputs}
    for name, described in {**signature["inputs"], **signature["outputs"]}.items():
        assert described["shape"] == ["batch", *of[name].shape[1:]] and str(of[name].shape[0]) == "batch"
        assert described["dtype"] == of[name].dtype.name
    assert signature["outputs"]["semseg"]["classes"] == list(config.dataset.semseg_classes)
    assert signature["outputs"]["semseg"]["range"] == [0, len(config.dataset.semseg_classes) - 1]
    assert [signature["outputs"]["depth"][key] for key in ("unit", "range", "resize")] == ["m", [0, None], "bilinear"]
    assert signature["outputs"]["semseg"]["resize"] == "nearest"
    assert signature["frame"]["size"] == signature["frame"]["model_size"] == list(config.dataset.image_size)
    assert signature["run"]["checkpoint"] == int(state.step) and signature["run"]["which"] == "latest"
    assert signature["run"]["parameters"] == sum(array.size for array in exported.parameters.values())
    assert signature["inside_the_program"]["image_std"] == list(config.model.image_std)
    assert signature["made_by"]["jax"] == jax.__version__
    assert signature["files"].keys() == {"program.jax_export", "parameters.npz"}
    for name, facts in signature["files"].items():
        content = (exported.folder / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_views_of_the_config_and_bfloat16(run, tmp_path):
    """Mirror image and sliding windows are in the program; NumPy's files have no bfloat16, so they have its bits."""
    config, workdir, state = run
    config = config.copy_and_resolve_references()
    height, width = config.dataset.image_size
    config.eval.flip, config.eval.image_size, config.eval.params_dtype = True, (height, 2 * width), "bfloat16"
    export.export(config, workdir, "best", tmp_path / "exported")
    exported = read(tmp_path / "exported")
    for name, array in tree.arrays({"params": state.params}).items():
        np.testing.assert_array_equal(exported.parameters[name], np.asarray(array, jnp.bfloat16).view(np.uint16))
    assert exported.signature["frame"]["size"] == [height, 2 * width]
    assert exported.signature["run"]["parameters_dtype"] == "bfloat16"
    inside = exported.signature["inside_the_program"]
    assert inside["flip"] and inside["sliding_windows"]
    images, windows = batch((height, 2 * width))
    outputs = jax.device_get(exported.call(exported.parameters, images, windows))
    wanted = predicted(config, workdir, images, windows)
    for task in config.tasks:
        np.testing.assert_allclose(outputs[task], wanted.values[task], atol=1e-5)


def test_attention_kernels_of_one_platform_are_replaced():
    config = random_runs.padded_scenes()
    config.model.attention = "splash"
    assert program.portable(config).model.attention == "xla"
    assert config.model.attention == "splash"


def test_a_folder_with_files_is_refused_and_kept(run, tmp_path):
    config, workdir, _ = run
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already has notes.txt: nothing is overwritten; give a new folder with --out"):
        export.export(config, workdir, "best", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"which": "77"}, "77"),
        ({"form": "tflite"}, r"--format=tflite: unknown; give one of jax"),
        ({"form": "onnx"}, r"--format=onnx: its converter, jax2onnx, needs an older Orbax .* docs/export.md"),
    ],
)
def test_nothing_remains_after_wrong_input(run, tmp_path, arguments, message):
    config, workdir, _ = run
    with pytest.raises(UserError, match=message):
        export.export(**{"config": config, "workdir": workdir, "which": "best", "output": tmp_path / "out"} | arguments)
    assert list(tmp_path.iterdir()) == []


def test_nothing_remains_on_a_full_disk(run, tmp_path, monkeypatch):
    config, workdir, _ = run

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jax_program.np, "savez", full)
    with pytest.raises(UserError, match=r"out cannot be written: No space left on device"):
        export.export(config, workdir, "best", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
