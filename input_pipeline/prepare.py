"""Verifies an archive and builds a data set: taskexpert prepare DATASET --archive=PATH --data_dir=DIR.

The archive is a tar file (.tar.gz or another compression) or the folder extracted from it; it is never modified. One
pass reads and checks every file of every example and writes the data set into a hidden folder in DIR, which is moved to
DIR/DATASET/VERSION when complete. Wrong input prints one line per fault and one line `error: ...`, exits with status 2
and leaves no partial data set.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import errno
import functools
import hashlib
import json
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from types import ModuleType, SimpleNamespace
from typing import Any

from absl import logging

from input_pipeline import archives, downloads, file_lock
from taskexpert_jax import command_line, files, paths, progress, storage, terminal
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.parallel import threads

SHOWN_FAULTS = 20


@contextlib.contextmanager
def _scratch_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Creates the empty folder `path` and removes it at the end; first removes what a killed process has left there."""
    try:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _build(module: ModuleType, root: pathlib.Path, listing: archives.Listing, target: pathlib.Path) -> str:
    """Reads and checks all examples and writes them into the existing folder `target`; returns their fingerprint.

    Raises:
      Problems: the faults of all examples; writing stops at the first one.
    """
    faults = [line for lines in listing.missing.values() for line in lines]
    readable = [
        (split, example_id)
        for split, ids in listing.ids.items()
        for example_id in ids
        if example_id not in listing.missing
    ]
    read = functools.partial(archives.read_with_digest, module.read_example, root)
    fingerprint = hashlib.sha256()
    builder = module.Builder(target, listing.ids)
    readings = threads.in_order(read, (example_id for _, example_id in readable))
    with contextlib.closing(readings), progress.Progress("", len(readable), "examples") as shown:
        for (split, example_id), reading in zip(readable, readings, strict=True):
            faults += reading.faults
            if reading.parts is not None and not faults:
                fingerprint.update(f"{split} {example_id} {reading.digest}\n".encode())
                builder.add(split, {**reading.parts, "id": example_id})
            shown.what = "faulty; checking the rest" if faults else f"building {split}"
            shown.add()
    if faults:
        raise archives.Problems(faults)
    builder.close()
    return fingerprint.hexdigest()


