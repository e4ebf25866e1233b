"""Gradients of a train step: micro-batches, and the load balance of the gates."""

import jax
import numpy as np
import pytest

from tests.training import one_step


def demo():
    config = one_step.small("demo")
    config.tasks = ("semseg", "depth")
    return config


@pytest.mark.parametrize("balancing", ["fixed", "pcgrad"])
def test_accumulated_gradients_are_the_mean_of_the_micro_batches(balancing):
    """With layer norm, where micro-batches do not see each other, and labels that are valid everywhere."""
    config = demo()
    config.balancing = balancing
    config.model.norm, config.model.drop_path = "layer", 0.0
    whole_sums, whole, _ = one_step.step_on(config, (1, 1, 1), ignored=0)
    config.accumulate_steps = 2
    sums, parts, _ = one_step.step_on(config, (1, 1, 1), ignored=0)
    for key in whole_sums:
        np.testing.assert_allclose(sums[key], whole_sums[key], rtol=1e-4)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole))
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * scale)


def test_the_balance_weight_adds_to_the_loss_and_moves_the_gates():
    config = demo()
    config.model.gate.init = "random"  # even gates are balanced
    plain_sums, plain, _ = one_step.step_on(config, (1, 1, 1))
    config.model.gate.balance = 1.0
    sums, balanced, _ = one_step.step_on(config, (1, 1, 1))
    assert sums["loss/semseg"] == plain_sums["loss/semseg"]
    assert sums["loss"] > plain_sums["loss"]
    moments = [
        [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "gates" in jax.tree_util.keystr(path)]
        for tree in (plain, balanced)
    ]
    assert max(np.abs(one - other).max() for one, other in zip(*moments, strict=True)) > 1e-6
