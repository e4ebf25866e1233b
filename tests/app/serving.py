"""The page's server in a thread of the test's process, on a free port."""

from collections.abc import Callable, Iterator
import contextlib
import http.client
import json
import threading
import time
from typing import Any, NamedTuple

import pytest

uvicorn = pytest.importorskip("uvicorn")

from taskexpert_jax import serve  # noqa: E402
from taskexpert_jax.app import server  # noqa: E402

ABOUT: dict[str, Any] = {"name": "a run", "tasks": []}


class Answer(NamedTuple):
    """Response to a request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The line of an error."""
        (line,) = json.loads(self.body).values()
        return line


class Client:
    """Sends requests to a server on this machine, each over a connection of its own."""

    def __init__(self, port: int):
        self.port = port
        self.url = f"http://127.0.0.1:{port}/"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Sends a request; underscores in the names of headers are hyphens."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


@contextlib.contextmanager
def served(
    predict: Callable[[bytes], bytes],
    about: dict[str, Any] = ABOUT,
    *,
    megabytes: float = 1.0,
    hosts: frozenset[str] | None = server.LOOPBACK,
) -> Iterator[Client]:
    """Serves the page within its body."""
    with serve.listen("127.0.0.1", 0) as sock:
        app = server.build(predict, about, server.Limits(megabytes), hosts)
        running = uvicorn.Server(serve.configuration(app))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield Client(sock.getsockname()[1])
        finally:
            running.should_exit = True
            thread.join()
