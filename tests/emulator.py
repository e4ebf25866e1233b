"""The emulator of Google Cloud Storage in tests: one of a process, started by the first test that uses a bucket.

Its address stands in the environment until the process ends, because TensorStore reads it once; programs that a test
starts inherit it.
"""

from collections.abc import Iterator
import contextlib
import os

import pytest

from benchmarks.fault_injection import emulator, proxy


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Runs the emulator, sets the environment of all clients and yields the address of an empty bucket, gs://NAME.

    Skips the test where the wheel or the extra is not installed, or the wheel does not run.
    """
    pytest.importorskip("google.cloud.storage", reason='buckets need: pip install "taskexpert-jax[gcs]"')
    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(emulator.running())
        except emulator.NotAvailable as error:
            pytest.skip(str(error))
        os.environ.update(emulator.environment(address))
        yield f"gs://{emulator.BUCKET}"


@contextlib.contextmanager
def failing(monkeypatch) -> Iterator[proxy.Proxy]:
    """A proxy before the emulator that runs already, for this process's client of google-cloud-storage alone."""
    from google.auth import credentials
    from google.cloud import storage

    from taskexpert_jax.storage import client

    with proxy.running(os.environ["STORAGE_EMULATOR_HOST"]) as between:
        options = {"api_endpoint": between.address}
        through = storage.Client("test-project", credentials.AnonymousCredentials(), client_options=options)
        monkeypatch.setattr(client, "client", lambda: through)
        yield between
        through.close()
