"""Seconds to the first prediction in a fresh Python, and of the calls after it, with the bundled demo model.

.venv/bin/python benchmarks/first_answer.py [--rounds=3] [--output=FILE]
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from taskexpert_jax import installation

ROOT = installation.root()
# A process of its own for each answer; prints milliseconds. The parent's clock includes Python's start and end.
ANSWER = """
import json, statistics, sys, time
import numpy as np
import taskexpert_jax
image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
run = taskexpert_jax.load_run("demo")
prediction = run.predict(image)
run.draw(prediction, image), run.predict([image] * 8, batch_size=8)

def median(call, images=1):
    times = []
    for _ in range(20):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start) / images)
    return statistics.median(times)

warm = {
    "arrays of one image": median(lambda: run.predict(image)),
    "arrays, 8 images at once": median(lambda: run.predict([image] * 8, batch_size=8), 8),
    "images with legends and montage": median(lambda: run.draw(prediction, image)),
}
print(json.dumps(warm))
"""
FIRST = 'import numpy, taskexpert_jax; taskexpert_jax.load_run("demo").predict(numpy.zeros((96, 128, 3), numpy.uint8))'


def seconds(code: str, cache: str | None) -> tuple[float, str]:
    """Wall time of a fresh Python with this code, and what it prints; cache: JAX's compilation cache."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache:
        env["JAX_COMPILATION_CACHE_DIR"] = cache
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    """Prints the figures, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each kind")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        seconds(FIRST, cache)
        cold = [seconds(FIRST, None)[0] for _ in range(args.rounds)]
        cached = [seconds(FIRST, cache)[0] for _ in range(args.rounds)]
    found: dict[str, Any] = {
        "version": installation.version_text(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "python": platform.python_version(),
        "first prediction, seconds": {"nothing cached": cold, "compilation cache": cached},
        "calls after it, median milliseconds": json.loads(seconds(ANSWER, None)[1]),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
