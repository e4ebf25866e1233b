"""Data sets in a bucket: copied to the disk once for a host, or read from the bucket, with the same fingerprint."""

from concurrent import futures
import errno
import os
import pathlib
import shutil
import threading
from types import SimpleNamespace

from ml_collections import ConfigDict
import numpy as np
import nyud_layout
from preparing import build, contents
import pytest

from configs import nyud as nyud_config
from input_pipeline import local_cache, nyud, pipeline, records, show
from taskexpert_jax import storage
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import from_config


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a small data set."""
    folder = tmp_path_factory.mktemp("nyud")
    build(nyud_layout.write(folder / "NYUDv2"), folder / "built")
    return folder / "built"


@pytest.fixture
def data(built: pathlib.Path, bucket: str) -> ConfigDict:
    """The data config of a copy of `built` in a bucket, without a cache."""
    storage.copy_tree(built, storage.path(bucket))
    return nyud_dataset(bucket, "")


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "cache"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that are fetched, one for each part."""
    from taskexpert_jax.storage import transfer

    names, fetch = [], transfer._fetch

    def noted(source, *arguments) -> None:
        names.append(source.name)
        fetch(source, *arguments)

    monkeypatch.setattr(transfer, "_fetch", noted)
    return names


def nyud_dataset(data_dir: str, cache: str | pathlib.Path) -> ConfigDict:
    dataset = nyud_config.get_config("tiny").dataset
    dataset.data_dir, dataset.local_cache = data_dir, str(cache)
    return dataset


def copy(config: ConfigDict, cache: pathlib.Path) -> pathlib.Path:
    """The copy of a data set as another process would find it."""
    config.local_cache = str(cache)
    local_cache._copied.cache_clear()
    return pathlib.Path(local_cache.located(config).data_dir)


@pytest.mark.parametrize("cached", [True, False])
def test_data_in_a_bucket_are_those_on_a_disk(built, data, cache, cached: bool) -> None:
    """With and without a copy: the fingerprint, and the arrays of a batch."""
    found = []
    for data_dir in (str(built), data.data_dir):
        config = nyud_config.get_config("tiny")
        config.dataset.data_dir, config.dataset.local_cache = data_dir, str(cache) if cached else ""
        pipeline.record_fingerprint(config)
        assert config.dataset.data_dir == data_dir  # as given: config.json names the bucket
        found.append((config.dataset.fingerprint, next(pipeline.train_batches(config, from_config(config)))))
    (here, ours), (there, theirs) = found
    assert here == there == records.fingerprint(nyud.Builder, str(built))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], strict=True)
    assert cache.exists() == cached


def test_a_copy_is_made_once(built, data, cache, fetched) -> None:
    target = copy(data, cache)
    assert contents(target) == contents(built)
    assert os.listdir(cache) == [target.name]  # neither lock nor partial copy
    assert target.name.startswith(f"nyud-{nyud.Builder.VERSION}-")
    assert sorted(fetched) == sorted(os.path.basename(name) for name in contents(built))
    fetched.clear()
    assert copy(data, cache) == target
    assert fetched == []


def test_only_the_files_of_the_data_set_are_copied(data, cache) -> None:
    (storage.path(data.data_dir) / "other" / "1.0.0" / "large").write_bytes(b"of another data set")
    assert {name.split("/")[0] for name in contents(copy(data, cache))} == {"nyud"}


