"""Evaluation of a checkpoint: what it writes against what the model's predictions give directly."""

import contextlib
import csv
import io
import json
import math
import pathlib
import shutil
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from configs import demo
from input_pipeline import pipeline
from taskexpert_jax import command_line, evaluate, installation, json_file, load_run
from taskexpert_jax.config import IMAGENET
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import full_pass, inference, steps
from taskexpert_jax.models import inputs
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs.load import load
from taskexpert_jax.tasks import from_config
from taskexpert_jax.tasks.metrics.boundary import counts as boundary
from tests import clock, random_runs, xla

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = 11  # in batches of 8: the second has 5 of padding


def tiny():
    config = random_runs.padded_scenes()
    config.dataset.val_scenes = EXAMPLES
    return config


def one_device():
    return sharding.one_device_mesh()


def batches_of(config):
    return pipeline.eval_batches(config, from_config(config), batch_size=config.eval.batch_size)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An evaluated checkpoint of random parameters: config, workdir, results, and what the boundary benchmark got."""
    config = tiny()
    tasks = from_config(config)
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    random_runs.save(config, workdir)
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        original = boundary.image_counts

        def recorded(prediction, label, max_dist, **options):
            counted.append((prediction, label))
            return original(prediction, label, max_dist, **options)

        patch.setattr(boundary, "image_counts", recorded)
        clock.each_look_takes(patch, seconds=40)
        command_line.configure_logging()
        with contextlib.redirect_stderr(io.StringIO()) as err:
            results = evaluate.evaluate(config, workdir, "latest", lambda: batches_of(config))
    folder = workdir / "evaluation"
    report = json.loads((folder / "metrics.json").read_text())
    with (folder / "per_class.csv").open() as file:
        per_class = list(csv.DictReader(file))
    assert (folder / "report.html").is_file()
    return types.SimpleNamespace(
        config=config,
        tasks=tasks,
        workdir=workdir,
        results=results,
        counted=counted,
        report=report,
        per_class=per_class,
        err=err.getvalue(),
    )


@pytest.fixture(scope="module")
def direct(run):
    """Plain forward pass of the model on one device: predictions, gates (S, T, B, N, K + 1) and labels."""
    config = run.config
    batches = list(batches_of(config))
    batch = {name: np.concatenate([of[name] for of in batches])[:EXAMPLES] for name in batches[0]}
    mesh = one_device()
    with sharding.use(mesh):
        model, variables, _ = load(config, run.workdir, "latest", mesh)
        forward = jax.jit(
            lambda *of: model.apply(of[0], inputs.normalise(*of[1:], IMAGENET), train=False, return_aux=True)
        )
        predictions, aux = jax.device_get(forward(variables, batch["image"], batch["window"]))
    return types.SimpleNamespace(batch=batch, predictions=predictions, gates=aux["gates"], model=model)


def inside(run, direct, task):
    """(prediction (h, w, c), label (h, w, c)) of every example, without padding."""
    for prediction, label, window in zip(
        direct.predictions[task], direct.batch[task], direct.batch["window"], strict=True
    ):
        top, left, height, width = window
        yield (part[top : top + height, left : left + width] for part in (prediction, label))


def test_progress_is_logged(run):
    assert run.err.splitlines()[1:] == ["evaluating: 8 of 11 examples"]  # of two batches, before the last one


def test_the_full_pass_gives_the_metrics_of_the_cheap_one_for_any_batch_size_and_mesh(run):
    config = run.config
    mesh = one_device()
    with sharding.use(mesh):
        model, variables, _ = load(config, run.workdir, "latest", mesh)
        step = steps.make_eval_step(model.tasks, inference.make_inference(model, config), mesh)
        batches = pipeline.eval_batches(config, model.tasks, batch_size=3)
        cheap = steps.run(step, variables, model.tasks, batches, mesh)
    assert {name: run.results[name] for name in cheap} == pytest.approx(cheap, rel=1e-4, nan_ok=True)
    of_boundaries = {"odsF", "oisF", "AP", "odsF_precision", "odsF_recall", "odsF_threshold"}
    assert run.results.keys() - cheap.keys() == {f"edge/{name}" for name in of_boundaries}


def test_a_run_in_python_finds_what_the_mode_does(run):
    found = load_run(run.workdir).evaluate(batches_of(run.config))
    assert found == pytest.approx(run.results, rel=1e-4, nan_ok=True)
    assert found.keys() == run.results.keys()


def test_metrics_json_says_what_was_evaluated(run):
    report = run.report
    assert (report["step"], report["checkpoint"], report["examples"]) == (0, "latest", EXAMPLES)
    assert report["metrics"] == pytest.approx(run.results, nan_ok=True)
    assert report["variant"] == "tiny" and report["tasks"] == list(run.config.tasks)
    assert report["dataset"]["name"] == "scenes" and report["dataset"]["split"] == "val"
    assert report["eval"]["flip"] is False and report["eval"]["boundary"]["max_dist"] == 0.05
    assert report["versions"]["jax"] == jax.__version__ and report["version"] == installation.version_text()
    published = {name: (of["metric"], of["value"]) for name, of in report["published"].items()}
    assert published["edge"] == ("odsF", run.results["edge/odsF"])
    assert published["depth"] == ("rmse", run.results["depth/rmse"])
    assert report["published"]["edge"]["higher_is_better"] and not report["published"]["depth"]["higher_is_better"]
    assert report["best_constant"].keys() == run.results.keys() - {
        name for name in run.results if name.startswith(("edge/odsF", "edge/oisF", "edge/AP"))
    }


def test_per_class_scores_are_those_of_the_pooled_pixels(run, direct):
    classed = [task for task in run.tasks if task.class_names]
    assert {row["task"] for row in run.per_class} == {task.name for task in classed}
    for task in classed:
        rows = [row for row in run.per_class if row["task"] == task.name]
        assert [row["name"] for row in rows] == list(task.class_names)
        pairs = [(p.argmax(axis=-1), g[..., 0]) for p, g in inside(run, direct, task.name)]
        predicted, label = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*pairs, strict=True))
        predicted, label = predicted[label != 255], label[label != 255]
        for row in rows:
            ours, theirs = predicted == int(row["index"]), label == int(row["index"])
            assert int(row["labelled"]) == theirs.sum()
            # A pixel may have two logits equal but for the last bit, which one and eight devices decide differently.
            assert int(row["predicted"]) == pytest.approx(ours.sum(), abs=2)
            assert int(row["correct"]) == pytest.approx((ours & theirs).sum(), abs=2)
            counts = {name: int(row[name]) for name in ("labelled", "predicted", "correct")}
            union = counts["labelled"] + counts["predicted"] - counts["correct"]
            assert float(row["iou"]) == pytest.approx(100 * counts["correct"] / max(union, 1))
        assert np.mean([float(row["iou"]) for row in rows]) == pytest.approx(run.results[f"{task.name}/mIoU"])
        assert run.report["per_class"][task.name] == {row["name"]: float(row["iou"]) for row in rows}


def test_the_boundary_benchmark_gets_every_picture_without_padding(run, direct):
    assert len(run.counted) == EXAMPLES
    found = sorted(run.counted, key=lambda pair: pair[1].tobytes())  # threads take them in any order
    expected = [(1 / (1 + np.exp(-p[..., 0])), g[..., 0]) for p, g in inside(run, direct, "edge")]
    expected.sort(key=lambda pair: pair[1].tobytes())
    for (prediction, label), (probability, truth) in zip(found, expected, strict=True):
        assert prediction.dtype == np.uint8 and prediction.shape == (24, 36)
        np.testing.assert_array_equal(label, truth)
        cut_off = 255 * probability - prediction
        assert cut_off.min() > -1e-2 and 0.9 < cut_off.max() < 1 + 1e-2


def test_odsf_is_the_benchmarks_own(run):
    def counts_of(kind):
        return boundary.BoundaryCounts.join(boundary.image_counts(*pair, 0.05, kind=kind) for pair in run.counted)

    counts = counts_of("lines")
    for name, value in boundary.scores(counts).items():
        assert run.results[f"edge/{name}"] == pytest.approx(value, rel=1e-9)
    written = run.report["boundary"]["edge"]
    np.testing.assert_allclose(written["f"], boundary.curve(counts).f)
    np.testing.assert_allclose(written["thresholds"], boundary.THRESHOLDS)
    assert boundary.odsf(counts_of("regions")) != boundary.odsf(counts)  # so that the kind has been told


def scores_of_examples(run, direct):
    """Task -> what each example should be ranked by, nan without a label; of boundaries by their own label's bytes."""

    def miou(p, g):
        p, g = p.argmax(axis=-1)[g[..., 0] != 255], g[..., 0][g[..., 0] != 255]
        seen = np.union1d(p, g)
        return 100 * np.mean([np.sum((p == c) & (g == c)) / np.sum((p == c) | (g == c)) for c in seen])

    def rmse(p, g):
        valid = g > 0
        return np.sqrt(np.mean((np.maximum(p[valid], 0) - g[valid]) ** 2))

    def angle(p, g):
        valid = (g != 255).all(axis=-1)
        p, g = (v[valid] / np.linalg.norm(v[valid], axis=-1, keepdims=True) for v in (p, g.astype(np.float32)))
        return np.degrees(np.arccos(np.clip((p * g).sum(axis=-1), -1, 1))).mean()

    rules = {"semseg": (miou, 255), "human_parts": (miou, 255), "depth": (rmse, -1), "normals": (angle, 255)}
    for name, (rule, ignore) in rules.items():
        pairs = [tuple(pair) for pair in inside(run, direct, name)]
        yield name, np.array([np.nan if (g == ignore).all() else rule(p, g) for p, g in pairs])
    of_label = {label.tobytes(): (prediction, label) for prediction, label in run.counted}
    labels = [g[..., 0].tobytes() for _, g in inside(run, direct, "edge")]
    yield (
        "edge",
        np.array([100 * boundary.odsf(boundary.image_counts(*of_label[key], 0.05, kind="lines")) for key in labels]),
    )


