"""Batches: determined by seed and step for any number of processes; evaluation sees every example once."""

from collections.abc import Iterator
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import ml_collections
import numpy as np
import nyud_layout
import pytest
import tensorflow as tf

from configs import nyud as nyud_config
from input_pipeline import nyud, pipeline, prepare, records, stream
from taskexpert_jax import tasks
from taskexpert_jax.errors import UserError

SIZE = (32, 48)  # the layout has images of 30x40


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("pipeline")
    prepare.prepare("nyud", nyud_layout.write(folder / "NYUDv2"), folder / "built", allow_subset=True)
    return folder / "built"


@pytest.fixture
def config(built: pathlib.Path) -> ml_collections.ConfigDict:
    config = nyud_config.get_config("vit_b16")
    config.dataset.data_dir = str(built)
    config.dataset.image_size = SIZE
    config.batch_size = 4
    config.seed = 3
    return config


@pytest.fixture
def plain(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Config without augmentation: training examples are whole images."""
    config.augment.scale_min = config.augment.scale_max = 1.0
    config.augment.flip_probability = config.augment.photometric_probability = 0.0
    return config


def train(config: ml_collections.ConfigDict, count: int, **place: int) -> list[pipeline.Batch]:
    return list(itertools.islice(pipeline.train_batches(config, tasks.from_config(config), **place), count))


def evaluation(config: ml_collections.ConfigDict, batch_size: int, **place) -> list[pipeline.Batch]:
    return list(pipeline.eval_batches(config, tasks.from_config(config), batch_size=batch_size, **place))


def shown(batches: list[pipeline.Batch]) -> list[str]:
    """Ids of the images in the batches, looked up by pixels."""
    names = {nyud_layout.frame(i, 30, 40)["images"].tobytes(): i for i in (*nyud_layout.TRAIN, *nyud_layout.VAL)}
    return [names[image[1:31, 4:44].tobytes()] for batch in batches for image in batch["image"]]


def assert_same(one: pipeline.Batch, other: pipeline.Batch) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def joined(parts: list[pipeline.Batch]) -> pipeline.Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_a_batch_is_a_function_of_seed_and_step(config: ml_collections.ConfigDict) -> None:
    batches = train(config, 6)  # more than one epoch, so that the cache is used too
    for config.dataset.cache, config.dataset.threads in ((True, 1), (False, 3)):
        for batch, again in zip(batches, train(config, 6), strict=True):
            assert_same(batch, again)
    assert not np.array_equal(batches[0]["image"], batches[1]["image"])
    config.seed = 4
    assert not np.array_equal(train(config, 1)[0]["image"], batches[0]["image"])


def test_resuming_at_a_step_gives_its_batch(config: ml_collections.ConfigDict) -> None:
    batches = train(config, 7)
    for step in (1, 5):
        for batch, resumed in zip(batches[step : step + 2], train(config, 2, start_step=step), strict=True):
            assert_same(batch, resumed)


def test_resuming_far_away_is_immediate(config: ml_collections.ConfigDict) -> None:
    assert train(config, 1, start_step=10**12)[0]["image"].shape == (4, *SIZE, 3)


def test_processes_share_the_global_batch(config: ml_collections.ConfigDict) -> None:
    batches = train(config, 3, start_step=1)
    halves = [train(config, 3, start_step=1, rows=rows) for rows in ([0, 1], [2, 3])]
    last_quarter = train(config, 3, start_step=1, rows=[3])
    for step, batch in enumerate(batches):
        assert_same(joined([half[step] for half in halves]), batch)
        assert_same(last_quarter[step], {name: value[3:] for name, value in batch.items()})


def test_every_epoch_is_a_permutation_of_its_own(plain: ml_collections.ConfigDict) -> None:
    stream = shown(train(plain, 15))  # 60 examples: 12 epochs of 5
    epochs = [tuple(stream[start : start + 5]) for start in range(0, 60, 5)]
    assert all(sorted(epoch) == sorted(nyud_layout.TRAIN) for epoch in epochs)
    assert len(set(epochs)) > 8
    plain.seed = 5
    assert shown(train(plain, 15)) != stream


def test_a_single_example_fills_a_batch(plain: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
    layout = nyud_layout.write(tmp_path / "NYUDv2", train=["0001"], val=["0002"])
    prepare.prepare("nyud", layout, tmp_path / "built", allow_subset=True)
    plain.dataset.data_dir = str(tmp_path / "built")
    assert shown(train(plain, 2)) == ["0001"] * 8


def test_batches_have_the_agreed_shapes_and_types(config: ml_collections.ConfigDict) -> None:
    built_tasks = tasks.from_config(config)
    for batch in (train(config, 1)[0], evaluation(config, 4)[0]):
        assert batch["image"].shape == (4, *SIZE, 3) and batch["image"].dtype == np.uint8
        assert batch["window"].shape == (4, 4) and batch["window"].dtype == np.int32
        assert batch["mask"].shape == (4,) and batch["mask"].dtype == np.float32
        for task in built_tasks:
            assert batch[task.name].shape == (4, *SIZE, task.label_channels)
            assert batch[task.name].dtype == task.label_dtype
            top, left, height, width = batch["window"][0]
            outside = np.ones(SIZE, bool)
            outside[top : top + height, left : left + width] = False
            assert (batch[task.name][0][outside] == task.ignore).all()
    config.tasks = ("depth", "edge")
    assert set(train(config, 1)[0]) == {"image", "window", "mask", "depth", "edge", "id"}
    assert set(evaluation(config, 4)[0]) == {"image", "window", "mask", "depth", "edge", "id"}


def test_augmentation_follows_its_strengths(plain: ml_collections.ConfigDict) -> None:
    unchanged = train(plain, 1)[0]
    plain.augment.flip_probability = 1.0
    flipped = train(plain, 1)[0]
    np.testing.assert_array_equal(flipped["image"], unchanged["image"][:, :, ::-1])
    inside = unchanged["normals"] != 255
    np.testing.assert_array_equal(
        flipped["normals"][:, :, ::-1][inside], (unchanged["normals"] * np.array([-1, 1, 1], np.float16))[inside]
    )
    plain.augment.flip_probability = 0.0
    plain.augment.scale_min = plain.augment.scale_max = 0.5
    half = train(plain, 1)[0]
    assert half["window"].tolist() == [[8, 14, 15, 20]] * 4
    valid = unchanged["depth"] > 0
    assert half["depth"].max() == pytest.approx(2 * unchanged["depth"][valid].max(), rel=0.05)
    plain.augment.scale_max = 2.0
    windows = np.concatenate([batch["window"] for batch in train(plain, 4)])
    assert (windows[:, 2] <= 32).all() and (windows[:, 3] <= 48).all()
    assert len(np.unique(windows[:, 2])) > 4


def test_every_strength_of_the_config_is_read(plain: ml_collections.ConfigDict) -> None:
    unchanged = train(plain, 1)[0]["image"]

    def differs(**strengths: float) -> bool:
        config = plain.copy_and_resolve_references()
        config.augment.photometric_probability = 1.0
        for name in ("contrast_min", "contrast_max", "saturation_min", "saturation_max"):
            config.augment[name] = 1.0
        config.augment.brightness, config.augment.hue = 0.0, 0
        before = train(config, 1)[0]["image"]
        config.augment.update(strengths)
        return not np.array_equal(train(config, 1)[0]["image"], before)

    assert differs(brightness=32.0) and differs(hue=18)
    assert differs(contrast_min=0.5) and differs(contrast_max=1.5)
    assert differs(saturation_min=0.5) and differs(saturation_max=1.5)
    assert not differs() and differs(photometric_probability=0.0)  # HSV and back rounds
    plain.augment.photometric_probability = 0.5
    assert not np.array_equal(train(plain, 1)[0]["image"], unchanged)

    plain.dataset.image_size = (16, 16)
    first = train(plain, 3)
    plain.augment.crop_max_class_share = 0.01
    redrawn = train(plain, 3)
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, redrawn, strict=True))
    plain.augment.crop_redraws = 0
    for one, other in zip(first, train(plain, 3), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    ("batch_size", "processes", "cache"),
    [(1, 1, True), (2, 1, False), (3, 1, True), (8, 1, False), (2, 2, True), (4, 2, False), (4, 4, True), (8, 4, True)],
)
def test_evaluation_sees_every_example_once(
    config: ml_collections.ConfigDict, batch_size: int, processes: int, cache: bool
) -> None:
    config.dataset.cache = cache
    split = np.arange(batch_size).reshape(processes, -1)
    parts = [evaluation(config, batch_size, rows=rows) for rows in split]
    assert {len(part) for part in parts} == {-(-3 // batch_size)}
    batches = [joined(list(step)) for step in zip(*parts, strict=True)]
    ids = [i for batch in batches for i in batch["id"]]
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert ids == [*nyud_layout.VAL, *[""] * (len(ids) - 3)]
    assert mask.tolist() == [1.0] * 3 + [0.0] * (len(ids) - 3)
    assert shown(batches)[:3] == list(nyud_layout.VAL)


def test_evaluation_of_a_part_and_of_another_split(config: ml_collections.ConfigDict) -> None:
    config.eval.max_examples = 2
    batches = evaluation(config, 4)
    assert [batch["id"].tolist() for batch in batches] == [["0002", "0009", "", ""]]
    config.eval.max_examples = 100
    assert [batch["mask"].sum() for batch in evaluation(config, 4, split="train")] == [4, 1]
    config.dataset.train_split, config.dataset.eval_split = "val", "train"
    assert [i for batch in evaluation(config, 5) for i in batch["id"]] == list(nyud_layout.TRAIN)
    config.augment.scale_min = config.augment.scale_max = 1.0
    config.augment.flip_probability = config.augment.photometric_probability = 0.0
    assert set(shown(train(config, 3))) == set(nyud_layout.VAL)


def test_downscale_reduces_every_frame(plain: ml_collections.ConfigDict) -> None:
    full = evaluation(plain, 4)[0]
    plain.dataset.downscale, plain.dataset.image_size = 0.5, (16, 24)
    for batch in (evaluation(plain, 4)[0], train(plain, 1)[0]):
        assert batch["image"].shape == (4, 16, 24, 3)
        assert batch["window"].tolist() == [[0, 2, 15, 20]] * 4
    half = evaluation(plain, 4)[0]
    np.testing.assert_array_equal(half["depth"][:, :15, 2:22], full["depth"][:, 1:31, 4:44][:, 1::2, 1::2])


class CountingSource:
    """Source of constant images; counts how often each is decoded."""

    labels = ("semseg",)

    def __init__(self) -> None:
        self.loads = [0, 0, 0]

    def __len__(self) -> int:
        return len(self.loads)

    def load(self, index: int) -> dict[str, Any]:
        self.loads[index] += 1
        flat = np.full((8, 8, 1), index, np.uint8)
        return {"image": flat.repeat(3, axis=2), "semseg": flat, "id": str(index)}


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, config: ml_collections.ConfigDict) -> Iterator[CountingSource]:
    """A CountingSource as the data set of the config."""
    source = CountingSource()

    class Module:
        @staticmethod
        def source(config: ml_collections.ConfigDict, split: str) -> CountingSource:
            return source

    monkeypatch.setattr(records, "dataset_module", lambda name: Module)
    monkeypatch.setattr(pipeline, "_kept", {})
    config.dataset.image_size = (8, 8)
    config.tasks = ("semseg",)
    config.dataset.threads = 1
    return source


def test_the_cache_decodes_an_example_once(config: ml_collections.ConfigDict, counting: CountingSource) -> None:
    for _ in range(3):
        ids = [i for batch in evaluation(config, 3) for i in batch["id"]]
        assert ids == ["0", "1", "2"]
    assert counting.loads == [1, 1, 1]
    config.dataset.cache = False
    evaluation(config, 3)
    evaluation(config, 3)
    assert counting.loads == [3, 3, 3]


def test_a_process_reads_its_own_part_only(config: ml_collections.ConfigDict, counting: CountingSource) -> None:
    config.dataset.cache = False
    counting.loads = [0] * 16
    evaluation(config, 8, rows=[2, 3])
    assert [index for index, loads in enumerate(counting.loads) if loads] == [2, 3, 10, 11]
    counting.loads = [0] * 16
    config.batch_size = 8
    epoch = [stream.shuffled_index(position, config.seed, 16) for position in range(16)]
    batches = pipeline.train_batches(config, tasks.from_config(config), rows=[2, 3])
    seen = [int(label[0, 0, 0]) for batch in itertools.islice(batches, 2) for label in batch["semseg"]]
    assert seen == [epoch[2], epoch[3], epoch[10], epoch[11]]


def test_a_fault_while_reading_is_raised_as_it_is(
    config: ml_collections.ConfigDict, counting: CountingSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(index: int) -> dict[str, Any]:
        raise UserError(f"frame {index} is broken")

    monkeypatch.setattr(counting, "load", broken)
    with pytest.raises(UserError, match=r"^frame 0 is broken$"):
        evaluation(config, 1)


@pytest.mark.parametrize("deleted", ["nyud-val.array_record*", "*"])
def test_data_that_are_deleted_or_cut_during_a_run_are_one_line(
    config: ml_collections.ConfigDict, built: pathlib.Path, tmp_path: pathlib.Path, deleted: str
) -> None:
    config.dataset.data_dir = str(shutil.copytree(built, tmp_path / "copy"))
    config.dataset.cache = False
    folder = tmp_path / "copy" / "nyud" / str(nyud.Builder.VERSION)
    batches = pipeline.eval_batches(config, tasks.from_config(config), batch_size=1)
    for path in folder.glob(deleted):
        path.unlink()
    with pytest.raises(UserError, match=rf"^{folder}: record 0 cannot be read \(.*No such file.*build it again$"):
        next(batches)
    if deleted == "*":
        with pytest.raises(UserError, match=rf"^no built data set at {folder}"):
            evaluation(config, 1)


def test_a_task_without_a_label_in_the_first_batches_is_warned_of_once(
    config: ml_collections.ConfigDict,
    counting: CountingSource,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.num_steps = 3
    train(config, 5)
    assert "warning" not in capsys.readouterr().err
    load = counting.load
    monkeypatch.setattr(counting, "load", lambda index: {**load(index), "semseg": np.full((8, 8, 1), 255, np.uint8)})
    config.dataset.cache = False
    train(config, 2)
    assert "warning" not in capsys.readouterr().err
    train(config, 5)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match("warning: semseg: no valid label in the first 3 training batches, so it is not learned; .*", line)


def test_two_processes_read_each_example_once(built: pathlib.Path) -> None:
    """Two epochs of five training images in each global batch, and the evaluation set; the processes run in turn."""
    config = nyud_config.get_config("vit_b16")
    config.dataset.data_dir, config.dataset.image_size, config.batch_size, config.seed = str(built), (32, 48), 10, 3
    config.augment.scale_min = config.augment.scale_max = 1.0
    config.augment.flip_probability = config.augment.photometric_probability = 0.0
    built_tasks = tasks.from_config(config)
    trained, evaluated = [], []
    for index in range(2):
        rows = np.arange(10).reshape(2, 5)[index]
        trained.append(list(itertools.islice(pipeline.train_batches(config, built_tasks, rows=rows), 2)))
        for batch in pipeline.eval_batches(config, built_tasks, batch_size=2, rows=[index]):
            evaluated += batch["id"].tolist()
    assert sorted(evaluated) == ["", *sorted(nyud_layout.VAL)]
    for step in range(2):
        first, second = (shown([batches[step]]) for batches in trained)
        assert sorted(first + second) == sorted(2 * nyud_layout.TRAIN)
        assert sorted(first) == sorted(nyud_layout.TRAIN)


def test_a_program_may_end_in_the_middle_of_an_iteration(built: pathlib.Path) -> None:
    """The exit status is the program's; TensorFlow's threads do not abort it."""
    program = (
        "import sys; from configs import nyud; from input_pipeline import pipeline; from taskexpert_jax import tasks;"
        f"config = nyud.get_config('vit_b16'); config.dataset.data_dir = {str(built)!r};"
        "batches = pipeline.train_batches(config, tasks.from_config(config)); next(batches); sys.exit(3)"
    )
    root = pathlib.Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 3, ended.stderr


def test_the_cache_keeps_only_what_is_read(config: ml_collections.ConfigDict, counting: CountingSource) -> None:
    config.eval.max_examples = 1
    evaluation(config, 1)
    assert counting.loads == [1, 0, 0]


def test_threads_are_those_of_the_config(config: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = tf.data.Dataset.map

    def spy(self, function, num_parallel_calls=None, **rest):
        used.append(num_parallel_calls)
        return original(self, function, num_parallel_calls, **rest)

    monkeypatch.setattr(tf.data.Dataset, "map", spy)
    config.dataset.threads = 3
    evaluation(config, 4)
    config.dataset.threads = 0
    evaluation(config, 4)
    assert [calls for calls in used if calls is not None] == [3, tf.data.AUTOTUNE]


def test_a_frame_that_does_not_fit_is_named(config: ml_collections.ConfigDict) -> None:
    config.dataset.image_size = (32, 32)
    message = r"\b0002\b.*30x40.*32x32.* --config.eval.image_size='\(32,40\)'$"
    with pytest.raises(UserError, match=message):
        evaluation(config, 4)
    assert train(config, 1)[0]["image"].shape == (4, 32, 32, 3)  # training crops


def test_what_cannot_work_is_said_at_the_call(config: ml_collections.ConfigDict) -> None:
    built_tasks = tasks.from_config(config)
    parts = tasks.build(["human_parts"], loss_weights={"human_parts": 1.0})
    with pytest.raises(UserError, match=r"'nyud' .*'human_parts'.* semseg, depth"):
        pipeline.train_batches(config, parts)
    config.dataset.name = "nyud2"
    with pytest.raises(UserError, match=r"'nyud2'"):
        pipeline.eval_batches(config, built_tasks, batch_size=4)


def test_tensorflow_prints_no_traceback_of_an_unreadable_example() -> None:
    """Its warnings are off, although JAX, imported before, turns them on."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    code = "import jax, input_pipeline, os; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    command = [sys.executable, "-c", code]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=True)
    assert done.stdout == "2\n"