def test_auto_is_the_users_cache(data, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    data.local_cache = "auto"
    assert pathlib.Path(local_cache.located(data).data_dir).parent == tmp_path / "caches" / "taskexpert_jax" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert local_cache.default_folder() == pathlib.Path("/home/me/.cache/taskexpert_jax/data")


def test_changed_data_get_another_copy(data, cache) -> None:
    before = copy(data, cache)
    path = storage.path(data.data_dir) / nyud.Builder.folder() / "prepared.json"
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    after = copy(data, cache)
    assert before.is_dir() and after != before
    assert records.fingerprint(nyud.Builder, str(after)) == f"0{records.fingerprint(nyud.Builder, str(before))}"


def test_a_copy_that_lost_a_file_is_completed(built, data, cache, fetched, caplog) -> None:
    target = copy(data, cache)
    lost, short = (target / nyud.Builder.folder() / name for name in ("features.json", "prepared.json"))
    lost.unlink()
    short.write_text("{")
    fetched.clear()
    assert copy(data, cache) == target and contents(target) == contents(built)
    assert sorted(fetched) == ["features.json", "prepared.json"]
    assert f"{target}: files are missing or truncated" in caplog.text


def test_a_copy_that_was_killed_is_no_copy_and_is_completed(built, data, cache, fetched, monkeypatch) -> None:
    from taskexpert_jax.storage import client

    def two_and_then_killed(call, items):
        for item in list(items)[:2]:
            call(item)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(client, "each", two_and_then_killed)
        with pytest.raises(KeyboardInterrupt):
            copy(data, cache)
    (partial,) = os.listdir(cache)
    assert partial.startswith(".") and partial.endswith(".partial") and len(fetched) == 2
    target = copy(data, cache)
    assert contents(target) == contents(built) and os.listdir(cache) == [target.name]
    assert len(fetched) == len(contents(built))  # the two were not fetched again


def test_damage_on_the_way_is_found(built, data, cache, monkeypatch) -> None:
    from taskexpert_jax.storage import transfer

    fetch = transfer._fetch

    def damaged(source, file, *arguments) -> None:
        fetch(source, file, *arguments)
        if source.name == "features.json":
            file.write_bytes(file.read_bytes().replace(b"e", b"f", 1))

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_fetch", damaged)
        with pytest.raises(UserError, match=rf"^{data.data_dir}/\S*/features.json: .*another checksum"):
            copy(data, cache)
    assert [name for name in os.listdir(cache) if not name.startswith(".")] == []
    assert contents(copy(data, cache)) == contents(built)


def test_a_disk_that_is_too_small_is_refused_before_the_copy(built, data, cache, fetched, monkeypatch) -> None:
    size = sum(len(content) for content in contents(built).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    with pytest.raises(UserError) as raised:
        copy(data, cache)
    assert str(raised.value).startswith(
        f"{data.data_dir}/{nyud.Builder.folder()}: 1 MiB do not fit on the disk of {cache}, 0 MiB free; "
    )
    assert str(raised.value).endswith(
        "give a folder on another disk with --config.dataset.local_cache=FOLDER, "
        "or read from the bucket with --config.dataset.local_cache=''"
    )
    assert fetched == os.listdir(cache) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size))
    assert contents(copy(data, cache)) == contents(built)


def test_a_disk_that_gets_full_is_left_empty(data, cache, monkeypatch) -> None:
    from taskexpert_jax.storage import transfer

    def full(source, file, *_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(transfer, "_fetch", full)
    with pytest.raises(UserError, match=rf"^config.dataset.local_cache={cache}: {cache}/.*: No space left.*FOLDER"):
        copy(data, cache)
    assert os.listdir(cache) == []


def test_a_cache_that_cannot_be_made_is_named(data, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^config.dataset.local_cache=.*/file/cache: .*Not a directory; give a folder"):
        copy(data, tmp_path / "file" / "cache")
    config = nyud_config.get_config("tiny")
    config.dataset.local_cache = "gs://bucket/cache"
    with pytest.raises(UserError, match=r"config.dataset.local_cache='gs://bucket/cache'.* local folder"):
        check(config)


def test_one_of_several_processes_copies_and_the_others_wait(data, cache, fetched, caplog) -> None:
    data.local_cache = str(cache)
    start = threading.Barrier(3)  # a lock is of an open file, so threads exclude each other as processes do

    def process(_: int) -> str:
        start.wait()
        return str(local_cache._copied.__wrapped__(data.data_dir, nyud.Builder.folder(), str(cache)))

    with futures.ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(process, range(3)))) == 1
    assert len(fetched) == 5 and len(os.listdir(cache)) == 1
    assert "waiting for another process" in caplog.text


