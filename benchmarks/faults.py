"""Fault injection: kills and damages a training run, and compares its end with an undisturbed run.

  python benchmarks/faults.py --output=benchmarks/results/faults.json

The demo is trained with a checkpoint every few steps. At random moments it gets SIGKILL (20 times) or SIGTERM (5 times)
and is restarted with the same command; then checkpoints are damaged, the disk is filled (a small tmpfs, if this user
may mount one) and a second run is started in the same workdir. A table reports each fault and the program's messages.
Parameters, moments, statistics and random key of the last step must equal those of the undisturbed run bit for bit.
The exit status is 1 if they differ, or if a start did not resume from the expected step. Takes about 20 minutes.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import signal
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.fault_injection import digests, disk, injected
from benchmarks.fault_injection.program import EVERY, Program


def main() -> None:
    """Runs all faults and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--kills", type=int, default=20, help="number of SIGKILLs")
    parser.add_argument("--terms", type=int, default=5, help="number of SIGTERMs")
    parser.add_argument("--steps", type=int, default=160, help="steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    arguments = parser.parse_args()
    flags = [
        f"--config={arguments.config}",
        f"--config.num_steps={arguments.steps}",
        f"--config.checkpoint.every_steps={EVERY}",
        f"--config.eval.every_steps={5 * EVERY}",
        "--config.eval.max_examples=20",
        "--config.log.every_steps=1",
        "--config.log.images=0",
        "--config.model.drop_path=0.2",
    ]
    rng = random.Random(arguments.seed)
    signals = [signal.SIGKILL] * arguments.kills + [signal.SIGTERM] * arguments.terms
    rng.shuffle(signals)
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        workdir, undisturbed = pathlib.Path(folder) / "disturbed", pathlib.Path(folder) / "undisturbed"
        whole = Program(undisturbed, flags)
        if whole.status():
            sys.exit("error: the undisturbed run failed: " + "\n".join(whole.lines[-5:]))
        faults = injected.killing(rng, workdir, flags, signals)
        others = injected.damaging(workdir, flags)
        others.append(injected.second_run(workdir, flags))
        if fault := disk.full_disk(workdir, flags):
            others.append(fault)
        end = Program(workdir, flags)
        if status := end.status():
            print("the last start ended with:", *end.lines[-3:], sep="\n")
        faults += others
        ours, theirs = (digests.digests(path, flags, arguments.steps) for path in (workdir, undisturbed))
    equal = sum(ours.get(name) == digest for name, digest in theirs.items())
    same = status == 0 and ours.keys() == theirs.keys() and equal == len(theirs)
    print(injected.table(faults))
    print(f"\n{equal} of {len(theirs)} arrays of step {arguments.steps} equal those of the undisturbed run bit for bit")
    if arguments.output:
        found = {"arrays": len(theirs), "equal": equal, "faults": [dataclasses.asdict(fault) for fault in faults]}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if same and all(fault.ok for fault in faults) else 1)


if __name__ == "__main__":
    main()
