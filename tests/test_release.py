"""Releases: what the folder and its card say, and what is refused."""

import json
import os
import re

import jax
import numpy as np
import pytest

from configs import demo, nyud
from taskexpert_jax import compare, release, storage
from taskexpert_jax.config import read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import results
from taskexpert_jax.parallel import sharding
from taskexpert_jax.release import Words
from taskexpert_jax.runs import hub, released
from taskexpert_jax.runs.load import Selected, load
from taskexpert_jax.tasks import from_config
from tests import random_runs
from tests.runs import hub_server, test_hub


def tiny(**fields):
    config = demo.get_config("tiny")
    config.tasks, config.checkpoint.best_task = ("semseg", "depth"), "depth"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 1, 1
    config.dataset.fingerprint = "scenes-1"
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    at = tmp_path_factory.mktemp("runs") / "run"
    random_runs.save(tiny(**{"model.pretrained": "/home/me/weights/vit.npz"}), at)
    return at


@pytest.fixture
def evaluated(run):
    """The run with an evaluation of its checkpoint, whose numbers are made up; a function that changes its fields."""
    config = read_run(run)
    tasks = from_config(config)
    values = {"semseg/mIoU": 41.25, "semseg/pixel_accuracy": 80.0, "depth/rmse": None}
    facts = results.facts(config, workdir=run, checkpoint=Selected(0, "best"), examples=654, seconds=1.0)
    content = {
        **facts,
        "published": {task.name: {"metric": task.main_metric, "value": 1.0} for task in tasks},
        "metrics": values,
        "best_constant": {"semseg/mIoU": 2.5},
    }
    path = run / "evaluation" / "metrics.json"
    path.parent.mkdir()

    def write(**changes):
        path.write_text(json.dumps({**content, **changes}))
        return path

    yield write
    path.unlink()
    path.parent.rmdir()


def card_of(run, tmp_path, **words):
    release.release(run, tmp_path / "out", words=Words(**words))
    return (tmp_path / "out" / released.CARD).read_text()


def test_a_note_that_is_not_utf_8_is_escaped(run, tmp_path):
    release.release(run, tmp_path / "out", words=release.Words(note="from \udcff"))
    assert r"from \udcff" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_a_release_is_the_run(run, tmp_path):
    line = release.release(run, tmp_path / "out")
    assert line.startswith(f"{run} at step 0 (latest): 0.2 M parameters, ")
    assert line.endswith(
        "; not evaluated (the run had no evaluation/metrics.json); licence: unknown (state it with --license)"
    )
    mesh = sharding.one_device_mesh()
    with sharding.use(mesh):
        _, ours, _ = load(read_run(run), run, "best", mesh)
        _, theirs, _ = load(read_run(tmp_path / "out"), tmp_path / "out", "best", mesh)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_half_precision_of_evaluations_does_not_reach_the_release(tmp_path):
    random_runs.save(tiny(**{"eval.params_dtype": "bfloat16"}), tmp_path / "run")
    release.release(tmp_path / "run", tmp_path / "out")
    release.release(tmp_path / "run", tmp_path / "again")
    parameters, _ = released.restore_parameters(tmp_path / "out")
    rounded = [(array.view(np.uint32) & 0xFFFF == 0).all() for array in parameters.values()]
    assert not all(rounded)
    assert read_run(tmp_path / "out").eval.params_dtype == "bfloat16"  # the run's own choice stays
    assert (tmp_path / "out/SHA256SUMS").read_text() == (tmp_path / "again/SHA256SUMS").read_text()


def test_paths_of_the_machine_stay_there(run, tmp_path, monkeypatch):
    release.release(run, tmp_path / "out")
    assert read_run(tmp_path / "out").model.pretrained == "vit.npz"
    texts = [(tmp_path / "out" / name).read_text() for name in (released.CONFIG, released.CARD)]
    assert not [text for text in texts if "/home/me" in text or str(run) in text or str(tmp_path) in text]
    assert "starts from `vit.npz`" in texts[1]
    config = nyud.get_config("tiny")
    config.update_from_flattened_dict({"dataset.data_dir": "../secret/data", "model.pretrained": "hf://o/vit"})
    config.dataset.local_cache = "/secret/disk"
    config.log.wandb = "team/project"
    with config.unlocked():
        config.dataset.list_file, config.dataset.note = "~/lists/a.txt", "a/b"
        config.dataset.masks = "gs://secret/masks"
    shared = release.portable(config)
    assert (shared.dataset.data_dir, shared.dataset.list_file, shared.dataset.note) == ("data", "a.txt", "a/b")
    assert shared.dataset.local_cache == "auto" and shared.dataset.masks == "masks"
    assert (
        shared.model.pretrained == "hf://o/vit"
        and shared.log.wandb == ""
        and config.dataset.data_dir == "../secret/data"
    )