def test_the_worst_and_the_best_examples_are_those_by_the_tasks_own_metric(run, direct):
    ranked = run.report["examples_ranked"]
    higher = {task.name: task.published(run.results).higher_is_better for task in run.tasks}
    for name, scores in scores_of_examples(run, direct):
        order = np.argsort(scores if higher[name] else -scores, kind="stable")
        order = order[~np.isnan(scores[order])]
        worst, best = order[:4], [index for index in order[::-1] if index not in order[:4]][:4]
        for end, expected in (("worst", worst), ("best", best)):
            np.testing.assert_allclose([entry["score"] for entry in ranked[name][end]], scores[expected], rtol=2e-2)
            assert [entry["id"] for entry in ranked[name][end]] == direct.batch["id"][expected].tolist(), (name, end)
    assert {len(of["worst"]) for of in ranked.values()} <= {1, 2, 3, 4}


def test_scenes_without_people_are_not_ranked_for_human_parts(run, direct):
    with_people = {i for i, (_, g) in enumerate(inside(run, direct, "human_parts")) if (np.asarray(g) != 255).any()}
    assert with_people < set(range(EXAMPLES))
    ranked = run.report["examples_ranked"]["human_parts"]
    shown = {entry["id"] for end in ("worst", "best") for entry in ranked[end]}
    assert shown <= set(direct.batch["id"][sorted(with_people)])
    assert len(shown) == min(8, len(with_people))


