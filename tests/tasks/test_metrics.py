"""Metrics: the family's numbers, plain NumPy definitions, and independence of how the set is split and padded."""

import functools
import json
import math

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
from scipy.special import expit

from taskexpert_jax.tasks import losses, metrics
from taskexpert_jax.tasks.metrics import segmentation, sums
from tests.golden import definitions, make

METRICS = {
    "semseg": metrics.mean_iou(5),
    "depth": metrics.Depth,
    "disparity": metrics.Disparity,
    "normals": metrics.Normals,
    "sal": metrics.Saliency,
    "edge": metrics.edge_loss(0.95),
}
GOLDEN = json.loads((make.FOLDER / "losses_metrics.json").read_text())
IGNORED = {"depth": -1, "disparity": -1}  # 255 elsewhere


@functools.cache
def jitted(metric):
    """Jitted update (state, batch) -> state, as in an evaluation step."""

    def step(state, prediction, label, mask):
        return state.merge(metric.from_model_output(prediction=prediction, label=label, mask=mask))

    return jax.jit(step, donate_argnums=0)


def pooled(metric, *batches):
    """State after batches (prediction, label, mask)."""
    state = metric.empty()
    for batch in batches:
        state = jitted(metric)(state, *batch)
    return state


def draw(task: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random label with a quarter of it ignored, a prediction correlated with it, and a mask of ones."""
    rng = np.random.default_rng(seed)
    shape = (8, 24, 32)  # the golden size, to compile once
    noise = functools.partial(rng.normal, 0, 1)
    if task in ("depth", "disparity"):
        label = rng.uniform(0.2, 9, (*shape, 1)).astype(np.float32)
        prediction = label * np.exp(noise(size=label.shape) / 3)
        prediction[rng.random(shape) < 0.1] *= -1
        label[rng.random(shape) < 0.05] = 0
        label[rng.random(shape) < 0.05] = 90
        label[rng.random(shape) < 0.05] = 300
    elif task == "normals":
        label = noise(size=(*shape, 3))
        label /= np.linalg.norm(label, axis=-1, keepdims=True)
        prediction = 3 * label + noise(size=label.shape)
        label = label.astype(np.float16)
    else:
        classes, channels = {"semseg": (5, 5), "sal": (2, 2), "edge": (2, 1)}[task]
        label = rng.integers(0, classes, (*shape, 1)).astype(np.uint8)
        own = label == np.arange(classes)[-channels:]
        prediction = 2 * own + noise(size=(*shape, channels))
    label[rng.random(shape) < 0.25] = IGNORED.get(task, 255)
    return prediction.astype(np.float32), label, np.ones(8, np.float32)


def assert_same(state, expected):
    """Asserts equal counts, and sums that are equal except for the last digits of float32."""
    for field, other in zip(leaves(state), leaves(expected), strict=True):
        if isinstance(field, metrics.Count):
            np.testing.assert_array_equal(field.value(), other.value())
        else:
            assert field.value() == pytest.approx(other.value(), rel=1e-7)


def assert_near(computed, expected):
    """Asserts the same names and values; a median only to 0.1 degrees, because it is computed from a histogram."""
    assert computed.keys() == expected.keys()
    for name, value in computed.items():
        assert value == pytest.approx(expected[name], **({"abs": 0.1} if name == "median" else {"rel": 1e-5})), name


def leaves(state):
    return jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, metrics.Count | metrics.Sum))


# Accumulators


def test_counts_are_exact_to_2_to_the_64():
    count = metrics.Count.of(jnp.array([1, 2**24, 2**32 - 1], jnp.uint32))
    expected = [1, 2**24, 2**32 - 1]
    add = jax.jit(lambda a, b: a + b)
    for _ in range(31):  # doubles: passes 2^24 + 1, 2^31, 2^32 and ends just below 2^63
        count = add(add(count, count), metrics.Count.of(jnp.array([1, 0, 0], jnp.uint32)))
        expected = [2 * expected[0] + 1, 2 * expected[1], 2 * expected[2]]
        assert count.value().tolist() == expected
    assert count.value().dtype == np.uint64


def test_ten_million_ones_are_counted_beyond_2_to_the_24():
    start = metrics.Count.of(jnp.asarray(2**24 - 3, jnp.uint32))
    one = metrics.Count.of(jnp.asarray(1, jnp.uint32))
    end = jax.jit(lambda start: jax.lax.fori_loop(0, 10_000_000, lambda _, count: count + one, start))(start)
    assert end.value() == 2**24 - 3 + 10_000_000


def test_sums_keep_what_float32_loses():
    values = np.random.default_rng(0).lognormal(0, 3, 100_000).astype(np.float32)
    exact = math.fsum(values.astype(np.float64))

    def add(state, value):
        total, naive = state
        return (total + metrics.Sum(total=value, error=jnp.zeros(())), naive + value), None

    start = (metrics.Sum.zeros(), jnp.zeros(()))
    (total, naive), _ = jax.jit(lambda values: jax.lax.scan(add, start, values))(values)
    assert total.value() == pytest.approx(exact, rel=1e-12)
    assert naive != pytest.approx(exact, rel=1e-6)


def test_the_sum_of_a_batch_equals_float64_and_skips_invalid_pixels():
    rng = np.random.default_rng(0)
    values = (rng.random((3, 45, 57)) ** 3).astype(np.float32)
    valid = rng.random(values.shape) < 0.5
    exact = values[valid].astype(np.float64).sum()
    values[~valid] = np.nan
    assert jax.jit(metrics.Sum.of)(values, valid).value() == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("bins", [40, 3600])
def test_both_histograms_count_every_index(bins):
    index = np.random.default_rng(0).integers(0, bins + 1, (3, 700)).astype(np.int32)  # `bins` itself: not counted
    expected = [np.bincount(row, minlength=bins + 1)[:bins] for row in index]
    for form in (sums._histogram_by_scatter, sums._histogram_by_product):
        np.testing.assert_array_equal(form(jnp.asarray(index), bins), expected)
    pixels = jnp.asarray(index.reshape(3, 10, 70))
    np.testing.assert_array_equal(metrics.histogram(pixels, bins), np.sum(expected, axis=0))


def test_a_tpu_gets_the_histogram_without_scatter():
    index = jax.ShapeDtypeStruct((2, 4, 4), jnp.int32)
    for platform, scatters in (("tpu", False), ("cpu", True)):
        export = jax.export.export(jax.jit(functools.partial(metrics.histogram, bins=40)), platforms=[platform])(index)
        assert ('"stablehlo.scatter"' in export.mlir_module()) == scatters


# Values


@pytest.mark.parametrize("task", make.CHANNELS)
def test_golden_values(task):
    assert make.checksum(task) == GOLDEN["inputs"][task], "NumPy draws other inputs: run tests.golden.make"
    metric = metrics.mean_iou(make.CHANNELS["semseg"]) if task == "semseg" else METRICS[task]
    batches = zip(*make.inputs(task), np.ones((len(make.CASES), 2), np.float32), strict=True)
    assert_near(pooled(metric, *batches).compute(), GOLDEN["metrics"][task])


@pytest.mark.parametrize("database", ["nyud", "pascal"])
def test_published_metrics(golden_dir, database):
    expected = json.loads((golden_dir / "losses_metrics.json").read_text())[f"{database}_metrics_over_all_cases"]
    arrays = np.load(golden_dir / "losses_metrics.npz")
    for task, values in expected.items():
        # Two images of each of the three cases, and two padding examples.
        prediction, label = (
            np.concatenate([arrays[f"{database}_{case}/{part}/{task}"] for case in (1, 2, 3, 3)])
            for part in ("pred", "label")
        )
        metric = metrics.mean_iou(prediction.shape[-1]) if "mIoU" in values else METRICS[task]
        label = label.astype(np.float32 if task in ("depth", "normals") else np.uint8)
        computed = pooled(metric, (prediction, label, np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32))).compute()
        assert {key: computed[key] for key in values} == pytest.approx(values, rel=1e-6), task


@pytest.mark.parametrize("task", METRICS)
def test_equals_the_definition(task):
    prediction, label, mask = draw(task)
    computed = pooled(METRICS[task], (prediction, label, mask)).compute()
    assert all(type(value) is float for value in computed.values())
    assert_near(computed, definitions.metrics(task, prediction, label))


@pytest.mark.parametrize("task", METRICS)
def test_a_split_into_single_images_changes_nothing(task):
    prediction, label, mask = draw(task)
    expected = pooled(METRICS[task], (prediction, label, mask))
    singles = [(prediction[i : i + 1], label[i : i + 1], mask[:1]) for i in range(len(mask))]
    assert_same(pooled(METRICS[task], *singles), expected)
    assert_same(pooled(METRICS[task], *reversed(singles)), expected)


@pytest.mark.parametrize("task", METRICS)
def test_padding_with_valid_labels_and_nan_predictions_changes_nothing(task):
    prediction, label, mask = draw(task)
    expected = pooled(METRICS[task], (prediction, label, mask))
    parts = []
    for own in (np.arange(8) < 5, np.arange(8) >= 5):
        spoilt = np.where(own[:, None, None, None], prediction, np.float32(np.nan))
        parts.append((spoilt, label, own.astype(np.float32)))
    assert_same(pooled(METRICS[task], *parts), expected)


@pytest.mark.multidevice
@pytest.mark.parametrize("task", ["semseg", "depth", "normals"])  # every kind of field there is
def test_eight_devices_give_the_state_of_one(task):
    prediction, label, mask = draw(task)
    mask[-3:] = 0
    prediction[3, 0, 0] = prediction[6] = np.nan  # an unlabelled pixel, and padding
    label[3, 0, 0] = IGNORED.get(task, 255)
    expected = pooled(METRICS[task], (prediction, label, mask))
    assert expected.nonfinite.value() == 1
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put((prediction, label, mask), NamedSharding(mesh, PartitionSpec("data")))
    assert_same(pooled(METRICS[task], sharded), expected)


@pytest.mark.parametrize("task", METRICS)
def test_states_merge_on_the_host_and_reduce_over_a_leading_axis(task):
    states = [pooled(METRICS[task], draw(task, seed=seed)) for seed in range(3)]
    expected = states[0].merge(states[1]).merge(states[2])
    on_host = jax.device_get(states)
    assert_same(on_host[0].merge(on_host[1]).merge(on_host[2]), expected)
    assert_same(METRICS[task].empty().merge(expected).merge(METRICS[task].empty()), expected)
    assert_same(jax.tree.map(lambda *parts: jnp.stack(parts), *states).reduce(), expected)
    assert jax.device_get(expected).compute() == expected.compute()


@pytest.mark.parametrize("task", METRICS)
def test_without_valid_pixels_every_value_is_nan(task):
    prediction, label, mask = draw(task)
    all_ignored = np.full_like(label, IGNORED.get(task, 255))
    for batch in [(prediction, all_ignored, mask), (prediction, label, 0 * mask)]:
        state = pooled(METRICS[task], batch)
        assert_same(state, METRICS[task].empty())
        assert all(map(math.isnan, state.compute().values())), state.compute()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("task", METRICS)
def test_one_number_that_is_not_finite_makes_every_value_nan(task, bad):
    """NaN logits would be class 0, NaN normals 90 degrees off, NaN saliency the background."""
    prediction, label, mask = draw(task)
    prediction[2, 5, 7, -1] = prediction[4, :2, :, 0] = bad
    label[2, 5, 7] = IGNORED.get(task, 255)  # an ignored pixel tells as much of the model
    state = pooled(METRICS[task], (prediction[:4], label[:4], mask[:4]), (prediction[4:], label[4:], mask[4:]))
    assert state.nonfinite.value() == 2  # examples, however many pixels of each
    values = state.compute()
    assert values.keys() == pooled(METRICS[task], draw(task)).compute().keys()
    assert all(map(math.isnan, values.values())), values
    assert math.isnan(state.of_one_image(next(iter(values))))


@pytest.mark.parametrize("task", METRICS)
def test_counts_go_on_beyond_32_bits(task):
    """Doubling a state 40 times, as for a set 2^40 times as large, does not change its values."""
    state = pooled(METRICS[task], draw(task))
    expected = state.compute()
    state = jax.jit(lambda state: jax.lax.fori_loop(0, 40, lambda _, state: state.merge(state), state))(state)
    assert state.compute() == pytest.approx(expected, rel=1e-12)


def test_no_mask_is_a_mask_of_ones():
    prediction, label, mask = draw("sal")
    expected = pooled(metrics.Saliency, (prediction, label, mask))
    assert_same(pooled(metrics.Saliency, (prediction, label, None)), expected)


# Single metrics


def test_a_class_that_is_never_seen_counts_as_zero():
    metric = metrics.mean_iou(4)
    label = np.array([0, 0, 1, 1, 255], np.uint8).reshape(1, 1, 5, 1)
    prediction = np.eye(4, dtype=np.float32)[[0, 1, 1, 1, 2]].reshape(1, 1, 5, 4)
    state = pooled(metric, (prediction, label, np.ones(1, np.float32)))
    np.testing.assert_allclose(state.per_class(), [50, 100 * 2 / 3, 0, 0])
    assert state.compute() == pytest.approx({"mIoU": (50 + 200 / 3) / 4, "pixel_accuracy": 75})
    assert metrics.mean_iou(4) is metric and metrics.mean_iou(5) is not metric


def test_the_first_of_equal_logits_decides():
    prediction, label = np.array([[[[0, 2, 2]]]], np.float32), np.array([[[[1]]]], np.uint8)
    state = pooled(metrics.mean_iou(3), (prediction, label, np.ones(1, np.float32)))
    np.testing.assert_array_equal(state.per_class(), [0, 100, 0])


def test_logits_of_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match=r"\b5\b.*\b7\b"):
        pooled(metrics.mean_iou(7), draw("semseg"))


def mean_angle(prediction: list[list[float]]) -> float:
    label = np.array([[[[0, 0, 1], [0, 0, 1]]]], np.float32)
    batch = (np.array([[prediction]], np.float32), label, np.ones(1, np.float32))
    return pooled(metrics.Normals, batch).compute()["mean"]


def test_a_normal_of_length_zero_is_ninety_degrees_off():
    assert mean_angle([[0, 0, 0], [0, 0, 2]]) == pytest.approx(45, rel=1e-6)


def test_small_angles_are_measured():
    """0.001 degrees, for which the arc cosine of a float32 dot product would give 0 or 0.02."""
    tilted = [0, np.sin(np.radians(1e-3)), np.cos(np.radians(1e-3))]
    assert mean_angle([tilted, tilted]) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("pos_weight", [0.95, 0.5])
def test_the_family_evaluates_edges_on_another_loss_than_it_trains(pos_weight):
    prediction, label, mask = draw("edge")
    loss = jax.jit(losses.edge_cross_entropy(pos_weight))
    values = pooled(metrics.edge_loss(pos_weight), (prediction, label, mask)).compute()
    assert values["loss_plain"] == pytest.approx(float(loss(prediction, label, mask)), rel=1e-6)
    assert values["loss"] == pytest.approx(float(loss(expit(prediction), label, mask)), rel=1e-6)
    assert metrics.edge_loss(pos_weight) is metrics.edge_loss(pos_weight)


@pytest.mark.parametrize("classes", [2, 7, 40, 200])
def test_the_largest_class_is_the_first_of_the_largest(classes: int) -> None:
    random = np.random.default_rng(0)
    logits = random.integers(-5, 5, (3, 20, 30, classes)).astype(np.float32)  # many ties
    expected = logits.argmax(-1)
    np.testing.assert_array_equal(jax.jit(segmentation.largest_class)(logits), expected)
    np.testing.assert_array_equal(segmentation._largest(jnp.asarray(logits)), expected)
