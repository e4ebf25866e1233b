"""Trains and evaluates the rungs of configs/ablation.py over several seeds, and writes one table.

  python benchmarks/ablation.py static static_gates dynamic_gates full --seeds 0 1 2 --output=DIR -- \
      --config.dataset.data_dir=DATA

Arguments after `--` go to every run. Interrupted runs resume and finished runs are only read, so the same command
completes a table, and more rungs or seeds extend it. A run that DIR/ablation.json has is finished, even if its folder
is gone: copy a recorded table there to extend it elsewhere. With the rungs `single_TASK` the table has delta-m: the
mean relative gain over the single-task models, whose numbers are means over the seeds. benchmarks/seeds.py has the
tables.
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import changes, machine, seeds
from configs import ablation
from taskexpert_jax import command_line, compare, files, json_file
from taskexpert_jax.config import flat, read_run
from taskexpert_jax.errors import UserError, shown
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.runs import writer
from taskexpert_jax.tasks import from_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
PREEMPTED = 75  # exit status of a training that SIGTERM stopped
TABLE = "ablation.json"  # in the output folder
_PLACES = ("dataset.data_dir", "dataset.local_cache", "dataset.cache", "dataset.threads")  # that change no result


class Run(NamedTuple):
    """One training: a rung with a seed."""

    rung: str
    seed: int

    def workdir(self, output: pathlib.Path) -> pathlib.Path:
        return output / self.rung / f"seed{self.seed}"


def finish(
    run: Run,
    base: str,
    output: pathlib.Path,
    extra: Sequence[str],
    cores: Sequence[int],
    running: set[subprocess.Popen],
) -> bool:
    """Trains and evaluates a run on the given cores; False if it failed. `running` has its process meanwhile."""
    workdir = run.workdir(output)
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
        # A training that was stopped fails: it must not be evaluated as if it were finished.
        training = ["--mode=train", f"--preempted_status={PREEMPTED}"]
        for mode in (training, ["--mode=evaluate", "--checkpoint=latest"]):
            with subprocess.Popen([*command, *mode], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT) as process:
                running.add(process)
                process.wait()
                running.remove(process)
            if process.returncode:
                last = (workdir / "log.txt").read_text().strip().splitlines()[-1:]
                print(f"{run.rung} seed {run.seed}: {mode[0]} failed: {' '.join(last)}", flush=True)
                return False
    print(f"{run.rung} seed {run.seed}: {time.monotonic() - started:.0f} s", flush=True)
    return True


@functools.cache
def size(rung: str, base: str) -> dict[str, int]:
    """Parameters and multiply-adds of a rung's model."""
    config = ablation.get_config(rung + base)
    count = budget.count(taskexpert.from_config(config, from_config(config)))
    return {"parameters": count.total_parameters, "multiply_adds": count.total_multiply_adds}


def recorded(output: pathlib.Path, setting: Mapping[str, Any]) -> dict[Run, seeds.Result]:
    """Results in the table that an earlier call left.

    Raises:
      UserError: it is of another setting (benchmark, variant, arguments for every run), or damaged.
    """
    file = output / TABLE
    if not file.exists():
        return {}
    content = seeds.read_table(file, {"setting": dict}, "move it away, or choose another --output")
    found = [seeds.recorded(record) for record in content["runs"]]
    for name, ours in setting.items():
        theirs = content["setting"].get(name)
        if theirs != ours:
            raise UserError(f"{file} has runs with {name} {theirs!r}, not {ours!r}: choose another --output")
    for rung in {result.rung for result in found}:
        try:
            ablation.get_config(",".join(filter(None, (rung, setting["base"]))))
        except ValueError as error:
            raise UserError(f"{file} has runs of another version ({error}): choose another --output") from None
    return {Run(result.rung, result.seed): result for result in found}


def read(run: Run, output: pathlib.Path, base: str, extra: Sequence[str]) -> seeds.Result | None:
    """The run's result, None if it is not evaluated at its last step.

    Raises:
      UserError: damaged files, or a run of another setting.
    """
    workdir = run.workdir(output)
    if not (workdir / "evaluation" / "metrics.json").exists():
        return None
    evaluation = compare.read_metrics(workdir)
    if (workdir / "config.json").exists():
        check_setting(run, workdir, base, extra)
        if evaluation.get("step") != read_run(workdir).num_steps:
            return None
    lines = workdir / writer.LINES
    try:
        losses = seeds.losses_by_step(lines.read_text().splitlines() if lines.exists() else ())
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise UserError(f"{lines} is damaged ({error}): move {workdir} away to train it again") from None
    return seeds.result(run.rung, run.seed, evaluation, losses)


def check_setting(run: Run, workdir: pathlib.Path, base: str, extra: Sequence[str]) -> None:
    """Raises UserError if a folder has a run of another rung, base or seed, or with other values of `extra`."""
    config = read_run(workdir)
    expected = {"variant": ablation.get_config(run.rung + base).variant, "seed": run.seed}
    for argument in extra:
        name, mark, text = argument.removeprefix("--config.").partition("=")
        if mark and argument.startswith("--config.") and name not in _PLACES:
            expected[name] = text
    values = dict(flat(config))
    for name, wanted in expected.items():
        if name in values and not _same(values[name], wanted):
            raise UserError(
                f"{workdir} has a run with {name} {shown(values[name])}, not {shown(wanted)}: choose another --output"
            )


