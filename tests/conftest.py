"""Shared set-up of all tests: simulated devices, compilation cache, folders of reference material.

The environment is set here, at import, because JAX and TensorFlow read it once, when they are first imported; pytest
imports this file before any test module. Programs that a test starts inherit it.
"""

from collections.abc import Iterator
import os
import pathlib
import uuid

import jaxtyping
import pytest

from tests import xla

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # reference values and real pictures: beside the project, never in it

if xla.DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(8)}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # or TensorFlow prints a line about it, at any log level

# A second run of the tests compiles nothing. By default JAX keeps only what took longer than a second to compile; most
# programs of the tests take less, and there are hundreds of them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the tests' time is compilation, and each program runs a few times: LLVM optimises little. With `xla.FAST` that
# saves half of it. XLA's own passes, which decide on fusion, layouts and collectives, all run. `make demo-smoke`
# runs what users run; JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test tests that.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Shapes and dtypes in the annotations of the model are checked whenever a test traces it.
jaxtyping.install_import_hook(["taskexpert_jax.models", "taskexpert_jax.evaluation.inference"], "beartype.beartype")


def _folder(name: str) -> pathlib.Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"no reference material at {path}")
    return path


@pytest.fixture(autouse=True)
def log():
    """Progress and warnings go to stderr, as in the programs; programs that tests call may have changed that."""
    from taskexpert_jax import command_line

    command_line.configure_logging()


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Folder of expected values (losses, metrics, decoded labels); the test is skipped where it is absent."""
    return _folder("golden")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Folder of real pictures and labels; the test is skipped where it is absent."""
    return _folder("data")


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    """Address of a bucket of the emulator, shared by the tests of this process; skips where there is no emulator."""
    from tests import emulator

    with emulator.running() as address:
        yield address


@pytest.fixture
def bucket(store) -> str:
    """A fresh gs:// address of the emulator, nothing below it; the test is skipped where there is no emulator."""
    return f"{store}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def session_bucket(store) -> str:
    """A gs:// address as `bucket`, the same for all tests of this process."""
    return f"{store}/session"


@pytest.fixture
def failing_store(store, monkeypatch):
    """A proxy (benchmarks/fault_injection/proxy.py) that fails requests of this process to the emulator when told to.

    TensorStore and programs that the test starts reach the emulator directly.
    """
    from tests import emulator

    with emulator.failing(monkeypatch) as between:
        yield between
