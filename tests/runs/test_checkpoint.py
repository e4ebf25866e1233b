"""Checkpoints of small trees: retention, other devices, dtypes and JAX versions, and the listing."""

import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

from checkpoint_trees import abstract, largest, opened, opened_newest, same, save, state, unseal
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from configs import demo
from taskexpert_jax import checkpoint as checkpoint_listing
from taskexpert_jax import installation
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs import sealing
from taskexpert_jax.runs.checkpoints import Checkpoints, saved_steps
from taskexpert_jax.runs.sealing import METRICS
from taskexpert_jax.training.state import TrainState


def test_the_latest_two_and_the_best_are_kept_and_sealed(tmp_path):
    save(tmp_path, range(1, 7), {1: 0.3, 2: 0.5, 3: 0.4, 5: float("nan")})
    assert saved_steps(tmp_path) == [2, 5, 6]
    with opened(tmp_path, read_only=True) as checkpoints:
        assert (checkpoints.select("best"), checkpoints.select("latest"), checkpoints.select("5")) == (2, 6, 5)
    for step in (2, 5, 6):
        folder = tmp_path / "checkpoints" / str(step)
        assert sealing.sealed(folder) and sealing.problem(folder) is None


def test_metrics_can_be_added_to_a_checkpoint(tmp_path):
    assert opened_newest(tmp_path) is None
    save(tmp_path, [3])
    restored = opened_newest(tmp_path)
    assert (restored.step, restored.evaluated) == (3, False)
    assert same(restored.items, state(3).to_items())
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state(4).to_items(), {}, {"semseg/mIoU": 0.5})
    restored = opened_newest(tmp_path)
    assert restored.evaluated and same(restored.items, state(3).to_items())  # nothing is overwritten
    save(tmp_path, [3])  # nor lost if the step is saved again without metrics
    assert opened_newest(tmp_path).evaluated
    with opened(tmp_path) as checkpoints:  # they count when the best is kept, at once
        for step, value in ((5, None), (5, 0.4), (7, None), (9, None)):
            metrics = None if value is None else {"semseg/mIoU": value}
            checkpoints.save(step, state(step).to_items(), {}, metrics)
            checkpoints.wait()
    assert saved_steps(tmp_path) == [3, 7, 9]
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.select("best") == 3
    folder = tmp_path / "checkpoints" / "3"
    assert sealing.problem(folder) is None
    (folder / METRICS).write_text('{"semseg/mIoU": 0.9}')
    assert str(sealing.problem(folder)).startswith(METRICS)


def test_an_evaluation_without_a_number_is_not_the_best_and_is_not_repeated(tmp_path):
    save(tmp_path, [3, 5])
    save(tmp_path, [5], {5: math.nan})
    assert opened_newest(tmp_path).evaluated
    save(tmp_path, [3], {3: 0.1})
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.select("best") == 3


def test_without_a_finite_metric_there_is_no_best_and_the_latest_is_used(tmp_path, caplog):
    values = {1: math.nan, 2: math.inf, 3: math.nan}
    save(tmp_path, range(1, 5), values, config=demo.get_config("tiny").to_dict())
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.best is None and checkpoints.select("best") == 4
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == "no checkpoint has a finite semseg/mIoU to be the best by: step 4 is used"
    assert "best" not in checkpoint_listing.listing(tmp_path) and "nan" not in checkpoint_listing.listing(tmp_path)
    save(tmp_path, [5], {5: 0.25}, config=demo.get_config("tiny").to_dict())
    save(tmp_path, [6, 7], {6: math.nan, 7: math.nan}, config=demo.get_config("tiny").to_dict())
    assert saved_steps(tmp_path) == [5, 6, 7]  # the retention policy keeps the only one with a number
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.best == checkpoints.select("best") == 5


def test_a_run_of_the_first_version_of_the_format_is_resumed(tmp_path):
    """The archive was written before metrics were added in place; it has averaged parameters."""
    with tarfile.open(pathlib.Path(__file__).parent / "first_format.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")

    def saved(step):
        averaged = jax.tree.map(lambda leaf: 3 * leaf, state(step, 64).params)
        return state(step, 64).replace(ema=averaged)

    def close(one, other):  # random numbers of another compilation differ in the last bit
        np.testing.assert_allclose(one, other, rtol=1e-5)

    wanted = abstract(64).replace(ema=abstract(64).params)
    with opened(tmp_path) as checkpoints:
        restored = checkpoints.restore_newest(wanted.to_items())
        assert (restored.step, restored.evaluated) == (4, False)
        jax.tree.map(close, TrainState.from_items(restored.items), saved(4))
        assert checkpoints.select("best") == 2
        jax.tree.map(close, checkpoints.restore_variables(2, wanted.variables()), saved(2).variables())
        checkpoints.save(4, saved(4).to_items(), {}, {"semseg/mIoU": 0.75})
        assert checkpoints.select("best") == 4
    rows = checkpoint_listing.listing(tmp_path).splitlines()[1:]
    assert len(rows) == 2 and all(re.search(r"  -\s+sealed", row) for row in rows)  # by an unknown version


