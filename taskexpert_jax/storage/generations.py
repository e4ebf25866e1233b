"""Conditional writes: an object is written only if it has the generation that the writer has seen."""

import secrets
from typing import NamedTuple

from google.api_core import exceptions
from google.cloud import storage

from taskexpert_jax.storage import client
from taskexpert_jax.storage.bucket import BucketPath

MISSING = 0  # the generation of an object that does not exist


class Version(NamedTuple):
    """Content of an object, its generation, and the time of its write in seconds since 1970 by the store's clock."""

    content: bytes
    generation: int
    updated: float


class Changed(Exception):
    """The object has another generation than expected; `current`: what it is now, None if it does not exist."""

    def __init__(self, current: Version | None):
        super().__init__(current)
        self.current = current


def read(path: BucketPath) -> Version | None:
    """The object as it is; None if it does not exist.

    Raises:
      StoreError: it cannot be read.
    """
    with client.errors(path):
        while (blob := path.bucket.get_blob(path.key, **client.options(path))) is not None:
            version = _version(b"", blob)
            try:
                content = blob.download_as_bytes(if_generation_match=version.generation, **client.options(path))
            except (exceptions.NotFound, exceptions.PreconditionFailed):  # written or deleted in between
                continue
            return version._replace(content=content)
    return None


def write(path: BucketPath, content: bytes, generation: int, *, seconds: float = client.RETRY_SECONDS) -> Version:
    """Writes the object if it has this generation.

    Args:
      path: the object.
      content: unlike that of any other write: it tells whether a request whose answer was lost has written it.
      generation: as read or written; MISSING for an object that does not exist.
      seconds: for which a request that failed for a while is repeated.

    Raises:
      Changed: it has another one. Nothing is written.
      StoreError: it is not known to be written, and may be.
    """
    blob = path.blob
    options = {**client.options(path), "retry": client.retrying(path).with_timeout(seconds)}
    with client.errors(path, of_bucket=True):
        try:
            blob.upload_from_string(content, "application/octet-stream", if_generation_match=generation, **options)
        except exceptions.PreconditionFailed:
            current = read(path)
            if current is None or current.content != content:
                raise Changed(current) from None
            return current
    return _version(content, blob)


def now(folder: BucketPath) -> float:
    """The store's clock, in seconds since 1970: the time of an object that is written for this and removed again.

    Raises:
      StoreError: it cannot be written.
    """
    token = secrets.token_hex(8)
    probe = folder / f".now_{token}"
    time = write(probe, token.encode(), MISSING).updated
    probe.unlink(missing_ok=True)
    return time


def _version(content: bytes, blob: storage.Blob) -> Version:
    assert blob.generation is not None and blob.updated is not None  # the answer to a read or a write has both
    return Version(content, int(blob.generation), blob.updated.timestamp())
