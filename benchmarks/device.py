"""Training and evaluation steps on this machine's accelerator: time, MFU, memory, parts, comparison with PyTorch.

  python benchmarks/device.py --output=device.json

Measures ViT-L and ViT-B at both benchmarks' sizes on random data and one accelerator, without TensorFlow; PyTorch is
measured if it is installed. Each variant runs in its own process, the most important first, so a failure affects no
other. Each result is written at once; variants beyond the time limit are listed. benchmarks/README.md explains them.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.accelerator import variants as offered
from benchmarks.accelerator.variants import WORKLOAD, Variant

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIB = 2**20
LONGEST = 210.0  # seconds for one variant, compilation included; a quarter of the total time if that is more
SHORTEST = 15.0  # seconds below which no variant is started
STEPS = ("training", "evaluation", "latency")  # keys of a record that hold times


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("device.json"), help="JSON file of results")
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit; variants beyond it are listed")
    parser.add_argument("--device", default="", help="JAX's platform: cpu, cuda or tpu; default: JAX's own choice")
    parser.add_argument("--size", default="", help="a variant of config/fields.py instead of ViT-L and ViT-B")
    parser.add_argument("--benchmark", choices=tuple(offered.IMAGES), default="pascal_context")
    parser.add_argument("--image", type=_image, help="HEIGHTxWIDTH with --size; default: the benchmark's")
    parser.add_argument("--batch", type=int, default=8, help="with --size")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="with --size")
    parser.add_argument(
        "--unroll", choices=("auto", "yes", "no"), default="auto", help="with --size: config.model.unroll"
    )
    parser.add_argument("--only", default="", help="regular expression: variants to measure, besides the ceilings")
    parser.add_argument("--after", type=pathlib.Path, help="JSON of an earlier run whose variants are skipped")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time per program, after compilation")
    parser.add_argument("--quick", action="store_true", help="a few calls of each program, to see that it runs")
    parser.add_argument("--commit", default="", help="commit to record if the folder is not a git checkout")
    parser.add_argument("--list", action="store_true", help="print the variants in order and measure nothing")
    return parser.parse_args(arguments)


def _image(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def plan(args: argparse.Namespace) -> list[Variant]:
    """The variants that the command line asks for, in order."""
    if args.size:
        image = args.image or offered.IMAGES[args.benchmark]
        ours = Variant(
            "ours", args.benchmark, args.size, image, args.batch, args.dtype, unroll=args.unroll, evaluated=True
        )
        found = offered.plan_of(ours)
    else:
        found = offered.full_plan()
    there = json.loads(args.after.read_text())["results"] if args.after else []
    done = {record["name"] for record in there if record["status"] in ("measured", "does not fit", "refused")}
    asked = [variant for variant in found if re.search(args.only, variant.name) and variant.name not in done]
    return [found[0], *(variant for variant in asked if variant is not found[0])]  # the ceilings always: MFU needs them


def commit(given: str) -> str:
    """The measured commit, with a + if files differ from it."""
    if given:
        return given
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measure(variant: Variant, seconds: float, limit: float, device: str) -> dict[str, Any]:
    """The variant's record, measured in a process that is killed after `limit` seconds."""
    record: dict[str, Any] = {"name": variant.name, **dataclasses.asdict(variant)}
    environment = dict(os.environ)
    if device:
        environment["JAX_PLATFORMS"] = device
    if variant.kind in ("torch", "equality"):
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else JAX takes the memory that PyTorch needs
    else:
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        asked, answered = folder / "variant.json", folder / "result.json"
        asked.write_text(json.dumps({"variant": dataclasses.asdict(variant), "seconds": seconds}))
        command = [sys.executable, str(ROOT / "benchmarks" / "accelerator" / "measure.py"), str(asked), str(answered)]
        errors = (folder / "stderr.txt").open("w+")
        with (
            errors,
            subprocess.Popen(
                command, stdout=errors, stderr=errors, env=environment, cwd=ROOT, start_new_session=True
            ) as process,
        ):
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and the compilers that PyTorch starts
                return {**record, "status": "stopped", "reason": f"not done after {limit:.0f} s"}
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            errors.seek(0)
            text = errors.read()[-1500:]
        if answered.exists():
            return json.loads(answered.read_text())
        return {**record, "status": "failed", "reason": f"exit status {process.returncode}: {text}"}


def add_rates(record: dict[str, Any], ceilings: Mapping[str, float]) -> None:
    """Adds images/s and the model FLOP utilisation to every timed step of a record.

    mfu: model FLOP/s over those of this device's bfloat16 matmul, also for float32.
    """
    steps = [record[key] for key in STEPS if key in record]
    steps += list(record.get("parts", {}).values())
    for step in steps:
        if step["median_s"] > 0:
            rate = step["model_flops"] / step["median_s"]
            step["model_flops_per_s"] = rate
            step["mfu"] = rate / ceilings["matmul_bfloat16"] if ceilings else None
    for key in STEPS:
        if key in record:
            record[key]["images_per_s"] = record["batch"] / record[key]["median_s"]


