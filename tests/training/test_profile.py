"""Profiles of a training run: which steps they have, what a trace contains, and that they never end a run."""

import contextlib
import gzip
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import pytest

from benchmarks import profile_scopes
from taskexpert_jax import storage
from taskexpert_jax.config import FIELDS
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, profile, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import make_train_step
from taskexpert_jax.training.throughput import Throughput
from taskexpert_jax.training.watchdog import Watchdog
from tests.training import one_step

DEFAULTS = {name: FIELDS[f"profile.{name}"].default for name in ("first_step", "steps", "every")}


def profiler(workdir, **settings):
    return profile.Profiler(ConfigDict(DEFAULTS | settings), workdir, Watchdog(0, 0), Throughput(0, 100, 1))


def train(profiler, steps, stop=None):
    """A loop as that of training, with a program of its own for the steps."""
    compute, result = jax.jit(lambda x: jnp.tanh(x @ x)), jnp.eye(4)
    with contextlib.closing(profiler):
        for step in profiler.steps(steps):
            with profiler._watchdog.doing("waiting for the next batch"):
                pass
            result = compute(result)
            profiler._watchdog.started(step, result)
            if step == stop:
                raise KeyboardInterrupt


def events(folder):
    (path,) = folder.glob("*.trace.json.gz")
    return [event for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if event.get("ph") == "X"]


def steps_in(folder):
    return [int(event["args"]["step_num"]) for event in events(folder) if event["name"] == "train"]


def folders(workdir):
    return sorted(workdir.glob("plugins/profile/*"))  # where xprof and TensorBoard look


@pytest.fixture
def windows(monkeypatch):
    """The run's steps, settings -> the steps of each trace, without any being taken."""

    def of(run, **settings):
        found, current = [], []
        monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **kwargs: current.append([]))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append(current.pop()))
        monkeypatch.setattr(profile, "place", lambda folder, target: None)
        with contextlib.closing(profiler(pathlib.Path("run"), **settings)) as taken:
            for step in taken.steps(run):
                for trace in current:
                    trace.append(step)
        return found

    return of


def test_the_settings_select_the_steps(windows):
    assert DEFAULTS == {"first_step": 0, "steps": 5, "every": 0}
    assert windows(range(1, 100)) == []
    assert windows(range(1, 100), first_step=20) == [[20, 21, 22, 23, 24]]
    assert windows(range(1, 31), first_step=1, steps=2, every=10) == [[1, 2], [11, 12], [21, 22]]
    assert windows(range(1, 13), first_step=11) == [[11, 12]]  # as far as the run goes


def test_a_resumed_run_profiles_the_rest_of_a_window(windows):
    assert windows(range(23, 60), first_step=20) == [[23, 24]]
    assert windows(range(25, 60), first_step=20) == []
    assert windows(range(33, 60), first_step=20, every=10) == [[33, 34], [40, 41, 42, 43, 44], [50, 51, 52, 53, 54]]


def test_a_run_without_profiles_loops_over_the_numbers_themselves(tmp_path):
    steps = range(1, 3)
    with contextlib.closing(profiler(tmp_path)) as off:
        assert type(off.steps(steps)) is type(iter(steps))


def test_a_trace_has_the_steps_and_what_the_host_does(tmp_path):
    train(profiler(tmp_path, first_step=3, steps=2), range(1, 7))
    (folder,) = folders(tmp_path)
    assert folder.name == "steps_00000003-00000004"
    assert steps_in(folder) == [3, 4]
    names = {event["name"] for event in events(folder)}
    assert {"waiting for the next batch", "PjitFunction(<lambda>)"} <= names
    assert {path.name.partition(".")[2] for path in folder.iterdir()} == {"trace.json.gz", "xplane.pb"}


