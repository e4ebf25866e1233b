"""Memory and inter-device traffic of a config's train and eval step, from the compiled programs: `--mode=compile`.

Nothing is executed and no data are read. A topology (`topologies.NAMES`) does not need its hardware either: XLA
compiles the same program that would run there.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import signal
import tempfile
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from taskexpert_jax import files, terminal
from taskexpert_jax.compile import advice, memory, topologies, traffic
from taskexpert_jax.compile import report as compile_report
from taskexpert_jax.compile.report import Program, Report, Trial
from taskexpert_jax.compile.steps import build, tracers
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.parallel import sharding, slices

# XLA's autotuning of Triton matmuls executes them, which needs a GPU.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def run(config: ConfigDict, topology: str | None, report_file: pathlib.Path | None, *, quick: bool = False) -> None:
    """Prints the report, and writes it as JSON if a file is given. quick: see `compile_steps`.

    Raises:
      UserError: see `compile_steps`; or the file's folder is missing.
    """
    if report_file is not None and not report_file.parent.is_dir():  # checked before minutes of compiling
        raise UserError(f"--report={report_file}: the folder {report_file.parent} does not exist; create it first")
    if report_file is not None:
        files.folder_for_results(report_file.parent, "--report")
    report = compile_steps(config, topology, quick=quick)
    if report_file is not None:
        files.write({report_file: json.dumps(dataclasses.asdict(report), indent=2) + "\n"})
    print(compile_report.text(report))
    if report_file is not None:
        print()
        terminal.print_written(report_file)


def compile_steps(
    config: ConfigDict,
    topology: str | None = None,
    steps: Sequence[str] = ("train", "eval"),
    devices: Sequence[Any] | None = None,
    *,
    quick: bool = False,
) -> Report:
    """Compiles the steps of a config for a topology, for the given devices, or for all devices of this process.

    quick: stops before machine code is generated; memory and traffic of the optimised program are known by then. Takes
      a few per cent of the time. TPU topologies only.

    Raises:
      UserError: an unknown topology, a compiler that is not installed, or a config that is inconsistent or does not
        fit the devices.
    """
    on_tpu = topologies.platform_of(topology) == "tpu"
    if quick and not on_tpu:
        raise UserError("--quick needs a --topology of TPUs: other compilers do not report their memory layout early")
    if topology:
        devices = topologies.devices(topology)
    devices = jax.devices() if devices is None else devices
    mesh, model = build(config, devices)
    counted = budget.count(model)
    limit = topologies.memory_of(devices[0])
    slice_of = slices.of_devices(mesh.devices.flat, config.mesh.slices)
    partitions = _partitions(slice_of, on_tpu=on_tpu)
    if quick:
        programs = {step: _compile_until_laid_out(config, str(topology), step, partitions, limit) for step in steps}
    else:
        trace = tracers(config, model, mesh)
        programs = {step: _compile(trace[step], mesh, partitions, limit) for step in steps}
    tried = on_tpu and "train" in programs and programs["train"].fits is False
    return Report(
        config=f"{config.dataset.name} {config.variant}",
        topology=topology or "local",
        device_kind=devices[0].device_kind,
        devices=len(devices),
        slices=len(set(slice_of)),
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        eval_batch_size=config.eval.batch_size,
        remat=config.model.remat,
        memory=limit,
        peak_flops=topologies.peak_of(devices[0]),
        steps=config.num_steps,
        parameters=counted.total_parameters,
        multiply_adds=counted.total_multiply_adds,
        train_flops=3 * 2 * counted.total_computed * config.batch_size,
        programs=programs,
        advice=advice.advice(config, mesh),
        trials=tuple(_trials(config, str(topology), mesh, partitions, limit)) if tried else (),
    )


def _partitions(slice_of: Sequence[int], *, on_tpu: bool) -> tuple[int, ...]:
    """Slice of each partition of a compiled program, given that of each device of its mesh: a TPU's is of one slice."""
    return (0,) * (len(slice_of) // len(set(slice_of))) if on_tpu else tuple(slice_of)


def _compile(
    trace: Callable[[], Any],
    mesh: Mesh,
    partitions: Sequence[int],
    limit: int | None,
    folder: pathlib.Path | None = None,
) -> Program:
    """Compiles a step.

    Args:
      trace: traces it.
      mesh: of its devices.
      partitions: slice of each partition of the program.
      limit: bytes of a device.
      folder: gets XLA's dump for a TPU; default: a temporary folder.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return _compile(trace, mesh, partitions, limit, pathlib.Path(temporary))
    device = mesh.devices.flat[0]
    on_tpu = device.platform == "tpu"
    options = memory.options(folder) if on_tpu else GPU_OPTIONS if device not in jax.devices() else {}
    with sharding.use(mesh), _uncached():
        lowered = trace().lower()
        started = time.monotonic()
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = memory.needed(str(error))
            if needed is None:
                raise
            return Program(needed, fits=False, compile_seconds=round(time.monotonic() - started, 1))
    seconds = round(time.monotonic() - started, 1)
    sizes = compiled.memory_analysis()
    layout = memory.read(folder)[0] if on_tpu else memory.of_analysis(sizes)
    program = _program(layout, compiled.as_text(), partitions, limit, peak=sizes.peak_memory_in_bytes)
    return dataclasses.replace(program, compile_seconds=seconds)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Disables JAX's compilation cache: for a cached program, XLA writes no dump and the compile time is wrong."""
    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]: defined at run time
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def _program(
    layout: memory.Layout, hlo: str, partitions: Sequence[int], limit: int | None, peak: int | None = None
) -> Program:
    counted = traffic.count(hlo, partitions)
    needed = max(peak or 0, layout.reserved)
    return Program(
        needed,
        fits=None if limit is None else needed <= limit,
        peak=peak,
        collectives=counted.within,
        between_slices=counted.between,
        uncounted_loops=counted.uncounted_loops,
        **vars(layout),
    )


