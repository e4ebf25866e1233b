"""Losses: the family's values and gradients, plain NumPy definitions, and the effect of ignored pixels (none)."""

import json

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from taskexpert_jax.tasks import losses
from tests.golden import definitions, make

LOSSES = {
    "semseg": losses.cross_entropy,
    "human_parts": losses.cross_entropy,
    "sal": losses.balanced_cross_entropy,
    "normals": losses.normals_l1,
    "edge": losses.edge_cross_entropy(0.95),
    "depth": losses.depth_l1,
}
KIND = {"human_parts": "semseg"}  # cross entropy, both
WEIGHTS = {"semseg": 1, "depth": 1, "human_parts": 2, "sal": 5, "normals": 10, "edge": 50}
CASES = [f"{database}_{case}" for database in ("nyud", "pascal") for case in (1, 2, 3)]

GOLDEN = json.loads((make.FOLDER / "losses_metrics.json").read_text())
ONES = np.ones(8, np.float32)

value_and_grad = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in LOSSES.items()}


def draw(task: str, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Random prediction and label, (8, 6, 8, c), with a quarter of the label ignored."""
    rng = np.random.default_rng(0)
    shape = (8, 6, 8)
    channels = {"semseg": 5, "human_parts": 7, "sal": 2, "normals": 3}.get(task, 1)
    prediction = rng.normal(0, scale, (*shape, channels)).astype(np.float32)
    if task == "depth":
        label, ignore = rng.uniform(0.5, 9, (*shape, 1)).astype(np.float32), -1
    elif task == "normals":
        label, ignore = rng.normal(size=(*shape, 3)), 255
        label = (label / np.linalg.norm(label, axis=-1, keepdims=True)).astype(np.float16)
    else:
        label, ignore = rng.integers(0, max(channels, 2), (*shape, 1)).astype(np.uint8), 255
    label[rng.random(shape) < 0.25] = ignore
    return prediction, label


def ignored(task: str) -> int:
    return -1 if task == "depth" else 255


@pytest.mark.parametrize("task", make.CHANNELS)
def test_golden_values_and_gradients(task):
    assert make.checksum(task) == GOLDEN["inputs"][task], "NumPy draws other inputs: run tests.golden.make"
    gradients = np.load(make.FOLDER / "gradients.npz")[task]
    cases = zip(*make.inputs(task), GOLDEN["losses"][task], gradients, strict=True)
    for name, (prediction, label, expected, slope) in zip(make.CASES, cases, strict=True):
        loss, gradient = value_and_grad[task](prediction, label, np.ones(len(label), np.float32))
        np.testing.assert_allclose(loss, expected, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6 * np.abs(slope).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_published_values_and_gradients(golden_dir, case):
    expected = json.loads((golden_dir / "losses_metrics.json").read_text())[case]["losses"]
    arrays = np.load(golden_dir / "losses_metrics.npz")
    total = 0.0
    for task in set(expected) - {"total"}:
        prediction, label = arrays[f"{case}/pred/{task}"], arrays[f"{case}/label/{task}"]
        loss, gradient = value_and_grad[task](prediction, label, np.ones(len(label), np.float32))
        np.testing.assert_allclose(loss, expected[task], rtol=1e-5, err_msg=task)
        golden = arrays[f"{case}/grad_total/{task}"]
        # The smallest elements suffer from cancellation, and the golden float32 values themselves have larger errors.
        rounding = 1e-6 * np.abs(golden).max()
        np.testing.assert_allclose(WEIGHTS[task] * gradient, golden, rtol=1e-5, atol=rounding, err_msg=task)
        total += WEIGHTS[task] * loss
    np.testing.assert_allclose(total, expected["total"], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e4])
@pytest.mark.parametrize("task", LOSSES)
def test_equals_the_definition(task, scale):
    prediction, label = draw(task, scale=scale)
    loss, gradient = value_and_grad[task](prediction, label, ONES)
    assert loss.dtype == np.float32 and loss.shape == ()
    np.testing.assert_allclose(loss, definitions.loss(KIND.get(task, task), prediction, label)[0], rtol=2e-6)
    assert np.isfinite(gradient).all()


def test_the_gradient_of_a_sure_pixel_keeps_its_digits():
    """softmax - 1 of the correct class at large logits, which would be rounding error if computed naively."""
    logits = np.array([12.0, 0.0, 1.0], np.float32) + 1000
    label = np.zeros((1, 1, 1, 1), np.uint8)
    loss, gradient = value_and_grad["semseg"](logits[None, None, None], label, None)
    others = np.exp([-12.0, -11.0])
    np.testing.assert_allclose(loss, np.log1p(others.sum()), rtol=5e-3)
    np.testing.assert_allclose(gradient[0, 0, 0, 1:], others / (1 + others.sum()), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0, 0, 0], -others.sum() / (1 + others.sum()), rtol=5e-3)


def test_the_form_for_tpus_picks_the_same_logits():
    prediction, label = draw("semseg")
    arguments = jnp.asarray(prediction), jnp.asarray(np.where(label == 255, 0, label)[..., 0].astype(np.int32))
    np.testing.assert_array_equal(losses._own_by_sum(*arguments), losses._own_by_gather(*arguments))
    for platform, gathers in (("tpu", False), ("cpu", True)):
        export = jax.export.export(jax.jit(losses.cross_entropy), platforms=[platform])(prediction, label)
        assert ('"stablehlo.gather"' in export.mlir_module()) == gathers


@pytest.mark.parametrize("task", LOSSES)
def test_the_dtype_of_the_label_changes_nothing(task):
    prediction, label = draw(task)
    if task == "depth":
        label = label.astype(np.float16)
    dtypes = [np.float16, np.float32] if task in ("depth", "normals") else [np.uint8, np.int32, np.float16, np.float32]
    values = {float(LOSSES[task](prediction, label.astype(dtype), None)) for dtype in dtypes}
    assert len(values) == 1


@pytest.mark.parametrize("task", LOSSES)
def test_padding_counts_nowhere(task):
    prediction, label = draw(task)
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    loss, gradient = value_and_grad[task](prediction, label, mask)
    np.testing.assert_allclose(loss, definitions.loss(KIND.get(task, task), prediction[:5], label[:5])[0], rtol=2e-6)
    np.testing.assert_array_equal(gradient[5:], 0)
    # Bit-identical to ignored labels.
    label[5:] = ignored(task)
    ignoring, ignoring_gradient = value_and_grad[task](prediction, label, ONES)
    np.testing.assert_array_equal(ignoring, loss)
    np.testing.assert_array_equal(ignoring_gradient, gradient)


def test_no_mask_is_a_mask_of_ones():
    prediction, label = draw("sal")
    assert LOSSES["sal"](prediction, label) == value_and_grad["sal"](prediction, label, ONES)[0]


@pytest.mark.parametrize("task", LOSSES)
def test_nothing_valid_gives_zero_and_no_gradient(task):
    prediction, label = draw(task)
    for labels, mask in [(np.full_like(label, ignored(task)), 1), (label, 0)]:
        loss, gradient = value_and_grad[task](prediction, labels, np.full(len(label), mask, np.float32))
        assert loss == 0
        np.testing.assert_array_equal(gradient, 0)


def test_a_normal_of_length_zero_has_its_whole_label_as_loss_and_no_gradient():
    prediction, label = draw("normals")
    label = np.where(label == 255, np.float16(0.5), label)
    prediction[0, 0, 0] = 0
    prediction[0, 0, 1] = 1e-13
    loss, gradient = value_and_grad["normals"](prediction, label, ONES)
    np.testing.assert_array_equal(gradient[0, 0, :2], 0)
    assert np.isfinite(loss) and (np.abs(gradient[1:]).max(axis=-1) > 0).all()
    unit = np.asarray(losses.unit_length(jnp.asarray(prediction)))
    np.testing.assert_array_equal(unit[0, 0, :2], 0)
    np.testing.assert_allclose(np.linalg.norm(unit[1:], axis=-1), 1, rtol=1e-6)


def test_a_normal_is_ignored_when_a_single_component_is():
    prediction, label = draw("normals")
    expected = LOSSES["normals"](prediction, label, None)
    label[label[..., 0] == 255] = [0, 255, 0]
    assert LOSSES["normals"](prediction, label, None) == expected


def test_saliency_of_one_class_has_no_loss():
    prediction, label = draw("sal")
    assert LOSSES["sal"](prediction, np.where(label == 255, label, 1), None) == 0


def test_the_weight_of_edges_moves_the_loss_from_negatives_to_positives():
    prediction, label = draw("edge")
    positives, negatives = np.where(label == 0, 255, label), np.where(label == 1, 255, label)
    for weight in (0.2, 0.8):
        one_class = [losses.edge_cross_entropy(weight)(prediction, part) for part in (positives, negatives)]
        even = [2 * losses.edge_cross_entropy(0.5)(prediction, part) for part in (positives, negatives)]
        np.testing.assert_allclose(one_class, [weight * even[0], (1 - weight) * even[1]], rtol=1e-6)
    assert losses.edge_cross_entropy(0.2) is losses.edge_cross_entropy(0.2)


@pytest.mark.multidevice
@pytest.mark.parametrize("task", ["semseg", "sal", "normals"])
def test_eight_devices_give_the_loss_of_one(task):
    """The mean is over the whole batch and not per device, also if some devices hold only ignored pixels."""
    prediction, label = draw(task)
    label[2:5] = ignored(task)
    mask = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    expected, expected_gradient = value_and_grad[task](prediction, label, mask)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    loss, gradient = value_and_grad[task](*jax.device_put((prediction, label, mask), sharding))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
