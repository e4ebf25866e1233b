"""Released folders: written whole, read strictly, every damage one line."""

import errno
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import demo
from taskexpert_jax import checkpoint, files, train
from taskexpert_jax.config import read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs import released, tree
from taskexpert_jax.runs.load import Selected, load
from tests import random_runs

FACTS = released.Facts(0, ("semseg", "depth"), "0.1.0")


def tiny(**fields):
    config = demo.get_config("tiny")
    config.tasks, config.checkpoint.best_task = ("semseg", "depth"), "depth"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 1, 1
    config.update_from_flattened_dict(fields)
    return config


def loaded(folder, which="best", config=None):
    mesh = sharding.one_device_mesh()
    with sharding.use(mesh):
        _, variables, selected = load(config or read_run(folder), folder, which, mesh)
    return variables, selected


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Workdir of a run with averaged parameters, and the variables that evaluation uses."""
    at = tmp_path_factory.mktemp("run") / "run"
    random_runs.save(tiny(**{"optimizer.ema_decay": 0.9}), at)
    return at, loaded(at)[0]


@pytest.fixture
def folder(run, tmp_path):
    """Released folder of the run."""
    released.write(tmp_path / "released", run[1], read_run(run[0]), FACTS, "card\n")
    return tmp_path / "released"


def rewrite(folder, change, metadata=None):
    """Changes the tensors of the model, and its checksum with it."""
    path = folder / released.MODEL
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata or released.metadata(FACTS))
    lines = [f"{files.checksum(folder / name)}  {name}\n" for name in released.VERIFIED]
    (folder / released.SUMS).write_text("".join(lines))


def error(folder, **arguments) -> str:
    with pytest.raises(UserError) as found:
        loaded(folder, **arguments)
    return str(found.value)


def test_a_released_model_is_the_one_that_evaluation_uses(run, folder):
    shardings = [leaf.sharding for leaf in jax.tree.leaves(run[1])]
    for which in ("best", "latest", "0"):
        variables, selected = loaded(folder, which)
        assert selected == Selected(0, "released") and str(selected) == "step 0 (released)"
        jax.tree.map(np.testing.assert_array_equal, variables, run[1])
        assert [leaf.sharding for leaf in jax.tree.leaves(variables)] == shardings
    assert {path.name for path in folder.iterdir()} == {*released.NEEDED, released.CARD}
    assert released.facts(folder) == FACTS
    stored = safetensors.numpy.load_file(folder / released.MODEL)
    assert {array.dtype for array in stored.values()} == {np.dtype("float32")}
    assert stored.keys() == tree.arrays(run[1]).keys() and "params/initial_memory" in stored


def test_other_programs_check_the_checksums(folder):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", released.SUMS], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.splitlines() == [f"{name}: OK" for name in released.VERIFIED]


def test_parameters_may_be_loaded_in_half_precision(run, folder):
    config = read_run(folder)
    config.eval.params_dtype = "bfloat16"
    variables, _ = loaded(folder, config=config)
    expected, _ = loaded(run[0], config=config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_the_same_model_gives_the_same_bytes(run, folder, tmp_path):
    released.write(tmp_path / "again", run[1], read_run(run[0]), FACTS, "another card\n")
    assert (tmp_path / "again" / released.SUMS).read_text() == (folder / released.SUMS).read_text()


def test_a_workdir_is_no_released_folder_even_with_files_of_one(run, folder, tmp_path):
    shutil.copytree(run[0], tmp_path / "both")
    shutil.copy(folder / released.MODEL, tmp_path / "both")
    assert not released.is_released(tmp_path / "both")
    assert loaded(tmp_path / "both")[1] == Selected(0, "latest")


@pytest.mark.parametrize("name", released.NEEDED)
def test_a_missing_file_is_one_line(folder, name):
    config = read_run(folder)
    (folder / name).unlink()
    assert error(folder, config=config).startswith(f"{folder / name} is missing: the released folder is incomplete; ")


@pytest.mark.parametrize("name", released.VERIFIED)
def test_a_changed_file_is_one_line(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    config = read_run(folder)
    (folder / name).write_bytes(content)
    assert error(folder, config=config).startswith(f"{folder / name} is damaged or was changed: ")


def test_the_card_may_be_edited(folder):
    before = loaded(folder)
    (folder / released.CARD).write_text("better words")
    edited = loaded(folder)
    (folder / released.CARD).unlink()
    for variables, selected in (edited, loaded(folder)):
        assert selected == before[1]
        jax.tree.map(np.testing.assert_array_equal, variables, before[0])


@pytest.mark.parametrize(
    "content", ["", "x" * 64, "0" * 64 + "  ../other\n", "é\n", "\xff", "0" * 64 + " model.safetensors"]
)
def test_a_malformed_list_of_checksums_is_one_line(folder, content):
    (folder / released.SUMS).write_bytes(content.encode("latin-1"))
    assert error(folder).startswith(f"{folder / released.SUMS} ")


def remove(tensors):
    del tensors["params/initial_memory"]


def add(tensors):
    tensors["params/other"] = np.zeros(3, np.float32)


def reshape(tensors):
    tensors["params/initial_memory"] = np.zeros((1, 2), np.float32)


def halve(tensors):
    tensors["params/initial_memory"] = tensors["params/initial_memory"].astype(np.float16)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (remove, r"\(1 of \d+ arrays differ\).*\n  \+ params/initial_memory .* only in the model"),
        (add, r"\(1 of \d+ arrays differ\).*\n  - params/other \(3,\) float32: only in the checkpoint"),
        (reshape, r"\n  ! params/initial_memory: \(1, 2\) float32 in the checkpoint"),
        (halve, "'params/initial_memory' has dtype F16; the arrays of a release are F32"),
    ],
)
def test_nothing_is_loaded_partially(folder, change, line):
    rewrite(folder, change)
    with pytest.raises(UserError, match=line):
        loaded(folder)


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({"format": "pt"}, "is no released model of this project"),
        ({**released.metadata(FACTS), "format_version": "2"}, "install a newer taskexpert-jax"),
        ({**released.metadata(FACTS), "format_version": "x"}, "has format_version 'x', and this program reads 1; copy"),
        ({**released.metadata(FACTS), "step": "-1"}, "has the step '-1' in its metadata"),
    ],
)
def test_a_file_of_another_format_is_refused(folder, metadata, line):
    rewrite(folder, lambda tensors: None, metadata)
    assert line in error(folder)


def test_a_file_that_is_no_safetensors_is_one_line(folder):
    (folder / released.MODEL).write_bytes(b"not tensors")
    lines = [f"{files.checksum(folder / name)}  {name}\n" for name in released.VERIFIED]
    (folder / released.SUMS).write_text("".join(lines))
    assert error(folder).startswith(f"{folder / released.MODEL} cannot be read: ")


def test_another_step_and_another_config_are_refused(folder):
    assert error(folder, which="5") == (
        f"--checkpoint=5: {folder} is a released model of step 0 alone; leave out --checkpoint"
    )
    config = read_run(folder)
    config.model.gate.temperature = 0.5
    assert "with another config:\n  model.gate.temperature was 1.0, is 0.5" in error(folder, config=config)
    config = read_run(folder)
    config.eval.batch_size, config.num_steps = 3, 100
    loaded(folder, config=config)


def test_a_folder_that_cannot_be_written_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "checksum", full)
    with pytest.raises(UserError, match="released cannot be written: No space left on device; free space"):
        released.write(tmp_path / "released", run[1], read_run(run[0]), FACTS, "card\n")
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_a_folder_is_not_replaced(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="already has file: nothing is overwritten"):
        released.write(tmp_path, run[1], read_run(run[0]), FACTS, "card\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_results_of_a_released_model_go_elsewhere(run, folder):
    assert released.results_folder(folder, "evaluation", None) == pathlib.Path("evaluation")
    assert released.results_folder(folder, "evaluation", pathlib.Path("out")) == pathlib.Path("out")
    assert released.results_folder(run[0], "evaluation", None) == run[0] / "evaluation"


def test_a_released_model_is_not_trained_further(folder):
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=rf"^{folder} is a released model, which is not trained further: give another"):
        train.train(read_run(folder), folder, lambda step: iter(()), lambda: ())
    assert sorted(folder.iterdir()) == before


def test_the_checkpoint_program_says_what_the_folder_is(folder, capsys):
    assert checkpoint.main([str(folder)]) == 0
    first = capsys.readouterr().out
    assert first.startswith(f"{folder} is a released model: step 0, tasks semseg, depth; ")
    assert first.endswith("MiB, written by taskexpert-jax 0.1.0; checksums good\n") and first.count("\n") == 1
    assert checkpoint.main([str(folder), "--verify", "--tree"]) == 0
    assert "\n  params/initial_memory  (2, 16)  F32\n" in capsys.readouterr().out
    (folder / released.CONFIG).write_text("{}")
    assert checkpoint.main([str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder / released.CONFIG} is damaged or was changed: ")
