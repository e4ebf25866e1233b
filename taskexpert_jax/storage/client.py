"""The client of Google Cloud Storage: one for a process, bounded retries, and errors as `StoreError` in one line."""

from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import errno
import functools
import os
import time
from typing import Any, TypeVar

from absl import logging
from google.api_core import exceptions, retry
import google.auth.exceptions
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
import requests.exceptions
import urllib3.exceptions

from taskexpert_jax.errors import StoreError

# Or a thread of the client asks for the bucket's settings, for traces that nobody records.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")

Result = TypeVar("Result")

RETRY_SECONDS = 120.0  # for which a request that failed for a while is repeated, with backoff
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two parts of an answer
_SECONDS_TO_WARN = 4.0
_SECONDS_BETWEEN_WARNINGS = 10.0
_THREADS = 8
_PASSING = (408, 429, 500, 502, 503, 504)  # HTTP status of errors that pass
_NETWORK = (
    ConnectionError,
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
)
_LOG_IN = "log in (gcloud auth application-default login), or grant this account access to the bucket"


@functools.cache
def client() -> storage.Client:
    """The client of this process; without credentials an anonymous one, which reads public buckets."""
    try:
        return storage.Client(project=None)
    except google.auth.exceptions.DefaultCredentialsError:
        return storage.Client.create_anonymous_client()


def bucket(name: str) -> storage.Bucket:
    """A bucket by name, without a request."""
    return client().bucket(name)


def retrying(where: object, failed: Callable[[Exception], object] = lambda error: None) -> retry.Retry:
    """Repeats a request after errors that pass (429, 5xx, the network), with backoff, and a warning if that takes long.

    Args:
      where: the path, for the warning.
      failed: called for each error that passes; the store may have carried the request out nevertheless.
    """
    begin = time.monotonic()

    def warn(error: Exception) -> None:
        _release(error)
        failed(error)
        if time.monotonic() - begin > _SECONDS_TO_WARN:  # single errors are usual
            text = f"{where}: {reason(error)}; trying again for up to {RETRY_SECONDS:g} s"
            logging.log_every_n_seconds(logging.WARNING, "%s", _SECONDS_BETWEEN_WARNINGS, text)

    return retry.Retry(_passes, initial=0.5, maximum=8.0, multiplier=2.0, timeout=RETRY_SECONDS, on_error=warn)


def _release(error: BaseException) -> None:
    """Closes the answer that an error came from: the client leaves it unread, and its connection open."""
    response = getattr(error, "response", None)
    if isinstance(response, requests.Response):
        response.close()


def _passes(error: BaseException) -> bool:
    """True for an error after which the same request may succeed."""
    if isinstance(error, google.auth.exceptions.GoogleAuthError):  # from the server of tokens, or of metadata
        transport = google.auth.exceptions.TransportError
        return error.retryable or isinstance(error, transport) or isinstance(error.__cause__, transport)
    if isinstance(error, InvalidResponse):
        return error.response.status_code in _PASSING
    return isinstance(error, _NETWORK) or (isinstance(error, exceptions.GoogleAPICallError) and error.code in _PASSING)


def options(where: object, failed: Callable[[Exception], object] = lambda error: None) -> dict[str, Any]:
    """Retry (see `retrying`) and timeout of a request, for the client's methods."""
    return {"retry": retrying(where, failed), "timeout": TIMEOUT}


@contextlib.contextmanager
def errors(where: object, *, of_bucket: bool = False) -> Iterator[None]:
    """Turns errors of the client into OSError: FileNotFoundError for a missing object, StoreError for all others.

    where: the path, which becomes the error's `filename`.
    of_bucket: the request needs no object, as to write or to list, so what is missing is the bucket.
    """
    try:
        yield
    except exceptions.NotFound as error:
        _release(error)
        if of_bucket or "bucket does not exist" in str(error).lower():
            missing = "the bucket does not exist; create it, or check its name"
            raise StoreError(errno.ENOENT, missing, str(where)) from error
        raise FileNotFoundError(errno.ENOENT, "no such object", str(where)) from error
    except (
        exceptions.GoogleAPIError,
        google.auth.exceptions.GoogleAuthError,
        InvalidResponse,
        DataCorruption,
        *_NETWORK,
    ) as error:
        _release(error)
        code = errno.EACCES if _status(error) in (401, 403) else errno.EIO
        raise StoreError(code, reason(error), str(where)) from error


def _status(error: BaseException | None) -> int | None:
    """HTTP status of an answer that was an error."""
    if isinstance(error, exceptions.RetryError):
        return _status(error.cause)
    if isinstance(error, InvalidResponse):
        return error.response.status_code
    return error.code if isinstance(error, exceptions.GoogleAPICallError) else None


def reason(error: BaseException) -> str:
    """The reason why a request failed, as a clause of one line."""
    if isinstance(error, exceptions.RetryError) and error.cause is not None:
        return reason(error.cause)
    status = _status(error)
    if isinstance(error, DataCorruption):
        return "it was received with another checksum than it has in the store; start again, or check the network"
    if isinstance(error, google.auth.exceptions.GoogleAuthError):
        return f"no valid credentials ({_first_line(error)}); {_LOG_IN}"
    if status in (401, 403):
        return f"no permission (HTTP {status}); {_LOG_IN}"
    if status == 429:
        return "the store receives too many requests (HTTP 429)"
    if status in _PASSING:
        return f"the store is not available (HTTP {int(status)})"
    if status is not None:
        return f"the store answered HTTP {int(status)}: {_first_line(error)}"
    if isinstance(error, _NETWORK):
        return "the store cannot be reached; check the network"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:200]


def each(call: Callable[[Any], Result], items: Iterable[Any]) -> list[Result]:
    """Calls a function for each item, eight at a time; returns the results in order, or raises the first error."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(call, items))
