"""Training, from top to bottom: set up, resume, step, log, evaluate, save."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import pathlib

from absl import logging
import jax
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import command_line, installation
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import inference, results, steps
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding, slices
from taskexpert_jax.parallel.preemption import Stopped, on_sigterm
from taskexpert_jax.pretrained import load as pretrained
from taskexpert_jax.progress import Progress
from taskexpert_jax.runs import released, wandb_writer
from taskexpert_jax.runs import workdir as workdirs
from taskexpert_jax.runs.checkpoints import Checkpoints, saved_steps
from taskexpert_jax.runs.config import check_checkpoint
from taskexpert_jax.runs.writer import RunWriter
from taskexpert_jax.tasks import best_task, from_config
from taskexpert_jax.training import balancing, optimizer
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.guard import NotFinite
from taskexpert_jax.training.profile import Profiler
from taskexpert_jax.training.reports import Reports, draw_examples
from taskexpert_jax.training.state import TrainState
from taskexpert_jax.training.step import batch_sizes, make_train_step
from taskexpert_jax.training.tally import Tally
from taskexpert_jax.training.tally import empty as empty_tally
from taskexpert_jax.training.throughput import Throughput
from taskexpert_jax.training.watchdog import Watchdog

HostBatches = Iterable[Mapping[str, np.ndarray]]


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    train_batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    eval_batches: Callable[[], HostBatches],
    *,
    extend: bool = False,
    preempted_status: int = 0,
) -> TrainState:
    """Trains `config` in `workdir`, resuming from its latest good checkpoint if there is one.

    On SIGTERM it saves a checkpoint and returns early.

    Args:
      config: see `taskexpert_jax.config`.
      workdir: receives config.json, checkpoints/, metrics.jsonl and TensorBoard events.
      train_batches: start step -> this process's rows of the batches from that step on.
      eval_batches: returns one pass over the evaluation set; `examples`, if it has that, is their number.
      extend: accept a larger `num_steps` than the run's, to train it further.
      preempted_status: if not 0, exit with this status after SIGTERM instead of returning.

    Returns:
      The final state.

    Raises:
      UserError: an invalid config, or one that does not fit the devices or the workdir; a workdir in use; a full disk;
        more NaN/Inf steps than `config.guard.skip_steps` (the state before the last of them is saved).
    """
    # Refuse invalid input before anything is written.
    check(config)
    released.refuse_to_train(workdir)
    if config.log.wandb:
        wandb_writer.installed()
    mesh = sharding.make_mesh(config.mesh, batch_sizes(config))
    tasks = from_config(config)
    best = best_task(tasks, config.checkpoint.best_task)
    model = taskexpert.from_config(config, tasks)
    infer = inference.make_inference(model, config)
    weights = None if saved_steps(workdir) else pretrained.read(config, model)  # a resumed run has its own weights
    tx = optimizer.build(config, model.backbone)
    method = balancing.from_config(config, tasks)
    plain_config = config.to_dict()
    first_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(sharding.use(mesh))
        initialise, abstract, shardings = train_state.abstract_and_shardings(
            model, tx, mesh, config.seed, averaged=config.optimizer.ema_decay > 0, balancing=method
        )
        finished_at = None  # num_steps before it was raised
        hold: workdirs.Hold = workdirs.Locked()
        if first_process:
            hold = stack.enter_context(workdirs.lock(workdir))
            finished_at = workdirs.claim(workdir, config, extend=extend)
        logging.info(f"TaskExpert-JAX {installation.version_text()}")
        logging.info(
            f"{config.variant} on {jax.device_count()} {jax.devices()[0].device_kind} device(s), {dict(mesh.shape)}, "
            f"{slices.count(mesh.devices.flat, config.mesh.slices)} slice(s)"
        )
        for line in budget.count(model).table().splitlines():
            logging.info(line)
        stop = stack.enter_context(on_sigterm())
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, best, hold=hold)))

        # --- state: fresh, or the latest good checkpoint's ---
        restored = checkpoints.restore_newest(abstract.to_items())
        if restored is None:
            state = jax.jit(initialise, out_shardings=shardings)()
            if weights is not None:
                state = state.replace(params=weights.placed(state.params), ema=weights.placed(state.ema))
                for line in weights.report.splitlines():
                    logging.info(line)
        else:
            check_checkpoint(workdir, restored.step, config, workdirs.FREE)
            state = TrainState.from_items(restored.items)
            if restored.step > config.num_steps:
                raise UserError(
                    f"checkpoint {checkpoints.path}/{restored.step} is beyond config.num_steps={config.num_steps}; "
                    "move it elsewhere to resume from the one before it"
                )
            logging.info(f"resumed {workdir} at step {restored.step} of {config.num_steps}")
            if finished_at is not None:
                logging.warning(optimizer.extension(config, finished_at, restored.step))
        first = int(state.step)
        writer = RunWriter(config, workdir, first, active=first_process, hold=hold)
        stack.enter_context(contextlib.closing(writer))
        watchdog = stack.enter_context(contextlib.closing(Watchdog(config.guard.stall_seconds, first)))
        throughput = Throughput(first, config.num_steps, config.batch_size)
        profiler = stack.enter_context(contextlib.closing(Profiler(config.profile, workdir, watchdog, throughput)))
        reports = Reports(config, workdir, writer, throughput, train_batches, mesh)

        # --- what a step, an evaluation and a save are ---
        train_step = make_train_step(model, tx, config, mesh, shardings)
        eval_step = steps.make_eval_step(tasks, infer, mesh)
        predict_step = steps.make_predict_step(tasks, infer, mesh)

        def evaluated(step: int, state: TrainState) -> results.Values:
            source = eval_batches()
            shown = Progress("evaluating", getattr(source, "examples", None), "examples", active=first_process)
            with watchdog.doing("evaluating"), shown:
                batches = watchdog.watching(stop.interrupting(shown.each(source, config.eval.batch_size)))
                found = steps.run(eval_step, state.variables(), tasks, batches, mesh)
                writer.scalars(step, {f"eval/{name}": value for name, value in found.items()})
                writer.images(step, draw_examples(predict_step, state, tasks, eval_batches, config.log.images, mesh))
            published = [f"{t.name} {t.main_metric} {found[f'{t.name}/{t.main_metric}']:.4g}" for t in tasks]
            logging.info(f"evaluation at step {step}: {', '.join(published)}")
            throughput.restart(step)
            return found

        def save(state: TrainState, metrics: results.Values | None) -> None:
            with watchdog.doing("saving"):
                writer.wait()  # a run that resumes from this step has all lines before it
                checkpoints.save(int(state.step), state.to_items(), plain_config, metrics)

        def due(step: int, every_steps: int) -> bool:
            return step == config.num_steps or (every_steps > 0 and step % every_steps == 0)

        step, stopping = first, False
        try:
            if restored and not restored.evaluated and due(first, config.eval.every_steps):
                save(state, evaluated(first, state))  # the run was preempted before this evaluation

            # --- the loop: only reports wait for the devices ---
            # The tally gets the sharding that the step returns, or the step would be compiled twice.
            empty = jax.jit(lambda: empty_tally(tasks, weights=method.weighs), out_shardings=sharding.replicated(mesh))
            tally = empty()
            restart, pending = jax.jit(Tally.restarted, out_shardings=sharding.replicated(mesh)), None
            batches = sharding.to_devices(train_batches(first), mesh) if first < config.num_steps else iter(())
            if first < config.num_steps:
                logging.info("compiling the training step, which the first step waits for")
            for step in profiler.steps(range(first + 1, config.num_steps + 1)):
                with watchdog.doing("waiting for the next batch"):
                    batch = next(batches)
                with jax.transfer_guard("disallow"):  # all inputs of a step are on the devices already
                    state, tally = train_step(state, tally, batch)
                watchdog.started(step, tally.skipped)
                if pending is not None:  # one step late, while the devices compute the next step
                    reports.write(*pending)
                    pending = None
                stopping = stop.asked()
                evaluating, saving = due(step, config.eval.every_steps), due(step, config.checkpoint.every_steps)
                if (
                    evaluating or saving or stopping
                ):  # at once, so that NaN/Inf steps are reported before their consequences
                    reports.write(step, tally)
                    tally = restart(tally)
                elif due(step, config.log.every_steps):
                    pending, tally = (step, tally), restart(tally)
                metrics = evaluated(step, state) if evaluating and not stopping else None
                if saving or stopping:
                    save(state, metrics)
                if stopping:
                    break
        except Stopped:  # in an evaluation, which is repeated when the run resumes
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
        logging.info(
            f"preempted (SIGTERM): saved step {step} of {config.num_steps}; the same command resumes from there"
        )
        if preempted_status:
            raise SystemExit(preempted_status)
    else:
        logging.info(f"trained to step {config.num_steps}: {workdir}")
        if first == config.num_steps:
            evaluate = command_line.called("evaluate")
            logging.info(
                f"nothing to train: {workdir} is at step {first} of {first}; {evaluate} evaluates it, --extend "
                "with a larger config.num_steps trains it further"
            )
    return state
