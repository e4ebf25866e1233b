"""Training, from top to bottom: set up, resume, step, log, evaluate, save."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from taskexpert_jax import (
    evaluate,
    gate_statistics,
    inference,
    inputs,
    optimizer,
    pretrained,
    processes,
    sharding,
    train_state,
)
from taskexpert_jax import workdir as workdirs
from taskexpert_jax.checkpoint import Checkpoints, saved_steps
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget, mmoe, taskexpert
from taskexpert_jax.models.taskexpert import TaskExpert
from taskexpert_jax.progress import Progress
from taskexpert_jax.tasks import Task, from_config
from taskexpert_jax.train_state import TrainState
from taskexpert_jax.writers import RunWriter

Batch = Mapping[str, jax.Array]
HostBatches = Iterable[Mapping[str, np.ndarray]]
Sums = dict[str, jax.Array]


def zero_sums(tasks: tuple[Task, ...]) -> Sums:
    """Sums of no step: what a training step adds to, float32 scalars."""
    names = ("loss", *(f"loss/{task.name}" for task in tasks), "grad_norm", "steps")
    return {name: jnp.zeros(()) for name in names}


def make_train_step(
    model: TaskExpert, tx: optax.GradientTransformation, config: Any, mesh: Mesh, state_shardings: TrainState
) -> Callable[[TrainState, Sums, Batch], tuple[TrainState, Sums]]:
    """(state, sums, batch) -> (state, sums), jitted on the mesh; state and sums are donated.

    With `config.accumulate_steps` > 1 the batch is split into that many micro-batches, whose gradients are averaged;
    batch statistics go from one to the next.
    """
    tasks, accumulate, balance = model.tasks, config.accumulate_steps, config.model.gate.balance
    averaged = optimizer.average(config.optimizer.ema_decay)

    def loss_fn(params: Any, batch_stats: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        (predictions, gates), updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            inputs.normalise(batch["image"], batch["window"], model.normalisation),
            train=True,
            return_gates=True,
            rngs={"drop_path": key, "gate_noise": jax.random.fold_in(key, 0)},
            mutable=["batch_stats"],
        )
        losses = {task.name: task.loss(predictions[task.name], batch[task.name], batch["mask"]) for task in tasks}
        total = sum((task.loss_weight * losses[task.name] for task in tasks), start=jnp.zeros(()))
        if balance:
            image_size = (batch["image"].shape[1], batch["image"].shape[2])
            pixels = gate_statistics.token_pixels(batch["window"], batch["mask"], image_size, model.backbone.patch_size)
            total = total + balance * mmoe.balance_loss(gates, pixels)
        return total, (losses, updates.get("batch_stats", {}))

    def gradients(state: TrainState, batch: Batch, key: jax.Array) -> tuple[Any, Any, jax.Array, dict[str, jax.Array]]:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate == 1:
            (total, (losses, batch_stats)), grads = grad_fn(state.params, state.batch_stats, batch, key)
            return grads, batch_stats, total, losses

        def micro(carry: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            batch_stats, sums = carry
            (total, (losses, batch_stats)), grads = grad_fn(state.params, batch_stats, *xs)
            return (batch_stats, jax.tree.map(jnp.add, sums, (grads, total, losses))), None

        zeros = (
            jax.tree.map(jnp.zeros_like, state.params),
            jnp.zeros(()),
            {task.name: jnp.zeros(()) for task in tasks},
        )
        keys = jax.random.split(key, accumulate)
        (batch_stats, sums), _ = jax.lax.scan(micro, (state.batch_stats, zeros), (split_batch(batch, accumulate), keys))
        grads, total, losses = jax.tree.map(lambda leaf: leaf / accumulate, sums)
        return grads, batch_stats, total, losses

    def step(state: TrainState, sums: Sums, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        grads, batch_stats, total, losses = gradients(state, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=averaged(state.ema, params, state.step) if state.ema else {},
        )
        seen = {"loss": total, "grad_norm": optax.tree.norm(grads), "steps": jnp.ones(())}
        seen |= {f"loss/{name}": loss for name, loss in losses.items()}
        return new_state, {name: sums[name] + seen[name] for name in sums}

    places = (state_shardings, sharding.replicated(mesh))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=places)


def split_batch(batch: Batch, count: int) -> Batch:
    """(B, ...) -> (count, B / count, ...) arrays; every device keeps the rows that it has."""

    def split(leaf: jax.Array) -> jax.Array:
        parts = leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]).swapaxes(0, 1)
        mesh = jax.sharding.get_abstract_mesh()
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"))))

    return jax.tree.map(split, dict(batch))


def batch_sizes(config: Any) -> dict[str, int]:
    """Config field -> number of examples, of everything that is split over the devices.

    Raises:
      UserError: micro-batches that do not add up to the batch.
    """
    micro_batch, rest = divmod(config.batch_size, config.accumulate_steps)
    if rest:
        raise UserError(f"config.accumulate_steps={config.accumulate_steps} must divide batch_size={config.batch_size}")
    sizes = {"batch_size": config.batch_size, "eval.batch_size": config.eval.batch_size}
    return sizes if config.accumulate_steps == 1 else {**sizes, "batch_size / accumulate_steps": micro_batch}


def train(
    config: Any,
    workdir: pathlib.Path,
    train_batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    eval_batches: Callable[[], HostBatches],
) -> TrainState:
    """Trains `config` in `workdir`, going on from its latest checkpoint where there is one.

    Args:
      config: see configs/defaults.py.
      workdir: gets config.json, checkpoints/, metrics.jsonl and TensorBoard events.
      train_batches: start step -> this process's rows of the batches of that step, the next, and so on.
      eval_batches: makes one pass over the evaluation set.

    Returns:
      The final state.

    Raises:
      UserError: a config that does not fit itself, the devices or the workdir; or a loss that is not finite.
    """
    # Everything that can be refused is refused before anything is written.
    mesh = sharding.make_mesh(config.mesh, batch_sizes(config))
    tasks = from_config(config)
    best = evaluate.best_task(config, tasks)
    model = taskexpert.from_config(config, tasks)
    infer = inference.make_inference(model, config)
    weights = None if saved_steps(workdir) else pretrained.read(config, model)  # a resumed run has its own
    plain_config = config.to_dict()
    if jax.process_index() == 0:
        workdirs.claim(workdir, plain_config)
    print(f"{config.variant} on {jax.device_count()} {jax.devices()[0].device_kind} device(s), {dict(mesh.shape)}")
    print(budget.count(model).table(), flush=True)

    with sharding.use(mesh), contextlib.closing(Checkpoints(workdir, best)) as checkpoints:
        # --- state: fresh, or the latest checkpoint's ---
        tx = optimizer.build(config)
        initialise, abstract, shardings = train_state.abstract_and_shardings(
            model, tx, mesh, config.seed, averaged=config.optimizer.ema_decay > 0
        )
        if checkpoints.latest is None:
            state = jax.jit(initialise, out_shardings=shardings)()
            if weights is not None:
                state = state.replace(params=weights.placed(state.params), ema=weights.placed(state.ema))
                print(weights.report, flush=True)
        else:
            state = checkpoints.restore(checkpoints.latest, abstract)
            print(f"resumed {workdir} at step {checkpoints.latest} of {config.num_steps}", flush=True)
        first = int(state.step)
        train_step = make_train_step(model, tx, config, mesh, shardings)
        eval_step = evaluate.make_eval_step(tasks, infer, mesh)
        predict_step = evaluate.make_predict_step(tasks, infer, mesh)
        rate = optimizer.learning_rate(config)
        progress = Progress(first, config.num_steps, config.batch_size)

        def evaluated(step: int, state: TrainState, writer: RunWriter) -> evaluate.Results:
            results = evaluate.run(eval_step, state.variables(), tasks, eval_batches(), mesh)
            writer.scalars(step, {f"eval/{name}": value for name, value in results.items()})
            writer.images(step, draw_examples(predict_step, state, tasks, eval_batches, config.log.images, mesh))
            published = [f"{t.name} {t.main_metric} {results[f'{t.name}/{t.main_metric}']:.4g}" for t in tasks]
            print(f"evaluation at step {step}: {', '.join(published)}", flush=True)
            progress.restart(step)
            return results

        # --- the loop: nothing in it waits for the device but the reports ---
        with contextlib.closing(RunWriter(workdir, first, active=jax.process_index() == 0)) as writer:
            # Placed as the step gives them back, or the step would be compiled once for these and once for those.
            fresh_sums = jax.jit(lambda: zero_sums(tasks), out_shardings=sharding.replicated(mesh))
            sums, pending = fresh_sums(), None
            batches = sharding.to_devices(train_batches(first), mesh) if first < config.num_steps else iter(())
            for step in range(first + 1, config.num_steps + 1):
                batch = next(batches)
                with jax.transfer_guard("disallow"):  # a step takes what is on the devices, and nothing from the host
                    state, sums = train_step(state, sums, batch)
                if pending is not None:  # fetched one step late, when the device has the next step to work on
                    report(writer, progress, *pending, rate=rate)
                    pending = None
                last = step == config.num_steps
                evaluating = last or step % config.eval.every_steps == 0
                saving = last or step % config.checkpoint.every_steps == 0
                if evaluating or saving:  # at once: a loss that is not finite must not reach a checkpoint
                    report(writer, progress, step, sums, rate=rate)
                    sums = fresh_sums()
                elif step % config.log.every_steps == 0:
                    pending, sums = (step, sums), fresh_sums()
                results = evaluated(step, state, writer) if evaluating else None
                if saving:
                    checkpoints.save(state, plain_config, results)
    print(f"trained to step {config.num_steps}: {workdir}", flush=True)
    return state


def report(writer: RunWriter, progress: Progress, step: int, sums: Sums, *, rate: optax.Schedule) -> None:
    """Writes and prints the means since the last report; stops the run where a loss is not finite, naming the task."""
    host = {name: float(value) for name, value in jax.device_get(sums).items()}
    count = host.pop("steps")
    if not count:
        return
    means = {name: value / count for name, value in host.items()}
    broken = [name.removeprefix("loss/") for name in means if "/" in name and not math.isfinite(means[name])]
    if broken or not all(map(math.isfinite, means.values())):
        # A sum keeps a NaN or infinity, so none of the steps since the last report escapes.
        what = f"the loss of {', '.join(broken)}" if broken else "the gradient"
        raise UserError(
            f"step {step}: {what} is not finite (some time in the last {int(count)} steps); nothing was saved since "
            "the last checkpoint. Lower config.optimizer.learning_rate, or train in float32"
        )
    scalars = {f"train/{name}": value for name, value in means.items()}
    scalars["train/learning_rate"] = float(jnp.asarray(rate(step - 1)))
    scalars["train/images_per_second"] = progress.images_per_second(step)
    writer.scalars(step, scalars)
    print(progress.line(step, means), flush=True)


def draw_examples(
    predict_step: Callable[..., dict[str, jax.Array]],
    state: TrainState,
    tasks: tuple[Task, ...],
    eval_batches: Callable[[], HostBatches],
    count: int,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """Prediction above ground truth for the first `count` evaluation examples: title -> (H, W, 3) uint8.

    Of several processes, the first draws those that it has read; the others take part and get nothing.
    """
    if not count:
        return {}
    from taskexpert_jax import visualize  # matplotlib is slow to import, and only needed here

    batch = next(iter(eval_batches()))
    (on_devices,) = sharding.to_devices([batch], mesh)
    predicted = predict_step(state.variables(), on_devices)
    if jax.process_index():
        return {}
    own = processes.batch_rows(mesh, len(on_devices["mask"])).own  # predictions are those of all processes
    values = {name: of[own] for name, of in jax.device_get(predicted).items()}
    pictures = {}
    for i in range(min(count, int(batch["mask"].sum()))):
        top, left, height, width = batch["window"][i]
        rows, columns = slice(top, top + height), slice(left, left + width)
        pictures[f"prediction/{i}"] = np.asarray(
            visualize.comparison(
                batch["image"][i, rows, columns],
                tasks,
                {task.name: values[task.name][i, rows, columns] for task in tasks},
                {task.name: task.label_values(batch[task.name][i, rows, columns]) for task in tasks},
            )
        )
    return pictures
