"""Paths in a bucket while the store fails: a lost answer, a refusal, a store that is down."""

import errno
from types import SimpleNamespace

from ml_collections import ConfigDict
import pytest

from input_pipeline import records
from taskexpert_jax import release, storage
from taskexpert_jax.errors import StoreError
from taskexpert_jax.runs import config, sealing, wandb_writer


@pytest.fixture
def folder(bucket, failing_store):
    return storage.path(bucket)


@pytest.mark.parametrize("reaches", [True, False])
def test_a_request_that_fails_once_is_repeated_whether_the_store_has_carried_it_out_or_not(
    folder, failing_store, reaches
):
    path = folder / "object"
    failing_store.fail_next(reaches=reaches)
    path.write_text("content")
    failing_store.fail_next(reaches=reaches)
    assert path.read_text() == "content"
    failing_store.fail_next(reaches=reaches)
    path.replace(folder / "moved")
    assert sorted(storage.listed(folder)) == ["moved"]
    failing_store.fail_next(reaches=reaches)
    (folder / "moved").unlink()
    assert storage.listed(folder) == {}
    assert failing_store.counts[503] == 4


def test_an_object_that_was_never_there_cannot_be_removed(folder):
    with pytest.raises(FileNotFoundError):
        (folder / "object").unlink()


def test_a_store_that_is_down_for_a_moment_is_waited_for(folder, failing_store):
    (folder / "object").write_bytes(b"before")
    failing_store.be_down(0.3)
    (folder / "object").write_bytes(b"after")
    assert failing_store.counts[0] >= 1
    assert (folder / "object").read_bytes() == b"after"


@pytest.mark.parametrize(
    "request_of",
    [
        lambda folder: (folder / "object").read_bytes(),
        lambda folder: (folder / "object").write_bytes(b"x"),
        lambda folder: (folder / "object").unlink(),
        lambda folder: (folder / "object").exists(),
        lambda folder: (folder / "object").stat(),
        lambda folder: list(folder.iterdir()),
        lambda folder: storage.listed(folder),
    ],
)
def test_a_refusal_is_one_line_and_not_repeated(folder, failing_store, request_of):
    failing_store.refuse(403)
    with pytest.raises(StoreError, match=r"no permission \(HTTP 403\)") as raised:
        request_of(folder)
    assert raised.value.errno == errno.EACCES and raised.value.filename.startswith(str(folder))
    assert "\n" not in str(raised.value) and failing_store.counts[403] == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: config.check_checkpoint(folder, 1, ConfigDict()),
        lambda folder: release.evaluation_of(folder, ConfigDict(), SimpleNamespace(step=1)),
        lambda folder: wandb_writer._known_id(folder / "wandb.json", "project"),
        lambda folder: sealing.problem(folder),
        lambda folder: sealing.unlisted(folder),
    ],
)
def test_what_the_store_refuses_is_neither_missing_nor_damaged(folder, failing_store, read):
    failing_store.refuse(403)
    with pytest.raises(StoreError, match=r"no permission"):
        read(folder)


def test_a_data_set_that_the_store_refuses_is_not_called_damaged(folder, failing_store, monkeypatch):
    monkeypatch.setattr(records, "directory", lambda builder, data_dir: folder)
    failing_store.refuse(403)
    with pytest.raises(StoreError, match=r"no permission"):
        records.fingerprint(records.ArchiveBuilder, str(folder))


def refreshing(error, cause=None):
    """A request whose token cannot be had, once: as google-auth's credentials of a VM raise it."""
    answers = [error]

    def request():
        if answers:
            raise answers.pop() from cause
        return "done"

    return request


def test_a_server_of_tokens_that_fails_once_is_asked_again():
    from google.auth import exceptions

    from taskexpert_jax.storage import client

    transport = exceptions.TransportError("metadata service unavailable")
    passing = [
        (transport, None),
        (exceptions.RefreshError("503"), transport),
        (exceptions.RefreshError(retryable=True), None),
    ]
    for error, cause in passing:
        assert client.retrying("gs://b")(refreshing(error, cause))() == "done"
    with pytest.raises(exceptions.RefreshError, match="revoked"):
        client.retrying("gs://b")(refreshing(exceptions.RefreshError("revoked")))()


def test_an_object_that_arrives_altered_is_one_line(folder, monkeypatch):
    from google.cloud.storage.exceptions import DataCorruption

    def altered(self, *args, **kwargs):
        raise DataCorruption(None, "Checksum mismatch while downloading:\n\n  https://x")

    monkeypatch.setattr("google.cloud.storage.Blob.download_as_bytes", altered)
    with pytest.raises(StoreError, match="received with another checksum than it has in the store") as raised:
        (folder / "object").read_bytes()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("status", "reason"), [(429, "too many requests"), (503, "not available .HTTP 503")])
def test_what_does_not_pass_is_one_line_after_bounded_retries(folder, failing_store, monkeypatch, status, reason):
    from taskexpert_jax.storage import client

    monkeypatch.setattr(client, "RETRY_SECONDS", 0.6)
    (folder / "object").write_bytes(b"x")
    failing_store.refuse(status)
    for request in ((folder / "object").read_bytes, (folder / "object").exists):
        with pytest.raises(StoreError, match=reason) as raised:
            request()
        assert "\n" not in str(raised.value)