def test_a_run_that_ends_within_a_window_writes_what_it_has(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(profiler(tmp_path / "a", first_step=2), range(1, 7), stop=3)
    assert not folders(tmp_path / "a")  # no workdir, none is made
    (tmp_path / "b").mkdir()
    with pytest.raises(KeyboardInterrupt):  # and the trace before has ended: only one can be taken at a time
        train(profiler(tmp_path / "b", first_step=2), range(1, 7), stop=3)
    (folder,) = folders(tmp_path / "b")
    assert (folder.name, steps_in(folder)) == ("steps_00000002-00000003", [2, 3])


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with contextlib.closing(profiler(workdir, first_step=1, steps=1, every=2)) as taken:
        for step in taken.steps(range(1, 7)):
            if step == 3:
                shutil.rmtree(workdir)
    assert not workdir.exists()
    assert re.findall("warning.*", capsys.readouterr().err) == [
        "warning: no profile of steps 3 to 3: No such file or directory; the run goes on without profiles"
    ]


def test_a_second_profiler_in_the_process_is_a_warning(tmp_path, capsys):
    with jax.profiler.trace(str(tmp_path / "users")):
        train(profiler(tmp_path, first_step=1), range(1, 3))
    assert "warning: no profile from step 1 on: Profile has already been started" in capsys.readouterr().err
    assert not folders(tmp_path)


def test_a_profile_of_a_run_in_a_bucket_is_in_the_bucket(bucket):
    workdir = storage.path(bucket)
    train(profiler(workdir, first_step=2, steps=1), range(1, 4))
    names = {re.sub(r"/[^/]*?\.(?=xplane|trace)", "/HOST.", name) for name in storage.listed(workdir)}
    assert names == {f"plugins/profile/steps_00000002-00000002/HOST.{kind}" for kind in ("xplane.pb", "trace.json.gz")}


def test_processes_write_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    (tmp_path / "trace/plugins/profile/now").mkdir(parents=True)
    (tmp_path / "trace/plugins/profile/now/host.xplane.pb").write_bytes(b"x")
    target = tmp_path / "run/plugins/profile/steps"
    target.parents[2].mkdir()
    profile.place(tmp_path / "trace", target)
    assert [path.name for path in target.iterdir()] == ["1-host.xplane.pb"]


@pytest.fixture(scope="module")
def compiled():
    """Names of the operations of a compiled training step, all from this version of the code."""
    config = one_step.small("nyud")
    config.model.depth = config.model.taps = config.model.experts = 1
    mesh, tasks = one_step.mesh_of((1, 1, 1)), from_config(config)
    model = taskexpert.from_config(config, tasks)
    with sharding.use(mesh), contextlib.closing(profiler(pathlib.Path("run"), first_step=1)):
        tx = optimizer.build(config, model.backbone)
        _, abstract, shardings = train_state.abstract_and_shardings(model, tx, mesh, config.seed)
        step = make_train_step(model, tx, config, mesh, shardings)
        (batch,) = sharding.to_devices([one_step.random_batch(config)], mesh)
        lowered = step.lower(abstract, jax.eval_shape(lambda: tally.empty(tasks)), batch)
        return set(re.findall(r'op_name="([^"]*)"', lowered.compile().as_text()))


SCOPES = (
    *("inputs", "backbone", "patches", "blocks", "attend", "mlp", "decoder", "mixture", "experts", "mixture._gates"),
    *("assemble", "mixture._read", "mixture._write", "write_semseg", "head_semseg", "head_normals"),
    *("losses/semseg", "losses/normals", "optimizer", "guard"),
)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_parts_of_the_step_have_scopes(scope, compiled):
    pattern = re.compile(rf"(?:^|[/(]){re.escape(scope)}(?:$|[/)])")
    assert any(pattern.search(name) for name in compiled)


def test_the_backward_pass_has_the_scopes_too(compiled):
    backward = [name for name in compiled if "transpose(jvp" in name]
    for scope in ("blocks", "experts", "assemble", "mixture._write", "head_semseg"):
        assert any(f"/{scope}/" in name for name in backward), scope


def test_profile_scopes_knows_the_parts(compiled):
    rows = {profile_scopes.row_of(name) for name in compiled}
    assert set(profile_scopes.ROWS) <= rows


def test_a_profiled_program_is_never_one_with_the_names_of_another_version(tmp_path):
    key = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, key)
    with contextlib.closing(profiler(tmp_path, first_step=1)):
        assert getattr(jax.config, key) is True
    assert getattr(jax.config, key) is before
