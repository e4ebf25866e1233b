"""Installation: the folder of `configs` and `input_pipeline`, bundled config files, version and commit.

A checkout has `configs/` and `input_pipeline/` beside the package. A wheel has them in `taskexpert_jax/bundled/`: these
names are so common that in site-packages they would overwrite, or be overwritten by, those of other projects.
"""

import functools
import importlib
import os
import pathlib
import subprocess
import sys

from taskexpert_jax.errors import UserError
from taskexpert_jax.version import __version__

PACKAGE = pathlib.Path(__file__).resolve().parent
_FOLDERS = ("configs", "input_pipeline")
_BUNDLED = PACKAGE / "bundled"  # of a wheel: made by setup.py
_COMMIT_FILE = "COMMIT"  # in it: the commit that the wheel was built from, if known


def root() -> pathlib.Path:
    """The folder that has `configs/` and `input_pipeline/`."""
    return _BUNDLED if _BUNDLED.is_dir() else PACKAGE.parent


def enable() -> None:
    """Makes `configs` and `input_pipeline` importable, before other packages of the same names; for programs only.

    Modules in folders of these names in the working directory are added: `configs/rooms.py` there is `configs.rooms`.
    """
    if sys.path[:1] != [folder := str(root())]:
        sys.path.insert(0, folder)
    for name in _FOLDERS:
        if os.path.isdir(name) and not os.path.samefile(name, root() / name):
            path = importlib.import_module(name).__path__
            if (own := os.path.abspath(name)) not in path:
                path.append(own)


def config_file(text: str) -> str:
    """The value of --config with the file's path for a short name: `nyud:vit_l16` is `configs/nyud.py:vit_l16`.

    That is a file of the working directory or, if it has none, the bundled one. Other paths are returned unchanged.

    Raises:
      UserError: an address; a name without `/` and `.py` that is neither a file nor such a config (the line lists the
        bundled ones).
    """
    if "://" in text:
        raise UserError(f"--config={text}: a config is a Python file that runs here: copy it, and give its local path")
    name, colon, variant = text.partition(":")
    path = pathlib.Path(name)
    if not name or path.is_file():
        return text
    folder = root() / "configs"
    short = path.suffix != ".py" and path.name == name
    if short:
        path = pathlib.Path("configs", f"{name}.py")
    if path.parts == ("configs", path.name) and path.stem != "__init__":
        for found in (path, folder / path.name):
            if found.is_file():
                return f"{found}{colon}{variant}"
    if short:
        names = ", ".join(sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__"))
        raise UserError(f"--config={text}: neither a file nor one of the bundled configs {names}")
    return text


def demo_model() -> pathlib.Path:
    """The released folder of the bundled model, `--model=demo`.

    Raises:
      UserError: this installation has none.
    """
    folder = PACKAGE / "demo_model"
    if not folder.is_dir():
        raise UserError(f"the bundled model is missing: {folder}; `make demo` trains one")
    return folder


@functools.cache
def commit() -> str | None:
    """The abbreviated commit of the code, with `-dirty` if tracked files differ from it; None where it is not known."""
    if _BUNDLED.is_dir():
        file = _BUNDLED / _COMMIT_FILE
        return file.read_text().strip() if file.is_file() else None
    if not (root() / ".git").exists():  # git would look further up, and find another project's
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    try:
        done = subprocess.run(command, cwd=root(), capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def version_text() -> str:
    """Version and commit, such as `0.1.0 (abc1234)`; without the commit where it is not known."""
    return f"{__version__} ({of})" if (of := commit()) else __version__