def test_the_best_task_may_change_when_a_run_goes_on(tmp_path):
    save(tmp_path, [2, 4, 6], {2: 0.9, 4: 0.4})
    depth = SimpleNamespace(name="depth", main_metric="rmse", higher_is_better=False)
    checkpoints = Checkpoints(tmp_path, depth)
    assert checkpoints.select("best") == 6  # none was evaluated by this one
    for step, rmse in ((8, 0.5), (10, 0.7), (12, 0.6)):
        checkpoints.save(step, state(step).to_items(), {}, {"depth/rmse": rmse})
    checkpoints.close()
    assert saved_steps(tmp_path) == [8, 10, 12]
    assert Checkpoints(tmp_path, depth, read_only=True).select("best") == 8


# --- other devices, parameters alone, other dtypes ---

MESHES = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 1, 2), 8: (1, 2, 4)}


def placed(mesh):
    """Abstract state with kernels sharded over fsdp and tensor, and the rest replicated."""

    def place(leaf):
        split = PartitionSpec("fsdp", "tensor") if leaf.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, split))

    return jax.tree.map(place, jax.eval_shape(lambda: state(0)))


def mesh_of(count):
    return sharding.make_mesh(dict(zip(sharding.AXES, MESHES[count], strict=True)), {}, jax.devices()[:count])


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("eight")
    with opened(workdir) as checkpoints:
        spread = jax.tree.map(lambda leaf, of: jax.device_put(leaf, of.sharding), state(5), placed(mesh_of(8)))
        assert len(spread.params["dense"]["kernel"].sharding.device_set) == 8
        checkpoints.save(5, spread.to_items(), {}, None)
    return workdir


@pytest.mark.multidevice
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_saved_on_eight_devices_restored_on_any(count, on_eight):
    with opened(on_eight) as checkpoints:
        restored = checkpoints.restore_newest(placed(mesh_of(count)).to_items())
    assert same(jax.device_get(restored.items), jax.device_get(state(5).to_items()))
    kernel = restored.items["params"]["params"]["dense"]["kernel"]
    _, fsdp, tensor = MESHES[count]
    assert (
        len(kernel.sharding.device_set) == count
        and kernel.addressable_shards[0].data.size == kernel.size // fsdp // tensor
    )


@pytest.mark.multidevice
def test_parameters_are_restored_without_the_optimiser_and_in_bfloat16(on_eight, tmp_path):
    shutil.copytree(on_eight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5" / "train")
    wanted = abstract().variables()
    half = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), wanted["params"])
    with opened(tmp_path / "run", read_only=True) as checkpoints:
        variables = checkpoints.restore_variables(5, {**wanted, "params": half})
        whole = checkpoints.restore_variables(5, wanted)
        hosts = checkpoints.restore_parameters(5)
        with pytest.raises(UserError, match=r"checkpoints/5 is damaged: train/\S+ is missing"):
            checkpoints.restore(5, abstract().to_items())
    expected = state(5).params
    assert same(variables["params"], jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected))
    assert variables["batch_stats"]["mean"].dtype == jnp.float32
    assert same(whole["params"], expected) and same(hosts, expected)


