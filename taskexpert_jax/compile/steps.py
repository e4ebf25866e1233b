"""The train and the eval step of a config, compiled and looked at: memory, traffic between devices, operations.

Nothing is computed and no data are read. For a topology (`topologies.NAMES`) not even its hardware is needed: XLA
compiles the very program that would run there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import multiprocessing
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taskexpert_jax.compile import collectives, memory_layout, topologies
from taskexpert_jax.compile import report as compile_report
from taskexpert_jax.compile.report import Program, Report, Trial
from taskexpert_jax.config import frame_size
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import inference
from taskexpert_jax.evaluation import steps as evaluation_steps
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task, from_config
from taskexpert_jax.training import optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import batch_sizes, make_train_step

STEPS = ("train", "eval")

# XLA's autotuning of matmuls by Triton runs them, and there is no GPU to run them on.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def compile_steps(
    config: Any,
    topology: str | None = None,
    steps: Sequence[str] = STEPS,
    devices: Sequence[Any] | None = None,
    *,
    quick: bool = False,
) -> Report:
    """Compiles the steps of a config for a topology, or for the given devices, or for all that this process has.

    quick: stop before machine code is made of the optimised program, whose memory and traffic are known by then: a few
      per cent of the time. For the topologies of TPUs only.

    Raises:
      UserError: an unknown topology, a compiler that is not installed, or a config that does not fit itself or the
        devices.
    """
    if quick and topologies.platform_of(topology) != "tpu":
        raise UserError("--quick needs a --topology of TPUs: no other compiler says early what it has laid out")
    if topology:
        devices = topologies.devices(topology)
    devices = jax.devices() if devices is None else devices
    mesh, model = _fitted(config, devices)
    counted = budget.count(model)
    memory = topologies.memory_of(devices[0])
    options = _GPU_OPTIONS if topologies.platform_of(topology) == "cuda" else {}
    programs, lowerings = {}, {} if quick else _lowerings(config, model, mesh)
    for step in steps:
        if topology and quick:
            programs[step] = _compile_until_laid_out(config, topology, step, mesh.size, memory)
        else:
            programs[step] = _compile(lowerings[step], mesh, memory, options)
    tried = "train" in programs and programs["train"].fits is False and topologies.platform_of(topology) == "tpu"
    return Report(
        config=f"{config.dataset.name} {config.variant}",
        topology=topology or "local",
        device_kind=devices[0].device_kind,
        devices=len(devices),
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        eval_batch_size=config.eval.batch_size,
        remat=config.model.remat,
        memory=memory,
        parameters=counted.total_parameters,
        multiply_adds=counted.total_multiply_adds,
        train_flops=3 * 2 * counted.total_computed * config.batch_size,
        programs=programs,
        advice=advice(config, mesh),
        trials=tuple(_trials(config, str(topology), mesh, memory)) if tried else (),
    )


def _fitted(config: Any, devices: Sequence[Any]) -> tuple[Mesh, taskexpert.TaskExpert]:
    """The mesh over the devices, and the model as it is built for them."""
    mesh = sharding.make_mesh(config.mesh, batch_sizes(config), devices)
    return mesh, taskexpert.from_config(config, from_config(config), devices[0])


def abstract_batch(
    tasks: Sequence[Task], batch_size: int, size: tuple[int, int], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and places of what a step takes as a batch of pictures of a size: docs/conventions.md."""
    shapes = {
        "image": ((*size, 3), jnp.uint8),
        "window": ((4,), jnp.int32),
        "mask": ((), jnp.float32),
        **{task.name: ((*size, task.label_channels), task.label_dtype) for task in tasks},
    }
    place = sharding.batch_sharding(mesh)
    return {
        key: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=place) for key, (shape, dtype) in shapes.items()
    }


