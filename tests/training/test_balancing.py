"""Balancing methods on problems whose answers are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nyud
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import balancing, gradients
from taskexpert_jax.training.balancing.dwa import DynamicWeightAverage
from taskexpert_jax.training.balancing.famo import Famo
from taskexpert_jax.training.balancing.pcgrad import PCGrad, projections
from taskexpert_jax.training.balancing.uncertainty import Uncertainty


def test_a_name_that_no_method_has_is_refused_with_the_known_ones():
    config = nyud.get_config("tiny")
    config.balancing = "gradnorm"
    with pytest.raises(UserError, match=r"^config.balancing='gradnorm': choose one of fixed, uncertainty, dwa, "):
        balancing.from_config(config, from_config(config))


def test_fixed_weights_have_no_state_and_change_nothing():
    method = balancing.from_config(nyud.get_config("tiny"), ())
    assert method.init() == {} and method.weights({}, jnp.ones(2)) is None and not method.separate


# --- PCGrad ---


def pcgrad(gradients_of_tasks, shared=True, key=0):
    stacked = {"kernel": jnp.array(gradients_of_tasks, jnp.float32)}
    found, weights = PCGrad().combined(stacked, {"kernel": jnp.array(shared)}, jax.random.key(key))
    return np.asarray(found["kernel"]), np.asarray(weights)


def test_two_conflicting_gradients_are_projected_onto_each_others_normal_planes():
    """(1, 0) and (-1, 1): the first becomes (1, 0) + (-1, 1) / 2, the second (-1, 1) + (1, 0)."""
    found, weights = pcgrad([[1, 0], [-1, 1]])
    np.testing.assert_allclose(found, [0.5, 0.5 + 1], rtol=1e-6)
    np.testing.assert_allclose(weights, [1 + 1, 0.5 + 1], rtol=1e-6)


def test_gradients_that_do_not_conflict_are_added():
    for given in ([[1, 0], [0, 1]], [[1, 2, 3], [3, 2, 1], [0, 1, 0]]):
        found, weights = pcgrad(given)
        np.testing.assert_array_equal(found, np.sum(given, axis=0))
        np.testing.assert_array_equal(weights, 1)


def test_parameters_that_are_not_shared_keep_their_own_gradient_and_do_not_count():
    """The second parameter decides no conflict: over both the product would be negative."""
    found, weights = pcgrad([[1, 2], [1, -3]], [True, False])
    np.testing.assert_array_equal(found, [2, -1])
    np.testing.assert_array_equal(weights, 1)
    found, _ = pcgrad([[1, 2], [-2, 0]], [True, False])
    np.testing.assert_allclose(found, [0, 2], atol=1e-6)  # opposite gradients cancel, in any ratio


def by_the_paper(given, orders):
    """Algorithm 1 on vectors: the tasks' gradients and for each task the order of the others."""
    total = np.zeros(given.shape[1])
    for own, order in zip(given, orders, strict=True):
        projected = own.copy()
        for other in (given[j] for j in order):
            if projected @ other < 0:
                projected -= projected @ other / (other @ other) * other
        total += projected
    return total


def test_three_conflicting_gradients_give_the_papers_result_in_a_random_order():
    given = np.random.default_rng(0).normal(size=(3, 2)) - [[1.5, 0], [-1.5, 1], [0, -1.5]]
    orders = [list(itertools.permutations(set(range(3)) - {task})) for task in range(3)]
    expected = np.array([by_the_paper(given, of_all) for of_all in itertools.product(*orders)])
    found = np.array([pcgrad(given, key=key)[0] for key in range(30)])
    distance = np.abs(found[:, None] - expected).max(axis=-1)
    assert distance.min(axis=1).max() < 1e-5
    distinct = {tuple(row) for row in expected.round(4)}
    assert len(distinct) > 2 and {tuple(expected[i].round(4)) for i in distance.argmin(axis=1)} == distinct
    np.testing.assert_array_equal(*(pcgrad(given, key=3)[0] for _ in range(2)))  # f(key)


def test_a_task_without_gradient_conflicts_with_none():
    np.testing.assert_array_equal(projections(jnp.array([[0.0, 0.0], [0.0, 4.0]]), jax.random.key(0)), np.eye(2))


def test_an_array_is_shared_if_two_tasks_have_a_gradient_in_it_and_an_axis_of_tasks_is_looked_at_part_by_part():
    both, one = jnp.array([[0.0, 2.0], [3.0, 0.0]]), jnp.array([[0.0, 2.0], [0.0, 0.0]])
    parts = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]])  # (T, tasks, 2)
    found = gradients.shared_parameters({"a": both, "b": one, "c": parts}, {"a": -1, "b": -1, "c": 0})
    assert {name: mask.shape for name, mask in found.items()} == {"a": (1,), "b": (1,), "c": (2, 1)}
    assert found["a"].all() and not found["b"].any() and not found["c"].any()


# --- uncertainty ---


def test_uncertainty_ends_with_the_variance_that_the_losses_have():
    """Regression: sigma^2 = L. Classification, L / sigma^2 + log sigma: sigma^2 = 2 L. Both weigh 1 / (2 L)."""
    method, losses = Uncertainty((0.5, 1.0, 0.5), 0.01), jnp.array([4.0, 0.25, 0.5])
    state = method.init()
    np.testing.assert_array_equal(method.weights(state, losses), [0.5, 1.0, 0.5])
    state = jax.lax.fori_loop(0, 3000, lambda _, state: method.updated(state, losses), state)
    np.testing.assert_allclose(jnp.exp(state["log_variances"]), [4.0, 0.5, 0.5], rtol=1e-3)
    np.testing.assert_allclose(method.weights(state, losses), 0.5 / losses, rtol=1e-3)


