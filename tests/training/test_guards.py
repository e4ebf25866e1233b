"""NaN/Inf steps, loss spikes, unreadable examples, a run that hangs, and preemption."""

import json
import os
import re
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from input_pipeline import pipeline, stream
from input_pipeline.sources import ReplacingSource
from taskexpert_jax import train
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.parallel.preemption import Stopped, on_sigterm
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.guard import Guard, NotFinite
from taskexpert_jax.training.step import make_train_step
from taskexpert_jax.training.watchdog import Watchdog


def small():
    config = demo.get_config("tiny")
    config.tasks = ("semseg", "depth")
    config.num_steps = 6
    config.checkpoint.every_steps = config.eval.every_steps = 4
    config.log.every_steps, config.log.images = 1, 0
    config.optimizer.ema_decay = 0.5
    config.mesh.data, config.batch_size, config.eval.batch_size = -1, 8, 8
    return config


@pytest.fixture(scope="module")
def stepped():
    """(config, state, batch, step with one step that may be left out) on the simulated devices."""
    config = small()
    config.guard.skip_steps = 1
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    mesh = sharding.make_mesh(config.mesh, {"batch_size": config.batch_size})
    batch = next(pipeline.train_batches(config, tasks))
    with sharding.use(mesh):
        tx = optimizer.build(config, model.backbone)
        initialise, _, places = train_state.abstract_and_shardings(model, tx, mesh, 0, averaged=True)
        state = jax.device_get(jax.jit(initialise, out_shardings=places)())
        step = make_train_step(model, tx, config, mesh, places)

    def apply(state, seen, batch):
        with sharding.use(mesh):
            (on_devices,) = sharding.to_devices([batch], mesh)
            return jax.device_get(step(jax.device_put(state, places), seen, on_devices))

    return tasks, state, batch, apply


def poisoned(batch, task="depth"):
    return {**batch, task: np.full_like(batch[task], np.nan)}


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.multidevice
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(stepped):
    tasks, state, batch, apply = stepped
    after, seen = apply(state, tally.empty(tasks), poisoned(batch))
    assert int(after.step) == 1
    assert same(after.replace(step=state.step), state)  # moments, statistics and average too
    assert seen.sums["steps"] == 0 and all(value == 0 for value in seen.sums.values())
    assert seen.skipped == 1 and seen.skipped_steps.tolist() == [1, *[0] * (tally.KEPT - 1)]
    assert {name for name, broken in seen.skipped_tasks.items() if broken[0]} == {"depth"}
    # The next one counts again, as if the first had not been.
    going_on, seen = apply(after, seen, batch)
    assert int(going_on.step) == 2 and seen.sums["steps"] == 1 and np.isfinite(seen.sums["loss"])
    assert not same(going_on.params, state.params) and not same(going_on.ema, state.ema)
    assert (seen.peak, seen.peak_step) == (seen.sums["loss"], 2)


@pytest.mark.multidevice
def test_after_one_too_many_nothing_moves_any_more(stepped):
    tasks, state, batch, apply = stepped
    state, seen = apply(state, tally.empty(tasks), poisoned(batch))
    state, seen = apply(state, seen, poisoned(batch))
    assert int(state.step) == 1 and seen.skipped_steps[:3].tolist() == [1, 2, 0]
    frozen, after = apply(state, seen.restarted(), batch)  # a report does not thaw it
    assert same(frozen, state)
    assert after.skipped == 2 and after.sums["steps"] == 0 and not after.skipped_steps.any()


# --- the whole run ---


def run(config, workdir, at_batch=lambda step, batch: batch, in_evaluation=lambda: None):
    """Trains; `at_batch` changes the batches, `in_evaluation` is called before each evaluation batch."""
    tasks = from_config(config)

    def train_batches(start):
        for step, batch in enumerate(pipeline.train_batches(config, tasks, start_step=start), start + 1):
            yield at_batch(step, batch)

    def eval_batches():
        for batch in pipeline.eval_batches(config, tasks, batch_size=config.eval.batch_size):
            in_evaluation()
            yield batch

    return train.train(config, workdir, train_batches, eval_batches)


