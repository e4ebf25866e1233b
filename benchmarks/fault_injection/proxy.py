"""A proxy before an object store over HTTP, which can fail in the ways that a store does."""

from collections import Counter
from collections.abc import Iterator
import contextlib
import http.client
import http.server
import random
import re
import threading
import time
import urllib.parse

_REASONS = {403: "forbidden", 429: "rateLimitExceeded", 503: "backendError"}
# Of one connection, not of the message (RFC 9110, 7.6.1); Expect is answered here.
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "upgrade", "te", "trailer"}


class Proxy:
    """Passes requests on to a store and, while it is told to, fails them. All methods may be called at any time.

    Attributes:
      address: where it listens, such as http://127.0.0.1:4443.
      target: address of the store.
      counts: number of answers by status; 0 counts connections that were closed without one.
    """

    def __init__(self, target: str = ""):
        self.target = target
        self.counts: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._down_until = 0.0
        self._down_at: tuple[re.Pattern[str], float] | None = None
        self._refusal = 0
        self._one_in = 0
        self._next: tuple[int, bool] | None = None
        self._random = random.Random(0)
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def refuse(self, status: int) -> None:
        """Answers all requests with a status such as 403, 429 or 503; 0 ends this."""
        self._refusal = status

    def fail_one_in(self, number: int, seed: int = 0) -> None:
        """Answers 503 to a random one in `number` requests; 0 ends this.

        Half of these requests have reached the store before: only the answer was lost.
        """
        with self._lock:
            self._random, self._one_in = random.Random(seed), number

    def fail_next(self, *, reaches: bool) -> None:
        """Answers 503 to the next request, which the store carries out nevertheless if it `reaches` it."""
        with self._lock:
            self._next = (503, reaches)

    def be_down(self, seconds: float, at: str = "") -> None:
        """Closes connections without an answer for a time; 0 ends this.

        Args:
          seconds: how long.
          at: waits for a request that writes an object whose name matches this pattern; from now on if empty.
        """
        with self._lock:
            self._down_at = (re.compile(at), seconds) if at else None
            self._down_until = 0.0 if at else time.monotonic() + seconds

    @property
    def is_down(self) -> bool:
        """True while connections are closed without an answer."""
        return time.monotonic() < self._down_until

    def see(self, path: str, body: bytes) -> None:
        """Looks at a request that writes, before it is answered."""
        if (waiting := self._down_at) is None:
            return
        start = body[:1000].decode("latin-1") if "uploadType=" in path else ""  # may have the object's name
        if waiting[0].search(urllib.parse.unquote(f"{path} {start}")):
            self.be_down(waiting[1])

    def fault(self) -> tuple[int, bool]:
        """Status that the next request gets instead of the store's, or 0, and whether it reaches the store."""
        if self._refusal:
            return self._refusal, False
        with self._lock:
            if self._next:
                fault, self._next = self._next, None
                return fault
            if self._one_in and self._random.randrange(self._one_in) == 0:
                return 503, self._random.random() < 0.5
        return 0, True

    def count(self, status: int) -> None:
        """Counts an answer."""
        with self._lock:
            self.counts[status] += 1

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def running(target: str = "") -> Iterator[Proxy]:
    """A proxy, which is closed at the end. `target` may be set later: a store may need the proxy's address to start."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """Prints nothing: clients that are killed leave broken connections."""


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a client, and one to the store that belongs to it."""

    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # header and body leave together
    _store: http.client.HTTPConnection | None = None

    def log_message(self, *_) -> None:
        """Prints nothing."""

    def finish(self) -> None:
        """Closes both connections."""
        if self._store is not None:
            self._store.close()
        super().finish()

    def do_GET(self) -> None:
        """Answers a request of any method."""
        body = self._body()
        if self.command != "GET":
            self.proxy.see(self.path, body)
        if self.proxy.is_down:
            return self._hang_up()
        status, reaches = self.proxy.fault()
        if reaches:
            try:
                answer = self._ask(body)
            except (OSError, http.client.HTTPException):
                return self._hang_up()
            if not status:
                return self._answer(*answer)
        content = f'{{"error": {{"code": {status}, "message": "{_REASONS.get(status, "failed")}"}}}}'.encode()
        return self._answer(status, [("Content-Type", "application/json")], content)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and content of the store's answer."""
        if self._store is None:
            self._store = http.client.HTTPConnection(self.proxy.target.removeprefix("http://"), timeout=60)
        self._store.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self._store.putheader(name, value)
        if body or self.command in ("POST", "PUT", "PATCH"):
            self._store.putheader("Content-Length", str(len(body)))
        self._store.endheaders(body)
        answer = self._store.getresponse()
        return answer.status, answer.getheaders(), answer.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        if self.proxy.is_down:  # it went down meanwhile
            return self._hang_up()
        self.proxy.count(status)
        self.send_response_only(status)
        lengths = [value for name, value in headers if name.lower() == "content-length"]  # HEAD has no content
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", lengths[0] if self.command == "HEAD" and lengths else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return None

    def _hang_up(self) -> None:
        self.proxy.count(0)
        self.close_connection = True
