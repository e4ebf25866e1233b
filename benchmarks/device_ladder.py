"""Trains rungs of configs/ablation.py on packed frames of NYUD-v2, one after the other, on one GPU within minutes.

  python benchmarks/device_ladder.py pack --folder=NYUDv2 --data_dir=DATA       # where the data and TensorFlow are
  python benchmarks/device_ladder.py run --output=ladder.json --minutes=9       # where the GPU is: neither, no network
  python benchmarks/device_ladder.py table ladder.json

`run` trains the first seed of every rung, then the second. It writes results and curves as it goes, starts no run that
would not end in time, and the same command goes on with the runs that are missing. benchmarks/README.md explains it.
"""

import argparse
from collections.abc import Sequence
import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.ladder.settings import RUNGS, Settings

PACKED = pathlib.Path("packed/nyud.zip")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="write the packed frames", description="Writes the packed frames.")
    pack.add_argument("--folder", type=pathlib.Path, help="the extracted archive, if --data_dir has no data set yet")
    pack.add_argument("--data_dir", type=pathlib.Path, required=True, help="directory of built data sets")
    pack.add_argument("--output", type=pathlib.Path, default=PACKED, help="default: %(default)s, which git ignores")
    pack.add_argument("--downscale", type=float, default=0.5, help="factor on the images' sides, %(default)s")
    pack.add_argument("--quality", type=int, default=88, help="of the JPEG files, %(default)s")
    run = commands.add_parser("run", help="train and evaluate", description="Trains and evaluates the rungs.")
    run.add_argument("--data", type=pathlib.Path, default=PACKED, help="the packed frames, %(default)s")
    run.add_argument("--output", type=pathlib.Path, required=True, help="JSON file of results")
    run.add_argument("--minutes", type=float, default=9.0, help="time limit of this call, %(default)s")
    run.add_argument("--rungs", nargs="+", default=list(RUNGS), metavar="RUNG", help=f"default: {' '.join(RUNGS)}")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    run.add_argument("--device", default="", help="JAX's platform: cpu, cuda or tpu; default: JAX's own choice")
    run.add_argument("--workers", type=int, help="processes that augment; default: one a core, without two")
    run.add_argument("--commit", default="", help="commit to record if the folder is not a git checkout")
    for field in Settings.flags():
        run.add_argument(f"--{field.name}", **field.argument)
    table = commands.add_parser("table", help="print the tables of results", description="Prints the tables.")
    table.add_argument("output", type=pathlib.Path, metavar="FILE", help="JSON file of results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    started = time.monotonic()
    args = parse(arguments)
    from taskexpert_jax.command_line import print_error
    from taskexpert_jax.errors import UserError

    try:
        if args.command == "pack":
            from benchmarks.ladder import packing

            about = packing.pack(args.folder, args.data_dir, args.output, args.downscale, args.quality)
            print(packing.line(args.output, about))
            return 0
        if args.command == "run" and not (args.minutes > 0 and (args.workers is None or args.workers > 0)):
            raise UserError(f"--minutes={args.minutes} and --workers={args.workers}: give numbers above 0")
        if args.command == "run" and args.device:
            os.environ["JAX_PLATFORMS"] = args.device
        from benchmarks.ladder import report

        if args.command == "run":
            from benchmarks.ladder import running

            running.run(args, Settings.of(args), ends=started + 60 * args.minutes)
        print(report.text(report.read(args.output)))
    except UserError as error:
        print_error(error)
        return 2
    return 0


def _interrupt(*_: object) -> None:
    """On SIGTERM, as on Ctrl-C: the decoded frames are removed and the processes end. `timeout` may send it twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    status = 130
    with contextlib.suppress(KeyboardInterrupt):
        status = main()
    for process in multiprocessing.active_children():
        process.terminate()
    sys.stdout.flush()
    os._exit(status)  # not waiting for a compilation of a rung that no time is left for