def test_training_goes_on_in_the_dtypes_that_were_saved(on_eight):
    wanted = abstract()
    wanted.params["dense"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    del wanted.params["dense"]["kernel"]
    with (
        opened(on_eight) as checkpoints,
        pytest.raises(UserError, match=r"2 of 3 arrays of `params` differ") as refusal,
    ):
        checkpoints.restore_newest(wanted.to_items())
    assert "- params/dense/kernel (256, 16) float32: only in the checkpoint" in str(refusal.value)
    assert "! params/dense/bias: (3,) float32 in the checkpoint, (3,) bfloat16 in the model" in str(refusal.value)
    assert saved_steps(on_eight) == [5]  # an architecture that differs is not damage


def test_checkpoints_are_read_across_jax_versions(tmp_path):
    """Saves and reads in both directions with the interpreter of an environment with another JAX version."""
    other = os.environ.get("TASKEXPERT_OTHER_PYTHON")
    if not other:
        pytest.skip("set TASKEXPERT_OTHER_PYTHON to the interpreter of an environment with another version of JAX")
    program = (
        "import pathlib, sys, numpy as np, jax; from tests.runs import checkpoint_trees as made\n"
        "workdir, mode = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "made.save(workdir, [7]) if mode == 'save' else None\n"
        "assert made.same(made.opened_newest(workdir).items, made.state(7).to_items())\nprint(jax.__version__)"
    )
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    versions = set()
    for saver, reader in ((other, sys.executable), (sys.executable, other)):
        workdir = tmp_path / str(len(versions))
        for python, mode in ((saver, "save"), (reader, "read")):
            done = subprocess.run(
                [python, "-c", program, str(workdir), mode], env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            versions.add(done.stdout.split()[-1])
    assert len(versions) == 2


# --- python -m taskexpert_jax.checkpoint ---


def test_the_listing_shows_what_is_there(tmp_path, capsys):
    config = demo.get_config("tiny").to_dict()
    with opened(tmp_path) as checkpoints:
        for step, value in ((2, 0.75), (4, 0.5), (6, None)):
            checkpoints.save(step, state(step).to_items(), config, None if value is None else {"semseg/mIoU": value})
    os.truncate(largest(tmp_path / "checkpoints" / "4" / "params"), 100)
    (tmp_path / "damaged" / "3").mkdir(parents=True)
    assert checkpoint_listing.main([str(tmp_path), "--verify", "--tree"]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"error: 1 of 3 checkpoints of {tmp_path} not intact: 4 \(damaged: params/.* bytes\)\n", err)
    head, *rows, aside, _, newest = out.split("\n", 6)
    assert head.split()[:3] == ["step", "saved", "semseg/mIoU"]
    assert [row.split()[0] for row in rows] == ["2", "4", "6"]
    assert [row.split()[3] for row in rows] == ["0.75", "0.5", "-"]
    assert all(f"  {installation.version_text()}  " in row for row in rows)
    assert rows[0].endswith("good  best") or rows[0].split()[-2:] == ["good", "best"]
    assert "damaged: params" in rows[1] and "of " in rows[1]
    assert rows[2].split()[-2:] == ["good", "latest"]
    assert aside.startswith("damaged, moved to") and aside.endswith(": 3")
    assert newest.startswith("step 6\nparams: 3 arrays, 0.0 MiB\n")
    assert "  params/dense/kernel  (256, 16)  float32  16,384 bytes" in newest
    assert "  step  ()  int32  4 bytes" in newest


def test_verifying_looks_for_files_that_do_not_belong_and_for_seals(tmp_path, capsys):
    save(tmp_path, [2, 4])
    assert checkpoint_listing.main([str(tmp_path), "--verify"]) == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "checkpoints" / "2" / "params" / "added").touch()
    unseal(tmp_path, 4)
    assert checkpoint_listing.main([str(tmp_path), "--verify"]) == 2
    what = "2 (damaged: params/added is not in manifest.json), 4 (not sealed)"
    assert capsys.readouterr().err == f"error: 2 of 2 checkpoints of {tmp_path} not intact: {what}\n"


def test_the_listing_and_evaluation_agree_on_the_best_of_equal_checkpoints(tmp_path):
    config = demo.get_config("tiny").to_dict()
    with opened(tmp_path) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state(step).to_items(), config, {"semseg/mIoU": 0.5})
        checkpoints.wait()
        best = checkpoints.select("best")
    marked = [line.split()[0] for line in checkpoint_listing.listing(tmp_path).splitlines() if "best" in line]
    assert marked == [str(best)] == ["4"]


@pytest.mark.parametrize("part", ["metrics/metrics", "config/metadata", "params/_METADATA"])
def test_the_listing_names_what_is_damaged_and_needs_no_accelerator(part, tmp_path):
    with opened(tmp_path) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state(step).to_items(), demo.get_config("tiny").to_dict(), {"semseg/mIoU": 0.5})
    path = tmp_path / "checkpoints" / "4" / part
    os.truncate(path, path.stat().st_size // 2)
    command = [sys.executable, "-m", "taskexpert_jax.checkpoint", str(tmp_path), "--verify", "--tree"]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "tpu"}, capture_output=True, text=True, check=False
    )
    head, good, damaged, *_ = done.stdout.splitlines()
    assert head.startswith("step") and " good " in f"{good} " and f"damaged: {part} has " in damaged
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1
    assert lines[0].startswith("error: the arrays of " if part == "params/_METADATA" else "error: 1 of 2 checkpoints ")


def test_the_listing_says_what_is_missing(tmp_path, capsys):
    assert checkpoint_listing.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: no checkpoints in {tmp_path}: give the --workdir of a run\n"
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint_listing.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no checkpoint in ")
