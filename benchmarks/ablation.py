"""Trains and evaluates the rungs of configs/ablation.py over several seeds, and writes one table.

  python benchmarks/ablation.py static static_gates dynamic_gates full --seeds 0 1 2 --output=DIR -- \
      --config.dataset.data_dir=DATA

Arguments after `--` go to every run. Interrupted runs resume and finished runs are only read, so the same command
completes a table, and more rungs or seeds extend it. With the rungs `single_TASK` the table has delta-m: the mean
relative gain over the single-task models, whose numbers are means over the seeds.
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import ablation
from taskexpert_jax import compare

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Run(NamedTuple):
    """One training: a rung with a seed."""

    rung: str
    seed: int

    def workdir(self, output: pathlib.Path) -> pathlib.Path:
        return output / self.rung / f"seed{self.seed}"


def finish(run: Run, base: str, output: pathlib.Path, extra: Sequence[str], cores: Sequence[int]) -> bool:
    """Trains and evaluates a run on the given cores, unless that is done; False if it failed."""
    workdir = run.workdir(output)
    if (workdir / "evaluation" / "metrics.json").exists():
        return True
    workdir.mkdir(parents=True, exist_ok=True)
    config = f"--config={ROOT / 'configs' / 'ablation.py'}:{run.rung}{base}"
    command = ["taskset", "--cpu-list", ",".join(map(str, cores))]
    command += [
        sys.executable,
        str(ROOT / "main.py"),
        config,
        f"--workdir={workdir}",
        f"--config.seed={run.seed}",
        *extra,
    ]
    started = time.monotonic()
    with (workdir / "log.txt").open("a") as log:
        for mode in (["--mode=train"], ["--mode=evaluate", "--checkpoint=latest"]):
            done = subprocess.run(
                [*command, *mode],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                check=False,
            )
            if done.returncode:
                last = (workdir / "log.txt").read_text().strip().splitlines()[-1:]
                print(f"{run.rung} seed {run.seed}: {mode[0]} failed: {' '.join(last)}", flush=True)
                return False
    print(f"{run.rung} seed {run.seed}: {time.monotonic() - started:.0f} s", flush=True)
    return True


def values(runs: Sequence[Run], output: pathlib.Path) -> dict[Run, dict[str, float]]:
    """Published metrics of every run: `task/metric` -> value."""
    return {run: compare.published_values(compare.read_metrics(run.workdir(output))) for run in runs}


def single_means(found: Mapping[Run, Mapping[str, float]]) -> dict[str, float]:
    """Means of the single-task models over the seeds: `task/metric` -> mean."""
    by_key: dict[str, list[float]] = {}
    for run, numbers in found.items():
        if run.rung.startswith(ablation.SINGLE):
            for key, value in numbers.items():
                by_key.setdefault(key, []).append(value)
    return {key: statistics.mean(numbers) for key, numbers in by_key.items()}


def summarise(found: Mapping[Run, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Rung -> {"seeds": [...], "mean": {key: value}, "std": {key: value}}; std: of the sample, nan for one seed."""
    single = single_means(found)
    of = compare.columns(sorted({key for numbers in found.values() for key in numbers}))
    summary = {}
    for rung in dict.fromkeys(run.rung for run in found):
        rows = {run.seed: dict(numbers) for run, numbers in found.items() if run.rung == rung}
        for numbers in rows.values():
            if not rung.startswith(ablation.SINGLE) and numbers.keys() <= single.keys():
                numbers[compare.DELTA] = compare.delta_m(numbers, single, of)
        keys = next(iter(rows.values())).keys()
        lists = {key: [numbers[key] for numbers in rows.values()] for key in keys}
        summary[rung] = {
            "seeds": list(rows),
            "mean": {key: statistics.mean(numbers) for key, numbers in lists.items()},
            "std": {key: statistics.stdev(n) if len(n) > 1 else math.nan for key, n in lists.items()},
        }
    return summary


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary as Markdown: mean ± standard deviation over the seeds."""
    keys = list(dict.fromkeys(key for row in summary.values() for key in row["mean"]))
    of = [*compare.columns([key for key in keys if key != compare.DELTA])]
    if compare.DELTA in keys:
        of.append(compare.Column(compare.DELTA, "Δm (%)", higher_is_better=True))
    digits = {
        column.key: 2 if max(abs(row["mean"].get(column.key, 0)) for row in summary.values()) >= 2 else 4
        for column in of
    }

    digits[compare.DELTA] = 2

    def cell(row: Mapping[str, Any], key: str) -> str:
        if key not in row["mean"]:
            return "-"
        mean, spread = row["mean"][key], row["std"][key]
        text = f"{mean:+.2f}" if key == compare.DELTA else f"{mean:.{digits[key]}f}"
        return text if math.isnan(spread) else f"{text} ± {spread:.{digits[key]}f}"

    lines = ["| rung | seeds | " + " | ".join(f"{c.title} {'↑' if c.higher_is_better else '↓'}" for c in of) + " |"]
    lines.append("|---" * (len(of) + 2) + "|")
    for rung, row in summary.items():
        lines.append(f"| {rung} | {len(row['seeds'])} | " + " | ".join(cell(row, c.key) for c in of) + " |")
    return "\n".join(lines)


def main() -> int:
    """Runs the program; returns the exit status, 1 if a run failed."""
    arguments, extra = sys.argv[1:], []
    if "--" in arguments:
        arguments, extra = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rungs", nargs="+", metavar="RUNG", help="of configs/ablation.py")
    parser.add_argument("--base", default="", help="BENCHMARK,VARIANT of configs/ablation.py; default nyud,small")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for workdirs and table")
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel, which share the CPU's cores")
    parser.add_argument("--read", action="store_true", help="train nothing; tabulate finished runs")
    args = parser.parse_args(arguments)
    base = f",{args.base}" if args.base else ""
    for rung in args.rungs:
        try:
            ablation.get_config(rung + base)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    runs = [Run(rung, seed) for seed in args.seeds for rung in args.rungs]
    cores = sorted(os.sched_getaffinity(0))
    free = [cores[job :: args.jobs] or cores for job in range(args.jobs)]

    def work(run: Run) -> bool:
        if args.read:
            return (run.workdir(args.output) / "evaluation" / "metrics.json").exists()
        own = free.pop()
        try:
            return finish(run, base, args.output, extra, own)
        finally:
            free.append(own)

    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(work, runs))
    found = values([run for run, complete in zip(runs, done, strict=True) if complete], args.output)
    if found:
        ordered = {run: found[run] for rung in args.rungs for run in found if run.rung == rung}
        summary = summarise(ordered)
        text = table(summary)
        print(f"\n{text}")
        record = {"command": sys.argv, "summary": summary}
        (args.output / "ablation.json").write_text(json.dumps(record, indent=2) + "\n")
        (args.output / "ablation.md").write_text(text + "\n")
    return 0 if args.read or all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
