"""The check that all processes of a run see the same workdir, with threads in place of processes."""

import threading

import jax
import pytest

from taskexpert_jax import storage
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import agreement


@pytest.fixture
def messages(monkeypatch):
    """Calls `refuse_unshared` in two processes, each with its workdir, and returns both messages."""
    monkeypatch.setattr(agreement, "_SECONDS_TO_SEE_A_FILE", 0.2)
    own, barrier, values = threading.local(), threading.Barrier(2), [None, None]

    def gather(value):
        values[own.index] = value
        barrier.wait()
        found = list(values)
        barrier.wait()
        return found

    def process(index, workdir, found):
        own.index = index
        try:
            agreement.refuse_unshared(storage.path(str(workdir)))
        except UserError as error:
            found[index] = str(error)

    def call(*workdirs):
        found = ["", ""]
        threads = [threading.Thread(target=process, args=(i, workdir, found)) for i, workdir in enumerate(workdirs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    monkeypatch.setattr(agreement.processes, "gather", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: own.index)
    return call


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """A folder on the disk or in a bucket."""
    return storage.path(request.getfixturevalue("bucket")) if request.param == "bucket" else tmp_path


def test_one_workdir_is_seen_by_all(place, messages):
    assert messages(place / "run", place / "run") == ["", ""]
    assert list(place.iterdir()) == []


def test_another_workdir_is_refused_by_all(place, messages):
    for name in ("0", "1"):
        (place / name).mkdir()
    said = messages(place / "0" / "run", place / "1" / "run")
    for name, line in zip("01", said, strict=True):
        assert line.startswith(f"--workdir={place}/{name}/run is not shared: process 1 on ")
        assert " does not see what process 0 writes there; " in line
    assert [path for path in place.rglob("*") if path.is_file()] == []


def test_a_process_that_cannot_write_to_its_bucket_is_named(bucket, messages):
    said = messages(bucket, "gs://no-such-bucket/run")
    assert all(
        " cannot be written to by process 1 on " in line and "the bucket does not exist" in line for line in said
    )
    assert list(storage.path(bucket).iterdir()) == []