def _summarise(
    module: ModuleType, listing: archives.Listing, data_dir: pathlib.Path
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Statistics of each split of the data set built under `data_dir`, and the lines of a table of them."""
    from input_pipeline import summary  # imports TensorFlow, which --help and wrong arguments do not need

    figures, tasks = {}, ()
    for split in listing.ids:
        source = module.source(SimpleNamespace(data_dir=str(data_dir)), split)
        tasks = summary.tasks_of(source, getattr(module, "CLASSES", ()))
        of_split = summary.of_split(source, tasks, f"summarising {split}")
        figures[split] = {
            "examples": of_split.pop("examples"),
            "published": module.PUBLISHED_COUNTS[split],
            "left out": listing.left_out[split],
            **of_split,
        }
    return figures, summary.table(figures, tasks)


def _members(folder: pathlib.Path, module: ModuleType) -> pathlib.Path:
    """Folder of the archive's members: `folder`, or its sub-folder `module.FOLDER` if that exists."""
    return folder / module.FOLDER if (folder / module.FOLDER).is_dir() else folder


def prepare(dataset: str, archive: pathlib.Path, data_dir: pathlib.Path, *, allow_subset: bool = False) -> list[str]:
    """Verifies the archive and builds the data set; returns the lines of a summary.

    Args:
      dataset: a module of input_pipeline that has a `Builder`.
      archive: a tar file or the folder extracted from it; of a bucket, it is copied to the disk first.
      data_dir: folder of built data sets; of a bucket, the data set is built on the disk and uploaded.
      allow_subset: accepts other counts than the published ones, and omits ids without an image.

    Raises:
      Problems: the faults of the archive.
      UserError: an unknown data set; no archive, or not a tar file; a data set that exists or is being built.
    """
    from input_pipeline import records  # imports TensorFlow

    start = time.monotonic()
    module = records.dataset_module(dataset)
    _check_arguments(dataset, module, archive, data_dir)
    target = data_dir / module.Builder.folder()
    with _scratch(data_dir, target, dataset) as scratch:
        root = _members(_extracted(archive, scratch), module)
        listing = archives.list_examples(root, module, allow_subset=allow_subset)
        built = scratch / module.Builder.folder()
        built.mkdir(parents=True)
        fingerprint = _build(module, root, listing, built)
        figures, table = _summarise(module, listing, scratch)
        record = {
            "dataset": dataset,
            "version": str(module.Builder.VERSION),
            "fingerprint": fingerprint,
            "subset": any(of_split["examples"] != of_split["published"] for of_split in figures.values()),
            "splits": figures,
        }
        (built / records.PREPARED).write_text(json.dumps(record, indent=2) + "\n")
        size = sum(path.stat().st_size for path in built.iterdir())
        if storage.is_bucket(target):
            _upload(built, target, size, last=records.COMPLETE)
        else:
            target.parent.mkdir(exist_ok=True)
            built.rename(target)
    lines = [*table, "", f"fingerprint {fingerprint}"]
    return [*lines, f"built {target}: {size / 2**20:.0f} MiB in {time.monotonic() - start:.0f} s"]


def _check_arguments(dataset: str, module: ModuleType, archive: pathlib.Path, data_dir: pathlib.Path) -> None:
    if not hasattr(module, "Builder"):
        raise UserError(f"data set {dataset!r} is not built from an archive: nothing to prepare")
    if not archive.exists():
        raise UserError(f"--archive={archive} does not exist; give {module.GIVEN}")
    if data_dir.resolve().is_relative_to(_members(archive, module).resolve()):
        raise UserError(
            f"--data_dir={data_dir} lies inside of the archive folder, which is not modified; choose another folder"
        )


@contextlib.contextmanager
def _scratch(data_dir: pathlib.Path, target: pathlib.Path, dataset: str) -> Iterator[pathlib.Path]:
    """An empty folder to build `target` in, hidden in `data_dir`; for a bucket, in TMPDIR.

    Raises:
      UserError: `target` exists or is being built on this disk, or the bucket cannot be written to.
    """
    from input_pipeline import records

    if storage.is_bucket(data_dir):
        files.folder_for_results(data_dir, "--data_dir")  # before the work and not after it
        if (target / records.COMPLETE).is_file():
            raise UserError(f"{target} exists already; remove it to build it again: gcloud storage rm -r {target}")
        with tempfile.TemporaryDirectory(prefix="taskexpert_") as folder:
            yield pathlib.Path(folder)
        return
    data_dir.mkdir(parents=True, exist_ok=True)
    refusal = f"{target} is being built by another process; wait until it has finished"
    with (
        file_lock.held(data_dir / f".{dataset}-lock", refusal=refusal),
        _scratch_folder(data_dir / f".{dataset}-incomplete") as scratch,
    ):
        if target.exists():
            raise UserError(f"{target} exists already; delete it to build it again")
        yield scratch


def _extracted(archive: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """The archive as a local folder: its own, or one in `scratch`."""
    if storage.is_bucket(archive):
        local = scratch / "download" / archive.name
        local.parent.mkdir()
        downloads.fetch(archive, local, scratch, "free space, or set TMPDIR for a --data_dir in a bucket")
        archive = local
    if archive.is_dir():
        return archive
    root = scratch / "archive"
    root.mkdir()
    archives.extract(archive, root)
    return root


def _upload(built: pathlib.Path, target: pathlib.Path, size: int, *, last: str) -> None:
    """Sends the files of a data set that the bucket does not have; `last` goes last and makes the data set complete."""
    logging.info(f"uploading {size >> 20} MiB to {target}")
    try:
        storage.copy_tree(built, target, last=last, replace=False)
    except StoreError as error:
        then = "" if error.errno == errno.EEXIST else "; the same command builds it again and sends what is missing"
        raise UserError(f"{error}; {target} is incomplete{then}") from error


def _run(args: argparse.Namespace) -> None:
    """Prepares the data set and prints the summary or the faults; raises UserError if it was not built."""
    try:
        print("\n".join(prepare(args.dataset, args.archive, args.data_dir, allow_subset=args.allow_subset)))
    except archives.Problems as problems:
        count = len(problems.lines)
        for line in problems.lines[:SHOWN_FAULTS]:
            print(terminal.message(line), file=sys.stderr)
        if count > SHOWN_FAULTS:
            print(f"... and {count - SHOWN_FAULTS} more", file=sys.stderr)
        faults = "faults" if count > 1 else "fault"
        raise UserError(f"{args.archive}: {count} {faults}, see above; nothing was built") from problems
    except OSError as error:
        larger = "; set TMPDIR to a folder on a larger disk" * (
            error.errno == errno.ENOSPC and storage.is_bucket(args.data_dir)
        )
        raise UserError(f"{error.filename or args.data_dir}: {error.strerror}; nothing was built{larger}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    signal.signal(signal.SIGTERM, _stop)
    parser = command_line.Parser("input_pipeline.prepare", __doc__)
    parser.add_argument("dataset", help="a data set, such as nyud")
    parser.add_argument(
        "--archive", type=paths.argument, required=True, help="the tar file or the folder extracted from it"
    )
    parser.add_argument("--data_dir", type=paths.argument, required=True, help="folder of built data sets")
    parser.add_argument(
        "--allow-subset",
        action="store_true",
        help="accept other counts than the published ones, and omit ids without an image",
    )
    parser.add_argument("--verbosity", type=int, help="-1 shows no progress")
    args = parser.parse_args(arguments)
    command_line.configure_logging(args.verbosity)
    return command_line.ended(lambda: _run(args), "interrupted; no data set was built: the same command starts anew")


def _stop(number: int, frame: Any) -> None:
    """Exits by an exception, so that the scratch folder is removed."""
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
