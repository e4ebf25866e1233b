"""Fault injection: kills and damages a training run, and compares its end with an undisturbed run.

  python benchmarks/faults.py --output=benchmarks/results/faults.json
  python benchmarks/faults.py --store=gcs-emulator --config=configs/demo.py:tiny --steps=600 \\
      --output=benchmarks/results/faults_gcs.json

The demo is trained with a checkpoint every few steps. At random moments it gets SIGKILL (20 times) or SIGTERM (5 times)
and is restarted with the same command; then checkpoints are damaged and a second run is started in the same workdir. On
a disk, that is filled (a small tmpfs, if this user may mount one). In a bucket (`--store=gcs-emulator`: an emulator on
this machine), the store answers 503 to one in 20 requests at random all the time, half of which it has carried out; two
runs start at once, leases of dead and frozen runs are taken over, and the store is down or refuses.

A table reports each fault and the program's messages. Parameters, moments, statistics and random key of the last step
must equal those of an undisturbed run on the disk bit for bit. The exit status is 1 if they differ, or if a start did
not resume from the expected step. Takes about 20 minutes.
"""

import argparse
from collections import Counter
from collections.abc import Callable
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import random
import signal
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.fault_injection import digests, disk, emulator, injected, proxy
from benchmarks.fault_injection.injected import Fault
from benchmarks.fault_injection.program import EVERY, Launch, Program
from taskexpert_jax import installation, storage

ONE_IN = 20  # requests that get 503


@dataclasses.dataclass
class Place:
    """Workdir of the disturbed run, on a disk or in a bucket, with the faults that it can have there.

    Attributes:
      workdir: its directory.
      environment: variables of its programs.
      faults: each injects one; None if that cannot be done here.
      finish: ends the faults that lasted all the time, and returns facts about them.
    """

    workdir: pathlib.Path
    environment: dict[str, str]
    faults: list[Callable[[pathlib.Path, Launch], Fault | None]]
    finish: Callable[[], dict[str, Any]] = dict


def local(folder: pathlib.Path, stack: contextlib.ExitStack, seed: int) -> Place:
    """A folder of the disk."""
    return Place(folder / "disturbed", {}, [injected.second_run, disk.full_disk])


def gcs_emulator(folder: pathlib.Path, stack: contextlib.ExitStack, seed: int) -> Place:
    """A bucket of the emulator, which fails one in `ONE_IN` requests of the programs, and none of this process."""
    from benchmarks.fault_injection import store

    between = stack.enter_context(proxy.running())
    try:
        between.target = stack.enter_context(emulator.running(between.address))
    except emulator.NotAvailable as error:
        sys.exit(f"error: {error}")
    os.environ.update(emulator.environment(between.target))
    between.fail_one_in(ONE_IN, seed)

    def finish() -> dict[str, Any]:
        between.fail_one_in(0)
        counts: Counter[int] = between.counts
        refused = {f"answered {status}": counts[status] for status in (403, 429, 503)}
        return {"requests": counts.total(), **refused, "connections closed": counts[0]}

    faults = [
        injected.second_run,
        store.two_at_once,
        store.lease_of_another_host,
        store.frozen,
        lambda *run: store.down(*run, between, store.CHECKPOINT, "a checkpoint"),
        lambda *run: store.down(*run, between, store.METRICS, "a write of metrics"),
        lambda *run: store.throttled(*run, between),
        lambda *run: store.forbidden(*run, between, at_start=True),
        lambda *run: store.forbidden(*run, between, at_start=False),
    ]
    workdir = storage.path(f"gs://{emulator.BUCKET}/disturbed")
    return Place(workdir, emulator.environment(between.address), faults, finish)


PLACES = {"local": local, "gcs-emulator": gcs_emulator}


def flags_of(config: str, steps: int) -> list[str]:
    """Flags of the training program."""
    return [
        f"--config={config}",
        f"--config.num_steps={steps}",
        f"--config.checkpoint.every_steps={EVERY}",
        f"--config.eval.every_steps={5 * EVERY}",
        "--config.eval.max_examples=20",
        "--config.log.every_steps=1",
        "--config.log.images=0",
        "--config.model.drop_path=0.2",
    ]


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--store", choices=list(PLACES), default="local", help="where the run is")
    parser.add_argument("--kills", type=int, default=20, help="number of SIGKILLs")
    parser.add_argument("--terms", type=int, default=5, help="number of SIGTERMs")
    parser.add_argument("--signals_only", action="store_true", help="no other faults")
    parser.add_argument("--steps", type=int, default=160, help="steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    return parser.parse_args()


def inject(place: Place, launch: Launch, arguments: argparse.Namespace) -> list[Fault]:
    """Injects all faults, one after the other."""
    rng = random.Random(arguments.seed)
    signals = [signal.SIGKILL] * arguments.kills + [signal.SIGTERM] * arguments.terms
    rng.shuffle(signals)
    faults = injected.killing(rng, place.workdir, launch, signals)
    if arguments.signals_only:
        return faults
    faults += injected.damaging(place.workdir, launch)
    for fault in place.faults:
        if found := fault(place.workdir, launch):
            faults.append(found)
    return faults


def main() -> None:
    """Runs all faults and prints the table."""
    arguments = parse()
    flags = flags_of(arguments.config, arguments.steps)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults_")))
        undisturbed = folder / "undisturbed"
        whole = Program(undisturbed, Launch(flags))
        if whole.status():
            sys.exit("error: the undisturbed run failed: " + "\n".join(whole.lines[-5:]))
        place = PLACES[arguments.store](folder, stack, arguments.seed)
        launch = Launch(flags, place.environment)
        faults = inject(place, launch, arguments)
        end = Program(place.workdir, launch)
        if status := end.status():
            print("the last start ended with:", *end.lines[-3:], sep="\n")
        facts = place.finish()
        ours, theirs = (digests.digests(path, flags, arguments.steps) for path in (place.workdir, undisturbed))
    equal = sum(ours.get(name) == digest for name, digest in theirs.items())
    same = status == 0 and ours.keys() == theirs.keys() and equal == len(theirs)
    print(injected.table(faults))
    print(f"\n{equal} of {len(theirs)} arrays of step {arguments.steps} equal those of the undisturbed run bit for bit")
    if facts:
        print("; ".join(f"{name}: {value}" for name, value in facts.items()))
    if arguments.output:
        found = {
            "version": installation.version_text(),
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "command": " ".join(["python", "benchmarks/faults.py", *sys.argv[1:]]),
            "arrays": len(theirs),
            "equal": equal,
            **facts,
            "faults": [dataclasses.asdict(fault) for fault in faults],
        }
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if same and all(fault.ok for fault in faults) else 1)


if __name__ == "__main__":
    main()