def test_classes_and_probabilities_are_classification_the_others_regression():
    config = nyud.get_config("tiny")
    config.balancing = "uncertainty"
    tasks = from_config(config)
    method = balancing.from_config(config, tasks)
    weights = np.asarray(method.weights(method.init(), jnp.ones(len(tasks)))).tolist()
    assert dict(zip((task.name for task in tasks), weights, strict=True)) == {
        "semseg": 1.0, "depth": 0.5, "normals": 0.5, "edge": 1.0
    }  # fmt: skip


# --- dynamic weight average ---


def test_dwa_weighs_by_the_ratio_of_the_last_two_windows():
    method = DynamicWeightAverage(2, 2, 2.0)
    state = method.init()
    history = [[9, 1], [7, 3], [4, 1], [4, 3], [1, 8], [1, 0], [5, 5]]  # means 8, 2; 4, 2; 1, 4
    weights = []
    for losses in history:
        weights.append(np.asarray(method.weights(state, jnp.array(losses, jnp.float32))))
        state = method.updated(state, jnp.array(losses, jnp.float32))

    def expected(*ratios):
        powers = np.exp(np.array(ratios) / 2.0)
        return 2 * powers / powers.sum()

    np.testing.assert_array_equal(weights[:4], 1.0)
    np.testing.assert_allclose(weights[4:6], [expected(0.5, 1.0)] * 2, rtol=1e-6)
    np.testing.assert_allclose(weights[6], expected(0.25, 2.0), rtol=1e-6)


def test_a_mean_loss_of_0_gives_dwa_no_nan():
    method = DynamicWeightAverage(2, 1, 2.0)
    state = method.updated(method.updated(method.init(), jnp.array([0.0, 1.0])), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(method.weights(state, jnp.ones(2)), [2.0, 0.0])


# --- FAMO ---

CENTRES, SCALES = np.array([[-1.0, 0.0], [1.0, 0.0]]), np.array([100.0, 1.0])


def quadratics(at):
    """Two losses with minima at different points, one a hundred times as large."""
    return SCALES * ((at - CENTRES) ** 2).sum(axis=-1) / 2 + 1e-3


def slopes(at):
    return SCALES[:, None] * (at - CENTRES)


def descended(weights_of, at, steps, rate):
    """Steps of a fixed length, as Adam's nearly are, along the weighted gradient; all points, the first too."""
    points = [np.array(at)]
    for _ in range(steps):
        direction = np.asarray(weights_of(quadratics(points[-1]))) @ slopes(points[-1])
        points.append(points[-1] - rate * direction / np.linalg.norm(direction))
    return np.array(points)


class Running:
    """A method that weighs and is updated step by step."""

    def __init__(self, method):
        self.method, self.state, self.weights = method, method.init(), []

    def __call__(self, losses):
        losses = jnp.asarray(losses, jnp.float32)
        self.weights.append(np.asarray(self.method.weights(self.state, losses), np.float64))
        self.state = self.method.updated(self.state, losses)
        return self.weights[-1]


def test_famo_lowers_both_losses_at_the_same_rate_where_fixed_weights_follow_the_large_one():
    start = [0.6, 1.5]

    def unevenness(weights_of):
        points = descended(weights_of, start, 150, 0.01)
        fallen = np.log(quadratics(points[0]) / quadratics(points[-1]))
        return abs(fallen[0] - fallen[1])

    assert unevenness(lambda losses: np.ones(2)) > 2
    assert unevenness(lambda losses: 1 / losses) > 3  # of logs, with equal weights
    assert unevenness(Running(Famo(2, 0.025, 0.001))) < 0.3


def test_famo_is_the_papers_algorithm_where_the_batch_is_constant():
    """Algorithm 1 in NumPy, with the losses computed again after each step, and xi's gradient given to Adam."""
    rate, beta, gamma = 0.05, 0.025, 0.01
    xi, mean, square, at = np.zeros(2), np.zeros(2), np.zeros(2), np.array([0.6, 1.5])
    expected, points = [], [at]
    for step in range(1, 9):
        z = np.exp(xi) / np.exp(xi).sum()
        losses = quadratics(at)
        expected.append((z / losses) / (z / losses).sum())
        direction = expected[-1] @ slopes(at)
        at = at - rate * direction / np.linalg.norm(direction)
        points.append(at)
        delta = np.log(losses) - np.log(quadratics(at))
        jacobian = np.diag(z) - np.outer(z, z)
        slope = jacobian.T @ delta + gamma * xi
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        xi = xi - beta * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    method = Running(Famo(2, beta, gamma))
    np.testing.assert_allclose(descended(method, points[0], 8, rate), points, rtol=1e-4)
    np.testing.assert_allclose(method.weights, expected, rtol=1e-3)
    assert np.abs(np.diff(expected, axis=0)).min() > 1e-5


def test_famo_leaves_a_task_without_loss_out_of_a_step():
    method = Running(Famo(3, 0.5, 0.01))
    method([1.0, 2.0, 4.0])
    before = method.state["log_losses"]
    weights = method([0.5, 0.0, 4.0])
    assert weights[1] == 0 and np.isclose(weights.sum(), 1) and np.isfinite(np.asarray(method.state["xi"])).all()
    assert method.state["log_losses"][1] == before[1]
    assert np.array_equal(method([0.0, 0.0, 0.0]), np.zeros(3))
    assert np.isnan(method([1.0, -1.0, 1.0])).any()  # stops the run, instead of a task that is never learnt
