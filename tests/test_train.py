"""Training end to end: every shipped config, devices, accumulation, resuming after a kill, and what is refused."""

import contextlib
import functools
import io
import json
import pathlib
import re
import shutil
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
from taskexpert_jax import command_line, evaluate, train
from taskexpert_jax.config import read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs import config as run_config
from taskexpert_jax.runs import workdir
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.runs.load import load
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer
from taskexpert_jax.training import state as train_state
from tests import clock, random_runs, xla
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


@pytest.fixture(scope="module")
def run_of(data_folder, tmp_path_factory):
    """A finished run of a shipped config in its tiny form on the eight devices: name -> (config, workdir, state)."""

    @functools.cache
    def run(name):
        config = shipped_configs(data_folder)[name]
        config.mesh.data, config.mesh.fsdp = 4, 2
        config.batch_size = config.eval.batch_size = 8
        config.optimizer.ema_decay = 0.5 if name == "demo" else 0.0
        config.update_from_flattened_dict(random_runs.NOT_IN_THE_SHAPES)
        config.dataset.semseg_classes = tuple(reversed(config.dataset.semseg_classes))
        if name == "demo":
            config.dataset.val_scenes = 12  # in two batches, the second with padding
        folder = tmp_path_factory.mktemp(name) / "run"
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
            clock.each_look_takes(patch, seconds=40)
            command_line.configure_logging()
            state = run_in_process(config, folder)
        assert ("evaluating: 8 of 12 examples\n" in err.getvalue()) == (name == "demo")
        return config, folder, state

    return run


@pytest.fixture(scope="module")
def finished(run_of):
    """The demo's run, which averages its parameters."""
    return run_of("demo")


@pytest.mark.parametrize("name", ["nyud", "demo"])
def test_a_run_leaves_what_a_workdir_holds(name, run_of):
    config, folder, state = run_of(name)
    assert int(state.step) == config.num_steps
    assert json.loads((folder / "config.json").read_text())["num_steps"] == config.num_steps
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = set().union(*lines)
    for task in from_config(config):
        assert f"train/loss/{task.name}" in names
        assert f"eval/{task.name}/{task.main_metric}" in names
    assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())
    assert (folder / "checkpoints" / str(config.num_steps)).is_dir()
    assert not (folder / "plugins").exists()  # no profile unless one is wanted


@pytest.mark.parametrize("name", ["nyud", "demo"])
def test_evaluation_of_the_checkpoint_equals_the_one_in_training(name, run_of, capsys):
    trained, folder, _ = run_of(name)
    config, _ = run_config.for_evaluation(folder, read_run(folder), {})
    assert config.model.to_dict() == trained.model.to_dict()
    tasks = from_config(config)
    batches = lambda: pipeline.eval_batches(config, tasks, batch_size=config.eval.batch_size)  # noqa: E731
    results = evaluate.evaluate(config, folder, "best", batches)
    (line,) = [json.loads(li) for li in (folder / "metrics.jsonl").read_text().splitlines() if "eval/" in li]
    in_training = {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
    # The full evaluation adds up examples, the one in training whole batches: float32 differs in the last digits.
    assert {name: results[name] for name in in_training} == pytest.approx(in_training, rel=1e-6, nan_ok=True)
    report = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert report["step"] == config.num_steps
    assert report["examples"] == {"demo": 12, "nyud": 3}[name]
    assert report["metrics"] == pytest.approx(results, nan_ok=True)
    assert report["best_constant"].keys() == in_training.keys()
    assert "best constant" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nyud", "demo"])
def test_evaluation_takes_the_averaged_parameters_where_a_run_has_them(name, run_of):
    config, folder, state = run_of(name)
    mesh = sharding.make_mesh(config.mesh, {})
    with sharding.use(mesh):
        _, variables, _ = load(config, folder, "latest", mesh)
    averaged = config.optimizer.ema_decay > 0
    assert bool(state.ema) == averaged
    params, ema, loaded = (
        tree["initial_memory"] for tree in (state.params, state.ema or state.params, variables["params"])
    )
    np.testing.assert_array_equal(loaded, ema)
    assert (np.abs(ema - params).max() > 1e-6) == averaged


def test_a_checkpoint_beyond_the_last_step_is_named(finished, tmp_path, capsys):
    config, folder, _ = finished
    shorter = config.copy_and_resolve_references()
    shorter.num_steps = config.num_steps - 1
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    beyond = rf"checkpoint .*{config.num_steps} is beyond config.num_steps={shorter.num_steps}"
    with pytest.raises(UserError, match=beyond):
        train.train(shorter, tmp_path, lambda _: iter([]), list)
    capsys.readouterr()
    mesh = sharding.make_mesh(config.mesh, {})
    with sharding.use(mesh):
        load(shorter, tmp_path, "latest", mesh)
    assert re.fullmatch(f"warning: {beyond}.*\n", capsys.readouterr().err)


def test_a_run_can_be_evaluated_on_another_data_set_in_the_tasks_that_both_have(run_of, data_folder, capsys):
    _, folder, _ = run_of("nyud")
    given = shipped_configs(data_folder)["pascal_context"]
    given.mesh.data, given.mesh.fsdp, given.eval.batch_size = 4, 2, 8
    config, data = run_config.for_evaluation(folder, given, {})
    tasks = from_config(data)
    batches = lambda: pipeline.eval_batches(data, tasks, batch_size=8)  # noqa: E731
    results = evaluate.evaluate(config, folder, "latest", batches, data=data)
    assert {name.partition("/")[0] for name in results} == {"normals", "edge"}
    assert 0 < results["normals/mean"] < 180
    report = json.loads((folder / "evaluation_pascal_context" / "metrics.json").read_text())
    assert (report["dataset"]["name"], report["tasks"]) == ("pascal_context", ["normals", "edge"])
    assert report["gates"]["tasks"].keys() == {"normals", "edge"}
    assert "depth (not a task of pascal_context)" in capsys.readouterr().err


def test_parameters_can_be_evaluated_in_bfloat16(finished):
    config, folder, _ = finished
    half = config.copy_and_resolve_references()
    half.eval.params_dtype = "bfloat16"
    mesh = sharding.make_mesh(config.mesh, {})
    with sharding.use(mesh):
        (_, whole, _), (_, halved, _) = (load(of, folder, "latest", mesh) for of in (config, half))
        for ours, theirs in zip(*(jax.tree.leaves(of["params"]) for of in (halved, whole)), strict=True):
            assert ours.dtype == jnp.bfloat16
            np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))
        half.eval.params_dtype = "int8"
        with pytest.raises(UserError, match=r"config\.eval\.params_dtype='int8'"):
            load(half, folder, "latest", mesh)
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
    with sharding.use(mesh), pytest.raises(UserError, match="expert_4/kernel") as refusal:
        load(other, folder, "latest", mesh)
    assert "params/mixture/experts/expert_4/kernel" in str(refusal.value)
    with (
        sharding.use(mesh),
        pytest.raises(UserError, match=rf"--checkpoint=7: .*\[{config.num_steps}\]"),
    ):
        load(config, folder, "7", mesh)