def _lowerings(config: Any, model: taskexpert.TaskExpert, mesh: Mesh) -> dict[str, Callable[[], Any]]:
    """Step -> a function that traces it for the mesh, as `train.train` and `evaluation.steps.run` would call it."""
    tx = optimizer.build(config)
    _, state, shardings = train_state.abstract_and_shardings(
        model, tx, mesh, config.seed, averaged=config.optimizer.ema_decay > 0
    )
    replicated = sharding.replicated(mesh)

    def placed(make: Callable[[], Any]) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), jax.eval_shape(make)
        )

    def training() -> Any:
        batch = abstract_batch(model.tasks, config.batch_size, tuple(config.dataset.image_size), mesh)
        step: Any = make_train_step(model, tx, config, mesh, shardings)
        return step.lower(state, placed(lambda: tally.empty(model.tasks)), batch)

    def evaluation() -> Any:
        batch = abstract_batch(model.tasks, config.eval.batch_size, frame_size(config), mesh)
        step: Any = evaluation_steps.make_eval_step(model.tasks, inference.make_inference(model, config), mesh)
        return step.lower(state.variables(), placed(lambda: evaluation_steps.empty_states(model.tasks)), batch)

    return {"train": training, "eval": evaluation}


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's cache of programs: a kept one would count as compiled in no time, and leave no notes."""
    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]: made at run time
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def _compile(
    lower: Callable[[], Any],
    mesh: Mesh,
    memory: int | None,
    options: Mapping[str, Any],
    folder: pathlib.Path | None = None,
) -> Program:
    """Compiles a step; for a TPU the compiler's notes go to `folder`, or to one that is gone afterwards."""
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return _compile(lower, mesh, memory, options, pathlib.Path(made))
    noted = mesh.devices.flat[0].platform == "tpu"
    with sharding.use(mesh), _uncached():
        lowered = lower()
        started = time.monotonic()
        try:
            compiled = lowered.compile(compiler_options={**options, **(memory_layout.options(folder) if noted else {})})
        except jax.errors.JaxRuntimeError as error:
            needed = memory_needed(str(error))
            if needed is None:
                raise
            seconds = round(time.monotonic() - started, 1)
            return Program(seconds, None, None, None, None, None, {}, 0, needed, fits=False)
    seconds = round(time.monotonic() - started, 1)
    sizes = compiled.memory_analysis()
    layout = memory_layout.read(folder)[0] if noted else memory_layout.of_analysis(sizes)
    return _program(layout, compiled.as_text(), mesh.size, memory, seconds, sizes.peak_memory_in_bytes)


def _program(
    layout: memory_layout.Layout,
    hlo: str,
    devices: int,
    memory: int | None,
    seconds: float | None = None,
    peak: int | None = None,
) -> Program:
    found = collectives.count(hlo, devices)
    needed = max(peak or 0, layout.reserved)
    return Program(
        compile_seconds=seconds,
        peak=peak,
        reserved=layout.reserved,
        arguments=layout.arguments,
        outputs=layout.outputs,
        temporaries=layout.temporaries,
        collectives=found.traffic,
        uncounted_loops=found.uncounted_loops,
        needed=needed,
        fits=None if memory is None else needed <= memory,
    )


def _compile_until_laid_out(config: Any, topology: str, step: str, devices: int, memory: int | None) -> Program:
    """Compiles a step in a process of its own, which is ended as soon as the program's memory is laid out."""
    processes = multiprocessing.get_context("spawn")
    answer, sender = processes.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        compiler = processes.Process(target=_answer, args=(config, topology, step, memory, folder, sender), daemon=True)
        compiler.start()
        sender.close()
        try:
            while not answer.poll(0.2):
                if memory_layout.is_written(folder):
                    return _program(*memory_layout.read(folder), devices, memory)
            received = answer.recv()
            if isinstance(received, UserError):
                raise received
            return received
        except EOFError:
            compiler.join()
            raise RuntimeError(f"the compiler's process ended with status {compiler.exitcode}") from None
        finally:
            compiler.kill()  # or libtpu would report the signal at length
            compiler.join()