def test_wrong_addresses_are_a_line(data, bucket, cache) -> None:
    cases = {
        f"{bucket}/absent": r"^no built data set at gs://\S+/absent/nyud/\S+; build it with `.*--data_dir=gs://",
        "gs://no-such-bucket/data": r"^gs://no-such-bucket/data/\S+: the bucket does not exist",
    }
    storage.path(data.data_dir).joinpath(nyud.Builder.folder(), records.COMPLETE).unlink()
    cases[data.data_dir] = r"^the data set at gs://\S+ is incomplete, .*; resume it with `.*--data_dir=gs://"
    for address, line in cases.items():
        for setting in ("", str(cache)):
            with pytest.raises(UserError, match=line):
                pipeline.open_source(nyud_dataset(address, setting), (), "train")
    assert not cache.exists()


def test_an_object_that_is_missing_is_a_line_when_it_is_read(data) -> None:
    source = pipeline.open_source(data, (), "train")
    for path in storage.path(data.data_dir).rglob("*array_record*"):
        path.unlink()
    with pytest.raises(UserError, match=rf"^{data.data_dir}/\S+: record 0 cannot be read .*Not Found"):
        source.load(0)


# Folders of images


def test_a_folder_in_a_bucket_is_one_on_a_disk(root, config, bucket, cache, fetched, capsys) -> None:
    pipeline.record_fingerprint(config)
    here = config.dataset.fingerprint
    objects = len(contents(root))
    storage.copy_tree(root, storage.path(bucket))
    config.dataset.data_dir, config.dataset.local_cache, config.dataset.fingerprint = bucket, str(cache), ""
    pipeline.record_fingerprint(config)
    assert config.dataset.fingerprint == here
    assert len(fetched) == objects
    assert show.check(config) == []
    assert show.draw(config, "val", 1, stored=False).size[0] > 0
    assert "train: 4 images, 0 of them not readable" in capsys.readouterr().out


def test_a_folder_in_a_bucket_needs_the_copy(config, bucket) -> None:
    config.dataset.data_dir, config.dataset.local_cache = bucket, ""
    with pytest.raises(UserError, match=rf"^config.dataset.data_dir={bucket}: .*--config.dataset.local_cache=auto"):
        pipeline.record_fingerprint(config)
    config.dataset.local_cache = "auto"
    with pytest.raises(UserError, match=rf"^config.dataset.data_dir: there is nothing at {bucket}; check the address"):
        pipeline.record_fingerprint(config)


def test_a_data_set_of_your_own_asks_for_the_copy(bucket, cache, monkeypatch) -> None:
    monkeypatch.setattr(records, "dataset_module", lambda name: SimpleNamespace())
    (storage.path(bucket) / "train" / "a.npz").write_bytes(b"frame")
    dataset = ConfigDict({"name": "frames", "data_dir": bucket})
    assert local_cache.located(dataset) is dataset
    dataset.local_cache = str(cache)
    assert contents(pathlib.Path(local_cache.located(dataset).data_dir)) == {"train/a.npz": b"frame"}


@pytest.mark.parametrize("name", ["../a.png", "images//a.png"])
def test_names_that_lead_elsewhere_on_a_disk_are_refused(config, bucket, cache, name: str) -> None:
    at = storage.path(bucket)
    at.bucket.blob(f"{at.key}/{name}").upload_from_string("x")  # pyright: ignore[reportAttributeAccessIssue]
    config.dataset.data_dir, config.dataset.local_cache = bucket, str(cache)
    with pytest.raises(UserError, match=rf"^{bucket}: the object '{name}' has no name of a file; remove or rename it"):
        pipeline.record_fingerprint(config)
    assert not cache.exists()
