"""Trained models by name or address; the Hugging Face hub, from which they are pulled and to which they are pushed.

Needs the package huggingface_hub, which knows the login (`hf auth login` or HF_TOKEN), the cache (HF_HOME) and the
server (HF_ENDPOINT). Every error is one line with the address.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import pathlib
import sys
from typing import Any

from absl import logging

from taskexpert_jax import installation, paths
from taskexpert_jax.errors import UserError, disk_refusal
from taskexpert_jax.paths import Address
from taskexpert_jax.runs import released
from taskexpert_jax.version import __version__

# Files of a repository with weights for a backbone: this project's, or those of timm and Hugging Face models.
_WEIGHTS = ("model.safetensors", "config.json", "preprocessor_config.json", released.SUMS)
_OTHER_WEIGHTS = ("pytorch_model.bin", *_WEIGHTS[1:])
WEIGHT_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")  # of files that `pretrained.files` reads
_OF_A_NEW_REPOSITORY = {".gitattributes", "README.md"}  # the hub's own files
_LOG_IN = "log in (hf auth login), or set HF_TOKEN"


def located(path: str | pathlib.Path, name: str = "--workdir") -> pathlib.Path:
    """The folder of a trained model that a user names: a path, an hf:// address, or `demo` for the bundled model.

    A released model or a run's directory on the hub is pulled to the hub's cache. A folder `demo` in the current one is
    that folder.

    Args:
      path: the path, address or name.
      name: the flag or argument that gave it, for the message.

    Raises:
      UserError: an unsupported address; a model that cannot be pulled, is not complete or is damaged.
    """
    if paths.is_hub(path):
        return _model(paths.address(path, name))
    found = paths.local(str(path), name)
    return installation.demo_model() if str(found) == "demo" and not found.exists() else found


@functools.cache  # a program needs it several times
def _model(address: Address) -> pathlib.Path:
    folder = _pulled(address, released.NEEDED)
    if (folder / released.MODEL).is_file() and (folder / released.SUMS).is_file():
        try:
            released.verify(folder)
        except UserError as error:
            raise UserError(f"{address}: {error}") from error
    elif not _pull_run(address, folder):
        raise UserError(
            f"{address} has no {released.MODEL} with {released.SUMS}: it is no model that `taskexpert release` wrote, "
            "and no run's directory"
        )
    logging.info(f"{address}: {folder}")
    return folder


def _pull_run(address: Address, folder: pathlib.Path) -> bool:
    """Adds a run's checkpoints, without the optimiser state, to its config in the cache; False if it is no run."""
    if not (folder / released.CONFIG).is_file() or (folder / released.SUMS).is_file():
        return False
    _pulled(address, ["checkpoints/*"], left_out=["checkpoints/*/train/*"])  # loading verifies them by their seals
    return (folder / "checkpoints").is_dir()


def weights(path: str, name: str) -> pathlib.Path:
    """Weights of an hf:// address in the hub's cache: the folder of a model's, or a file; raises as `located`."""
    address = paths.address(path, name)
    if address.subfolder.endswith(WEIGHT_SUFFIXES):
        inner, _, file = address.subfolder.rpartition("/")
        found = _pulled(address._replace(subfolder=inner), (file, *_WEIGHTS[1:])) / file
        if not found.is_file():
            raise UserError(f"{name}={address}: the repository has no such file")
        return found
    folder = _pulled(address, _WEIGHTS)
    if not (folder / _WEIGHTS[0]).is_file():
        folder = _pulled(address, _OTHER_WEIGHTS)
    there = any((folder / names[0]).is_file() for names in (_WEIGHTS, _OTHER_WEIGHTS))
    if not there and not _pull_run(address, folder):
        raise UserError(
            f"{name}={address} has neither {_WEIGHTS[0]} nor {_OTHER_WEIGHTS[0]}, and is no run's directory"
        )
    return folder


