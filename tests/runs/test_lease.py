"""One writer for a workdir in a bucket: who gets its lease, when it ends, and what a run does that has lost it."""

import contextlib
import json
import os
import threading
import time

from checkpoint_trees import opened, state
import pytest

from taskexpert_jax import storage
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.runs import sealing, workdir
from taskexpert_jax.runs.checkpoints import saved_steps

pytest.importorskip("google.cloud.storage", reason="buckets need the extra gcs")
from taskexpert_jax.runs import lease
from taskexpert_jax.storage import client, generations
from tests.runs.holding import holder

RENEW, EXPIRE = 0.1, 0.5  # seconds
NOT_ONE_LINE = json.dumps(lease.Holder(token="1", host="a\nb")._asdict())


@pytest.fixture
def folder(bucket):
    """A workdir that nobody has used yet."""
    return storage.path(bucket) / "run"


@pytest.fixture
def elsewhere(monkeypatch):
    """Programs of this machine look like those of others: whether they run cannot be asked."""
    monkeypatch.setattr(lease, "_machine", str)


def held(folder, renew=RENEW, expire=EXPIRE):
    """The lease with short times."""
    return lease.held(folder, renew_seconds=renew, expire_seconds=expire)


def abandoned(folder, **times):
    """The lease of a run that was killed: nobody renews or ends it."""
    found = lease.Lease(folder, times.get("renew", RENEW), times.get("expire", EXPIRE))
    found._ending.set()
    found._thread.join()
    return found


def fields(folder):
    """Fields of the lease's object."""
    return json.loads((folder / ".lease").read_text())


def test_one_start_wins_of_several_at_the_same_instant(folder, elsewhere):
    for place in range(20):
        start, end, won, lost = threading.Barrier(4), threading.Barrier(4), [], []
        if place % 2:  # the lease of a run that has ended
            with held(folder / str(place)):
                pass

        def run(path=folder / str(place), start=start, end=end, won=won, lost=lost):
            start.wait()
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(held(path, EXPIRE / 20, EXPIRE))
                    won.append(path)
                except UserError as refusal:
                    lost.append(str(refusal))
                end.wait()

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert [f"is in use by process {os.getpid()} on " in line for line in lost] == [True] * 3


def test_a_program_that_has_ended_leaves_the_workdir_to_the_next(folder, elsewhere):
    for _ in range(2):
        before = time.monotonic()
        with held(folder, 60, 60):
            assert not fields(folder)["ended"]
        assert time.monotonic() - before < 5
        assert fields(folder)["ended"]
    assert [path.name for path in folder.iterdir()] == [".lease"]


def test_a_program_of_this_machine_holds_it_until_it_ends_or_is_killed(folder):
    with holder(folder) as process:
        before = time.monotonic()
        refused = pytest.raises(
            UserError, match=rf"^gs://.*/run is in use by process {process.pid} on \S+ since 2.*: wait .*--workdir$"
        )
        with refused, workdir.lock(folder):
            pass
        process.kill()
    assert not fields(folder)["ended"]
    with workdir.lock(folder):
        assert fields(folder)["process"] == os.getpid()
    assert time.monotonic() - before < 10  # it does not wait for a renewal, or until the lease expires


def test_another_process_of_the_same_number_is_not_the_holder(folder):
    left = abandoned(folder, expire=60)
    with pytest.raises(UserError, match="is in use"), held(folder, RENEW, 60):
        pass
    left._own = left._own._replace(started=left._own.started - 1)
    left.renew()
    with held(folder, RENEW, 60):
        pass


def test_a_lease_that_is_renewed_is_refused_and_one_that_is_not_expires(folder, elsewhere, capsys):
    with held(folder), pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on"), held(folder):
        pass
    left = abandoned(folder)
    capsys.readouterr()
    before = time.monotonic()
    with held(folder):
        assert EXPIRE / 2 < time.monotonic() - before < 5 * EXPIRE
        first, second = capsys.readouterr().err.splitlines()
        who = f"process {os.getpid()} on {left._own.host} since {left._own.since}"
        assert f"{folder} was in use by {who}" in first and "waiting for up to " in first
        assert f"{folder} is taken over from {who}" in second
        with pytest.raises(UserError, match=f"{folder} has been taken over by process .*; it ends here"):
            left.check()
    left.release()  # changes nothing: the lease is another's
    assert fields(folder)["token"] != left._own.token


@pytest.mark.parametrize("hours", [-3, 3])
def test_clocks_of_hosts_do_not_matter(hours, folder, elsewhere, monkeypatch):
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 3600 * hours)
    left = abandoned(folder)
    threading.Timer(EXPIRE / 3, left.renew).start()
    with pytest.raises(UserError, match="is in use"), held(folder):
        pass  # not taken over, although its clock says that the lease is hours old
    left.check()
    time.sleep(EXPIRE)
    with held(folder):
        assert fields(folder)["token"] != left._own.token


def test_the_clock_is_the_stores(folder):
    first, second = generations.now(folder), generations.now(folder)
    assert 0 < second - first < 5
    assert list(folder.iterdir()) == []


