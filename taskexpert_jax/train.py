"""Training, from top to bottom: set up, resume, step, log, evaluate, save."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from taskexpert_jax import evaluate
from taskexpert_jax.evaluation import inference
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import processes, sharding
from taskexpert_jax.parallel.stopping import Stopped, on_sigterm
from taskexpert_jax.pretrained import load as pretrained
from taskexpert_jax.runs import workdir as workdirs
from taskexpert_jax.runs.checkpoints import Checkpoints, saved_steps
from taskexpert_jax.runs.writer import RunWriter
from taskexpert_jax.tasks import Task, best_task, from_config
from taskexpert_jax.training import optimizer
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.guard import Guard, NotFinite, batch_ids
from taskexpert_jax.training.progress import Progress
from taskexpert_jax.training.state import TrainState
from taskexpert_jax.training.step import batch_sizes, make_train_step
from taskexpert_jax.training.tally import Tally
from taskexpert_jax.training.tally import empty as empty_tally
from taskexpert_jax.training.watchdog import Watchdog

HostBatches = Iterable[Mapping[str, np.ndarray]]


def train(
    config: Any,
    workdir: pathlib.Path,
    train_batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    eval_batches: Callable[[], HostBatches],
) -> TrainState:
    """Trains `config` in `workdir`, going on from its latest good checkpoint where there is one.

    Told to stop by SIGTERM, it saves and returns early.

    Args:
      config: see configs/defaults.py.
      workdir: gets config.json, checkpoints/, metrics.jsonl and TensorBoard events.
      train_batches: start step -> this process's rows of the batches of that step, the next, and so on.
      eval_batches: makes one pass over the evaluation set.

    Returns:
      The final state.

    Raises:
      UserError: a config that does not fit itself, the devices or the workdir; a workdir in use; a full disk; or
        more losses that are not finite than `config.guard.skip_steps`: the state before the last of them is saved.
    """
    # Everything that can be refused is refused before anything is written.
    mesh = sharding.make_mesh(config.mesh, batch_sizes(config))
    tasks = from_config(config)
    best = best_task(tasks, config.checkpoint.best_task)
    model = taskexpert.from_config(config, tasks)
    infer = inference.make_inference(model, config)
    weights = None if saved_steps(workdir) else pretrained.read(config, model)  # a resumed run has its own
    plain_config = config.to_dict()
    first_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if first_process:
            stack.enter_context(workdirs.lock(workdir))
            workdirs.claim(workdir, plain_config)
        print(f"{config.variant} on {jax.device_count()} {jax.devices()[0].device_kind} device(s), {dict(mesh.shape)}")
        print(budget.count(model).table(), flush=True)
        stack.enter_context(sharding.use(mesh))
        stop = stack.enter_context(on_sigterm())
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, best)))

        # --- state: fresh, or the latest good checkpoint's ---
        tx = optimizer.build(config)
        initialise, abstract, shardings = train_state.abstract_and_shardings(
            model, tx, mesh, config.seed, averaged=config.optimizer.ema_decay > 0
        )
        restored = checkpoints.restore_newest(abstract.to_items())
        if restored is None:
            state = jax.jit(initialise, out_shardings=shardings)()
            if weights is not None:
                state = state.replace(params=weights.placed(state.params), ema=weights.placed(state.ema))
                print(weights.report, flush=True)
        else:
            state = TrainState.from_items(restored.items)
            print(f"resumed {workdir} at step {restored.step} of {config.num_steps}", flush=True)
        first = int(state.step)
        writer = stack.enter_context(contextlib.closing(RunWriter(workdir, first, active=first_process)))
        watchdog = stack.enter_context(contextlib.closing(Watchdog(config.guard.stall_seconds, first)))
        progress = Progress(first, config.num_steps, config.batch_size)
        reports = Reports(config, workdir, writer, progress, train_batches, mesh)

        # --- what a step, an evaluation and a save are ---
        train_step = make_train_step(model, tx, config, mesh, shardings)
        eval_step = evaluate.make_eval_step(tasks, infer, mesh)
        predict_step = evaluate.make_predict_step(tasks, infer, mesh)

        def evaluated(step: int, state: TrainState) -> evaluate.Results:
            with watchdog.doing("evaluating"):
                batches = watchdog.watching(stop.interrupting(eval_batches()))
                results = evaluate.run(eval_step, state.variables(), tasks, batches, mesh)
                writer.scalars(step, {f"eval/{name}": value for name, value in results.items()})
                writer.images(step, draw_examples(predict_step, state, tasks, eval_batches, config.log.images, mesh))
            published = [f"{t.name} {t.main_metric} {results[f'{t.name}/{t.main_metric}']:.4g}" for t in tasks]
            print(f"evaluation at step {step}: {', '.join(published)}", flush=True)
            progress.restart(step)
            return results

        def save(state: TrainState, results: evaluate.Results | None) -> None:
            with watchdog.doing("saving"):
                checkpoints.save(int(state.step), state.to_items(), plain_config, results)

        def due(step: int, every_steps: int) -> bool:
            return step == config.num_steps or step % every_steps == 0

        step, stopping = first, False
        try:
            if restored and not restored.evaluated and due(first, config.eval.every_steps):
                save(state, evaluated(first, state))  # the run was told to stop before it had come to this

            # --- the loop: nothing in it waits for the devices but the reports ---
            # Placed as the step gives it back, or the step would be compiled once for this and once for that.
            tally = jax.jit(lambda: empty_tally(tasks), out_shardings=sharding.replicated(mesh))()
            restart, pending = jax.jit(Tally.restarted, out_shardings=sharding.replicated(mesh)), None
            batches = sharding.to_devices(train_batches(first), mesh) if first < config.num_steps else iter(())
            for step in range(first + 1, config.num_steps + 1):
                with watchdog.doing("waiting for the next batch"):
                    batch = next(batches)
                with jax.transfer_guard("disallow"):  # a step takes what is on the devices, nothing from the host
                    state, tally = train_step(state, tally, batch)
                watchdog.started(step, tally.left_out)
                if pending is not None:  # fetched one step late, when the devices have the next step to work on
                    reports.write(*pending)
                    pending = None
                stopping = stop.asked()
                evaluating, saving = due(step, config.eval.every_steps), due(step, config.checkpoint.every_steps)
                if evaluating or saving or stopping:  # at once: what is not finite is said before what it leads to
                    reports.write(step, tally)
                    tally = restart(tally)
                elif step % config.log.every_steps == 0:
                    pending, tally = (step, tally), restart(tally)
                results = evaluated(step, state) if evaluating and not stopping else None
                if saving or stopping:
                    save(state, results)
                if stopping:
                    break
        except Stopped:  # in an evaluation, which is made when the run goes on
            stopping = True
            save(state, None)
        except NotFinite:
            if int(state.step) > first:
                save(state, None)
                checkpoints.wait()
            raise
        with watchdog.doing("saving"):
            checkpoints.wait()
    if stopping:
        print(f"told to stop: saved step {step} of {config.num_steps}; the same command goes on from there", flush=True)
    else:
        print(f"trained to step {config.num_steps}: {workdir}", flush=True)
    return state


class Reports:
    """What is said and written of a run's steps: means, rate, and what its guard finds."""

    def __init__(
        self,
        config: Any,
        workdir: pathlib.Path,
        writer: RunWriter,
        progress: Progress,
        train_batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
        mesh: Mesh,
    ):
        def ids(step: int) -> list[str]:
            batch = next(iter(train_batches(step - 1)))
            return batch_ids(batch, processes.batch_rows(mesh, config.batch_size).own)

        self._guard = Guard(config, workdir, ids, active=jax.process_index() == 0)
        self._writer, self._progress = writer, progress
        self._rate = optimizer.learning_rate(config)

    def write(self, step: int, tally: Tally) -> None:
        """Writes and prints the means of the steps since the last report; raises NotFinite as `Guard.check`."""
        host = jax.device_get(tally)
        count = float(host.sums["steps"])
        if count:
            means = {name: float(value) / count for name, value in host.sums.items() if name != "steps"}
            scalars = {f"train/{name}": value for name, value in means.items()}
            scalars["train/learning_rate"] = self._rate_at(step - 1)
            scalars["train/images_per_second"] = self._progress.images_per_second(step)
            self._writer.scalars(step, scalars)
            print(self._progress.line(step, means), flush=True)
        self._guard.check(host, self._rate_at)

    def _rate_at(self, step: int) -> float:
        return float(jnp.asarray(self._rate(step)))


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
    from taskexpert_jax.tasks import drawing  # matplotlib is slow to import, and only needed here

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
            drawing.comparison(
                batch["image"][i, rows, columns],
                tasks,
                {task.name: values[task.name][i, rows, columns] for task in tasks},
                {task.name: task.label_values(batch[task.name][i, rows, columns]) for task in tasks},
            )
        )
    return pictures
