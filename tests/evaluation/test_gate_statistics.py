"""Gate statistics: mean weights and entropy over the pixels of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskexpert_jax.evaluation.gate_statistics import GateStatistics
from taskexpert_jax.models.decoders import mixture

S, T, B, GRID, SLOTS, PATCH = 2, 3, 4, (2, 3), 6, 8
SIZE = (GRID[0] * PATCH, GRID[1] * PATCH)
NAMES = ("1", "2", "3", "4", "5", "memory")
ALL = np.ones(B, np.float32)
FULL = np.tile(np.array([0, 0, *SIZE], np.int32), (B, 1))


@jax.jit
def with_batch(state, gates, window, mask):
    return state.merge(GateStatistics.from_gates(gates, window, mask, SIZE, PATCH))


def summary(gates, window=FULL, mask=ALL):
    state = with_batch(GateStatistics.zeros(S, T, gates.shape[-1]), gates, window, mask)
    return state.summary(NAMES[: gates.shape[-1]])


def drawn(top_k=0, seed=0):
    logits = np.random.default_rng(seed).normal(0, 2, (S, T, B, GRID[0] * GRID[1], SLOTS))
    return np.asarray(mixture.gate_weights(jnp.asarray(logits), top_k))


def test_equal_weights_have_entropy_one():
    found = summary(np.full((S, T, B, 6, SLOTS), 1 / SLOTS, np.float32))
    assert found.weights.shape == (T, S, SLOTS) and found.entropy.shape == (T, S)
    np.testing.assert_allclose(found.weights, 1 / SLOTS, rtol=1e-6)
    np.testing.assert_allclose(found.entropy, 1, rtol=1e-6)


def test_one_choice_a_token_has_entropy_zero_and_its_weights_are_frequencies():
    gates = drawn(top_k=1)
    found = summary(gates)
    np.testing.assert_allclose(found.entropy, 0, atol=1e-7)
    chosen = gates.argmax(axis=-1)  # (S, T, B, N)
    frequencies = np.stack([(chosen == k).mean(axis=(2, 3)) for k in range(SLOTS)], axis=-1)
    np.testing.assert_allclose(found.weights, frequencies.swapaxes(0, 1), rtol=1e-6)


def test_two_equal_choices_of_six_have_the_entropy_of_a_coin():
    gates = np.zeros((S, T, B, 6, SLOTS), np.float32)
    gates[..., :2] = 0.5
    np.testing.assert_allclose(summary(gates).entropy, np.log(2) / np.log(6), rtol=1e-6)


def test_a_token_counts_by_its_pixels_inside_of_the_picture_and_padding_examples_do_not():
    """The image covers rows 4..13, columns 0..9 of a 16x24 frame: tokens 0, 1, 3, 4 have 32, 8, 48 and 12 pixels."""
    gates = drawn()
    window = np.tile(np.array([4, 0, 10, 10], np.int32), (B, 1))
    found = summary(gates, window, np.array([1, 0, 1, 0], np.float32))
    pixels = np.array([32, 8, 0, 48, 12, 0])
    weights = np.einsum("stbnk,n->tsk", gates[:, :, [0, 2]].astype(np.float64), pixels) / 200
    np.testing.assert_allclose(found.weights, weights, rtol=1e-6)
    entropy = -(gates * np.log(gates)).sum(axis=-1)[:, :, [0, 2]]
    np.testing.assert_allclose(found.entropy, np.einsum("stbn,n->ts", entropy, pixels) / 200 / np.log(6), rtol=1e-5)


def test_batches_merge_into_the_set():
    both = np.concatenate([drawn(seed=1), drawn(seed=2)], axis=2)
    states = [
        GateStatistics.from_gates(jnp.asarray(part), jnp.asarray(FULL), jnp.ones(B), SIZE, PATCH)
        for part in np.split(both, 2, axis=2)
    ]
    merged = states[0].merge(states[1]).summary(NAMES)
    np.testing.assert_allclose(merged.weights, both.mean(axis=(2, 3)).swapaxes(0, 1), rtol=1e-5)


def test_a_single_choice_has_no_entropy():
    found = summary(np.ones((S, T, B, 6, 1), np.float32))
    assert np.isnan(found.entropy).all() and (found.weights == pytest.approx(1))
