"""Time of a training step by the scopes of the model, from the newest profile of a run.

.venv/bin/python benchmarks/profile_scopes.py RUN [--output=FILE]

Needs TensorFlow, which has the format of profiles. docs/profile.md says how to take one.
"""

import argparse
import collections
from collections.abc import Iterator, Mapping
import json
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from taskexpert_jax.training.profile import FOLDER

PROGRAM = "jit_step"  # the training step
# Row -> the scopes of an operation's name that belong to it, the first that fits.
ROWS = {
    "attention of tokens": ("attend", "attention"),
    "backbone, the rest": ("backbone",),
    "experts": ("experts",),
    "gates": ("mixture._gates",),
    "assembling": ("assemble",),
    "memory": ("mixture._read", "mixture._write"),
    "heads": ("head",),
    "decoder, the rest": ("neck", "decoder"),
    "losses": ("losses",),
    "optimizer": ("optimizer",),
    "guard against NaN/Inf": ("guard",),
    "inputs": ("inputs",),
}
OTHER = "without a scope"


def newest(run: pathlib.Path) -> pathlib.Path:
    """The profile of the last steps in a run's directory: that of its first host."""
    found = sorted((run / FOLDER).glob("*/*.xplane.pb"))
    if not found:
        sys.exit(f"error: {run} has no profile; train with --config.profile.first_step=STEP")
    return next(path for path in found if path.parent == found[-1].parent)


def space_of(path: pathlib.Path) -> Any:
    """The planes of a profile."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(path.read_bytes())
    return space


def names_of(space: Any) -> dict[str, str]:
    """Instruction of the training step -> name of the operation that it comes from, from the profile's programs."""
    from tensorflow.compiler.xla.service import hlo_pb2

    names: dict[str, str] = {}
    for plane in space.planes:
        if plane.name != "/host:metadata":
            continue
        for program in plane.event_metadata.values():
            for stat in program.stats:
                hlo = hlo_pb2.HloProto.FromString(stat.bytes_value)
                if hlo.hlo_module.name == PROGRAM:
                    every = (of for computation in hlo.hlo_module.computations for of in computation.instructions)
                    names |= {of.name: of.metadata.op_name for of in every}
    return names


def own_times(space: Any) -> Iterator[tuple[str, float]]:
    """(instruction, milliseconds without those of the instructions within it) of the training step's instructions."""
    for plane in space.planes:
        stats = {key: of.name for key, of in plane.stat_metadata.items()}
        for line in plane.lines:
            open_: list[list[Any]] = []  # [instruction, end, time of its own] of the events around this one
            for event in sorted(line.events, key=lambda event: (event.offset_ps, -event.duration_ps)):
                given = {stats[of.metadata_id]: _text(of, plane) for of in event.stats}
                if given.get("hlo_module") != PROGRAM or "hlo_op" not in given:
                    continue
                while open_ and open_[-1][1] <= event.offset_ps:
                    yield open_[-1][0], open_.pop()[2] / 1e9
                if open_:
                    open_[-1][2] -= event.duration_ps
                open_.append([given["hlo_op"], event.offset_ps + event.duration_ps, event.duration_ps])
            yield from ((name, own / 1e9) for name, _, own in open_)


def _text(stat: Any, plane: Any) -> str:
    return plane.stat_metadata[stat.ref_value].name if stat.ref_value else stat.str_value


def row_of(name: str) -> str:
    """The row of `ROWS` of an operation."""
    scopes = {
        re.split("[_.]", scope)[0] if scope.startswith(("head_", "attention.")) else scope
        for scope in re.split("[/()]", name)
    }
    return next((row for row, known in ROWS.items() if scopes & set(known)), OTHER)


def steps_of(path: pathlib.Path) -> int:
    """Number of steps of a profile, from its folder's name."""
    first, last = map(int, re.findall(r"\d+", path.parent.name))
    return last - first + 1


def shares(path: pathlib.Path) -> Mapping[str, float]:
    """Milliseconds of a step by row, summed over threads or devices."""
    space = space_of(path)
    names, total = names_of(space), collections.Counter[str]()
    for instruction, time in own_times(space):
        total[row_of(names.get(instruction, ""))] += time / steps_of(path)
    return {row: total[row] for row in (*ROWS, OTHER) if total[row]}


def main() -> None:
    """Prints the table, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    args = parser.parse_args()
    path = newest(args.run)
    found = shares(path)
    whole = sum(found.values())
    print(f"{path.parent.name}: {whole:.1f} ms a step, summed over threads or devices")
    print("| scope | ms a step | share |\n|---|---|---|")
    for row, time in found.items():
        print(f"| {row} | {time:.1f} | {100 * time / whole:.1f} % |")
    if args.output:
        args.output.write_text(json.dumps({"profile": path.parent.name, "ms a step": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
