"""Training end to end: every shipped config, devices, accumulation, resuming after a kill, and what is refused."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo, nyud, pascal_context
from input_pipeline import pipeline, prepare
from taskexpert_jax import evaluate, train
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs import workdir
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import make_train_step
from tests.input_pipeline import nyud_layout, pascal_layout

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    layouts = {
        "nyud": nyud_layout.write(folder / "NYUDv2", height=400, width=560),
        "pascal_context": pascal_layout.write(folder / "PASCALContext", height=400, width=400),
    }
    for name, layout in layouts.items():
        prepare.prepare(name, layout, folder / "built", allow_subset=True)
    return folder / "built"


def shipped_configs(data_folder):
    configs = {module.__name__.split(".")[1]: module.get_config("tiny") for module in (nyud, pascal_context, demo)}
    for name in ("nyud", "pascal_context"):
        configs[name].dataset.data_dir = str(data_folder)
    return configs


def run_in_process(config, folder):
    tasks = from_config(config)
    return train.train(
        config,
        folder,
        lambda start: pipeline.train_batches(config, tasks, start_step=start),
        lambda: pipeline.eval_batches(config, tasks, batch_size=config.eval.batch_size),
    )


@pytest.fixture(scope="module", params=["nyud", "pascal_context", "demo"])
def finished(request, data_folder, tmp_path_factory):
    """A finished run of each shipped config in its tiny form, on one device: (config, workdir, state)."""
    config = shipped_configs(data_folder)[request.param]
    config.mesh.data, config.mesh.fsdp = 4, 2
    config.batch_size = config.eval.batch_size = 8
    config.optimizer.ema_decay = 0.5 if request.param == "demo" else 0.0
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return config, folder, run_in_process(config, folder)


def test_a_run_leaves_what_a_workdir_holds(finished):
    config, folder, state = finished
    assert int(state.step) == config.num_steps
    assert json.loads((folder / "config.json").read_text())["num_steps"] == config.num_steps
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = set().union(*lines)
    for task in from_config(config):
        assert f"train/loss/{task.name}" in names
        assert f"eval/{task.name}/{task.main_metric}" in names
    assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())
    assert (folder / "checkpoints" / str(config.num_steps)).is_dir()


def test_evaluation_of_the_checkpoint_equals_the_one_in_training(finished, capsys):
    config, folder, _ = finished
    tasks = from_config(config)
    batches = lambda: pipeline.eval_batches(config, tasks, batch_size=config.eval.batch_size)  # noqa: E731
    results = evaluate.evaluate(config, folder, "best", batches)
    (line,) = [json.loads(li) for li in (folder / "metrics.jsonl").read_text().splitlines() if "eval/" in li]
    in_training = {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
    # The full evaluation adds up examples, the one in training whole batches: float32 differs in the last digits.
    assert {name: results[name] for name in in_training} == pytest.approx(in_training, rel=1e-6, nan_ok=True)
    report = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert report["step"] == config.num_steps
    assert report["examples"] == {"scenes": 4, "nyud": 3, "pascal_context": 3}[config.dataset.name]
    assert report["metrics"] == pytest.approx(results, nan_ok=True)
    assert report["best_constant"].keys() == in_training.keys()
    assert "best constant" in capsys.readouterr().out


def test_evaluation_takes_the_averaged_parameters_where_a_run_has_them(finished):
    config, folder, state = finished
    mesh = sharding.make_mesh(config.mesh, {})
    with sharding.use(mesh):
        _, variables, _ = evaluate.load(config, folder, "latest", mesh)
    averaged = config.optimizer.ema_decay > 0
    assert bool(state.ema) == averaged
    params, ema, loaded = (
        tree["initial_memory"] for tree in (state.params, state.ema or state.params, variables["params"])
    )
    np.testing.assert_array_equal(loaded, ema)
    assert (np.abs(ema - params).max() > 1e-6) == averaged


def test_parameters_can_be_evaluated_in_bfloat16(finished):
    config, folder, _ = finished
    half = config.copy_and_resolve_references()
    half.eval.params_dtype = "bfloat16"
    mesh = sharding.make_mesh(config.mesh, {})
    with sharding.use(mesh):
        (_, whole, _), (_, halved, _) = (evaluate.load(of, folder, "latest", mesh) for of in (config, half))
        for ours, theirs in zip(*(jax.tree.leaves(of["params"]) for of in (halved, whole)), strict=True):
            assert ours.dtype == jnp.bfloat16
            np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))
        half.eval.params_dtype = "int8"
        with pytest.raises(UserError, match=r"config.eval.params_dtype='int8': must be one of float32, bfloat16"):
            evaluate.load(half, folder, "latest", mesh)
    half.eval.params_dtype = "bfloat16"
    tasks = from_config(config)
    results = evaluate.evaluate(
        half, folder, "latest", lambda: pipeline.eval_batches(half, tasks, batch_size=half.eval.batch_size)
    )
    (line,) = [json.loads(li) for li in (folder / "metrics.jsonl").read_text().splitlines() if "eval/" in li]
    exact = {name.removeprefix("eval/"): value for name, value in line.items() if "loss" in name or "rmse" in name}
    assert exact and {name: results[name] for name in exact if name in results} != {}
    for name in exact.keys() & results.keys():
        assert results[name] == pytest.approx(exact[name], rel=0.05, nan_ok=True), name


def test_a_checkpoint_that_does_not_fit_is_refused_with_a_diff(finished):
    config, folder, _ = finished
    other = config.copy_and_resolve_references()
    other.model.experts = 3
    mesh = sharding.make_mesh(other.mesh, {})
    with sharding.use(mesh), pytest.raises(UserError, match=r"does not fit") as refusal:
        evaluate.load(other, folder, "latest", mesh)
    assert "params/mixture/experts/expert_4/kernel" in str(refusal.value)
    assert "only in the checkpoint" in str(refusal.value)
    with (
        sharding.use(mesh),
        pytest.raises(UserError, match=r"--checkpoint=7: not in .*use best, latest or one of \[\d"),
    ):
        evaluate.load(config, folder, "7", mesh)


def test_a_workdir_of_another_config_is_refused_and_untouched(finished):
    config, folder, _ = finished
    before = (folder / "config.json").read_bytes()
    other = config.copy_and_resolve_references()
    other.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"another config; use another(.|\n)*optimizer.learning_rate was .*, is 0.5"):
        run_in_process(other, folder)
    assert (folder / "config.json").read_bytes() == before
    free = config.copy_and_resolve_references()
    free.mesh.data, free.mesh.fsdp, free.log.every_steps = 8, 1, 3
    workdir.claim(folder, free.to_dict())  # what does not change the result may change


# --- one device and eight ---


def one_step(config, devices, batch):
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    mesh = sharding.make_mesh(config.mesh, {"batch_size": config.batch_size}, devices)
    with sharding.use(mesh):
        tx = optimizer.build(config)
        initialise, _, shardings = train_state.abstract_and_shardings(model, tx, mesh, config.seed)
        state = jax.jit(initialise, out_shardings=shardings)()
        step = make_train_step(model, tx, config, mesh, shardings)
        (on_devices,) = sharding.to_devices([batch], mesh)
        state, seen = step(state, tally.empty(tasks), on_devices)
        return jax.device_get(state), jax.device_get(seen.sums), state


@pytest.mark.multidevice
@pytest.mark.parametrize("name", ["nyud", "pascal_context", "demo"])
def test_one_and_eight_devices_agree(name, data_folder):
    config = shipped_configs(data_folder)[name]
    config.batch_size = 8
    config.model.drop_path = 0.2
    tasks = from_config(config)
    batch = next(iter(pipeline.train_batches(config, tasks)))
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 1, 1
    single, single_sums, _ = one_step(config, jax.devices()[:1], batch)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    sharded, sharded_sums, on_devices = one_step(config, jax.devices(), batch)
    for key, value in single_sums.items():
        np.testing.assert_allclose(sharded_sums[key], value, rtol=1e-5, err_msg=key)
    # Adam's first moment is a tenth of the clipped gradient: compares gradients, which Adam's update would hide.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(single.opt_state))
    for ours, theirs in zip(jax.tree.leaves(sharded.opt_state), jax.tree.leaves(single.opt_state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * largest)
    for ours, theirs in zip(jax.tree.leaves(sharded.batch_stats), jax.tree.leaves(single.batch_stats), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # statistics of the global batch
    qkv = on_devices.params["blocks"]["attention"]["qkv_kernel"]
    assert qkv.addressable_shards[0].data.size == qkv.size // 4  # over fsdp and tensor


def test_accumulated_gradients_are_the_mean_of_the_micro_batches(data_folder):
    """With layer norm, where micro-batches do not see each other, and labels that are valid everywhere."""
    config = shipped_configs(data_folder)["demo"]
    config.model.norm = "layer"
    config.tasks = ("semseg", "depth")
    config.mesh.data = 1
    batch = next(iter(pipeline.train_batches(config, from_config(config))))
    whole, whole_sums, _ = one_step(config, jax.devices()[:1], batch)
    config.accumulate_steps = 2
    parts, parts_sums, _ = one_step(config, jax.devices()[:1], batch)
    for key in ("loss", "loss/semseg", "loss/depth", "grad_norm"):
        np.testing.assert_allclose(parts_sums[key], whole_sums[key], rtol=1e-4)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole.opt_state))
    for ours, theirs in zip(jax.tree.leaves(parts.opt_state), jax.tree.leaves(whole.opt_state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * scale)


def test_the_balance_weight_adds_to_the_loss_and_moves_the_gates(data_folder):
    config = shipped_configs(data_folder)["demo"]
    config.tasks = ("semseg", "depth")
    config.mesh.data = 1
    batch = next(iter(pipeline.train_batches(config, from_config(config))))
    plain, plain_sums, _ = one_step(config, jax.devices()[:1], batch)
    config.model.gate.balance = 1.0
    balanced, sums, _ = one_step(config, jax.devices()[:1], batch)
    assert sums["loss/semseg"] == plain_sums["loss/semseg"]
    assert sums["loss"] > plain_sums["loss"]
    gates = [np.asarray(jax.tree.leaves(state.params["mixture"]["gates"])[0]) for state in (plain, balanced)]
    assert np.abs(gates[0] - gates[1]).max() > 1e-6


# --- what is refused ---


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        ((-1, 1, 1), 6, r"config.batch_size=6 is not divisible by 8 devices .*choose a multiple of 8"),
        ((3, 1, 1), 6, r"config.mesh \(data=3, fsdp=1, tensor=1\) does not fit 8 devices"),
        ((-1, -1, 1), 8, r"at most one may be -1"),
        ((0, 1, 1), 8, r"sizes must be positive"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, batch, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), {"batch_size": batch})


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_task(data_folder, tmp_path):
    config = shipped_configs(data_folder)["demo"]
    config.mesh.data, config.mesh.fsdp = 1, 8
    config.batch_size = config.eval.batch_size = 8
    tasks = from_config(config)

    def poisoned(start):
        for step, batch in enumerate(pipeline.train_batches(config, tasks, start_step=start)):
            if step == 2:
                batch["depth"] = np.full_like(batch["depth"], np.nan)
            yield batch

    with pytest.raises(UserError, match=r"step 3: the loss of depth is not finite"):
        train.train(config, tmp_path / "run", poisoned, lambda: iter(()))
    assert Checkpoints(tmp_path / "run", tasks[0]).latest == 2  # the state before that step


# --- the program itself ---


def main(*arguments):
    command = [sys.executable, "main.py", *arguments]
    env = {**os.environ, "XLA_FLAGS": ""}  # one device
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--config.batch_sise=3",), r"unknown config field 'batch_sise'.*batch_size"),
        (("--config.optimizer.lr=3",), r"unknown config field 'lr'; all fields are in taskexpert_jax/config/fields.py"),
        (("--config.log.every_steps=0",), r"config.log.every_steps=0: must be a whole number of 1 or more"),
        (("--config=configs/demo.py:larg",), r"unknown variant 'larg': choose demo or tiny"),
        (("--mode=predict",), r"--mode=predict needs --images"),
        (
            ("--config=configs/nyud.py:tiny", "--config.dataset.data_dir=nowhere"),
            r"nowhere.*input_pipeline.prepare nyud",
        ),
        (("--mode=evaluate",), r"no checkpoints in .*train first"),
    ],
)
def test_wrong_flags_end_in_one_line(arguments, line, tmp_path):
    config = () if arguments[0].startswith("--config=") else ("--config=configs/demo.py:tiny",)
    done = main(*config, f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 2
    (message,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert __import__("re").search(line, message)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    """SIGKILL after a checkpoint was written; the same command again; parameters equal bit for bit."""
    arguments = [
        "--config=configs/demo.py:tiny",
        "--config.num_steps=60",
        "--config.checkpoint.every_steps=3",
        "--config.eval.every_steps=60",
        "--config.model.drop_path=0.2",
        "--config.log.images=0",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "main.py", *arguments, f"--workdir={killed}"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not any(p.name.isdigit() for p in (killed / "checkpoints").glob("*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = max(int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdigit())
    assert saved < 60
    resumed = main(*arguments, f"--workdir={killed}")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed {killed} at step" in resumed.stdout
    uninterrupted = main(*arguments, f"--workdir={whole}")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    config = demo.get_config("tiny")
    for field, value in (("num_steps", 60), ("model.drop_path", 0.2)):
        config.update_from_flattened_dict({field: value})
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, {}, jax.devices()[:1])
    with sharding.use(mesh):
        _, abstract, _ = train_state.abstract_and_shardings(model, optimizer.build(config), mesh, 0)
        one, other = (Checkpoints(d, tasks[0], read_only=True).restore(60, abstract) for d in (killed, whole))
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one.params))
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert sorted(steps) == steps
