"""Report of `--mode=compile`: its fields and its text form."""

from collections.abc import Mapping, Sequence
import dataclasses

from taskexpert_jax.compile.topologies import GIB
from taskexpert_jax.compile.traffic import Traffic

_ASSUMED_UTILISATION = 0.4  # of the peak; not measured
_EVALUATION_ADVICE = ("a smaller --config.eval.batch_size", "a larger --config.mesh.fsdp or .tensor")


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled step; sizes are bytes on each device, None where compilation ran out of device memory.

    Attributes:
      needed: the larger of `peak` and `reserved`, or the amount in the compiler's out-of-memory error.
      fits: `needed` is within the device's memory; None if the memory is unknown.
      compile_seconds: XLA's time without tracing; None where it was stopped before generating machine code.
      peak: peak memory by XLA's count; None where XLA was stopped. On CPUs it excludes the temporaries.
      reserved: the device's allocation for the whole step: arguments, results that do not alias them, and one block
        for everything else, fragmentation included.
      arguments, outputs, temporaries: state and batch, results, and that block.
      collectives: kind -> its traffic within a slice, see `Traffic`.
      between_slices: kind -> its traffic between slices.
      uncounted_loops: loops with collectives and an unknown trip count, counted as one iteration.
    """

    needed: int
    fits: bool | None
    compile_seconds: float | None = None
    peak: int | None = None
    reserved: int | None = None
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    between_slices: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    uncounted_loops: int = 0


@dataclasses.dataclass(frozen=True)
class Trial:
    """The train step with other flags: bytes that it needs on each device, and whether it fits."""

    flags: str
    needed: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """Results of `--mode=compile`.

    Attributes:
      topology: the requested one, or "local".
      slices: number of slices that the devices lie in.
      memory: nominal bytes of each device; None if unknown.
      peak_flops: nominal FLOP/s of each device's matmuls in bfloat16; None if unknown.
      steps: of the config's training, for the estimate of its cost.
      train_flops: analytic FLOPs of a train step over all devices: 2 per multiply-add, the backward pass counted as
        twice the forward pass, without recomputation by remat.
      programs: step (train, eval) -> program.
      advice: config changes that would reduce the memory, the most useful first.
      trials: the memory with some of these changes, if the train step does not fit a TPU.
    """

    config: str
    topology: str
    device_kind: str
    devices: int
    slices: int
    mesh: dict[str, int]
    batch_size: int
    eval_batch_size: int
    remat: bool
    memory: int | None
    peak_flops: float | None
    steps: int
    parameters: int
    multiply_adds: int
    train_flops: int
    programs: dict[str, Program]
    advice: tuple[str, ...]
    trials: tuple[Trial, ...] = ()


def cost(report: Report) -> str:
    """One line: device-hours of the training steps, estimated from FLOPs and an assumed utilisation of the peak."""
    flops = report.train_flops * report.steps
    line = f"training, {report.steps} steps: {flops:.3e} model FLOPs"
    if report.peak_flops is None:
        return line
    hours = flops / (report.peak_flops * _ASSUMED_UTILISATION) / 3600
    unit = "chip-hours" if report.device_kind.startswith("TPU") else "GPU-hours"
    return (
        f"{line}; {hours:.3g} {unit} if a step reaches {_ASSUMED_UTILISATION:.0%} of the peak of "
        f"{report.peak_flops / 1e12:.0f} TFLOP/s: an estimate, nothing was run"
    )


def verdict(program: Program, memory: int | None, advice: Sequence[str]) -> str:
    """One line: whether a step fits a device with `memory` bytes, and advice if it does not."""
    needed = f"{program.needed / GIB:.2f}"
    if program.fits is None or memory is None:
        return f"needs {needed} GiB per device; the device's memory is unknown"
    if program.fits:
        return f"fits ({needed} of {memory / GIB:.0f} GiB)"
    return f"does not fit: needs {needed} GiB of {memory / GIB:.0f}; try {' or '.join(advice)}"


def text(report: Report) -> str:
    """The report as text."""
    axes = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    of_slices = f" in {report.slices} slices" if report.slices > 1 else ""
    lines = [
        f"{report.config}, remat={report.remat}, on {report.topology}: {report.devices} x {report.device_kind}"
        f"{of_slices}, {axes}",
        f"{report.parameters / 1e6:.1f} M parameters, {report.multiply_adds / 1e9:.3g} G multiply-adds per image and "
        f"forward pass; model FLOPs of a train step: {report.train_flops:.3e}",
    ]
    for step, program in report.programs.items():
        training = step == "train"
        batch = report.batch_size if training else report.eval_batch_size
        advised = report.advice if training else _EVALUATION_ADVICE
        lines.append(f"\n{step} step, global batch {batch}: {verdict(program, report.memory, advised)}")
        lines += _program_lines(program, report.slices)
        lines += _trial_lines(report) if training else []
        ours = 0.75 if report.device_kind.startswith("NVIDIA") else 1.0
        if report.memory and ours * report.memory < program.needed <= report.memory:
            lines.append("  JAX allocates only 75 % of a GPU's memory: raise XLA_PYTHON_CLIENT_MEM_FRACTION")
    lines.append(f"\n{cost(report)}")
    return "\n".join(lines)


def _program_lines(program: Program, slices: int) -> list[str]:
    if program.reserved is None:
        return ["  compilation failed: out of memory"]
    seconds = program.compile_seconds
    lines = ["  compiled without machine code" if seconds is None else f"  compiled in {seconds:.1f} s"]
    parts = {part: getattr(program, part) for part in ("peak", "reserved", "arguments", "outputs", "temporaries")}
    sizes = ", ".join(f"{part} {size / 2**20:.1f}" for part, size in parts.items() if size is not None)
    lines.append(f"  MiB per device: {sizes}")
    lines += _traffic_lines("within a slice", program.collectives, slices)
    if slices > 1:
        lines += _traffic_lines("between slices (DCN)", program.between_slices, slices)
    if program.uncounted_loops:
        lines.append(f"  {program.uncounted_loops} loops of unknown length are counted as one iteration")
    return lines


def _traffic_lines(where: str, traffic: Mapping[str, Traffic], slices: int) -> list[str]:
    total = sum(of_kind.sent for of_kind in traffic.values()) / 2**20
    lines = [f"  {where}: {total:.1f} MiB sent per device"] if slices > 1 else []
    for kind, of_kind in traffic.items():
        whole, sent = of_kind.bytes / 2**20, of_kind.sent / 2**20
        lines.append(f"  {kind:<18}{of_kind.count:>6} x, {whole:>9.1f} MiB per device, {sent:>9.1f} MiB sent")
    return lines


def _trial_lines(report: Report) -> list[str]:
    return [
        f"  with {trial.flags}: {trial.needed / GIB:.2f} GiB, {'fits' if trial.fits else 'does not fit'}"
        for trial in report.trials
    ]