def _pulled(address: Address, names: Sequence[str], *, left_out: Sequence[str] = ()) -> pathlib.Path:
    """The folder of the cache with those files of the repository that it has; without a network, of the last pull.

    names: of the files, or patterns in which `*` also stands for slashes.
    left_out: patterns of names that are not pulled.
    """
    inner = f"{address.subfolder}/" if address.subfolder else ""
    with _asked(address) as hub:
        found = hub.snapshot_download(
            address.repository,
            revision=address.revision or None,
            allow_patterns=[f"{inner}{name}" for name in names],
            ignore_patterns=[f"{inner}{name}" for name in left_out],
        )
    return pathlib.Path(found) / address.subfolder


def push(folder: pathlib.Path, address: Address, *, public: bool, message: str) -> str:
    """Uploads a released folder in one commit, and returns its web page.

    A repository that does not exist is created. In one that does, an earlier release is replaced, which its history
    keeps; its visibility stays.

    Args:
      folder: the released folder.
      address: the repository; its revision is a branch that exists.
      public: visibility of a new repository.
      message: message of the commit.

    Raises:
      UserError: no permission, no network, or other files at this address. The repository may have been created.
    """
    with _asked(address) as hub:
        api = hub.HfApi(library_name="taskexpert-jax", library_version=__version__)
        try:
            names = api.list_repo_files(address.repository, revision=address.revision or None)
        except hub.errors.RepositoryNotFoundError as error:
            if isinstance(error, hub.errors.GatedRepoError):
                raise
            names = []
            api.create_repo(address.repository, private=not public, exist_ok=True)
        _refuse_others(address, names)
        done = api.upload_folder(
            repo_id=address.repository,
            folder_path=folder,
            path_in_repo=address.subfolder or None,
            revision=address.revision or None,
            commit_message=message,
        )
    return str(done.commit_url)


def _refuse_others(address: Address, names: Sequence[str]) -> None:
    inner = f"{address.subfolder}/" if address.subfolder else ""
    there = {name.removeprefix(inner) for name in names if name.startswith(inner)}
    if not inner:
        there -= _OF_A_NEW_REPOSITORY
    if there and not {released.MODEL, released.SUMS} <= there:
        raise UserError(
            f"{address} has other files ({sorted(there)[0]}) and no release to replace: give another repository or a "
            "subfolder"
        )


@contextlib.contextmanager
def _asked(address: Address) -> Iterator[Any]:
    """Yields the package huggingface_hub; its errors, and those of the network below it, become one line."""
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors
        import huggingface_hub.utils as utils
    except ImportError:
        raise UserError(f'{address} needs the package huggingface_hub: pip install "taskexpert-jax[hub]"') from None
    quiet = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    if quiet:
        utils.disable_progress_bars()
    try:
        yield hub
    except UserError:
        raise
    except Exception as error:  # the hub's, of its network library, and of the disk
        raise UserError(f"{address}: {_reason(address, hub.errors, error)}") from error
    finally:
        if quiet:
            utils.enable_progress_bars()


def _reason(address: Address, errors: Any, error: Exception) -> str:
    responses = (
        getattr(each, "response", None) for each in (error, error.__cause__)
    )  # a pull wraps the server's error
    status = next((found.status_code for found in responses if found is not None), None)
    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted: ask for it on the page of {address.repository}, and {_LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one: check the name; for a private one {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {address.revision or 'main'!r}: give a branch, a tag or a commit of {address.repository}"
    if status in (401, 403):
        return f"not allowed (HTTP {status}): {_LOG_IN}, with a token that may do this"
    if status is not None:
        return f"the server answered HTTP {status}: {_first_line(error)}"
    if reason := disk_refusal(error):
        return f"the download cannot be written: {reason}; free space, or set HF_HOME to another folder"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) or _of_network(error):
        return "the server cannot be reached, and the model is not complete in the cache; check the network"
    return f"{type(error).__name__}: {_first_line(error)}"


def _of_network(error: BaseException | None) -> bool:
    """True for errors of the network library, whose name changes with the version of huggingface_hub."""
    return error is not None and (
        type(error).__module__.startswith(("httpx", "requests", "urllib3")) or isinstance(error, ConnectionError)
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:200]
