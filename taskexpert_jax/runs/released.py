"""Released folders: a trained model for others, without optimiser state, verified by checksums; see docs/release.md.

model.safetensors   parameters and batch statistics that evaluation uses, float32, named `params/...`
config.json         the run's config
README.md           model card; free to edit, so that it has no checksum
SHA256SUMS          checksums of the first two
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np
import safetensors

from taskexpert_jax import files, json_file, storage
from taskexpert_jax.config import read_run
from taskexpert_jax.errors import StoreError, UserError, shown
from taskexpert_jax.runs import tree
from taskexpert_jax.runs.tree import Tree
from taskexpert_jax.runs.workdir import differences, listed

MODEL, CONFIG, CARD, SUMS = "model.safetensors", "config.json", "README.md", "SHA256SUMS"
VERIFIED = (MODEL, CONFIG)  # what a model is loaded from
NEEDED = (*VERIFIED, SUMS)
FORMAT = "taskexpert-jax"  # in the metadata of model.safetensors
FORMAT_VERSION = 1
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")  # as sha256sum writes them
_MOST_SUMS = 1 << 20  # bytes of SHA256SUMS
_MOST_HEADER = 100 << 20  # bytes of the header of a .safetensors file, a limit of the format
_AGAIN = "copy or download the folder again"


class Facts(NamedTuple):
    """Metadata of a released model: its training step, tasks, and the version of the program that wrote it."""

    step: int
    tasks: tuple[str, ...]
    version: str


def metadata(facts: Facts) -> dict[str, str]:
    """The metadata of model.safetensors, whose values are text."""
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "step": str(facts.step),
        "tasks": ",".join(facts.tasks),
        "taskexpert_jax": facts.version,
    }


def is_released(folder: pathlib.Path) -> bool:
    """True for a released folder, complete or not; false for a workdir, which has `checkpoints/`."""
    return not (folder / "checkpoints").is_dir() and any((folder / name).is_file() for name in (MODEL, SUMS))


def is_model(file: pathlib.Path) -> bool:
    """True if the metadata of a weight file say that it is the model of a released folder."""
    try:
        length = int.from_bytes(storage.beginning(file, 8), "little") if file.suffix == ".safetensors" else 0
        if not 0 < length <= _MOST_HEADER:
            return False
        header = json_file.parse(storage.beginning(file, 8 + length)[8:], {"__metadata__": dict})
    except StoreError:
        raise
    except (json_file.MalformedError, OSError):
        return False
    return header["__metadata__"].get("format") == FORMAT


def write(folder: pathlib.Path, variables: dict[str, Tree], config: ConfigDict, facts: Facts, card: str) -> None:
    """Writes a released folder, completely or not at all.

    Args:
      folder: must not exist, or be empty.
      variables: `params` and `batch_stats`, float32 arrays on this host.
      config: the run's config, without paths of this machine.
      facts: the metadata.
      card: text of README.md.

    Raises:
      UserError: it is not empty, or cannot be written.
    """
    named = {name: np.asarray(array) for name, array in tree.arrays(variables).items()}
    with files.new_folder(folder, last=SUMS) as partial, files.writing(folder):
        _save(partial / MODEL, named, metadata(facts))
        (partial / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n", "utf-8")
        (partial / CARD).write_text(card, "utf-8", "backslashreplace")
        (partial / SUMS).write_text("".join(f"{files.checksum(partial / name)}  {name}\n" for name in VERIFIED))


def _save(path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes float32 arrays as .safetensors: the same bytes each time, while the library shuffles the metadata."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # alignment of the arrays
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.astype("<f4", order="C").data)


def verify(folder: pathlib.Path, copy: pathlib.Path | None = None) -> None:
    """Compares the model and its config with their checksums.

    Args:
      folder: the released folder, which messages name.
      copy: a copy of it whose files are compared; default: the folder itself.

    Raises:
      UserError: a file is missing, cannot be read or differs; or SHA256SUMS is malformed.
    """
    path, copy = folder / SUMS, copy or folder
    try:
        with (copy / SUMS).open("rb") as file:
            content = file.read(_MOST_SUMS)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the released folder is incomplete; {_AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    lines = content.decode("utf-8", "replace").splitlines()
    found = [match for line in lines if (match := _SUM.fullmatch(line))]
    expected = {match[2]: match[1] for match in found}
    if len(found) != len(lines) or len(expected) != len(found):
        raise UserError(f"{path} is not a list of SHA-256 checksums, each file once; {_AGAIN}")
    for name in VERIFIED:
        if name not in expected:
            raise UserError(f"{path} has no checksum of {name}; {_AGAIN}")
        try:
            wrong = files.checksum(copy / name) != expected[name]
        except FileNotFoundError:
            raise UserError(f"{folder / name} is missing: the released folder is incomplete; {_AGAIN}") from None
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}") from error
        if wrong:
            raise UserError(f"{folder / name} is damaged or was changed: not the file of {SUMS}; {_AGAIN}")


@contextlib.contextmanager
def _opened(folder: pathlib.Path) -> Iterator[tuple[Any, Facts]]:
    """Yields the verified model.safetensors and its metadata."""
    path = folder / MODEL
    with storage.local_copy(folder, NEEDED) as copy:
        verify(folder, copy)
        try:
            with safetensors.safe_open(copy / MODEL, framework="numpy") as file:
                yield file, _facts(path, file.metadata() or {})
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _facts(path: pathlib.Path, found: dict[str, str]) -> Facts:
    if found.get("format") != FORMAT:
        raise UserError(
            f"{path} is no released model of this project (no format={FORMAT!r} in its metadata); "
            "weights of others are for config.model.pretrained"
        )
    version, step = (found.get(name, "") for name in ("format_version", "step"))
    if version != str(FORMAT_VERSION):
        newer = version.isdecimal() and int(version) > FORMAT_VERSION
        hint = "install a newer taskexpert-jax" if newer else _AGAIN
        raise UserError(f"{path} has format_version {shown(version)}, and this program reads {FORMAT_VERSION}; {hint}")
    if not (step.isascii() and step.isdecimal() and len(step) < 12):
        raise UserError(f"{path} has the step {shown(step)} in its metadata, which is no number; {_AGAIN}")
    return Facts(int(step), tuple(found.get("tasks", "").split(",")), found.get("taskexpert_jax", ""))


def facts(folder: pathlib.Path) -> Facts:
    """The metadata of a released model; raises UserError as `verify`, or if the model is not of this project."""
    with _opened(folder) as (_, found):
        return found


def restore_variables(
    folder: pathlib.Path, which: str, abstract: dict[str, Tree], config: ConfigDict, free: tuple[str, ...]
) -> tuple[dict[str, Tree], Facts]:
    """Restores parameters and batch statistics, and the facts of a released model.

    Args:
      folder: the released folder.
      which: "best", "latest" or its step.
      abstract: `params` and `batch_stats` with shardings; arrays are cast to its dtypes.
      config: the config that the model is loaded with.
      free: fields that may differ from config.json.

    Raises:
      UserError: a file is missing or damaged; an array is missing, superfluous or of another shape or dtype; or the
        config is another than the model's.
    """
    with _opened(folder) as (file, found):
        if which not in ("best", "latest", str(found.step)):
            raise UserError(
                f"--checkpoint={which}: {folder} is a released model of step {found.step} alone; leave out --checkpoint"
            )
        if lines := differences(read_run(folder), config, (*free, "num_steps")):
            raise UserError(f"{folder} is a released model with another config:{listed(lines)}")
        _check(folder / MODEL, file, abstract)

        def placed(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            value = file.get_tensor(name).astype(leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

        return _by_name(placed, abstract), found


def restore_parameters(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], Facts]:
    """Restores the parameters as host arrays by name, without the leading `params/`; raises UserError as `verify`."""
    with _opened(folder) as (file, found):
        names: list[str] = file.keys()
        own = [name for name in names if name.startswith("params/")]
        return {name.removeprefix("params/"): file.get_tensor(name) for name in own}, found


def described(folder: pathlib.Path) -> tuple[Facts, dict[str, tuple[tuple[int, ...], str]]]:
    """The metadata, and shape and dtype of every array by name; raises UserError as `facts`."""
    with _opened(folder) as (file, found):
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        return found, {name: (tuple(of.get_shape()), of.get_dtype()) for name, of in slices.items()}


def _check(path: pathlib.Path, file: Any, abstract: dict[str, Tree]) -> None:
    """Raises UserError if names, shapes or dtypes differ, so that nothing is restored partially."""
    saved = {}
    names: list[str] = file.keys()
    for name in names:
        of = file.get_slice(name)
        if of.get_dtype() != "F32":
            raise UserError(f"{path}: {shown(name)} has dtype {of.get_dtype()}; the arrays of a release are F32")
        saved[name] = jax.ShapeDtypeStruct(of.get_shape(), np.float32)
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), abstract)
    lines, count = tree.differences(saved, wanted)
    if lines:
        raise UserError(
            f"{path} does not fit the model of its config ({len(lines)} of {count} arrays differ); "
            f"{_AGAIN}:{tree.listed(lines)}"
        )


def _by_name(function: Callable[[str, Any], Any], of: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), of
    )


def results_folder(workdir: pathlib.Path, name: str, given: pathlib.Path | None) -> pathlib.Path:
    """Folder for results: the given one, else `name` in the workdir.

    Of a released model, and of a run in the hub's cache (in a folder `models--OWNER--NAME`), it is `name` in the
    current folder.
    """
    pulled = any(part.startswith("models--") for part in workdir.parts)
    return given or (pathlib.Path(name) if pulled or is_released(workdir) else workdir / name)


def refuse_to_train(workdir: pathlib.Path) -> None:
    """Raises UserError if a run would start in a released folder."""
    if is_released(workdir):
        raise UserError(
            f"{workdir} is a released model, which is not trained further: give another --workdir; "
            f"--config.model.pretrained={workdir} starts from its backbone"
        )