def test_the_card_has_the_numbers_of_the_evaluation(run, evaluated, tmp_path):
    evaluated()
    card = card_of(run, tmp_path, license="cc-by-nc-4.0", name="rooms", note="Trained for *fun*.")
    front, body = card.removeprefix("---\n").split("\n---\n")
    assert front.startswith('library_name: taskexpert-jax\nlicense: "cc-by-nc-4.0"\npipeline_tag: image-segmentation\n')
    assert '    - type: "semseg/mIoU"\n      name: "semantic segmentation: mIoU (%)"\n      value: 41.25' in front
    assert "nan" not in front and "depth/rmse" not in front
    assert body.startswith("\n# rooms\n\n") and "\n\nTrained for *fun*.\n\n" in body
    assert "| semantic segmentation | **mIoU (%) ↑** | 41.25 | 2.5 |\n" in body
    assert "| semantic segmentation | pixel_accuracy | 80 | - |\n" in body
    assert "| depth | **RMSE (m) ↓** | nan | - |\n" in body
    assert "654 examples of the split `val` of `scenes` (fingerprint `scenes-1`), one view; evaluated at step 0" in body
    assert "Trained on rendered scenes only, on no photograph" in body
    assert "`cc-by-nc-4.0`, as stated by those who released the model." in body
    assert "| `semseg` | semantic segmentation | class ids, (H, W) uint8; 14 classes: floor, wall," in body
    assert "| `depth` | depth | metres, (H, W) float32 |" in body


def test_the_front_matter_is_yaml(run, evaluated, tmp_path):
    yaml = pytest.importorskip("yaml")
    evaluated()
    front = yaml.safe_load(card_of(run, tmp_path, name='a: "b" # c').split("---\n")[1])
    assert front["license"] == "unknown" and {"jax", "depth", "semantic-segmentation"} <= set(front["tags"])
    (result,) = front["model-index"][0]["results"]
    assert front["model-index"][0]["name"] == 'a: "b" # c' and result["dataset"]["name"] == "scenes"
    assert result["metrics"] == [{"type": "semseg/mIoU", "name": "semantic segmentation: mIoU (%)", "value": 41.25}]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": 20}, "the run was evaluated at step 20, not 0"),
        ({"tasks": ["depth"]}, "the run's evaluation/metrics.json is of another model or data set"),
        ({"model": {"width": 7}}, "the run's evaluation/metrics.json is of another model or data set"),
        (
            {"dataset": {"name": "nyud", "split": "val", "fingerprint": ""}},
            "the run's evaluation/metrics.json is of another model or data set",
        ),
        ({"metrics": []}, "the run's evaluation/metrics.json cannot be read"),
    ],
)
def test_numbers_of_anything_else_are_not_in_the_card(run, evaluated, tmp_path, changes, reason):
    evaluated(**changes)
    card = card_of(run, tmp_path)
    assert f"## Results\n\nNot evaluated: {reason}.\n" in card and "41.25" not in card


def test_an_evaluation_before_the_checkpoint_was_written_is_not_of_it(run, evaluated, tmp_path):
    saved = (run / "checkpoints" / "0").stat().st_mtime
    os.utime(evaluated(), (0, saved - 60))
    assert "Not evaluated: the run's evaluation is older than the checkpoint." in card_of(run, tmp_path)


def test_names_of_others_break_neither_table_nor_page(tmp_path):
    classes = ("a|b", "<img src=x>", "c")
    random_runs.save(tiny(**{"dataset.semseg_classes": classes}), tmp_path / "run")
    card = card_of(tmp_path / "run", tmp_path, name="x\n---\n# y")
    assert "classes: a\\|b, &lt;img src=x>, c |\n" in card
    assert "\n# x --- # y\n" in card and card.count("\n---\n") == 1


