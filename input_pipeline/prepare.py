"""Builds a data set from its public archive: python -m input_pipeline.prepare DATASET --archive=PATH --data_dir=DIR.

The archive is a tar file (.tar.gz or another compression) or the folder extracted from it; it is only read. The data
set is built in a temporary folder inside of DIR, which also takes the extracted archive, and moved to
DIR/DATASET/VERSION when it is complete. Wrong input ends with one line `error: ...` and status 2, and leaves nothing
half-built behind.
"""

import argparse
from collections.abc import Sequence
import contextlib
import io
import lzma
import pathlib
import signal
import sys
import tarfile
import tempfile
import time
from types import ModuleType
import zlib

import tensorflow_datasets as tfds
import tqdm

from input_pipeline.records import dataset_module
from taskexpert_jax.errors import UserError


def extract(archive: pathlib.Path, target: pathlib.Path) -> None:
    """Extracts the tar file `archive` into the existing folder `target`, in one pass over the archive.

    Raises:
      UserError: not a tar file; a truncated or damaged one; one with a member that would land outside of `target`.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm.tqdm(tar, desc="extracting", unit=" files", mininterval=1.0):
                tar.extract(member, target, filter="data")
            while tar.fileobj is not None and tar.fileobj.read(2**20):
                pass  # the checksum of a compressed file stands at its end, after the last member
    except tarfile.FilterError as error:
        raise UserError(f"refused, as a member is unsafe to extract: {error}") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's trouble, not the archive's
        raise UserError("it is not a tar file, or it is truncated or corrupt; get the archive again") from error


def _members(folder: pathlib.Path, module: ModuleType) -> pathlib.Path:
    """The folder of the archive's members: `folder`, or the archive's own folder in it."""
    return folder / module.FOLDER if (folder / module.FOLDER).is_dir() else folder


def _build(module: ModuleType, archive: pathlib.Path, scratch: pathlib.Path) -> tuple[pathlib.Path, dict[str, int]]:
    """Verifies the archive and builds inside of `scratch`; returns what was built and its examples by split.

    Raises:
      UserError: the archive is faulty.
    """
    root = archive
    if not archive.is_dir():
        root = scratch / "archive"
        root.mkdir()
        extract(archive, root)
    root = _members(root, module)
    counts = module.verify(root)
    builder = module.Builder(data_dir=str(scratch / "built"), file_format="array_record")
    settings = tfds.download.DownloadConfig(manual_dir=str(root))
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of its download and of the temporary folder
        builder.download_and_prepare(download_dir=str(scratch / "downloads"), download_config=settings)
    return pathlib.Path(builder.data_dir), counts


def prepare(dataset: str, archive: pathlib.Path, data_dir: pathlib.Path) -> list[str]:
    """Verifies the archive and builds the data set; returns the lines of a summary.

    Raises:
      UserError: an unknown data set; an archive that is missing or faulty; a data set that is there already.
    """
    start = time.monotonic()
    module = dataset_module(dataset)
    if not hasattr(module, "Builder"):
        raise UserError(f"data set {dataset!r} is not built from an archive: nothing to prepare")
    if not archive.exists():
        raise UserError(
            f"--archive={archive} does not exist; give {module.FOLDER}.tar.gz or the folder extracted from it"
        )
    if data_dir.resolve().is_relative_to(_members(archive, module).resolve()):
        raise UserError(
            f"--data_dir={data_dir} lies inside of the archive folder, which is only read; choose another one"
        )
    target = data_dir / module.Builder.name / str(module.Builder.VERSION)
    if target.exists():
        raise UserError(f"{target} is there already; delete it to build it again")
    data_dir.mkdir(parents=True, exist_ok=True)
    tfds.disable_progress_bar()  # the data sets show their own
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{dataset}-incomplete-") as scratch:
        try:
            built, counts = _build(module, archive, pathlib.Path(scratch))
        except UserError as error:
            raise UserError(f"{archive}: {error}") from error
        target.parent.mkdir(exist_ok=True)
        built.rename(target)
    size = sum(path.stat().st_size for path in target.iterdir())
    return [
        *(
            f"{split}: {count} examples (published: {module.PUBLISHED_COUNTS[split]})"
            for split, count in counts.items()
        ),
        f"built {target}: {size / 2**20:.0f} MiB in {time.monotonic() - start:.0f} s",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser("python -m input_pipeline.prepare", description="Verifies and builds a data set.")
    parser.add_argument("dataset", help="a data set, such as nyud")
    parser.add_argument(
        "--archive", type=pathlib.Path, required=True, help="the tar file or the folder extracted from it"
    )
    parser.add_argument("--data_dir", type=pathlib.Path, required=True, help="where built data sets are kept")
    args = parser.parse_args(arguments)
    try:
        summary = prepare(args.dataset, args.archive.expanduser(), args.data_dir.expanduser())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(summary))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the temporary folder is removed
    sys.exit(main())