def _same(value: Any, given: Any) -> bool:
    """True if a field's value is that given on the command line."""
    if isinstance(given, str) and not isinstance(value, str):
        text, given = given, changes.parsed(given, value)
        if given is text:
            return True  # in a form that only the flags' parser reads
        if isinstance(value, tuple):
            given = tuple(given) if isinstance(given, tuple | list) else (given,)
    return value == given


def report(results: Sequence[seeds.Result], against: str, base: str) -> tuple[dict[str, Any], str]:
    """The contents of DIR/ablation.json about the results, and the tables in Markdown."""
    of, summary = seeds.columns(results), seeds.summarise(results)
    paired = seeds.differences(results, against)
    memory = seeds.memory_weights(results)
    sizes = {rung: size(rung, base) for rung in summary}
    parts = [seeds.mean_table(summary, of)]
    if paired:
        parts += [f"Differences to {against}, within seeds, with 95 % intervals:"]
        parts += [seeds.difference_table(paired, of, against, summary)]
    if memory:
        parts += ["Largest mean weight of the memory at a tap, by seed:", seeds.memory_table(memory)]
    content = {"size": sizes, "summary": summary, "against": against, "differences": paired}
    return content, "\n\n".join(parts)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; `extra` has what follows `--`."""
    own, extra = list(arguments), []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = command_line.Parser("benchmarks/ablation.py", __doc__)
    parser.add_argument("rungs", nargs="+", metavar="RUNG", help="of configs/ablation.py")
    parser.add_argument("--base", default="", help="BENCHMARK,VARIANT of configs/ablation.py; default nyud,small")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for workdirs and table")
    parser.add_argument("--against", default="static", help="rung that the others are compared with, seed by seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel, which share the CPU's cores")
    parser.add_argument("--read", action="store_true", help="train nothing; tabulate finished runs")
    args = parser.parse_args(own)
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs}: give 1 or more")
    if min(args.seeds) < 0:
        parser.error(f"--seeds {min(args.seeds)}: give 0 or more")
    args.extra, args.base = extra, f",{args.base}" if args.base else ""
    args.rungs, args.seeds = list(dict.fromkeys(args.rungs)), list(dict.fromkeys(args.seeds))
    return args


def train(args: argparse.Namespace, runs: Sequence[Run], done: dict[Run, seeds.Result], write: Any) -> bool:
    """Trains and evaluates the runs, in order; `write` is called after each. False if one failed."""
    cores = sorted(os.sched_getaffinity(0))
    free = [cores[job :: args.jobs] or cores for job in range(args.jobs)]
    running: set[subprocess.Popen] = set()

    def work(run: Run) -> bool:
        own = free.pop()
        try:
            return finish(run, args.base, args.output, args.extra, own, running)
        finally:
            free.append(own)

    complete = True
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for run, finished in zip(runs, pool.map(work, runs), strict=True):
                found = read(run, args.output, args.base, args.extra) if finished else None
                complete &= found is not None
                if found:
                    done[run] = found
                    write()
        except BaseException:  # Ctrl-C; or the table cannot be written
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                process.send_signal(signal.SIGTERM)  # saves a checkpoint and exits
            raise
    return complete


def program(args: argparse.Namespace) -> bool:
    """Trains what is missing and writes the table; False if a run failed.

    Raises:
      UserError: an unknown rung, results of another setting, damaged files, or an output that cannot be written.
    """
    setting = {"base": args.base.lstrip(","), "arguments": args.extra}
    try:
        for rung in dict.fromkeys([*args.rungs, args.against]):
            ablation.get_config(rung + args.base)
    except ValueError as error:
        raise UserError(str(error)) from None
    files.folder_for_results(args.output)
    done = recorded(args.output, setting)
    wanted = [Run(rung, seed) for seed in args.seeds for rung in args.rungs]
    done |= {run: found for run in wanted if (found := read(run, args.output, args.base, args.extra))}

    def write() -> str:
        for run, found in recorded(args.output, setting).items():  # another call may have added to the table meanwhile
            done.setdefault(run, found)
        order = [*args.rungs, *(run.rung for run in done)]
        results = sorted(done.values(), key=lambda found: (order.index(found.rung), found.seed))
        content, text = report(results, args.against, args.base)
        runs = [{**found._asdict(), "losses": dict(found.losses)} for found in results]
        content = {"setting": setting, "machine": machine.described("jax"), **content, "runs": runs}
        table = json.dumps(json_file.finite(content), indent=1) + "\n"
        files.write({args.output / TABLE: table, args.output / "ablation.md": text + "\n"})
        return text

    missing = [run for run in wanted if run not in done]
    if args.read and not done:
        raise UserError(f"{args.output} has no finished run of {', '.join(args.rungs)}: train them without --read")
    complete = args.read or train(args, missing, done, write)
    if done:
        print(f"\n{write()}")
        if not any(run.rung == args.against for run in done):
            print(f"\nno differences: no finished run of {args.against}, which --against names")
    return complete


def main() -> int:
    """Runs the program; returns the exit status, 1 if a run failed."""
    args = parse(sys.argv[1:])
    complete = []
    resumes = "interrupted; the same command goes on, each run from its last checkpoint"
    status = command_line.ended(lambda: complete.append(program(args)), resumes)
    return status or int(not complete[0])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))  # the trainings save and end
    sys.exit(main())
