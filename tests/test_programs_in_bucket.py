"""The programs on a run, images, predictions and released folders in a bucket, compared with the same on a disk."""

import json
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from input_pipeline import pipeline
from taskexpert_jax import checkpoint, compare, evaluate, export, gates, load_run, predict, release, storage
from taskexpert_jax.config import read_run
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.evaluation import scoring
from taskexpert_jax.runs import sealing
from taskexpert_jax.tasks import from_config
from tests import random_runs, xla

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGES = {"a": (24, 36), "b": (20, 38)}


def batches_of(config):
    return pipeline.eval_batches(config, from_config(config), batch_size=config.eval.batch_size)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A run of random parameters."""
    config = random_runs.padded_scenes()
    config.tasks = ("semseg", "depth")
    config.model.depth = config.model.taps = config.model.experts = 1  # compiles faster
    config.dataset.val_scenes = 8
    workdir = tmp_path_factory.mktemp("programs") / "run"
    random_runs.save(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def in_bucket(on_disk, session_bucket):
    """The same run, copied to a bucket, and a folder of images beside it."""
    workdir = storage.path(f"{session_bucket}/programs/run")
    storage.copy_tree(on_disk, workdir)
    random = np.random.default_rng(0)
    for name, size in IMAGES.items():
        with (workdir.parent / "images" / f"{name}.png").open("wb") as file:
            Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(file, "PNG")
    for name in (".hidden.png", "note.txt", "inner/c.png"):
        (workdir.parent / "images" / name).write_text("no image")
    return workdir


@pytest.fixture(scope="module")
def released(in_bucket):
    """The run's release in the bucket."""
    folder = in_bucket.parent / "released"
    assert release.main([str(in_bucket), f"--output={folder}", "--license=mit"]) == 0
    return folder


def array(path):
    with path.open("rb") as file:
        return np.load(file)


def test_predict_writes_what_the_run_on_a_disk_predicts(in_bucket, on_disk):
    images, output = in_bucket.parent / "images", in_bucket / "predictions"
    predict.predict(read_run(in_bucket), in_bucket, "latest", images, output)
    run = load_run(on_disk)
    assert sorted(path.name for path in output.iterdir()) == sorted(IMAGES)
    for name in IMAGES:
        expected = run.predict(str(images / f"{name}.png"))
        assert sorted(path.name for path in (output / name).iterdir()) == sorted(
            ["montage.png", *(f"{task}.{kind}" for task in expected for kind in ("npy", "png"))]
        )
        for task, values in expected.items():
            np.testing.assert_array_equal(array(output / name / f"{task}.npy"), values)
        with (output / name / "montage.png").open("rb") as file:
            Image.open(file).verify()


def test_gates_are_those_of_the_run_on_a_disk(in_bucket, on_disk):
    image, output = in_bucket.parent / "images" / "a.png", in_bucket / "inspection"
    gates.inspect(read_run(in_bucket), in_bucket, "latest", image, output)
    names = sorted(path.name for path in output.iterdir())
    assert names == ["images", "inspection.html", "inspection.json", "mean_weights.pdf", "mean_weights.png"]
    with (output / "images" / "a" / "gates.npz").open("rb") as file:
        np.testing.assert_array_equal(np.load(file)["gates"], load_run(on_disk).gates(image).weights)
    assert json.loads((output / "inspection.json").read_text())["images_from"] == str(image)


def test_an_evaluation_is_compared_and_its_age_with_that_of_the_checkpoints(in_bucket, capsys):
    config = read_run(in_bucket)
    metrics = evaluate.evaluate(config, in_bucket, "latest", lambda: batches_of(config))
    found = sorted(path.name for path in (in_bucket / "evaluation").iterdir())
    assert found == ["metrics.json", "per_class.csv", "report.html"]
    capsys.readouterr()
    assert compare.main([str(in_bucket)]) == 0
    printed = capsys.readouterr()
    assert f"**{metrics['depth/rmse']:.4f}**" in printed.out and printed.err == ""
    later = in_bucket.parent / "trained_further"
    for name in ("evaluation/metrics.json", f"checkpoints/0/{sealing.COMMIT}"):
        (later / name).write_bytes((in_bucket / name).read_bytes())
    evaluated = (later / "evaluation" / "metrics.json").stat().st_mtime
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealing, "saved_at", lambda folder: evaluated + 1)
        assert compare.main([str(later)]) == 0
    assert "was trained further after this evaluation" in capsys.readouterr().err


def test_predictions_in_a_bucket_are_scored_as_those_on_a_disk(bucket, tmp_path):
    config = random_runs.padded_scenes()
    config.tasks, config.checkpoint.best_task = ("depth", "human_parts"), "depth"
    config.dataset.val_scenes = config.eval.batch_size = 2
    batch = next(iter(batches_of(config)))
    for row, name in enumerate(batch["id"]):
        top, left, height, width = batch["window"][row]
        inside = (row, slice(top, top + height), slice(left, left + width))
        for path, values in (
            (tmp_path / "depth" / f"{name}.npy", batch["depth"][inside] + 0.5),
            (tmp_path / str(name) / "human_parts.npy", np.zeros((height, width), np.uint8)),
        ):
            path.parent.mkdir(exist_ok=True)
            np.save(path, values)
    storage.copy_tree(tmp_path, storage.path(bucket))
    found, expected = (scoring.score(config, folder, [batch]).metrics for folder in (storage.path(bucket), tmp_path))
    assert found == expected and found["depth/rmse"] == pytest.approx(0.5, abs=1e-5)
    (storage.path(bucket) / "depth" / f"{batch['id'][0]}.npy").unlink()
    with pytest.raises(UserError, match=rf"1 of 4 files are missing or unusable:\n  {bucket}/depth/{batch['id'][0]}"):
        scoring.score(config, storage.path(bucket), [batch])


