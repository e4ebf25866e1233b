"""Runs a reader of files on mutated files, in a process of its own, and reports what leaks out of it.

A leak is anything but a result or one line of `Reader.accepted`: another exception, a warning, a crash, more CPU time
than `MOST_SECONDS` or more memory than `Reader.most_bytes` for one file.

By default each reader gets `CASES` files, the same in every run. FUZZ_SECONDS=60 gives each reader 60 seconds instead,
and FUZZ_SEED=1 other files.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import resource
import signal
import time
from typing import Any
import warnings
import zlib

import numpy as np

from taskexpert_jax import command_line
from taskexpert_jax.errors import UserError
from tests.fuzz import mutate

CASES = 300  # per reader
WALL_SECONDS = 5.0  # per reader, on slow machines
MOST_SECONDS = 5  # of CPU time for one file
MOST_LENGTH = 1000  # characters of a message


@dataclasses.dataclass(frozen=True)
class Reader:
    """A function that reads a file, and files to mutate.

    Attributes:
      read: called with the path of a mutated file; a function of a module or a partial of one,
        because another process imports it.
      file: name of the mutated file.
      seeds: contents of good files.
      repair: applied to half of the mutated contents, such as `mutate.with_png_checksums`.
      accepted: exceptions that may be raised, with a message of one line.
      most_bytes: memory that reading one file may take.
    """

    read: Callable[[pathlib.Path], Any]
    file: str
    seeds: Sequence[bytes]
    repair: Callable[[bytes], bytes] | None = None
    accepted: tuple[type[Exception], ...] = (UserError,)
    most_bytes: int = 256 * 2**20


class _TooLongError(BaseException):
    """Raised by a signal in the middle of a reader; no Exception, so that readers do not catch it."""


def leaks(readers: Sequence[Reader], folder: pathlib.Path) -> list[str]:
    """Reads mutated files with each reader; returns one line for each leak: reader, what happened, file that shows it.

    folder: an empty folder; keeps the files that show leaks. The lines of one reader are limited to 20.
    """
    report, current = folder / "leaks.txt", folder / "current.txt"
    report.touch()
    # In a process of its own, because decoders in C crash or hang; spawned, because a fork of threads may hang.
    process = multiprocessing.get_context("spawn").Process(target=_read_all, args=(readers, folder), daemon=True)
    process.start()
    process.join(60 + len(readers) * (_seconds() + 2 * MOST_SECONDS))
    hung = process.is_alive()
    process.kill()
    process.join()
    lines = report.read_text().splitlines()
    if hung or process.exitcode:
        how = "hangs" if hung else f"ends the process with {process.exitcode}"
        at = current.read_text() if current.exists() else "the start, before any file"
        lines.append(f"{how}: {at}")
    return lines


def _seconds() -> float:
    return float(os.environ.get("FUZZ_SECONDS", WALL_SECONDS))


def _read_all(readers: Sequence[Reader], folder: pathlib.Path) -> None:
    """Runs every reader; appends leaks to leaks.txt, and keeps the path of the file being read in current.txt."""
    command_line.ignore_warnings()  # as every program does
    warnings.simplefilter("always", append=True)  # after these filters
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _stop)
    for number, reader in enumerate(readers):
        function = reader.read.func if isinstance(reader.read, functools.partial) else reader.read
        name = f"{function.__name__}({reader.file})"
        place = folder / str(number)
        place.mkdir()
        path = place / reader.file
        (folder / "current.txt").write_text(f"{name}: {path}")
        for content in reader.seeds:  # good files give a result; imports and caches then count in no limit below
            path.write_bytes(content)
            reader.read(path)
        seen = set()
        for case, content in enumerate(_contents(reader)):
            path.write_bytes(content)
            leak = leak_of(reader, path)
            if leak and leak not in seen and len(seen) < 20:
                seen.add(leak)
                kept = place / f"leak{case}{path.suffix}"
                kept.write_bytes(content)
                with (folder / "leaks.txt").open("a") as file:
                    file.write(f"{name}: {leak}: {kept}\n")


def _contents(reader: Reader) -> Iterator[bytes]:
    """Mutated contents, for as long as a reader is tried."""
    rng = np.random.default_rng([int(os.environ.get("FUZZ_SEED", "0")), zlib.crc32(reader.file.encode())])
    streams = [mutate.mutations(seed, rng) for seed in reader.seeds]
    end = time.monotonic() + _seconds()
    for case, stream in enumerate(itertools.cycle(streams)):
        if time.monotonic() > end or ("FUZZ_SECONDS" not in os.environ and case >= CASES):
            return
        content = next(stream)
        yield reader.repair(content) if reader.repair and rng.random() < 0.5 else content


def leak_of(reader: Reader, path: pathlib.Path) -> str | None:
    """The leak of the reader for one file, without line breaks; None if there is none."""
    before = _reset_peak()
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        with warnings.catch_warnings(record=True) as shown:
            reader.read(path)
        if shown:
            return f"{shown[0].category.__name__}, {str(shown[0].message)[:200]!r}"
    except reader.accepted as error:
        for message in getattr(error, "lines", (str(error),)):  # of `archives.Problems`, one for each fault
            if not message or "\n" in message or len(message) > MOST_LENGTH + len(str(path)):
                return f"a message of {len(message)} characters, {message[:200]!r}"
    except _TooLongError:
        return f"takes more than {MOST_SECONDS} s of CPU time"
    except BaseException as error:
        return f"{type(error).__name__}, {str(error)[:200]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    taken = _status("VmHWM") - before
    return f"takes {taken >> 20} MiB of memory" if taken > reader.most_bytes else None


def _stop(number: int, frame: Any) -> None:
    del number, frame
    raise _TooLongError


def _reset_peak() -> int:
    """Sets the process's peak of memory to what it holds now; returns that, in bytes."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
