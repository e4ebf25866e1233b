"""The runs of a call, one after the other until the time is over; the next rung is compiled while one is trained."""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import device
from benchmarks.accelerator import measure
from benchmarks.ladder import packed, report
from benchmarks.ladder.feeding import Feeder, all_tasks
from benchmarks.ladder.settings import Settings
from benchmarks.ladder.training import Rung
from input_pipeline import stream
from taskexpert_jax import command_line
from taskexpert_jax.errors import UserError

RESERVE = 5.0  # seconds at the end of a call, for its tables
SPREAD = 1.1  # a run may take so many times the mean of those before it


class Planned(NamedTuple):
    """A run to come."""

    rung: str
    seed: int


def run(args: argparse.Namespace, settings: Settings, ends: float) -> None:
    """Trains and evaluates what `args.output` does not have yet, until `ends` (`time.monotonic()`).

    Raises:
      UserError: wrong settings or files, or no such device; nothing is trained.
    """
    if line := command_line.absent_device():
        raise UserError(line)
    facts = packed.facts(args.data)
    configs = {rung: settings.config(rung, facts) for rung in args.rungs}
    about = {name: facts[name] for name in ("fingerprint", "downscale", "frame_size", "image_size", "quality")}
    about |= {"frames": {split: len(ids) for split, ids in facts["splits"].items()}}
    plain = json.loads(json.dumps(dataclasses.asdict(settings)))
    content = report.opened(args.output, plain, about)
    done = {Planned(each["rung"], each["seed"]) for each in content["trainings"]}
    plan = [Planned(rung, seed) for seed in args.seeds for rung in args.rungs if Planned(rung, seed) not in done]
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_roomy())))
        begun = time.monotonic()
        packed.unpack(args.data, folder)
        first = configs[args.rungs[0]]
        batches = evaluation_batches(folder, facts["splits"]["val"], first)
        print(f"decoded {sum(about['frames'].values())} frames in {time.monotonic() - begun:.1f} s", flush=True)
        workers = args.workers or max(1, (os.cpu_count() or 1) - 2)
        feeder = stack.enter_context(contextlib.closing(Feeder(folder, facts["splits"]["train"], first, workers)))
        call = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "minutes": args.minutes}
        call |= {"commit": device.commit(args.commit), **measure.environment(), "workers": workers}
        content["calls"].append(call)
        _Call(args.output, content, settings, configs, feeder, batches, ends - RESERVE).train(plan)
    assert sys.modules.get("tensorflow") is None, "the run has to work where TensorFlow is not installed"


def evaluation_batches(folder: pathlib.Path, ids: list[str], config: Any) -> list[dict[str, np.ndarray]]:
    """Batches of the evaluation split with all labels, as `pipeline.eval_batches` makes them."""
    frames, tasks = packed.Frames(folder, "val", ids), all_tasks(config)
    size = tuple(config.dataset.image_size)
    rows = range(-(-len(ids) // config.batch_size) * config.batch_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examples = list(pool.map(lambda row: stream.eval_example(frames, size, tasks, len(ids), row), rows))
    groups = [examples[at : at + config.batch_size] for at in range(0, len(rows), config.batch_size)]
    return [{name: np.stack([each[name] for each in group]) for name in group[0]} for group in groups]


def _roomy() -> str | None:
    """A folder in memory for the decoded frames; None where it is missing or small."""
    with contextlib.suppress(OSError):
        free = os.statvfs("/dev/shm")
        return "/dev/shm" if free.f_bavail * free.f_frsize > 8 << 30 else None
    return None


class _Call:
    """State of a call: what is compiled, what is written."""

    def __init__(
        self,
        output: pathlib.Path,
        content: dict[str, Any],
        settings: Settings,
        configs: Mapping[str, Any],
        feeder: Feeder,
        batches: Sequence[Mapping[str, np.ndarray]],
        ends: float,
    ):
        self._output, self._content, self._settings, self._configs = output, content, settings, configs
        self._feeder, self._batches, self._ends = feeder, batches, ends
        self._compiler = ThreadPoolExecutor(1)
        self._rungs: dict[str, Future[Rung]] = {}

    def _compiled(self, rung: str) -> Future[Rung]:
        """The rung, which the compiler's thread makes."""
        if rung not in self._rungs:
            self._rungs[rung] = self._compiler.submit(Rung, self._configs[rung], self._batches[0])
        return self._rungs[rung]

    def train(self, plan: Sequence[Planned]) -> None:
        """Trains the runs in order; ends before the first that the time does not suffice for."""
        self._content["not_run"] = [each._asdict() for each in plan]
        for number, each in enumerate(plan):
            if not self._fits(each):
                break
            rung = self._compiled(each.rung).result()
            if not self._fits(each):
                break
            for following in plan[number + 1 :]:
                if following.rung not in self._rungs:
                    self._compiled(following.rung)
                    break
            self._one(rung, each)
        self._compiler.shutdown(wait=False, cancel_futures=True)
        report.write(self._output, self._content)

    def _fits(self, planned: Planned) -> bool:
        """True if a run like those before it would end in time; the first has to try."""
        here = self._content["calls"][-1]["device"]
        before = [
            each["seconds"] for each in self._content["trainings"] if each["device"] == here and "seconds" in each
        ]
        expected = SPREAD * statistics.mean(before) if before else 0.0
        left = self._ends - time.monotonic()
        if left > expected:
            return True
        print(f"{planned.rung}, seed {planned.seed}: not started: takes {expected:.0f} s, {left:.0f} s are left")
        return False

    def _one(self, rung: Rung, planned: Planned) -> None:
        self._content["rungs"][planned.rung] = {
            "parameters": rung.size.total_parameters,
            "multiply_adds": rung.size.total_multiply_adds,
            "compile_seconds": rung.compile_seconds,
        }
        self._content["not_run"].remove(planned._asdict())
        facts = {**planned._asdict(), "device": self._content["calls"][-1]["device"]}
        facts |= {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        position, begun = len(self._content["trainings"]), time.monotonic()
        self._content["trainings"].append(facts)

        def write(record: Mapping[str, Any]) -> None:
            self._content["trainings"][position] = {**facts, **record}
            report.write(self._output, self._content)

        record = rung.train(planned.seed, self._feeder, self._batches, self._settings.evaluations, self._ends, write)
        if record["status"] == report.FINISHED:
            record["seconds"] = time.monotonic() - begun
        write(record)
        print(line(self._content["trainings"][position]), flush=True)


def line(record: Mapping[str, Any]) -> str:
    """The record of a run as one printed line."""
    name = f"{record['rung']}, seed {record['seed']}"
    if record["status"] != report.FINISHED:
        return f"{name}: {record['status']} at step {record['steps']}: {record['reason']}"
    found = [f"{task} {of['metric']} {of['value'] or float('nan'):.4g}" for task, of in record["published"].items()]
    return f"{name}: {', '.join(found)}; {record['seconds']:.0f} s, {record['images_per_s']:.0f} images/s"