@pytest.mark.parametrize("name", ["file", "folder", "released"])
def test_a_release_replaces_nothing(run, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept.txt").write_text("mine")
    release.release(run, tmp_path / "released")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"^{tmp_path}/{name} .*: nothing is overwritten; give a new"):
        release.release(run, tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_folder_or_a_link_to_one_is_filled(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    release.release(run, tmp_path / "link")
    assert released.facts(tmp_path / "empty").step == 0 and (tmp_path / "link").is_symlink()
    release.release(run, tmp_path / "new" / "deep")
    assert released.facts(tmp_path / "new" / "deep").tasks == ("semseg", "depth")


def main(*arguments) -> int:
    return release.main([str(argument) for argument in arguments])


def test_the_program_says_what_is_wrong_in_a_line(run, tmp_path, capsys):
    def error(*arguments):
        assert main(*arguments) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert out == "" and len(lines) == 1
        return lines[0]

    out = f"--output={tmp_path / 'out'}"
    assert error(run, out, "--license=Apache 2.0").startswith(
        "error: --license=Apache 2.0: give an identifier of the hub"
    )
    assert error(run, out, "--checkpoint=7").startswith("error: --checkpoint=7: not in ")
    assert error(run, out, "--public") == "error: --public is for --output=hf://OWNER/NAME"
    assert "config.json is missing; give the --workdir of a run" in error(tmp_path / "none", out)
    assert not (tmp_path / "out").exists()
    assert main(run, out) == 0
    assert capsys.readouterr().out.endswith(f"written: {tmp_path / 'out'}\n")
    assert "is a released model already: copy the folder, or push it" in error(tmp_path / "out", f"{out}2")


@pytest.mark.parametrize("output", ["s3://b/x", "hf://x", ""])
def test_addresses_that_are_none_are_refused_at_once(run, capsys, output):
    with pytest.raises(SystemExit) as ended:
        main(run, f"--output={output}")
    assert ended.value.code == 2 and "argument --output: " in capsys.readouterr().err


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server.running() as found:
        test_hub.use(monkeypatch, found.url, tmp_path)
        yield found


def test_a_run_is_pushed_and_pulled(run, tmp_path, server, capsys):
    assert main(run, "--output=hf://me/rooms", "--license=mit") == 0
    out = capsys.readouterr().out
    assert re.search(rf"\nwritten: {server.url}/me/rooms/commit/\w+\n$", out)
    ((header, files),) = server.commits
    assert header["summary"] == "Step 0, TaskExpert-JAX 0.1.0" and files.keys() == {*released.NEEDED, released.CARD}
    card = files[released.CARD].decode()
    assert "\n# rooms\n" in card and 'load_run("hf://me/rooms")' in card and str(tmp_path) not in card
    folder = hub.located("hf://me/rooms")
    release.release(run, tmp_path / "out")
    for name in released.NEEDED:
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert main(tmp_path / "out", "--output=hf://me/copy") == 0
    assert server.commits[1][0]["summary"] == "Step 0, TaskExpert-JAX 0.1.0"
    assert server.revisions["me/copy"]["main"][released.CARD] == (tmp_path / "out" / released.CARD).read_bytes()
    assert main(tmp_path / "out", "--output=hf://me/copy", "--license=mit") == 2
    assert "--license, --name and --note are in its README.md" in capsys.readouterr().err


def test_a_release_in_a_bucket_is_pushed(run, bucket, server, capsys):
    assert main(run, f"--output={bucket}", "--license=mit") == 0
    assert f"written: {bucket}\n" in capsys.readouterr().out
    assert main(bucket, "--output=hf://me/copy") == 0
    ((header, files),) = server.commits
    assert header["summary"] == "Step 0, TaskExpert-JAX 0.1.0"
    assert files == {name: (storage.path(bucket) / name).read_bytes() for name in (*released.NEEDED, released.CARD)}


def test_the_evaluation_of_the_run_is_not_part_of_the_release(run, evaluated, tmp_path):
    evaluated()
    release.release(run, tmp_path / "out")
    with pytest.raises(UserError, match=r"out/evaluation/metrics.json is missing"):
        compare.read_metrics(tmp_path / "out")
