"""Task records, constant baselines, and the budget of parameters and FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nyud
from taskexpert_jax import tasks
from taskexpert_jax.config.fields import FIELDS
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.tasks import constants as baselines
from taskexpert_jax.tasks import losses

NAMES = ("semseg", "depth", "normals", "edge", "human_parts", "sal")
WEIGHTS = dict.fromkeys(NAMES, 1.0)
ALL = {task.name: task for task in tasks.build(NAMES, loss_weights=WEIGHTS, semseg_classes=("a", "b", "c"))}


def test_a_flip_negates_the_x_of_normals_and_nothing_else():
    label = np.array([[[0.5, -0.25, 1.0]]], np.float16)
    flipped = ALL["normals"].flip(label)
    np.testing.assert_array_equal(flipped, np.array([[[-0.5, -0.25, 1.0]]], np.float16))
    assert flipped.dtype == np.float16
    for name in set(NAMES) - {"normals"}:
        assert ALL[name].flip(label) is label


def test_scaling_the_image_divides_depth_and_nothing_else():
    label = np.array([[[3.0]]], np.float32)
    np.testing.assert_array_equal(ALL["depth"].rescale(label, 1.5), [[[2.0]]])
    for name in set(NAMES) - {"depth"}:
        assert ALL[name].rescale(label, 1.5) is label


def test_values_are_what_a_user_wants_to_see():
    np.testing.assert_array_equal(ALL["semseg"].values(jnp.array([[[[0.0, 2.0, 1.0]]]])), [[[1]]])
    np.testing.assert_array_equal(ALL["depth"].values(jnp.array([[[[-2.0], [3.0]]]])), [[[0.0, 3.0]]])
    np.testing.assert_allclose(ALL["normals"].values(jnp.array([[[[0.0, 3.0, 4.0]]]])), [[[[0, 0.6, 0.8]]]], rtol=1e-6)
    np.testing.assert_allclose(ALL["edge"].values(jnp.array([[[[0.0]]]])), [[[0.5]]])
    np.testing.assert_allclose(ALL["sal"].values(jnp.array([[[[0.0, np.log(3.0)]]]])), [[[0.75]]], rtol=1e-6)


def test_the_largest_depth_is_that_of_the_config_and_the_familys_by_default():
    assert FIELDS["dataset.depth_max"].default == losses.DEPTH_MAX == ALL["depth"].metric.maximum
    config = nyud.get_config("tiny")
    config.dataset.depth_max = 200.0
    depth = tasks.from_config(config)[1]
    assert depth.metric.maximum == 200
    np.testing.assert_array_equal(depth.kind.in_range(np.float32([[[199], [200]]])), [[[199], [0]]])


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (("semsge",), WEIGHTS, "unknown task 'semsge'; did you mean 'semseg'"),
        (("semseg", "semseg"), WEIGHTS, "each once"),
        ((), WEIGHTS, "at least one task"),
        (("depth",), {}, "add config.loss_weights.depth"),
    ],
)
def test_wrong_task_lists_are_named(names, weights, message):
    with pytest.raises(UserError, match=message):
        tasks.build(names, loss_weights=weights, semseg_classes=("a", "b"))


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(UserError, match="semseg: two classes are named 'b'"):
        tasks.build(("semseg",), loss_weights=WEIGHTS, semseg_classes=["a", "b", "b"])


def random_labels(name, count=400):
    random = np.random.default_rng(3)
    return {
        "semseg": random.choice(3, (count, 1), p=[0.2, 0.5, 0.3]),
        "depth": random.uniform(1, 6, (count, 1)),
        "normals": random.normal(size=(count, 3)) + np.array([0.2, -1.5, -1.0]),
        "edge": random.choice(2, (count, 1), p=[0.9, 0.1]),
    }[name].astype(np.float64)


@pytest.mark.parametrize("name", ["semseg", "depth", "normals", "edge"])
def test_no_other_constant_beats_the_best_constant(name):
    """Comparison with 300 random constants by the task's own metric."""
    task, labels = ALL[name], random_labels(name)
    if name == "normals":
        labels /= np.linalg.norm(labels, axis=-1, keepdims=True)
    label = jnp.asarray(labels, task.label_dtype)[None, None]  # one row of pixels

    @jax.jit
    def state(constant):
        prediction = jnp.broadcast_to(constant, (1, 1, len(labels), task.channels))
        return task.metric.from_model_output(prediction=prediction, label=label, mask=jnp.ones(1))

    best = state(task.best_constant(labels)).compute()[task.main_metric]
    others = 3 * np.random.default_rng(0).normal(size=(300, task.channels))
    scores = np.array([state(other).compute()[task.main_metric] for other in others])
    tolerance = 0.05 if name == "normals" else 1e-6  # degrees: directions are tried on a grid
    assert (scores <= best + tolerance).all() if task.higher_is_better else (scores >= best - tolerance).all()
    assert abs(scores - best).max() > 0.01


def test_best_direction_of_one_direction_is_that_direction():
    labels = np.tile([0.0, 0.6, -0.8], (50, 1))
    assert np.degrees(np.arccos(baselines.best_direction(labels) @ labels[0])) < 4


def pascal_vit_l():
    config = nyud.get_config("vit_l16")
    config.dataset.image_size = (512, 512)
    names = ("semseg", "human_parts", "sal", "normals", "edge")
    records = tasks.build(names, loss_weights=WEIGHTS, semseg_classes=tuple(map(str, range(21))))
    return taskexpert.from_config(config, records)


def test_vit_l_on_pascal_context_is_within_the_published_budget():
    """Tables of follow-up papers give 420 M parameters and 622 G multiply-adds at 512x512 for TaskExpert ViT-L."""
    counted = budget.count(pascal_vit_l())
    assert counted.total_parameters == pytest.approx(420e6, rel=0.05)
    assert counted.total_multiply_adds == pytest.approx(622e9, rel=0.05)
    assert sum(counted.parameters.values()) == counted.total_parameters


def test_counted_multiply_adds_equal_the_compilers():
    """Unrolled, because XLA counts the body of a scan once.

    XLA skips products with padding and includes norms and other elementwise operations; at this size both are small.
    """
    config = nyud.get_config("tiny")
    config.model.width, config.model.feature_width, config.model.heads = 128, 96, 4
    config.model.unroll = "yes"
    config.dataset.image_size = (384, 512)
    config.tasks = ("depth", "edge")
    model = taskexpert.from_config(config, tasks.from_config(config))
    image = jax.ShapeDtypeStruct((1, 384, 512, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    lowered = jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, image)
    flops = lowered.cost_analysis()["flops"]
    assert 2 * budget.count(model).total_computed == pytest.approx(flops, rel=0.03)