def test_gates_are_means_over_the_pixels_of_the_pictures(run, direct):
    patch = direct.model.backbone.stride
    pixels = np.zeros((EXAMPLES, 32, 48))
    for example, (top, left, height, width) in zip(pixels, direct.batch["window"], strict=True):
        example[top : top + height, left : left + width] = 1
    share = pixels.reshape(EXAMPLES, 32 // patch, patch, 48 // patch, patch).sum(axis=(2, 4)).reshape(EXAMPLES, -1)
    assert len(np.unique(share)) > 2  # besides the tokens wholly inside or outside, some lie on the border
    gates = np.moveaxis(direct.gates.astype(np.float64), 1, 0)  # (T, S, B, N, K + 1)
    written = run.report["gates"]
    assert written["choices"] == ["expert 1", "expert 2", "expert 3", "expert 4", "expert 5", "memory"]
    for task, weights in zip(run.tasks, gates, strict=True):
        of_task = written["tasks"][task.name]
        mean = np.einsum("sbnk,bn->sk", weights, share) / share.sum()
        np.testing.assert_allclose(of_task["weights"], mean, rtol=1e-4)
        entropy = -(weights * np.log(weights)).sum(axis=-1) / np.log(6)
        np.testing.assert_allclose(of_task["entropy"], (entropy * share).sum(axis=(1, 2)) / share.sum(), rtol=1e-4)


def snapshot(folder):
    """Path -> time of the last change and size, of everything in a folder."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_folder_that_cannot_be_written_is_said_before_the_data_are_read(run, tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(UserError, match=r"results cannot be written to .*is a file; give another .* with --output")
    with refused:
        evaluate.evaluate(run.config, run.workdir, "latest", lambda: pytest.fail("read"), tmp_path / "file" / "below")


# As with a run on a read-only disk: nothing in it is changed. (Permissions would not stop root.)
def test_the_table_stars_odsf_where_it_was_computed_and_the_loss_elsewhere(run, tmp_path, capsys):
    edge = next(task for task in run.tasks if task.name == "edge")
    assert edge.published(run.results).metric == "odsF"
    assert edge.published({"edge/loss_plain": 0.1}).metric == "loss_plain"
    config = run.config.copy_and_resolve_references()
    config.eval.boundary.odsf = False
    config.eval.flip = True
    config.eval.max_examples = 3
    before = snapshot(run.workdir)
    results = evaluate.evaluate(config, run.workdir, "latest", lambda: batches_of(config), tmp_path / "a" / "b")
    assert snapshot(run.workdir) == before
    assert "edge/odsF" not in results
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("boundaries") and "loss_plain ↓ *" in line for line in lines)
    assert any(line.startswith("3 examples in") for line in lines)
    report = json.loads((tmp_path / "a" / "b" / "metrics.json").read_text())
    assert report["gates"] is None  # those of an image and of its mirror image are not the same gates
    assert report["boundary"] == {} and report["published"]["edge"]["metric"] == "loss_plain"


def test_a_label_of_its_own_for_the_benchmark_is_used_and_unknown_pixels_are_left_out(run):
    (batch, *_) = batches_of(run.config)
    own = np.zeros_like(batch["edge"])
    own[:, 16, 10:30] = 1
    own[:, :, 20] = 255
    batch = {**batch, "edge_benchmark": own}
    edge = next(task for task in run.tasks if task.name == "edge")
    strengths = jax.device_put(np.where(own[..., 0] == 1, 200, 0).astype(np.uint8) + 50)
    values = jax.numpy.zeros(strengths.shape)
    with contextlib.closing(full_pass._Examples(run.config.eval.boundary, (edge,), one_device())) as examples:
        states = full_pass.single_states(edge, values[..., None], batch)
        examples.add(batch, full_pass.Outputs({"edge": states}, {"edge": values}, {"edge": strengths}))
        counts = examples._runs["edge"].counts()
    expected = [
        boundary.image_counts((np.asarray(s) * (o != 255))[4:28, 6:42], (o == 1)[4:28, 6:42], 0.05, kind="lines")
        for s, o in zip(strengths, own[..., 0], strict=True)
    ]
    np.testing.assert_array_equal(counts.table(), boundary.BoundaryCounts.join(expected).table())


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    """Each has half of the devices and of every batch; boundary counts, ranks and samples are brought together."""
    fields = {
        "tasks": ("semseg", "depth", "edge"),
        "dataset.val_scenes": EXAMPLES,
        "model.depth": 1,  # a model that is soon compiled
        "model.taps": 1,
        "model.experts": 2,
        "mesh.data": 4,
        "mesh.fsdp": 2,
        "eval.batch_size": 8,
        "eval.boundary.max_dist": 0.05,
    }
    config = demo.get_config("tiny")
    config.update_from_flattened_dict(fields)
    workdir = tmp_path / "run"
    random_runs.save(config, workdir)
    evaluate.evaluate(config, workdir, "latest", lambda: batches_of(config))
    of_one = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    shutil.rmtree(workdir / "evaluation")

    command = [sys.executable, "main.py", "--mode=evaluate", "--config=configs/demo.py:tiny", "--checkpoint=latest"]
    command += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in fields.items())]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = xla.environment(4, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2")
    both = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(index)}, stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "odsF" in outputs[0] and "odsF" not in outputs[1]  # one table
    of_both = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    assert of_both["examples"] == EXAMPLES
    for part in ("metrics", "best_constant"):
        assert of_both[part] == pytest.approx(of_one[part], rel=1e-4), part
    for name, ranked in of_one["examples_ranked"].items():
        for end in ("worst", "best"):
            ids = [[entry["id"] for entry in of[end]] for of in (ranked, of_both["examples_ranked"][name])]
            assert ids[0] == ids[1], (name, end)


def test_what_is_no_number_is_null_in_the_file() -> None:
    found = json_file.finite({"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf}, "d": 3, "e": "nan"})
    assert found == {"a": [None, 1.5, [None]], "b": {"c": None}, "d": 3, "e": "nan"}
