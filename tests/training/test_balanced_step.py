"""Balancing in the training step and in whole runs: gradients, logs, skipped steps, resuming."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import demo
from input_pipeline import pipeline
from taskexpert_jax import train
from taskexpert_jax.models import inputs
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import balancing, objective, optimizer
from taskexpert_jax.training import state as train_state
from tests.training import one_step


def separate_gradients(config):
    """Gradients by parameter, of each weighted loss and of the penalty, for the arguments of `one_step.step_on`."""
    mesh, tasks = one_step.mesh_of((1, 1, 1)), from_config(config)
    model = taskexpert.from_config(config, tasks)
    with sharding.use(mesh):
        tx = optimizer.build(config, model.backbone)
        state = one_step.drawn(train_state.abstract_and_shardings(model, tx, mesh, config.seed)[1])
        batch = {key: jnp.asarray(value) for key, value in one_step.random_batch(config).items()}

        def terms(params):
            key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), 0)
            image = inputs.normalise(batch["image"], batch["window"], model.normalisation)
            (logits, aux), _ = model.apply(
                {"params": params, "batch_stats": state.batch_stats}, image, train=True, return_aux=True,
                full_size=False, mutable=["batch_stats"], rngs={"drop_path": key, "gate_noise": key},
            )  # fmt: skip
            losses = objective.losses(tasks, logits, batch)
            pixels = lambda stride: inputs.token_pixels(  # noqa: E731
                batch["window"], batch["mask"], tuple(config.dataset.image_size), stride
            )
            return jnp.stack([t.loss_weight * losses[t.name] for t in tasks] + [model.decoder.penalty(aux, pixels)])

        def rows(params):
            backward = jax.vjp(terms, params)[1]
            return jax.tree.map(lambda *of: jnp.stack(of), *(backward(row)[0] for row in jnp.eye(len(tasks) + 1)))

        found = jax.jit(rows)(state.params)
    named = jax.tree_util.tree_leaves_with_path(jax.device_get(found))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.astype(np.float64) for path, leaf in named}


def test_the_step_of_pcgrad_projects_what_the_tasks_share_and_nothing_else():
    """Heads, writes and reads have a task's name, gates and the initial memory an axis of tasks."""
    config = one_step.small("ablation")
    config.balancing, config.model.gate.balance = "pcgrad", 0.1
    config.optimizer.clip_norm = config.optimizer.weight_decay = 0.0

    def own(name):
        of_a_task = any(f"_{task}/" in name for task in config.tasks)
        return of_a_task or name.startswith(("initial_memory", "mixture/gates/"))

    of_terms = separate_gradients(config)
    first, second, _ = np.stack([
        np.concatenate([leaf[term].ravel() for name, leaf in of_terms.items() if not own(name)]) for term in range(3)
    ])  # fmt: skip
    product = first @ second
    assert product < 0, "the tasks of this batch do not conflict"
    largest = max(np.abs(first).max(), np.abs(second).max())
    weights = 1 - product / (first @ first), 1 - product / (second @ second)
    sums, moments, _ = one_step.step_on(config, (1, 1, 1))
    for task, weight in zip(from_config(config), weights, strict=True):
        np.testing.assert_allclose(sums[f"weight/{task.name}"], task.loss_weight * weight, rtol=1e-3)
    (adam,) = [part for part in moments if isinstance(part, optax.ScaleByAdamState)]
    for path, moment in jax.tree_util.tree_leaves_with_path(adam.mu):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        semseg, normals, penalty = of_terms[name]
        factors = (1, 1) if own(name) else weights
        expected = factors[0] * semseg + factors[1] * normals + penalty
        np.testing.assert_allclose(10 * moment, expected, rtol=1e-3, atol=1e-4 * largest, err_msg=name)


# --- whole runs ---


def small(method):
    config = demo.get_config("tiny")
    config.tasks, config.balancing = ("semseg", "depth"), method
    config.dwa.window = 1
    config.famo.learning_rate = config.uncertainty.learning_rate = 0.1
    config.num_steps = 6
    config.checkpoint.every_steps, config.eval.every_steps = 4, 0
    config.log.every_steps, config.log.images = 1, 0
    config.guard.skip_steps = 1
    config.batch_size = config.eval.batch_size = 8
    return config


class Killed(Exception):
    """Raised in the place of a batch."""


def run(config, workdir, killed_at=0):
    """Trains with NaN labels in the third step, which is skipped."""
    tasks = from_config(config)

    def train_batches(start):
        for step, batch in enumerate(pipeline.train_batches(config, tasks, start_step=start), start + 1):
            if step == killed_at:
                raise Killed
            yield {**batch, "depth": np.full_like(batch["depth"], np.nan)} if step == 3 else batch

    def eval_batches():
        return pipeline.eval_batches(config, tasks, batch_size=config.eval.batch_size)

    return jax.device_get(train.train(config, workdir, train_batches, eval_batches))


def logged(workdir):
    """The lines of training steps in metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("name", ["dwa", "famo"])  # Adam's state in famo, as in uncertainty
def test_a_run_follows_its_method_logs_the_weights_skips_nan_steps_and_resumes_exactly(name, tmp_path, monkeypatch):
    """The method is run again on the logged losses: the skipped step has no part in its state."""
    config, steps, make_train_step = small(name), [], train.make_train_step

    def kept_step(*arguments):
        steps.append(make_train_step(*arguments))
        return steps[-1]

    monkeypatch.setattr(train, "make_train_step", kept_step)
    whole = run(config, tmp_path / "whole")
    assert steps[0]._cache_size() == 1  # compiled once
    lines = logged(tmp_path / "whole")
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]
    tasks = from_config(config)
    method = balancing.from_config(config, tasks)
    state = method.init()
    for line in lines:
        losses = jnp.array([task.loss_weight * line[f"train/loss/{task.name}"] for task in tasks], jnp.float32)
        for task, weight in zip(tasks, method.weights(state, losses), strict=True):
            np.testing.assert_allclose(line[f"train/weight/{task.name}"], task.loss_weight * weight, rtol=1e-5)
        state = method.updated(state, losses)
    assert lines[0]["train/weight/depth"] != lines[-1]["train/weight/depth"]
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4), whole.balancing, state)
    with pytest.raises(Killed):
        run(config, tmp_path / "killed", killed_at=6)
    resumed = run(config, tmp_path / "killed")
    assert resumed.balancing
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    timed = ("time", "train/images_per_second")
    without_times = [[{k: v for k, v in line.items() if k not in timed} for line in logged(tmp_path / of)]
                     for of in ("whole", "killed")]  # fmt: skip
    assert without_times[0] == without_times[1]


def test_fixed_weights_add_nothing_to_state_and_checkpoints():
    config = small("fixed")
    tasks = from_config(config)
    model, mesh = taskexpert.from_config(config, tasks), one_step.mesh_of((1, 1, 1))
    tx = optimizer.build(config, model.backbone)
    kept = {}
    for name in ("fixed", "pcgrad", "famo"):
        config.balancing = name
        method = balancing.from_config(config, tasks)
        state = train_state.abstract_and_shardings(model, tx, mesh, 0, balancing=method)[1]
        kept[name] = set(state.to_items()["train"])
        assert train_state.TrainState.from_items(state.to_items()) == state
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.balancing))
    assert kept["fixed"] == kept["pcgrad"] == {"opt_state", "step", "rng"}
    assert kept["famo"] == {*kept["fixed"], "balancing"}