def _answer(config: Any, topology: str, step: str, memory: int | None, folder: pathlib.Path, sender: Any) -> None:
    """What that process does: it sends the program if it gets as far as that, and above all writes to the folder."""
    mesh, model = _fitted(config, topologies.devices(topology))
    options = _GPU_OPTIONS if topologies.platform_of(topology) == "cuda" else {}
    try:
        sender.send(_compile(_lowerings(config, model, mesh)[step], mesh, memory, options, folder))
    except UserError as error:
        sender.send(error)


def memory_needed(error: str) -> int | None:
    """Bytes that a compiler's error asks for, where it is the error of a program that is too large for its device."""
    # XLA's TPU compiler says it in two ways: before it has laid out the memory, and after.
    before = re.search(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", error)
    after = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", error)
    said = before or after
    if "RESOURCE_EXHAUSTED" not in error or said is None:
        return None
    return math.ceil(float(said[1]) * 1024 ** ("KMGT".index(said[2]) + 1))


def advice(config: Any, mesh: Mesh) -> tuple[str, ...]:
    """What of the config lowers the memory that a step needs, the cheapest first."""
    found = [_flags(changes) for changes in _changes(config, mesh)]
    if (each := _images_a_device(config, mesh)) > 1:
        found.append(f"a smaller batch or --config.accumulate_steps (now {each} images a device)")
    return tuple(found) or ("a larger --config.mesh.fsdp or .tensor", "a smaller model or smaller images")


def _images_a_device(config: Any, mesh: Mesh) -> int:
    return config.batch_size // config.accumulate_steps // (mesh.shape["data"] * mesh.shape["fsdp"])


def _changes(config: Any, mesh: Mesh) -> list[dict[str, Any]]:
    """Config changes, each of which lowers the memory."""
    found: list[dict[str, Any]] = [] if config.model.remat else [{"model.remat": True}]
    if mesh.shape["fsdp"] == 1 and mesh.shape["data"] > 1:
        shards = math.gcd(mesh.shape["data"], 8)
        shards = shards if shards > 1 else mesh.shape["data"]
        rest = {} if config.mesh.data == -1 else {"mesh.data": mesh.shape["data"] // shards}
        found.append({**rest, "mesh.fsdp": shards})
    return found


def _flags(changes: Mapping[str, Any]) -> str:
    return " ".join(f"--config.{field}={value}" for field, value in changes.items())


def _trials(config: Any, topology: str, mesh: Mesh, memory: int | None) -> Iterator[Trial]:
    """The train step with one change, with all of them, and with more and more micro-batches, until it fits."""
    single = _changes(config, mesh)
    every = {field: value for changes in single for field, value in changes.items()}
    each, steps = _images_a_device(config, mesh), config.accumulate_steps
    finer = [{**every, "accumulate_steps": steps * n} for n in range(2, each + 1) if each % n == 0]
    for changes in [*single, *([every] if len(single) > 1 else []), *finer]:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        program = _compile_until_laid_out(changed, topology, "train", mesh.size, memory)
        yield Trial(_flags(changes), program.needed, program.fits is True)
        if program.fits:
            return


def run(config: Any, topology: str | None, report_file: pathlib.Path | None, *, quick: bool = False) -> Report:
    """`--mode=compile`: prints the report and, given a file, writes it there as JSON. quick: see `compile_steps`.

    Raises:
      UserError: see `compile_steps`; or there is no folder for the file.
    """
    if report_file is not None and not report_file.parent.is_dir():  # before minutes of compiling
        raise UserError(f"--report={report_file}: there is no folder {report_file.parent}")
    report = compile_steps(config, topology, quick=quick)
    print(compile_report.text(report))
    if report_file is not None:
        report_file.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
        print(f"\nwritten: {report_file}")
    return report
