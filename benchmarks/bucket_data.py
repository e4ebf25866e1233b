"""Milliseconds to load an example from a bucket and from its copy on the disk, and the seconds to make the copy.

  python benchmarks/bucket_data.py nyud --data_dir=DATA              # a built data set, sent to an emulator first
  python benchmarks/bucket_data.py nyud --data_dir=gs://BUCKET/data  # your bucket, from the machine that trains

The emulator runs on this machine, where requests take no time: a relay before it delays each by --latency milliseconds.
Neither limits the bandwidth, and both take their share of this machine's cores. Bucket and copy take turns at each
example, in one thread.
"""

import argparse
import asyncio
from collections.abc import Callable, Iterator
import contextlib
import importlib
import json
import multiprocessing
from multiprocessing.connection import Connection
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.fault_injection import emulator
from input_pipeline import pipeline, records
from taskexpert_jax import storage, tasks
from taskexpert_jax.errors import UserError

COPY, BUCKET = "copy", "bucket"
_BYTES = 1 << 18


class Delay:
    """A TCP relay before a store that passes each request on only after a time; what a store sends passes at once.

    Attributes:
      seconds: the time.
    """

    def __init__(self, target: str):
        self.seconds = 0.0
        self._port = int(target.rpartition(":")[2])

    async def serve(self, connection: Connection) -> None:
        """Sends its address, and then receives the seconds; ends with its process."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        connection.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        while True:
            self.seconds = await asyncio.to_thread(connection.recv)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_store, to_store = await asyncio.open_connection("127.0.0.1", self._port)
        answered = True  # so what the client sends next is the begin of a request

        async def requests() -> None:
            nonlocal answered
            while data := await reader.read(_BYTES):
                if answered:
                    answered = False
                    await asyncio.sleep(self.seconds)
                to_store.write(data)
                await to_store.drain()

        async def answers() -> None:
            nonlocal answered
            while data := await from_store.read(_BYTES):
                answered = True
                writer.write(data)
                await writer.drain()

        both = [asyncio.ensure_future(requests()), asyncio.ensure_future(answers())]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for one, end in zip(both, (to_store, writer), strict=True):
            one.cancel()
            end.close()
        await asyncio.gather(*both, return_exceptions=True)


def serve(target: str, connection: Connection) -> None:
    """Runs a `Delay` before a store."""
    asyncio.run(Delay(target).serve(connection))


@contextlib.contextmanager
def slow_store() -> Iterator[Callable[[float], None]]:
    """Runs an emulator for all clients of this process; yields a function that sets the seconds of a request.

    The relay is another process, so that it takes no time of the pipeline's threads.
    """
    context = multiprocessing.get_context("spawn")
    with emulator.running() as store:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(store, theirs), daemon=True)
        process.start()
        theirs.close()
        os.environ.update(emulator.environment(ours.recv()))
        try:
            yield ours.send
        finally:
            process.kill()
            process.join()


def loading(sources: dict[str, records.Source], count: int) -> dict[str, float]:
    """Median milliseconds to load an example in one thread; the sources take turns at each example."""
    taken = {name: [] for name in sources}
    for index in range(count):
        for name, source in sources.items():
            begin = time.perf_counter()
            source.load(index % len(source))
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(args: argparse.Namespace, address: str, delay: Callable[[float], None]) -> Iterator[dict[str, Any]]:
    """Results for each latency. delay: sets the seconds of a request."""
    config = importlib.import_module(f"configs.{args.dataset}").get_config("vit_l16")
    config.dataset.data_dir, config.dataset.cache = address, False
    for latency in args.latency:
        delay(latency / 1e3)
        sources = {}
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            for name, config.dataset.local_cache in ((COPY, folder), (BUCKET, "")):
                sources[name] = pipeline.open_source(config.dataset, tasks.from_config(config), args.split)
            opening = time.perf_counter() - begin
            yield {"latency_ms": latency, "seconds_to_copy": opening, "load_ms": loading(sources, args.examples)}


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["nyud", "pascal_context"])
    parser.add_argument("--data_dir", required=True, help="built data sets, on a disk or in a bucket")
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 20, 50], help="milliseconds added to a request")
    parser.add_argument("--split", default="train")
    parser.add_argument("--examples", type=int, default=100, help="examples to load")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the results")
    args = parser.parse_args()
    found = []
    print("| added latency, ms | s to copy | ms an example, copy | ms an example, bucket |\n|---|---|---|---|")
    try:
        with contextlib.ExitStack() as stack:
            address, delay = args.data_dir, lambda seconds: None
            if storage.is_bucket(address):
                args.latency = [0]
            else:
                delay = stack.enter_context(slow_store())
                address = f"gs://{emulator.BUCKET}/data"
                storage.copy_tree(pathlib.Path(args.data_dir) / args.dataset, storage.path(address) / args.dataset)
            for row in measure(args, address, delay):
                found.append(row)
                copy, bucket = (f"{row['load_ms'][name]:.1f}" for name in (COPY, BUCKET))
                print(f"| {row['latency_ms']:g} | {row['seconds_to_copy']:.1f} | {copy} | {bucket} |", flush=True)
    except (UserError, emulator.NotAvailable) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.output:
        report = {"dataset": args.dataset, **machine.described("array_record", "google-cloud-storage")}
        args.output.write_text(json.dumps({**report, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
