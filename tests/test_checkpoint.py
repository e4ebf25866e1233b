"""Checkpoints of small trees: what is kept, what is damaged, what is full, and other devices and dtypes."""

import contextlib
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from configs import demo
from taskexpert_jax import checkpoint_files, checkpoint_listing, sharding
from taskexpert_jax.checkpoint import Checkpoints, saved_steps
from taskexpert_jax.errors import UserError
from taskexpert_jax.train_state import TrainState

BEST = SimpleNamespace(name="semseg", main_metric="mIoU", higher_is_better=True)
SIZE = 4096


def state(step, size=SIZE):
    """A state whose values depend on the step and do not compress."""
    weights = jax.random.normal(jax.random.key(step), (size // 16, 16))
    return TrainState(
        step=jnp.int32(step),
        params={"dense": {"kernel": weights, "bias": jnp.full((3,), step, jnp.float32)}},
        batch_stats={"mean": jnp.ones((2,))},
        opt_state={"mu": weights * 2},
        rng=jnp.array([1, step], jnp.uint32),
        ema={},
    )


def abstract(size=SIZE, **places):
    shapes = jax.eval_shape(lambda: state(0, size))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@contextlib.contextmanager
def opened(workdir, **options):
    with contextlib.closing(Checkpoints(workdir, BEST, **options)) as checkpoints:
        yield checkpoints


def save(workdir, steps, metrics=None):
    with opened(workdir) as checkpoints:
        for step in steps:
            value = (metrics or {}).get(step)
            checkpoints.save(state(step), {"seed": 0}, None if value is None else {"semseg/mIoU": value})
            checkpoints.wait()


def largest(folder):
    return max(checkpoint_files.files(folder), key=lambda path: path.stat().st_size)


def test_the_latest_two_and_the_best_are_kept_and_sealed(tmp_path):
    save(tmp_path, range(1, 7), {1: 0.3, 2: 0.5, 3: 0.4, 5: float("nan")})
    assert saved_steps(tmp_path) == [2, 5, 6]
    with opened(tmp_path, read_only=True) as checkpoints:
        assert (checkpoints.select("best"), checkpoints.select("latest"), checkpoints.select("5")) == (2, 6, 5)
    for step in (2, 5, 6):
        folder = tmp_path / "checkpoints" / str(step)
        assert checkpoint_files.sealed(folder) and checkpoint_files.problem(folder) is None


def test_a_checkpoint_says_whether_it_was_evaluated_and_can_be_replaced(tmp_path):
    assert opened_newest(tmp_path) is None
    save(tmp_path, [3])
    restored = opened_newest(tmp_path)
    assert (restored.step, restored.evaluated) == (3, False)
    assert same(restored.state, state(3))
    save(tmp_path, [3], {3: 0.5})
    assert opened_newest(tmp_path).evaluated
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.select("best") == 3


def opened_newest(workdir):
    with opened(workdir) as checkpoints:
        return checkpoints.restore_newest(abstract())


DAMAGES = {
    "deleted": (lambda path: path.unlink(), "is missing"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), r"has \d+ of \d+ bytes"),
    "altered": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "has other bytes than were written"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("which", ["params", "train", "_CHECKPOINT_METADATA"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(how, which, tmp_path, capsys):
    save(tmp_path, [2, 4])
    damage, what = DAMAGES[how]
    path = tmp_path / "checkpoints" / "4" / which
    damage(largest(path) if path.is_dir() else path)
    refused = rf"checkpoints/4 is damaged: {which}.* {what}; --checkpoint may be one of \[2\]"
    with opened(tmp_path, read_only=True) as checkpoints, pytest.raises(UserError, match=refused):
        checkpoints.restore_variables(4, abstract())
    capsys.readouterr()
    restored = opened_newest(tmp_path)
    assert restored.step == 2 and same(restored.state, state(2))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: checkpoint 4 is damaged: {which}") and line.endswith("falls back to step 2")
    assert (tmp_path / "damaged" / "4").is_dir()  # nothing is thrown away
    save(tmp_path, [4])  # the run comes to this step again
    assert opened_newest(tmp_path).step == 4
    assert capsys.readouterr().out == ""


def test_without_a_good_checkpoint_a_run_does_not_start_anew(tmp_path):
    save(tmp_path, [2, 4])
    for step in (2, 4):
        os.truncate(largest(tmp_path / "checkpoints" / str(step)), 10)
    for _ in range(2):  # it stays so
        with pytest.raises(
            UserError, match=r"none of the checkpoints in .* is good \(4 is .*; 2 is .*\); put the files back"
        ):
            opened_newest(tmp_path)
    assert saved_steps(tmp_path) == [2, 4]


def unseal(workdir, step):
    """As when the program is killed after the last file was written, and before it was sealed."""
    (workdir / "checkpoints" / str(step) / checkpoint_files.MANIFEST).unlink()


def test_one_that_was_not_sealed_is_not_used(tmp_path, capsys):
    save(tmp_path, [2, 4])
    unseal(tmp_path, 4)
    assert opened_newest(tmp_path).step == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: checkpoint 4 had not been sealed when the run ended; it is now")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves reads unfinished
@pytest.mark.parametrize("damaged", [False, True])
def test_where_none_is_sealed_all_are_read_to_see_which_is_good(damaged, tmp_path, capsys):
    save(tmp_path, [2, 4])
    unseal(tmp_path, 2)
    unseal(tmp_path, 4)
    folder = tmp_path / "checkpoints" / "4"
    if damaged:
        os.truncate(largest(folder), largest(folder).stat().st_size // 2)
    step = 2 if damaged else 4
    assert opened_newest(tmp_path).step == step
    assert capsys.readouterr().out.count("warning: checkpoint 4 cannot be read: ") == damaged
    assert checkpoint_files.sealed(tmp_path / "checkpoints" / str(step))


KILLED = """
import os, pathlib, sys, threading, time
from tests import test_checkpoint as made
with made.opened(pathlib.Path(sys.argv[1])) as checkpoints:
    checkpoints.save(made.state(2), {}, None)
    checkpoints.wait()
    checkpoints.save(made.state(4, 1 << 24), {}, None)
    while not list(checkpoints.path.glob("4.*/*/*")):
        time.sleep(0.001)
    os.kill(os.getpid(), 9)
"""


def test_a_write_cut_in_the_middle_is_said_and_left_out(tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "XLA_FLAGS": ""}, check=False
    )
    assert done.returncode == -9
    assert [path.name for path in (tmp_path / "checkpoints").glob("4*")] == ["4.orbax-checkpoint-tmp"]
    assert opened_newest(tmp_path).step == 2
    assert capsys.readouterr().out == "step 4 was being written when the run ended: left out\n"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_what_was_good_stays(small_disk, capfd):
    workdir = small_disk / "run"
    save(workdir, [2])
    refused = r"cannot be written to .*/checkpoints: No space left on device; make room.*step 2"
    with pytest.raises(UserError, match=refused), opened(workdir) as checkpoints:
        checkpoints.save(state(4, 1 << 20), {}, None)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    assert "Traceback" not in capfd.readouterr().err
    assert opened_newest(workdir).step == 2
    save(workdir, [4])
    assert opened_newest(workdir).step == 4


def test_other_errors_keep_their_trace(tmp_path):
    with opened(tmp_path) as checkpoints, pytest.raises((TypeError, ValueError), match="object"):
        checkpoints.save(state(1).replace(params={"a": object()}), {}, None)


# --- other devices, parameters alone, other dtypes ---

MESHES = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 1, 2), 8: (1, 2, 4)}


def placed(mesh):
    """Shapes of the state with its kernels split over fsdp and tensor, and the rest on all devices."""

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
        checkpoints.save(spread, {}, None)
    return workdir


@pytest.mark.multidevice
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_saved_on_eight_devices_restored_on_any(count, on_eight):
    with opened(on_eight) as checkpoints:
        restored = checkpoints.restore_newest(placed(mesh_of(count)))
    assert same(jax.device_get(restored.state), jax.device_get(state(5)))
    kernel = restored.state.params["dense"]["kernel"]
    _, fsdp, tensor = MESHES[count]
    assert (
        len(kernel.sharding.device_set) == count
        and kernel.addressable_shards[0].data.size == kernel.size // fsdp // tensor
    )


@pytest.mark.multidevice
def test_parameters_are_restored_without_the_optimiser_and_in_bfloat16(on_eight, tmp_path):
    shutil.copytree(on_eight, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "5"
    shutil.rmtree(folder / "train")
    (folder / checkpoint_files.MANIFEST).unlink()
    half = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding)  # noqa: E731
    wanted = abstract().replace(params=jax.tree.map(half, abstract().params))
    with opened(tmp_path / "run", read_only=True) as checkpoints:
        variables = checkpoints.restore_variables(5, wanted)
        whole = checkpoints.restore_variables(5, abstract())
        with pytest.raises(KeyError):
            checkpoints.restore(5, abstract())
    kernel = variables["params"]["dense"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and variables["batch_stats"]["mean"].dtype == jnp.float32
    assert same(kernel, state(5).params["dense"]["kernel"].astype(jnp.bfloat16))
    assert same(whole["params"], state(5).params)


def test_training_goes_on_in_the_dtypes_that_were_saved(on_eight):
    wanted = abstract()
    wanted.params["dense"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    del wanted.params["dense"]["kernel"]
    with (
        opened(on_eight) as checkpoints,
        pytest.raises(UserError, match=r"2 of 3 arrays of `params` differ") as refusal,
    ):
        checkpoints.restore_newest(wanted)
    assert "- params/dense/kernel (256, 16) float32: only in the checkpoint" in str(refusal.value)
    assert "! params/dense/bias: (3,) float32 in the checkpoint, (3,) bfloat16 in the model" in str(refusal.value)
    assert saved_steps(on_eight) == [5]  # an architecture that differs is not damage


def test_checkpoints_are_read_across_jax_versions(tmp_path):
    """Both ways with the interpreter of another environment, which has another version of JAX."""
    other = os.environ.get("TASKEXPERT_OTHER_PYTHON")
    if not other:
        pytest.skip("TASKEXPERT_OTHER_PYTHON names no interpreter of an environment with another version of JAX")
    program = (
        "import pathlib, sys, numpy as np, jax; from tests import test_checkpoint as made\n"
        "workdir, mode = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "made.save(workdir, [7]) if mode == 'save' else None\n"
        "assert made.same(made.opened_newest(workdir).state, made.state(7))\nprint(jax.__version__)"
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
            checkpoints.save(state(step), config, None if value is None else {"semseg/mIoU": value})
    os.truncate(largest(tmp_path / "checkpoints" / "4" / "params"), 100)
    (tmp_path / "damaged" / "3").mkdir(parents=True)
    assert checkpoint_listing.main([str(tmp_path), "--verify", "--tree"]) == 0
    head, *rows, aside, _, newest = capsys.readouterr().out.split("\n", 6)
    assert head.split()[:3] == ["step", "saved", "semseg/mIoU"]
    assert [row.split()[0] for row in rows] == ["2", "4", "6"]
    assert [row.split()[3] for row in rows] == ["0.75", "0.5", "-"]
    assert rows[0].endswith("good  best") or rows[0].split()[-2:] == ["good", "best"]
    assert "damaged: params" in rows[1] and "of " in rows[1]
    assert rows[2].split()[-2:] == ["good", "latest"]
    assert aside.startswith("damaged, moved to") and aside.endswith(": 3")
    assert newest.startswith("step 6\nparams: 3 arrays, 0.0 MiB\n")
    assert "  params/dense/kernel  (256, 16)  float32  16,384 bytes" in newest
    assert "  step  ()  int32  4 bytes" in newest


def test_the_listing_says_what_is_missing(tmp_path, capsys):
    assert checkpoint_listing.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: no checkpoints in {tmp_path}: give the --workdir of a run\n"
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint_listing.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no checkpoint in ")
