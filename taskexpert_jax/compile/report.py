"""The report of `--mode=compile`: its fields, and its text for people."""

from collections.abc import Sequence
import dataclasses

from taskexpert_jax.compile.topologies import GIB
from taskexpert_jax.compile.traffic import Traffic

_EVALUATION_ADVICE = ("a smaller --config.eval.batch_size", "a larger --config.mesh.fsdp or .tensor")


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled step; sizes are bytes on each device, None where the compiler gave up for want of memory.

    Attributes:
      needed: the larger of `peak` and `reserved`, or what the compiler said that it lacks.
      fits: `needed` is within the device's memory; None where that is not known.
      compile_seconds: of XLA alone, without tracing; None where it was stopped before it made machine code.
      peak: the most that is in use at any moment, by XLA's count; None where it was stopped. On CPUs it leaves the
        temporaries out.
      reserved: what the device sets aside for the whole step: arguments, results that do not take the place of
        arguments, and one block for everything else, gaps included.
      arguments, outputs, temporaries: state and batch, results, and that block.
      collectives: kind -> its traffic, see `Traffic`.
      uncounted_loops: loops with collectives whose number of turns is unknown, counted as one.
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
    uncounted_loops: int = 0


@dataclasses.dataclass(frozen=True)
class Trial:
    """The train step with other flags: bytes that it would need on each device, and whether these would do."""

    flags: str
    needed: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """The findings of `--mode=compile`.

    Attributes:
      topology: as asked for, or "local".
      memory: bytes of each device, as its maker gives them; None where not known.
      train_flops: of a train step over all devices, by the analytic count: 2 a multiply-add, and the backward pass as
        twice the forward pass; what remat computes once more is not counted.
      programs: step (train, eval) -> program.
      advice: config changes that would lower the memory, the most useful first.
      trials: the memory with some of them, where the train step does not fit a TPU.
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
    trials: tuple[Trial, ...] = ()


def verdict(program: Program, memory: int | None, advice: Sequence[str]) -> str:
    """One line: if a step fits a device with so many bytes of memory, and what to do where it does not."""
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
        f"{report.parameters / 1e6:.1f} M parameters, {report.multiply_adds / 1e9:.3g} G multiply-adds an image and "
        f"forward pass; model FLOPs of a train step: {report.train_flops:.3e}",
    ]
    for step, program in report.programs.items():
        training = step == "train"
        batch = report.batch_size if training else report.eval_batch_size
        advised = report.advice if training else _EVALUATION_ADVICE
        lines.append(f"\n{step} step, global batch {batch}: {verdict(program, report.memory, advised)}")
        lines += _program_lines(program)
        lines += _trial_lines(report) if training else []
        ours = 0.75 if report.device_kind.startswith("NVIDIA") else 1.0
        if report.memory and ours * report.memory < program.needed <= report.memory:
            lines.append("  XLA takes three quarters of a GPU's memory: set XLA_PYTHON_CLIENT_MEM_FRACTION to more")
    return "\n".join(lines)


def _program_lines(program: Program) -> list[str]:
    if program.reserved is None:
        return ["  the compiler gave up"]
    seconds = program.compile_seconds
    lines = ["  no machine code was made" if seconds is None else f"  compiled in {seconds:.1f} s"]
    parts = {part: getattr(program, part) for part in ("peak", "reserved", "arguments", "outputs", "temporaries")}
    sizes = ", ".join(f"{part} {size / 2**20:.1f}" for part, size in parts.items() if size is not None)
    lines.append(f"  MiB a device: {sizes}")
    for kind, of_kind in program.collectives.items():
        whole, sent = of_kind.bytes / 2**20, of_kind.sent / 2**20
        lines.append(f"  {kind:<18}{of_kind.count:>6} x, {whole:>9.1f} MiB a device, {sent:>9.1f} MiB sent")
    if program.uncounted_loops:
        lines.append(f"  {program.uncounted_loops} loops of unknown length are counted as one turn")
    return lines


def _trial_lines(report: Report) -> list[str]:
    return [
        f"  with {trial.flags}: {trial.needed / GIB:.2f} GiB, {'fits' if trial.fits else 'does not fit'}"
        for trial in report.trials
    ]
