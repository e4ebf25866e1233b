"""Memory and traffic of the train step on 8 to 256 devices, by compiling it: the table of docs/scaling.md.

  python benchmarks/scaling.py --list                      # the rows, and which of them are there
  python benchmarks/scaling.py --only 'nyud vit_l16 v5e'   # compiles those that match a regular expression and lack

Each row is written to benchmarks/results/scaling.json as soon as it is there, so an interrupted table goes on where it
was; `--table` only prints it. TPU rows stop before machine code, which changes no number: a quarter of a minute each,
against two to three minutes with `--whole`. GPU rows are always whole. TPU rows need libtpu (requirements-tpu.txt), GPU
rows JAX's CUDA plugin (requirements-cuda.txt), neither the hardware.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"
MARK = "<!-- made by benchmarks/scaling.py -->"
BENCHMARKS = {"nyud": "NYUD-v2", "pascal_context": "PASCAL-Context"}
SIZES = ("vit_b16", "vit_l16")
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16", "h200:8")
SHARDS = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: the train step of a config, with one image a device."""

    benchmark: str
    size: str
    topology: str
    fsdp: int
    remat: bool

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.benchmark} {self.size} {self.topology} fsdp={self.fsdp} remat={self.remat}"


ROWS = tuple(
    Row(benchmark, size, topology, fsdp, remat)
    for benchmark in BENCHMARKS
    for size in SIZES
    for topology in TOPOLOGIES
    for fsdp in (1, SHARDS)
    for remat in (False, True)
)


def compile_row(row: Row, *, whole: bool) -> dict[str, Any]:
    """The report of a row's train step, as `--mode=compile` makes it: with `--quick`, unless whole or for GPUs."""
    from taskexpert_jax.compile import steps as compilation
    from taskexpert_jax.compile import topologies

    config = importlib.import_module(f"configs.{row.benchmark}").get_config(row.size)
    config.batch_size = config.eval.batch_size = len(topologies.devices(row.topology))
    config.mesh.fsdp = row.fsdp
    config.model.remat = row.remat
    quick = not whole and topologies.platform_of(row.topology) == "tpu"
    return dataclasses.asdict(compilation.compile_steps(config, row.topology, steps=("train",), quick=quick))


def in_own_process(row: Row, *, whole: bool) -> dict[str, Any] | None:
    """The same in a process of its own, which gives all its memory back; None, and its last line, where it fails."""
    command = [sys.executable, __file__, "--row", row.key, *(["--whole"] if whole else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        print(f"{row.key}: failed: {' '.join(done.stderr.strip().splitlines()[-1:])}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def read() -> dict[str, Any]:
    """Row key -> report, of all rows that are there."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def is_there(report: Mapping[str, Any] | None, *, whole: bool) -> bool:
    """Whether a row's report is there, with the seconds of a whole compilation where these are asked for."""
    return report is not None and (not whole or report["programs"]["train"]["compile_seconds"] is not None)


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def table(found: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The rows that are there as Markdown, one table a benchmark and size."""
    lines: list[str] = []
    for benchmark, title in BENCHMARKS.items():
        for size in SIZES:
            of = [row for row in rows if (row.benchmark, row.size) == (benchmark, size) and row.key in found]
            if not of:
                continue
            first = found[of[0].key]
            parameters, products = first["parameters"] / 1e6, first["multiply_adds"] / 1e9
            lines += [
                f"\n### {title}, {size}: {parameters:.1f} M parameters, {products:.1f} G multiply-adds an image\n",
                "| devices | fsdp | remat | reserved MiB (of) | arguments MiB | TFLOP a device "
                "| all-reduce | all-gather | reduce-scatter | other | sent MiB | compile s |",
                "|---|---|---|---|---|---|---|---|---|---|---|---|",
                *(_line(row, found[row.key]) for row in of),
            ]
    missing = [row.key for row in rows if row.key not in found]
    lines.append(f"\n{len(rows) - len(missing)} of {len(rows)} rows are compiled. Not compiled: ")
    lines[-1] += "; ".join(missing) + "." if missing else "none."
    return "\n".join(lines).strip()


def _line(row: Row, report: Mapping[str, Any]) -> str:
    program = report["programs"]["train"]
    start = [f"{row.topology} ({report['devices']})", str(row.fsdp), "yes" if row.remat else "no"]
    memory = mebibytes(report["memory"])
    if program["reserved"] is None:
        return f"| {' | '.join(start)} | {mebibytes(program['needed'])} ({memory}): does not fit | | | | | | | | |"
    start += [
        f"{mebibytes(program['reserved'])} ({memory})" + ("" if program["fits"] else ": does not fit"),
        mebibytes(program["arguments"]),
        f"{report['train_flops'] / report['devices'] / 1e12:.2f}",
    ]
    named = ("all-reduce", "all-gather", "reduce-scatter")
    traffic = program["collectives"]
    kinds = [_cell([traffic[kind]] if kind in traffic else []) for kind in named]
    kinds.append(_cell([of for kind, of in traffic.items() if kind not in named]))
    sent = mebibytes(sum(of["sent"] for of in traffic.values()))
    seconds = "" if program["compile_seconds"] is None else f"{program['compile_seconds']:.0f}"
    return f"| {' | '.join(start)} | {' | '.join(kinds)} | {sent} | {seconds} |"


def _cell(traffic: Sequence[Mapping[str, int]]) -> str:
    if not traffic:
        return ""
    return f"{sum(of['count'] for of in traffic)} x, {mebibytes(sum(of['bytes'] for of in traffic))}"


def write(found: Mapping[str, Any]) -> None:
    """The results, in the order of `ROWS`, and the page's table after its mark."""
    ordered = {row.key: found[row.key] for row in ROWS if row.key in found}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    if PAGE.exists():
        before, mark, _ = PAGE.read_text().partition(MARK)
        if mark:
            PAGE.write_text(f"{before}{MARK}\n\n{table(found, ROWS)}\n")


def main() -> None:
    """Compiles the rows that lack, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression; rows that do not match are left as they are")
    parser.add_argument("--list", action="store_true", help="only list the rows")
    parser.add_argument("--table", action="store_true", help="only print the table, and write it to its page")
    parser.add_argument("--whole", action="store_true", help="make machine code too, of rows that lack that")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    by_key = {row.key: row for row in ROWS}
    if arguments.row:
        print(json.dumps(compile_row(by_key[arguments.row], whole=arguments.whole)))
        return
    chosen = [row for row in ROWS if re.search(arguments.only, row.key)]
    if arguments.list:
        for row in chosen:
            print(f"{'compiled' if row.key in read() else 'lacks   '}  {row.key}")
        return
    for row in [] if arguments.table else chosen:
        if is_there(read().get(row.key), whole=arguments.whole):
            continue
        started = time.monotonic()
        report = in_own_process(row, whole=arguments.whole)
        if report is not None:
            write({**read(), row.key: report})
            print(f"{row.key}: {time.monotonic() - started:.0f} s", flush=True)
    write(read())
    print(table(read(), chosen))


if __name__ == "__main__":
    main()
