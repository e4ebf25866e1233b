"""The store of the fault injection: what its proxy passes on, and what it answers in the store's place."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.fault_injection import emulator, proxy


@pytest.fixture(scope="module")
def between():
    """A proxy before an emulator of its own."""
    with contextlib.ExitStack() as stack:
        between = stack.enter_context(proxy.running())
        try:
            between.target = stack.enter_context(emulator.running(between.address))
        except emulator.NotAvailable as error:
            pytest.skip(str(error))
        yield between


def request(between, method, path, body=None, **headers):
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection(between.address.removeprefix("http://"), timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def upload(between, name, content, **headers):
    """Status of the upload of an object."""
    path = f"/upload/storage/v1/b/{emulator.BUCKET}/o?uploadType=media&name={name}"
    return request(between, "POST", path, content, **headers)[0]


def download(between, name):
    """Status and content of an object."""
    status, _, content = request(between, "GET", f"/storage/v1/b/{emulator.BUCKET}/o/{name}?alt=media")
    return status, content


def test_the_proxy_passes_objects_on_unchanged(between):
    content = bytes(range(256)) * 5000
    assert upload(between, "whole", content) == 200
    assert download(between, "whole") == (200, content)
    assert upload(between, "chunked", iter([content[:700], content[700:]])) == 200  # Transfer-Encoding: chunked
    assert download(between, "chunked") == (200, content)
    media = f"/storage/v1/b/{emulator.BUCKET}/o/whole?alt=media"
    status, _, part = request(between, "GET", media, Range="bytes=10-19")
    assert (status, part) == (206, content[10:20])


def test_a_resumable_upload_continues_through_the_proxy(between):
    path = f"/upload/storage/v1/b/{emulator.BUCKET}/o?uploadType=resumable&name=parts"
    status, headers, _ = request(between, "POST", path, b"{}")
    assert status == 200 and headers["Location"].startswith(between.address)


def test_one_request_in_four_fails_and_half_of_those_reached_the_store(between):
    between.counts.clear()
    between.fail_one_in(4, seed=1)
    answers = {f"random{i}": upload(between, f"random{i}", b"x") for i in range(200)}
    between.fail_one_in(0)
    failed = [name for name, status in answers.items() if status == 503]
    assert between.counts == {200: 200 - len(failed), 503: len(failed)}
    assert 30 <= len(failed) <= 70
    stored = sum(download(between, name)[0] == 200 for name in failed)
    assert len(failed) / 4 < stored < len(failed) * 3 / 4
    assert all(download(between, name)[0] == 200 for name in answers if name not in failed)


@pytest.mark.parametrize("status", [403, 429])
def test_refused_requests_do_not_reach_the_store(between, status):
    between.refuse(status)
    answer, headers, content = request(between, "POST", f"/upload/storage/v1/b/{emulator.BUCKET}/o?name=no", b"x")
    between.refuse(0)
    assert (answer, headers["Content-Type"]) == (status, "application/json")
    assert json.loads(content)["error"]["code"] == status
    assert download(between, "no")[0] == 404


def test_a_store_that_is_down_closes_connections_for_its_time(between):
    upload(between, "before", b"kept")
    between.be_down(0.3)
    begin = time.monotonic()
    while True:
        try:
            found = download(between, "before")
            break
        except (ConnectionError, http.client.HTTPException):
            assert time.monotonic() - begin < 5
    assert found == (200, b"kept") and time.monotonic() - begin >= 0.25


def test_a_store_goes_down_in_the_middle_of_a_named_write(between):
    between.be_down(0.2, at=r"run/metrics\.jsonl")
    assert upload(between, "run%2Fother", b"x") == 200 and not between.is_down
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        upload(between, "run%2Fmetrics.jsonl", b"x")
    assert between.is_down
    time.sleep(0.25)
    assert download(between, "run%2Fmetrics.jsonl")[0] == 404
    assert upload(between, "run%2Fmetrics.jsonl", b"x") == 200


def test_a_bucket_is_empty_and_subprocesses_use_the_same_store(bucket):
    from google.cloud import storage

    assert bucket.startswith(f"gs://{emulator.BUCKET}/")
    prefix = bucket.removeprefix(f"gs://{emulator.BUCKET}/") + "/"
    client = storage.Client()
    assert list(client.list_blobs(emulator.BUCKET, prefix=prefix)) == []
    code = "import sys; from google.cloud import storage; b = storage.Client().bucket(sys.argv[1])"
    code += "; b.blob(sys.argv[2]).upload_from_string('there', if_generation_match=0)"
    subprocess.run([sys.executable, "-c", code, emulator.BUCKET, f"{prefix}x"], check=True)
    (blob,) = client.list_blobs(emulator.BUCKET, prefix=prefix)
    assert (blob.download_as_bytes(), blob.size, blob.generation > 0) == (b"there", 5, True)
    client.close()


def test_tensorstore_uses_the_emulator(bucket):
    import tensorstore

    name = bucket.removeprefix(f"gs://{emulator.BUCKET}/")
    store = tensorstore.KvStore.open({"driver": "gcs", "bucket": emulator.BUCKET, "path": f"{name}/"}).result()
    store.write("key", b"value").result()
    assert store.read("key").result().value == b"value"
    assert os.environ["TENSORSTORE_GCS_HTTP_URL"].startswith("http://127.0.0.1:")


def test_no_wheel_is_a_reason_to_skip(monkeypatch):
    monkeypatch.setattr(emulator, "WHEEL", "no-such-wheel")
    with pytest.raises(emulator.NotAvailable, match=r"pip install no-such-wheel"), emulator.running():
        pass