def test_a_workdir_of_another_config_is_refused_and_untouched(finished):
    config, folder, _ = finished
    before = (folder / "config.json").read_bytes()
    other = config.copy_and_resolve_references()
    other.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"optimizer.learning_rate .*\b0.5"):
        run_in_process(other, folder)
    assert (folder / "config.json").read_bytes() == before
    free = config.copy_and_resolve_references()
    free.mesh.data, free.mesh.fsdp, free.log.every_steps = 8, 1, 3
    workdir.claim(folder, free)  # what does not change the result may change


# --- what is refused ---


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        ((-1, 1, 1), 6, r"config.batch_size=6 .*\b8\b"),
        ((3, 1, 1), 6, r"config.mesh \(data=3, fsdp=1, tensor=1\) .*\b8\b"),
        ((-1, -1, 1), 8, r"config.mesh.*-1"),
        ((0, 1, 1), 8, r"config.mesh.*data=0"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, batch, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), {"batch_size": batch})


# --- the program itself ---


def main(*arguments):
    command = [sys.executable, "main.py", *arguments]
    env = xla.environment()
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--config.batch_sise=3",), r"unknown config field 'batch_sise'.*batch_size"),
        (("--config.optimizer.lr=3",), r"unknown config field 'lr'; all fields are in taskexpert_jax/config/fields.py"),
        (
            ("--config.log.every_steps=-1",),
            r"config.log.every_steps=-1: must be a whole number of 0 or more, below 2\*\*31",
        ),
        (("--config=configs/demo.py:larg",), r"unknown variant 'larg': choose demo or tiny"),
        (("--mode=predict",), r"--images is missing"),
        (("--images=x",), r"--images is for --mode=predict, and this is --mode=train"),
        (
            ("--config=configs/nyud.py:tiny", "--config.dataset.data_dir=nowhere"),
            r"nowhere.*input_pipeline.prepare nyud",
        ),
        (  # before the missing data
            ("--config=configs/nyud.py:tiny", "--config.dataset.data_dir=nowhere", "--config.model.backbone=resnet"),
            r"config.model.backbone='resnet': choose one of vit, swin",
        ),
        (("--mode=evaluate",), r"run/config\.json is missing; give the --workdir of a run"),
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
    fields = {
        "num_steps": 40,
        "tasks": ("semseg", "depth"),
        "model.depth": 2,  # a model that is soon compiled
        "model.taps": 2,
        "model.experts": 2,
        "model.drop_path": 0.2,
        "checkpoint.every_steps": 3,
        "eval.every_steps": 40,
        "log.images": 0,
    }
    arguments = ["--config=configs/demo.py:tiny", *(f"--config.{name}={value}" for name, value in fields.items())]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "main.py", *arguments, f"--workdir={killed}"]
    process = subprocess.Popen(command, cwd=ROOT, env=xla.environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not any(p.name.isdigit() for p in (killed / "checkpoints").glob("*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = max(int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdigit())
    assert saved < 40
    resumed = main(*arguments, f"--workdir={killed}")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed {killed} at step" in resumed.stderr
    uninterrupted = main(*arguments, f"--workdir={whole}")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    config = demo.get_config("tiny")
    config.update_from_flattened_dict(fields)
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    mesh = sharding.one_device_mesh()
    with sharding.use(mesh):
        _, abstract, _ = train_state.abstract_and_shardings(model, optimizer.build(config, model.backbone), mesh, 0)
        wanted = abstract.to_items()
        one, other = (Checkpoints(d, tasks[0], read_only=True).restore(40, wanted) for d in (killed, whole))
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one["params"]))
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert sorted(steps) == steps