def compare_with_torch(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of images/s for every PyTorch variant: ours with default settings, and our fastest, by workload."""
    rates = [(record, _images_per_s(record)) for record in results if _images_per_s(record)]
    workload = lambda record: [record[key] for key in WORKLOAD]  # noqa: E731
    found = []
    for torch, rate in (pair for pair in rates if pair[0]["kind"] == "torch"):
        same = [pair for pair in rates if pair[0]["kind"] == "ours" and workload(pair[0]) == workload(torch)]
        if same:
            (first, shipped), (best, fastest) = same[0], max(same, key=lambda pair: pair[1])
            pair = {"torch": torch["name"], "ours": first["name"], "ratio": shipped / rate}
            found.append({**pair, "best_of_ours": best["name"], "best_ratio": fastest / rate})
    return found


def _images_per_s(record: Mapping[str, Any]) -> float:
    """Images/s of the record's latency or training; 0 if it was not measured."""
    return record.get("latency" if record["inference"] else "training", {}).get("images_per_s", 0.0)


def line(record: Mapping[str, Any]) -> str:
    """The record as one printed line."""
    if record["status"] != "measured":
        reason = record.get("reason", "").strip().splitlines()
        return f"{record['name']}: {record['status']} ({reason[-1][:160] if reason else ''})"
    words = []
    if "ceilings" in record:
        of = record["ceilings"]
        rates = f"{of['matmul_bfloat16'] / 1e12:.2f} / {of['matmul_float32'] / 1e12:.2f} TFLOP/s"
        words.append(f"bfloat16 / float32 matmuls {rates}, copy {of['copy'] / 1e9:.1f} GB/s")
    for key in STEPS:
        if key in record:
            step = record[key]
            utilisation = "" if step["mfu"] is None else f", MFU {100 * step['mfu']:.1f} %"
            spread = f"{1e3 * step['min_s']:.1f} to {1e3 * step['max_s']:.1f}"
            words.append(
                f"{key} {1e3 * step['median_s']:.1f} ms ({spread}), {step['images_per_s']:.2f} images/s{utilisation}, "
                f"compiled in {step['compile_s']:.1f} s"
            )
    peak = record.get("peak_memory_bytes") or record.get("training", {}).get("peak_memory_bytes")
    words += [f"peak memory {peak / MIB:.0f} MiB"] if peak else []
    words += [f"{name} {1e3 * part['median_s']:.1f} ms" for name, part in record.get("parts", {}).items()]
    words += ["equal" if record["equal"] else "NOT EQUAL"] if "equal" in record else []
    words += [f"{pair}: {max(of.values()):.1e}" for pair, of in record.get("distances", {}).items()]
    return f"{record['name']}: " + "; ".join(words)


def write(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Replaces the file atomically, so an interrupted program leaves the last complete one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def start(args: argparse.Namespace, variants: Sequence[Variant], seconds: float) -> dict[str, Any]:
    """The report before the first measurement."""
    return {
        "commit": commit(args.commit),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "minutes": args.minutes,
        "seconds_a_program": seconds,
        "versions": {},
        "ceilings": {},
        "results": [],
        "versus_torch": [],
        "not_measured": [variant.name for variant in variants],
    }


def add(report: dict[str, Any], record: dict[str, Any]) -> None:
    """Adds a variant's record to the report, with rates and ratios."""
    environment = record.pop("environment", {})
    report["versions"] |= environment.get("versions", {})
    report |= {key: environment[key] for key in ("device", "platform", "platform_version") if environment}
    report["ceilings"] = record.get("ceilings", report["ceilings"])
    add_rates(record, report["ceilings"])
    report["results"].append(record)
    report["not_measured"].remove(record["name"])
    report["versus_torch"] = compare_with_torch(report["results"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the variants that the command line selects."""
    args = parse(arguments)
    variants = plan(args)
    if args.list:
        print("\n".join(variant.name for variant in variants))
        return
    ends = time.monotonic() + 60 * args.minutes
    seconds = 0.0 if args.quick else args.seconds
    report = start(args, variants, seconds)
    write(args.output, report)
    for variant in variants:
        left = ends - time.monotonic()
        if left < SHORTEST:
            break
        record = measure(variant, seconds, min(left, max(LONGEST, 15 * args.minutes)), args.device)
        add(report, record)
        write(args.output, report)
        print(line(record), flush=True)
    for pair in report["versus_torch"]:
        best = f"best {pair['best_ratio']:.2f}: {pair['best_of_ours']}"
        print(f"{pair['ours']}: {pair['ratio']:.2f} times {pair['torch']} ({best})")
    if report["not_measured"]:
        print(f"not measured within the time limit: {'; '.join(report['not_measured'])}")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