def test_a_release_in_a_bucket_is_the_model_of_the_run(released, on_disk, in_bucket, capsys):
    assert sorted(storage.listed(released)) == ["README.md", "SHA256SUMS", "config.json", "model.safetensors"]
    image = in_bucket.parent / "images" / "b.png"
    run, expected = load_run(str(released)), load_run(on_disk).predict(image)
    assert run.path == released and run.checkpoint.which == "released"
    for task, values in run.predict(image).items():
        np.testing.assert_array_equal(values, expected[task])
    assert checkpoint.main([str(released)]) == 0
    assert f"{released} is a released model: step 0" in capsys.readouterr().out
    assert release.main([str(in_bucket), f"--output={released}"]) == 2
    assert f"{released} already has README.md: nothing is overwritten" in capsys.readouterr().err


def test_a_damaged_release_is_named_by_its_address(released, bucket):
    for name in storage.listed(released):
        (storage.path(bucket) / name).write_bytes((released / name).read_bytes())
    model = storage.path(bucket) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"^{model} is damaged or was changed: not the file of SHA256SUMS"):
        load_run(bucket)
    model.unlink()
    with pytest.raises(UserError, match=rf"^{model} is missing: the released folder is incomplete"):
        load_run(bucket)


def test_an_export_is_complete_in_the_bucket(released, bucket):
    output = storage.path(bucket)
    export.export(read_run(released), released, "best", output)
    signature = json.loads((output / "signature.json").read_text())
    found = {name: facts.size for name, facts in storage.listed(output).items() if name != "signature.json"}
    assert found == {name: of["bytes"] for name, of in signature["files"].items()} and len(found) == 2


def test_checkpoints_are_listed_with_the_time_of_their_end_and_verified(in_bucket, capsys):
    assert checkpoint.main([str(in_bucket), "--verify", "--tree"]) == 0
    listed = capsys.readouterr().out
    assert "1970-" not in listed and "good" in listed and "\nparams: " in listed
    copy = in_bucket.parent / "damaged_run"
    for name, _ in storage.listed(in_bucket / "checkpoints").items():
        (copy / "checkpoints" / name).write_bytes((in_bucket / "checkpoints" / name).read_bytes())
    (copy / "checkpoints" / "0" / "data" / "metadata").unlink()
    assert checkpoint.main([str(copy), "--verify"]) == 2
    assert f"1 of 1 checkpoints of {copy} not intact: 0 (damaged: data/metadata is missing)" in capsys.readouterr().err


def programs(run, images):
    """Calls that read a run or images, without --config."""
    return {
        "load_run": lambda: load_run(run),
        "checkpoint": lambda: checkpoint.verified(storage.path(run)),
        "compare": lambda: compare.compare([storage.path(run)]),
        "release": lambda: release.release(storage.path(run), storage.path(f"{run}/released")),
        "images": lambda: gates.images.list_images(images),
        "image": lambda: gates.images.read_image(f"{images}/a.png"),
        "results": lambda: gates.files.folder_for_results(storage.path(images)),
    }


@pytest.mark.parametrize("program", programs("", ""))
def test_a_store_that_refuses_or_is_down_is_one_line(program, bucket, failing_store, monkeypatch):
    from taskexpert_jax.storage import client

    monkeypatch.setattr(client, "RETRY_SECONDS", 0.2)
    call = programs(f"{bucket}/run", bucket)[program]
    for fail, reason in (
        (lambda: failing_store.refuse(403), r"no permission \(HTTP 403\); log in"),
        (lambda: failing_store.refuse(503), r"HTTP 503"),
        (
            lambda: (failing_store.refuse(0), failing_store.be_down(60)),
            "the store cannot be reached; check the network",
        ),
    ):
        fail()
        with pytest.raises(UserError, match=rf"{bucket}.*{reason}") as found:
            call()
        assert "\n" not in str(found.value)


def test_commands_end_with_status_2_where_the_store_refuses(bucket, failing_store):
    failing_store.refuse(403)
    env = xla.environment(STORAGE_EMULATOR_HOST=failing_store.address)
    commands = (
        ["train", bucket, "--config=demo:tiny"],
        ["evaluate", bucket],
        ["predict", bucket, f"--images={bucket}"],
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "taskexpert_jax", *command], env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for command in commands
    ]
    for program in started:
        _, errors = program.communicate(timeout=300)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert program.returncode == 2 and len(lines) == 1 and "Traceback" not in errors
        assert bucket in lines[0] and "no permission (HTTP 403)" in lines[0]


@pytest.mark.parametrize("program", programs("", ""))
def test_no_such_bucket_or_run_is_one_line(program, bucket):
    # The emulator does not say of a missing object that its bucket is missing, as the store does.
    missing = "is missing" if program == "load_run" else "the bucket does not exist"
    for address, reason in ((bucket, ""), ("gs://no-such-bucket", missing)):
        if program == "results" and address == bucket:
            continue
        with pytest.raises(UserError, match=rf"{address}.*{reason}") as found:
            programs(f"{address}/run", address)[program]()
        assert "\n" not in str(found.value)


def test_an_image_that_cannot_be_fetched_ends_the_listing_and_a_damaged_one_does_not(bucket, failing_store):
    folder = storage.path(bucket)
    (folder / "a.png").write_text("no image")
    failures = []
    assert list(gates.images.read_each(gates.images.list_images(folder), failures)) == []
    assert str(failures[0]).startswith(f"{bucket}/a.png: not a readable image (is damaged, or none of")
    failing_store.refuse(403)
    with pytest.raises(StoreError, match=rf"^{bucket}/a.png: no permission"):
        next(gates.images.read_each([folder / "a.png"], failures))
