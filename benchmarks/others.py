"""Cost of InvPT, TaskPrompter and MLoRE, by their own code, and of ours: parameters, multiply-adds, time of a step.

  python benchmarks/others.py --invpt=CLONE/InvPT --taskprompter=CLONE/TaskPrompter --mlore=CLONE --output=others.json

The folders are clones of yours: github.com/prismformore/Multi-Task-Transformer has the first two,
github.com/YuqiYang213/MLoRE the third; any of them may be left out. All models have ViT-L, random weights, and the
setting that their authors publish. Parameters and multiply-adds are those of one frame of the benchmark. Times are of
one smaller frame in float32: CPU seconds on one core, so that other programs on it do not count.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks import machine
from benchmarks.pytorch import contestants, foreign
from benchmarks.pytorch.contestants import JAX, REFERENCE, Spec
from taskexpert_jax import command_line
from taskexpert_jax.errors import UserError

PARTS = ("counts", "times")
FRAMES = {"pascal_context": (512, 512), "nyud": (448, 576)}


class Method(NamedTuple):
    """A model of others: the flag of its clone, and its config files there, which have a {} for the benchmark."""

    flag: str
    config: str

    def of(self, benchmark: str) -> str:
        return self.config.replace("{}", {"pascal_context": "pascal", "nyud": "nyud"}[benchmark])


MERGED = "MLoRE, experts merged"  # for inference only: has no training step
METHODS = {
    "InvPT": Method("invpt", "configs/{}/{}_vitLp16.yml"),
    "TaskPrompter": Method("taskprompter", "configs/{}/{}_vitLp16_taskprompter.yml"),
    "MLoRE": Method("mlore", "configs/{}/{}_vitLp16_MLoRE.yml"),
    MERGED: Method("mlore", "configs/{}/{}_vitLp16_MLoRE_repara.yml"),
}
FLAGS = tuple(dict.fromkeys(method.flag for method in METHODS.values()))


class Contestant:
    """A model in its own process."""

    def __init__(self, spec: Spec):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=contestants.serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def ask(self, request: str) -> Any:
        """Answer to `count`, `forward` or `training`; raises a UserError if the model cannot give it."""
        self._connection.send(request)
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError as error:
            self._process.join()
            raise UserError(f"its process ended with status {self._process.exitcode}") from error
        if isinstance(answer, UserError):
            raise answer
        return answer


def specs(clones: dict[str, pathlib.Path], benchmark: str, frame: tuple[int, int]) -> list[Spec]:
    """Ours and the others whose clones are given."""
    found = [Spec(JAX, benchmark, frame), Spec(REFERENCE, benchmark, frame)]
    for name, method in METHODS.items():
        if method.flag in clones:
            found.append(Spec(name, benchmark, frame, clones[method.flag], method.of(benchmark)))
    return found


@contextlib.contextmanager
def running(spec: Spec) -> Iterator[Contestant]:
    """A model that is ended afterwards; raises a UserError if it cannot be built."""
    model = Contestant(spec)
    try:
        yield model
    finally:
        model.close()


def counts(clones: dict[str, pathlib.Path], found: dict[str, Any], failed: dict[str, str]) -> Iterator[None]:
    """Fills found, benchmark -> model -> counts, and the reasons of those that fail; yields after each model."""
    for benchmark, frame in FRAMES.items():
        found[benchmark] = {}
        for spec in specs(clones, benchmark, frame):
            try:
                with running(spec) as model:
                    found[benchmark][spec.name] = model.ask("count")
            except UserError as error:
                failed[f"{spec.name}, {benchmark}"] = str(error)
            yield


def times(
    wanted: Sequence[Spec], rounds: dict[str, int], found: dict[str, Any], failed: dict[str, str]
) -> Iterator[None]:
    """Fills found, model -> request (`forward`, `training`) -> `_turns` with `REFERENCE`; yields after each model.

    The model and the reference take steps in turn, so caches and clocks that others change concern both, and no more
    than two models are in memory. Their first steps are not counted.
    """
    base = next(spec for spec in wanted if spec.name == REFERENCE)
    with running(base) as reference:
        for request in rounds:
            reference.ask(request)
        others = [spec for spec in wanted if spec is not base]
        for spec in sorted(others, key=lambda spec: spec.name == JAX):  # ours last, which takes long to compile
            found[spec.name] = {}
            try:
                with running(spec) as model:
                    for request, count in rounds.items():
                        if (spec.name, request) != (MERGED, "training"):
                            found[spec.name][request] = _turns(model, reference, request, count)
            except UserError as error:
                failed[spec.name] = str(error)
            yield


def _turns(model: Contestant, reference: Contestant, request: str, count: int) -> dict[str, Any]:
    """Seconds of both in `count` rounds, and their ratios within each round."""
    model.ask(request)
    pairs = [(model.ask(request), reference.ask(request)) for _ in range(count)]
    return {
        "seconds": [own for own, _ in pairs],
        "reference_seconds": [other for _, other in pairs],
        "ratios": [own / other for own, other in pairs],
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: parameters and multiply-adds, in parentheses what exceeds a plain ViT-L; then ratios of times."""
    counted, timed = report.get("counts", {}).get("found", {}), report.get("times", {}).get("found", {})
    heads = [f"{name}, {unit}" for name in counted for unit in ("M parameters", "G multiply-adds")]
    lines = ["| " + " | ".join(["model", *heads, "forward", "training step"]) + " |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for name in (JAX, REFERENCE, *METHODS):
        cells = [name]
        for rows in counted.values():
            for key, unit in (("parameters", 1e6), ("multiply_adds", 1e9)):
                if name not in rows:
                    cells.append("-")
                    continue
                beyond = rows[name][key] - rows[JAX][f"backbone_{key}"]
                cells.append(f"{rows[name][key] / unit:.1f} ({beyond / unit:.1f})")
        cells += [_ratio(timed.get(name, {}).get(request)) for request in ("forward", "training")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(of: dict[str, Any] | None) -> str:
    if of is None:
        return "-"
    return f"{statistics.median(of['ratios']):.2f} ({min(of['ratios']):.2f} to {max(of['ratios']):.2f})"


def commit(clone: pathlib.Path) -> str:
    """Commit of a clone; `unknown` for a folder without git's history."""
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in FLAGS:
        parser.add_argument(f"--{flag}", type=pathlib.Path, metavar="DIR", help="folder with its utils/ and configs/")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="of a file it keeps the other part")
    parser.add_argument("--frame", type=int, nargs=2, default=(256, 256), metavar=("H", "W"), help="for the times")
    parser.add_argument("--forward", type=int, default=5, help="rounds of forward passes")
    parser.add_argument("--training", type=int, default=3, help="rounds of training steps")
    parser.add_argument("--core", type=int, default=0, help="CPU core that all models run on")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for all numbers")
    return parser.parse_args()


def _facts(args: argparse.Namespace, clones: dict[str, pathlib.Path], part: str) -> dict[str, Any]:
    """Machine, versions, commits and, for times, the setting."""
    facts = machine.described("torch", "jax", "flax", *(["timm"] if clones else []))
    facts["clones"] = {flag: commit(clone) for flag, clone in clones.items()}
    if part == "times":
        facts |= {"frame": list(args.frame), "batch": 1, "dtype": "float32", "nice": os.nice(0), "clock": "CPU time"}
    return facts


def main() -> None:
    """Runs the program."""
    args = arguments()
    clones = {flag: getattr(args, flag).resolve() for flag in FLAGS if getattr(args, flag)}
    try:
        for flag, clone in clones.items():
            methods = [method for method in METHODS.values() if method.flag == flag]
            foreign.check(f"--{flag}", clone, [method.of(benchmark) for method in methods for benchmark in FRAMES])
    except UserError as error:
        command_line.fail(str(error))
    report = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    rounds = {"forward": args.forward, "training": args.training}
    os.sched_setaffinity(0, {args.core})
    for part in args.parts:
        found, failed = {}, {}
        report[part] = _facts(args, clones, part) | {"found": found, "failed": failed}
        if part == "counts":
            measured = counts(clones, found, failed)
        else:
            measured = times(specs(clones, "pascal_context", tuple(args.frame)), rounds, found, failed)
        for _ in measured:
            if args.output:
                args.output.write_text(json.dumps(report, indent=2) + "\n")
        for name, reason in failed.items():
            print(f"{name}: {reason}", file=sys.stderr)
    print(table(report))


if __name__ == "__main__":
    main()