def test_a_run_whose_lease_is_deleted_ends(folder):
    with held(folder, 60, 60) as ours:
        ours.renew()
        storage.remove(folder)
        ours.check()  # nobody can have it yet
        with pytest.raises(UserError, match=r"/run/\.lease has been deleted during the run, which ends here$"):
            ours.renew()
        with pytest.raises(UserError, match="deleted"):
            ours.check()
    assert not folder.exists()


def test_the_thread_finds_the_loss(folder):
    with held(folder, RENEW, 60) as ours:
        storage.remove(folder)
        deadline = time.monotonic() + 10
        while not ours._lost and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(UserError, match="deleted"):
            ours.check()


def test_a_run_that_was_suspended_asks_before_it_writes(folder, elsewhere):
    left = abandoned(folder)
    left.check()
    time.sleep(EXPIRE)
    left.check()  # nobody has taken it: it is renewed
    left.check()
    time.sleep(EXPIRE)
    with held(folder), pytest.raises(UserError, match="has been taken over"):
        left.check()


@pytest.fixture
def answers_lost(monkeypatch):
    """Uploads reach the store, but the first answer of each is lost: the client sends them again."""
    upload = client.storage.Blob.upload_from_string
    lost = []

    def twice(self, *arguments, **options):
        upload(self, *arguments, **options)
        lost.append(self.name)
        return upload(self, *arguments, **options)

    monkeypatch.setattr(client.storage.Blob, "upload_from_string", twice)
    return lost


def test_a_write_whose_answer_is_lost_counts(folder, answers_lost):
    for _ in range(2):
        with held(folder) as ours:
            ours.renew()
            assert fields(folder)["token"] == ours._own.token
        assert fields(folder)["ended"]
    assert len(answers_lost) >= 6


def test_a_write_that_was_given_up_and_arrives_late_is_ours(folder, monkeypatch):
    with held(folder, 60, 60) as ours:
        write = generations.write

        def unknown(*arguments, **options):
            write(*arguments, **options)
            raise StoreError(5, "the store cannot be reached", str(folder))

        with monkeypatch.context() as patch:
            patch.setattr(generations, "write", unknown)
            with pytest.raises(UserError, match="cannot be reached"):
                ours.renew()
        ours.renew()
        assert fields(folder)["token"] == ours._own.token
    assert fields(folder)["ended"]


def test_a_store_that_is_away_for_a_while_costs_nothing(folder, elsewhere, monkeypatch, capsys):
    with held(folder, RENEW, EXPIRE) as ours:
        write, tries = generations.write, []

        def away(*arguments, **options):
            tries.append(arguments)
            raise StoreError(5, "the store cannot be reached", str(folder))

        monkeypatch.setattr(generations, "write", away)
        time.sleep(2 * EXPIRE)
        assert len(tries) > 2
        monkeypatch.setattr(generations, "write", write)
        ours.check()
        with pytest.raises(UserError, match="is in use"), held(folder):
            pass
    assert capsys.readouterr().err.count("/.lease cannot be renewed: the store cannot be reached; trying again") == 1


@pytest.mark.parametrize("content", ["", "[1]", '{"token": 1}', "\0", "[" * 100_000, "1" * 5000, NOT_ONE_LINE])
def test_an_object_of_this_name_that_is_no_lease_expires_too(content, folder):
    (folder / ".lease").write_text(content)
    time.sleep(EXPIRE)
    with held(folder):
        assert fields(folder)["process"] == os.getpid()


def test_an_object_is_no_workdir(folder):
    (folder / "config.json").write_text("{}")
    refused = pytest.raises(UserError, match=r"/config\.json cannot be written to: it is a file; use another$")
    with refused, workdir.lock(folder / "config.json"):
        pass
    assert sorted(storage.listed(folder)) == ["config.json"]


def test_a_bucket_that_does_not_exist_is_one_line(store):
    refused = pytest.raises(
        UserError, match=r"^--workdir=gs://no-such-bucket/run cannot be written to: the bucket does"
    )
    with refused, workdir.lock(storage.path("gs://no-such-bucket/run")):
        pass


class Losing:
    """A hold that is lost after some questions."""

    def __init__(self, times):
        self.left = times

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise UserError("run has been taken over")

    def renew(self, seconds=0):
        self.check()


def test_a_run_that_has_lost_its_workdir_saves_and_seals_nothing_more(tmp_path):
    refused = pytest.raises(UserError, match=r"^run has been taken over$")
    with refused, opened(tmp_path, hold=Losing(2)) as checkpoints:
        checkpoints.save(1, state(1).to_items(), {}, None)
        checkpoints.wait()
        checkpoints.save(2, state(2).to_items(), {}, None)
    assert saved_steps(tmp_path) == [1]
    with refused, opened(tmp_path, hold=Losing(1)) as checkpoints:
        checkpoints.save(3, state(3).to_items(), {}, None)
    assert [sealing.sealed(tmp_path / "checkpoints" / step) for step in "13"] == [True, False]


def test_the_reason_of_a_failed_save_is_that_the_workdir_is_lost(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("no such object")  # the other run has removed what this one was writing

    refused = pytest.raises(UserError, match=r"^run has been taken over$")
    with refused, opened(tmp_path, hold=Losing(1)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", missing)
        checkpoints.save(1, state(1).to_items(), {}, None)
