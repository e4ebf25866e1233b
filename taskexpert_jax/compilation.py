"""The train and the eval step of a config, compiled and looked at: memory, traffic between devices, operations.

Nothing is computed and no data are read. For a topology (`topologies.NAMES`) not even its hardware is needed: XLA
compiles the very program that would run there.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taskexpert_jax import collectives, evaluate, inference, inputs, optimizer, sharding, topologies, train, train_state
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget, taskexpert
from taskexpert_jax.tasks import Task, from_config
from taskexpert_jax.topologies import GIB

STEPS = ("train", "eval")

# XLA's autotuning of matmuls by Triton runs them, and there is no GPU to run them on.
_COMPILER_OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}}


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled step; sizes are bytes on each device, None where the compiler gave up for want of memory.

    Attributes:
      compile_seconds: of XLA alone, without tracing.
      peak: the most that is in use at any moment, by XLA's count. On CPUs it leaves the temporaries out.
      reserved: what the device sets aside for the whole step: arguments, results that do not take the place of
        arguments, and one block for everything else, gaps included.
      arguments, outputs, temporaries: state and batch, results, and that block.
      collectives: kind -> its traffic, see `collectives.Traffic`.
      uncounted_loops: loops with collectives whose number of turns is unknown, counted as one.
      needed: bytes that the step needs: the larger of `peak` and `reserved`, or what the compiler said that it lacks.
      fits: whether that is within the device's memory; None where that is not known.
    """

    compile_seconds: float
    peak: int | None
    reserved: int | None
    arguments: int | None
    outputs: int | None
    temporaries: int | None
    collectives: dict[str, collectives.Traffic]
    uncounted_loops: int
    needed: int
    fits: bool | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `--mode=compile` finds.

    Attributes:
      topology: as asked for, or "local".
      memory: bytes of each device, as its maker gives them; None where not known.
      train_flops: of a train step over all devices, by the analytic count: 2 a multiply-add, and the backward pass as
        twice the forward pass; what remat computes once more is not counted.
      programs: by step, see `STEPS`.
      advice: config changes that would lower the memory, the most useful first.
    """

    config: str
    topology: str
    device_kind: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    eval_batch_size: int
    remat: bool
    memory: int | None
    parameters: int
    multiply_adds: int
    train_flops: int
    programs: dict[str, Program]
    advice: tuple[str, ...]


def compile_steps(
    config: Any, topology: str | None = None, steps: Sequence[str] = STEPS, devices: Sequence[Any] | None = None
) -> Report:
    """Compiles the steps of a config for a topology, or for the given devices, or for all that this process has.

    Raises:
      UserError: an unknown topology, a compiler that is not installed, or a config that does not fit itself or the
        devices.
    """
    options = None
    if topology:
        devices = topologies.devices(topology)
        options = _COMPILER_OPTIONS.get(topologies.ACCELERATORS[topology.split(":")[0]].platform)
        if config.model.unroll == "auto":
            config = config.copy_and_resolve_references()
            config.model.unroll = "no"  # what auto means there: it goes by the devices of this process
    devices = jax.devices() if devices is None else devices
    mesh = sharding.make_mesh(config.mesh, train.batch_sizes(config), devices)
    model = taskexpert.from_config(config, from_config(config))
    counted = budget.count(model)
    memory = topologies.memory_of(devices[0])
    lowered = _lowerings(config, model, mesh)
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
        train_flops=3 * 2 * counted.total_multiply_adds * config.batch_size,
        programs={step: _compile(lowered[step], mesh, memory, options) for step in steps},
        advice=advice(config, mesh),
    )


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
    """Step -> a function that traces it for the mesh, as `train.train` and `evaluate.run` would call it."""
    tx = optimizer.build(config)
    _, state, shardings = train_state.abstract_and_shardings(
        model, tx, mesh, config.seed, averaged=config.optimizer.ema_decay > 0
    )
    replicated = sharding.replicated(mesh)

    def placed(make: Callable[[], Any]) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), jax.eval_shape(make)
        )

    def train_step() -> Any:
        batch = abstract_batch(model.tasks, config.batch_size, tuple(config.dataset.image_size), mesh)
        step: Any = train.make_train_step(model, tx, config, mesh, shardings)
        return step.lower(state, placed(lambda: train.zero_sums(model.tasks)), batch)

    def eval_step() -> Any:
        batch = abstract_batch(model.tasks, config.eval.batch_size, inputs.frame_size(config), mesh)
        step: Any = evaluate.make_eval_step(model.tasks, inference.make_inference(model, config), mesh)
        return step.lower(state.variables(), placed(lambda: evaluate.empty_states(model.tasks)), batch)

    return {"train": train_step, "eval": eval_step}


def _compile(lower: Callable[[], Any], mesh: Mesh, memory: int | None, options: Mapping[str, Any] | None) -> Program:
    with sharding.use(mesh):
        lowered = lower()
        started = time.monotonic()
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = memory_needed(str(error))
            if needed is None:
                raise
            seconds = round(time.monotonic() - started, 1)
            return Program(seconds, None, None, None, None, None, {}, 0, needed, fits=False)
    seconds = round(time.monotonic() - started, 1)
    sizes = compiled.memory_analysis()
    found = collectives.count(compiled.as_text(), mesh.size)
    peak = sizes.peak_memory_in_bytes
    own_outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    reserved = sizes.argument_size_in_bytes + own_outputs + sizes.temp_size_in_bytes
    needed = max(peak, reserved)
    return Program(
        compile_seconds=seconds,
        peak=peak,
        reserved=reserved,
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        collectives=found.traffic,
        uncounted_loops=found.uncounted_loops,
        needed=needed,
        fits=None if memory is None else needed <= memory,
    )


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
    each = config.batch_size // config.accumulate_steps // (mesh.shape["data"] * mesh.shape["fsdp"])
    found = [] if config.model.remat else ["--config.model.remat=True"]
    if mesh.shape["fsdp"] == 1 and mesh.shape["data"] > 1:
        shards = math.gcd(mesh.shape["data"], 8)
        found.append(f"--config.mesh.fsdp={shards if shards > 1 else mesh.shape['data']}")
    if each > 1:
        found.append(f"a smaller batch or --config.accumulate_steps (now {each} images a device)")
    return tuple(found) or ("a larger --config.mesh.fsdp or .tensor", "a smaller model or smaller images")


def verdict(program: Program, memory: int | None, advice: Sequence[str]) -> str:
    """In words: whether a step fits a device with so many bytes of memory, and what to do where it does not."""
    needed = f"{program.needed / GIB:.2f}"
    if program.fits is None or memory is None:
        return f"needs {needed} GiB a device; how much there is, is not known"
    if program.fits:
        return f"fits ({needed} of {memory / GIB:.0f} GiB)"
    return f"does not fit: needs {needed} GiB of {memory / GIB:.0f}; try {' or '.join(advice)}"


def text(report: Report) -> str:
    """The report for people."""
    axes = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    lines = [
        f"{report.config}, remat={report.remat}, on {report.topology}: {report.devices} x {report.device_kind}, {axes}",
        f"{report.parameters / 1e6:.1f} M parameters, {report.multiply_adds / 1e9:.1f} G multiply-adds an image and "
        f"forward pass; model FLOPs of a train step: {report.train_flops:.3e}",
    ]
    for step, program in report.programs.items():
        batch = report.batch_size if step == "train" else report.eval_batch_size
        lines.append(f"\n{step} step, global batch {batch}: {verdict(program, report.memory, report.advice)}")
        lines.append(f"  compiled in {program.compile_seconds:.1f} s")
        if program.peak is None:
            continue
        parts = ("peak", "reserved", "arguments", "outputs", "temporaries")
        sizes = ", ".join(f"{part} {getattr(program, part) / 2**20:.1f}" for part in parts)
        lines.append(f"  MiB a device: {sizes}")
        for kind, of_kind in program.collectives.items():
            whole, sent = of_kind.bytes / 2**20, of_kind.sent / 2**20
            lines.append(f"  {kind:<18}{of_kind.count:>6} x, {whole:>9.1f} MiB a device, {sent:>9.1f} MiB sent")
        if program.uncounted_loops:
            lines.append(f"  {program.uncounted_loops} loops of unknown length are counted as one turn")
    return "\n".join(lines)


def run(config: Any, topology: str | None, report_file: pathlib.Path | None) -> Report:
    """`--mode=compile`: prints the report and, given a file, writes it there as JSON.

    Raises:
      UserError: see `compile_steps`; or there is no folder for the file.
    """
    if report_file is not None and not report_file.parent.is_dir():  # before minutes of compiling
        raise UserError(f"--report={report_file}: there is no folder {report_file.parent}")
    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]: made at run time
    jax.config.update("jax_enable_compilation_cache", False)  # or a kept program would count as compiled in no time
    try:
        report = compile_steps(config, topology)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    print(text(report))
    if report_file is not None:
        report_file.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
        print(f"\nwritten: {report_file}")
    return report