def _compile_until_laid_out(
    config: ConfigDict, topology: str, step: str, partitions: Sequence[int], limit: int | None
) -> Program:
    """Compiles a step in a separate process, which is killed as soon as the memory layout is written."""
    processes = multiprocessing.get_context("spawn")
    answer, sender = processes.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        compiler = processes.Process(
            target=_answer, args=(config, topology, step, partitions, limit, folder, sender), daemon=True
        )
        compiler.start()
        sender.close()
        try:
            while not answer.poll(0.2):
                if memory.is_written(folder):
                    return _program(*memory.read(folder), partitions, limit)
            received = answer.recv()
            if isinstance(received, UserError):
                raise received
            return received
        except EOFError:
            compiler.join()
            raise RuntimeError(f"the compiler's process ended with status {compiler.exitcode}") from None
        finally:
            compiler.kill()  # SIGKILL, because libtpu prints a long report on other signals
            compiler.join()


def _answer(
    config: ConfigDict,
    topology: str,
    step: str,
    partitions: Sequence[int],
    limit: int | None,
    folder: pathlib.Path,
    sender: Any,
) -> None:
    """Entry point of the separate process: XLA dumps to `folder`; the program is sent if it is not killed before."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    mesh, model = build(config, topologies.devices(topology))
    try:
        sender.send(_compile(tracers(config, model, mesh)[step], mesh, partitions, limit, folder))
    except UserError as error:
        sender.send(error)


def _trials(
    config: ConfigDict, topology: str, mesh: Mesh, partitions: Sequence[int], limit: int | None
) -> Iterator[Trial]:
    """The train step with each of `advice.candidates`, until one fits."""
    for changes in advice.candidates(config, mesh):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        program = _compile_until_laid_out(changed, topology, "train", partitions, limit)
        yield Trial(advice.flags(changes), program.needed, program.fits is True)
        if program.fits:
            return