def lines(workdir, kind):
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in read if any(name.startswith(kind) for name in line)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (workdir, final state on the host)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, jax.device_get(run(small(), workdir))


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_run_stops_before_the_step_that_is_not_finite_and_repeats_it(whole, tmp_path, capsys):
    config = small()
    poison = lambda step, batch: poisoned(batch) if step == 3 else batch  # noqa: E731
    with pytest.raises(NotFinite, match=r"step 3: .*depth .*not_finite/3.json.*skip_steps"):
        run(config, tmp_path / "run", poison)
    assert Checkpoints(tmp_path / "run", from_config(config)[0]).latest == 2
    assert issubclass(NotFinite, UserError)  # so the program ends with one line
    found = json.loads((tmp_path / "run" / "not_finite" / "3.json").read_text())
    batches = pipeline.train_batches(config, from_config(config), start_step=2)
    assert found["ids"] == next(batches)["id"].tolist() and len(found["ids"]) == 8
    assert (found["step"], found["tasks"], found["seed"]) == (3, ["depth"], config.seed)
    with pytest.raises(NotFinite, match="step 3: "):  # started again, it meets the same step at once
        run(config, tmp_path / "run", poison)
    capsys.readouterr()
    state = jax.device_get(run(config, tmp_path / "run"))
    assert "step 2 of 6" in capsys.readouterr().err
    assert same(state, whole[1])
    config.guard.skip_steps = 1
    (tmp_path / "skip").mkdir()
    skipped = run(config, tmp_path / "skip" / "run", poison)
    assert int(skipped.step) == 6 and not same(skipped.params, whole[1].params)
    assert re.search("warning: step 3: .*depth", capsys.readouterr().err)
    assert lines(tmp_path / "skip" / "run", "train/") == [1, 2, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_sigterm_saves_at_once_and_the_run_goes_on_as_if_it_had_not_come(moment, whole, tmp_path, capsys):
    config, workdir = small(), tmp_path / "run"
    config.checkpoint.every_steps = 100

    def tell():
        os.kill(os.getpid(), signal.SIGTERM)

    def at_batch(step, batch):  # two batches are on their way to the devices before they are asked for
        if moment == "step" and step == 5:
            tell()
        return batch

    stopped = run(config, workdir, at_batch, tell if moment == "evaluation" else lambda: None)
    step = int(stopped.step)
    assert step < config.num_steps and (moment == "step" or step == 4)
    assert f"saved step {step} of 6" in capsys.readouterr().err
    assert Checkpoints(workdir, from_config(config)[0]).latest == step
    state = jax.device_get(run(config, workdir))
    assert f"at step {step} of 6" in capsys.readouterr().err
    assert same(state, whole[1])
    assert lines(workdir, "eval/") == lines(whole[0], "eval/") == [4, 6]
    assert lines(workdir, "train/") == lines(whole[0], "train/")


def test_a_signal_is_only_taken_over_within_a_run():
    before = signal.getsignal(signal.SIGTERM)
    with on_sigterm() as stop:
        assert not stop.asked()
        items = stop.interrupting(iter(range(3)))
        assert next(items) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked() and stop.asked()
        with pytest.raises(Stopped):
            next(items)
    assert signal.getsignal(signal.SIGTERM) is before


# --- what the host says ---


def seen(tasks, losses, skipped=()):
    """The tally of steps with these losses, then of steps that are not finite in their first task."""
    found = tally.empty(tasks)
    yes = jnp.array(True)
    for step, loss in enumerate(losses, 1):
        each = {task.name: jnp.float32(loss) for task in tasks}
        found = found.add(jnp.int32(step), jnp.float32(loss), each, jnp.ones(()), taken=yes, applied=yes)
    for step in skipped:
        each = {task.name: jnp.float32(np.nan if task is tasks[0] else 1.0) for task in tasks}
        found = found.add(jnp.int32(step), jnp.float32(np.nan), each, jnp.ones(()), taken=yes, applied=~yes)
    return jax.device_get(found)


def test_spikes_are_noted_against_the_mean_before(tmp_path, capsys):
    config = small()
    tasks = from_config(config)
    config.guard.spike_factor = 3.0
    guard = Guard(config, tmp_path, lambda step: [f"id{step}"])
    for losses in ([5.0, 1.0], [2.0, 2.5], [1.0, 9.5, 1.0]):  # the first has nothing before it; means 3, 2.925
        guard.check(seen(tasks, losses), lambda step: 0.0)
    (line,) = (tmp_path / "spikes.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 2, "loss": 9.5, "mean": pytest.approx(2.925), "ids": ["id2"]}
    assert re.search(r"step 2: .*9\.5 .*3\.25 ", capsys.readouterr().err)
    config.guard.spike_factor = 0.0
    guard.check(seen(tasks, [1.0, 1000.0]), lambda step: 0.0)
    assert capsys.readouterr().err == ""


def test_steps_skipped_are_described_and_counted(tmp_path, capsys):
    config = small()
    tasks = from_config(config)
    config.guard.skip_steps = 12
    guard = Guard(config, tmp_path, lambda step: [])
    many = seen(tasks, [1.0], skipped=range(2, 2 + tally.KEPT + 3))
    guard.check(many, lambda step: step / 10)
    out = capsys.readouterr().err.splitlines()
    assert len(out) == tally.KEPT + 1 and " 3 " in out[-1]
    assert json.loads((tmp_path / "not_finite" / "4.json").read_text())["learning_rate"] == pytest.approx(0.3)
    two = seen(tasks, [], skipped=[30, 31])
    two = two.replace(skipped=two.skipped + many.skipped)  # carried over from before the report
    with pytest.raises(NotFinite, match=r"step 31: .*semseg.* 12 "):
        guard.check(two, lambda step: 0.0)


# --- examples that cannot be read ---


class Broken:
    labels = ("semseg",)

    def __init__(self, unreadable):
        self.unreadable = unreadable

    def __len__(self):
        return 6

    def load(self, index):
        if index in self.unreadable:
            raise ValueError(f"bytes of\n{index}")
        return index


def test_unreadable_examples_are_replaced_by_the_next_up_to_a_number(capsys):
    source = ReplacingSource(Broken({2, 3, 5}), "train of cats", 3)
    assert [source.load(index) for index in (5, 2, 3, 4, 2, 5)] == [0, 4, 4, 4, 4, 0]
    out = capsys.readouterr().err.splitlines()
    assert [line.split(" cannot")[0] for line in out] == [f"warning: example {i} of train of cats" for i in (5, 2, 3)]
    assert out[2].endswith("cannot be read: ValueError: bytes of 3; replaced, 3 of at most 3")
    with pytest.raises(UserError, match=r"example 3 of train of cats .*bytes of 3 .*1 "):
        ReplacingSource(Broken({2, 3}), "train of cats", 1).load(2)
    with pytest.raises(UserError, match=r"example 2 of .*ValueError: bytes of 2"):
        ReplacingSource(Broken({2}), "train of cats", 0).load(2)
    with pytest.raises(UserError, match="no example of a can be read"):
        ReplacingSource(Broken(set(range(6))), "a", 6).load(0)


def test_training_goes_on_without_what_cannot_be_read_and_evaluation_does_not(monkeypatch):
    config = small()
    tasks = from_config(config)
    opened = pipeline.open_source(config.dataset, tasks, config.dataset.train_split)
    bad = stream.shuffled_index(0, config.seed, len(opened))

    class Damaged(Broken):
        labels = opened.labels

        def __len__(self):
            return len(opened)

        def load(self, index):
            super().load(index)
            return opened.load(index)

    good = next(pipeline.train_batches(config, tasks))["id"].tolist()
    monkeypatch.setattr(pipeline, "open_source", lambda *_: Damaged({bad}))
    with pytest.raises(UserError, match=rf"example {bad} of train of scenes .*skip_examples"):
        next(pipeline.train_batches(config, tasks))
    config.guard.skip_examples = 1
    ids = next(pipeline.train_batches(config, tasks))["id"].tolist()
    assert ids[1:] == good[1:] and ids[0] == opened.load((bad + 1) % len(opened))["id"]
    monkeypatch.setattr(pipeline, "open_source", lambda *_: Damaged({0}))
    with pytest.raises(ValueError, match="bytes of"):
        next(pipeline.eval_batches(config, tasks, batch_size=2))


# --- a run that hangs ---


def waited(watchdog, capsys, until, seconds=5.0):
    deadline = time.monotonic() + seconds
    said = ""
    while until not in said and time.monotonic() < deadline:
        time.sleep(0.02)
        said += capsys.readouterr().err
    return said


def test_the_watchdog_says_what_a_run_waits_for_and_how_long(capsys):
    watchdog = Watchdog(0.2, 7)
    try:
        with watchdog.doing("waiting for the next batch"):
            said = waited(watchdog, capsys, "for 0")
        assert "no step has finished for 0 s; the last was 7, and the program is waiting for the next batch" in said
        watchdog.started(8, jnp.zeros(()))  # of a step that is done
        said = waited(watchdog, capsys, "last was 8")
        assert "the last was 8, and the program is waiting for the devices" in said
    finally:
        watchdog.close()


def test_the_watchdog_is_quiet_while_things_move_and_when_it_is_off(capsys):
    watchdog, off = Watchdog(0.5, 0), Watchdog(0.0, 0)
    for _ in watchdog.watching(range(8)):
        time.sleep(0.1)
    watchdog.close()
    off.close()
    assert capsys.readouterr().err == ""
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
