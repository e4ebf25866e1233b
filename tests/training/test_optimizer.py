"""Facts about the optimiser: the protocol's golden steps, and what each option does to them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import nyud
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer


def tiny(**fields):
    config = nyud.get_config("tiny")
    config.num_steps = 100
    config.update_from_flattened_dict({f"optimizer.{name}": value for name, value in fields.items()})
    return config


def built(config):
    return optimizer.build(config, taskexpert.from_config(config, from_config(config)).backbone)


def test_ten_steps_equal_the_golden_ones(golden_dir):
    golden = json.loads((golden_dir / "losses_metrics.json").read_text())["optimizer"]
    config = tiny(learning_rate=golden["base_lr"], weight_decay=golden["weight_decay"])
    config.num_steps = golden["max_steps"]
    config.optimizer.clip_norm = float(golden["clip_norm"])
    tx, rate = built(config), optimizer.learning_rate(config)
    params = [jnp.asarray(golden["w0"]), jnp.asarray(golden["b0"])]
    state = tx.init(params)
    assert len(golden["grads"]) == 10
    for step, grads in enumerate(golden["grads"]):
        np.testing.assert_allclose(rate(step), golden["lrs"][step], rtol=1e-6)
        updates, state = tx.update([jnp.asarray(g) for g in grads], state, params)
        params = optax.apply_updates(params, updates)
        for ours, theirs in zip(params, golden["params_after_each_step"][step], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_warmup_rises_to_the_protocol():
    plain, rising = optimizer.learning_rate(tiny()), optimizer.learning_rate(tiny(warmup_steps=10))
    assert rising(0) == pytest.approx(plain(0) / 10)
    assert rising(10) == pytest.approx(plain(10))
    assert float(plain(100)) == 0.0


def test_the_power_bends_the_decay():
    rate = optimizer.learning_rate(tiny(schedule_power=2.0, learning_rate=0.5))
    np.testing.assert_allclose(rate(50), 0.125, rtol=1e-6)


def test_the_cosine_schedule_is_half_a_wave():
    rate = optimizer.learning_rate(tiny(schedule="cosine", learning_rate=0.5))
    expected = 0.25 * (1 + np.cos(np.pi * np.arange(101) / 100))
    np.testing.assert_allclose([rate(step) for step in range(101)], expected, atol=1e-7)


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_the_gradient_is_clipped_to_the_norm_or_not_at_all(norm):
    tx = built(tiny(clip_norm=norm, weight_decay=0.0))
    params = {"kernel": jnp.zeros(4)}
    _, state = tx.update({"kernel": jnp.full(4, 3.0)}, tx.init(params), params)
    (moments,) = [part for part in state if isinstance(part, optax.ScaleByAdamState)]
    np.testing.assert_allclose(moments.mu["kernel"], 0.1 * (0.5 if norm else 3.0), rtol=1e-6)


def first_updates(params, gradient, **fields):
    tx = built(tiny(learning_rate=0.01, clip_norm=0.0, **fields))
    return tx.update(jax.tree.map(lambda p: jnp.full_like(p, gradient), params), tx.init(params), params)[0]


def test_adamw_decays_kernels_beside_the_gradient():
    params = {"dense": {"kernel": jnp.full(3, 2.0), "bias": jnp.full(3, 2.0)}}
    decayed = first_updates(params, 1.0, algorithm="adamw", weight_decay=0.1)["dense"]
    np.testing.assert_allclose(decayed["kernel"], -0.01 * (1 + 0.1 * 2), rtol=1e-5)
    np.testing.assert_allclose(decayed["bias"], -0.01, rtol=1e-5)
    # Adam's step does not depend on the gradient's size, so that the L2 term is lost in it.
    np.testing.assert_allclose(first_updates(params, 1.0, weight_decay=0.1)["dense"]["kernel"], -0.01, rtol=1e-5)


@pytest.fixture(scope="module")
def parameters():
    config = tiny()
    config.model.depth = 8
    model = taskexpert.from_config(config, from_config(config))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 80, 3)), train=False))
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), sharding.unbox(shapes)["params"])


def test_layer_decay_lowers_the_rate_block_by_block(parameters):
    config = tiny(learning_rate=0.01, layer_decay=0.5, backbone_rate=0.1, clip_norm=0.0)
    config.model.depth = 8
    tx = built(config)
    updates, _ = tx.update(parameters, tx.init(parameters), parameters)
    for leaf in jax.tree.leaves(updates["blocks"]):
        blocks = np.asarray(leaf).reshape(8, -1)
        expected = np.broadcast_to(-0.001 * 0.5 ** np.arange(8, 0, -1)[:, None], blocks.shape)
        np.testing.assert_allclose(blocks, expected, rtol=1e-4)
    for leaf in jax.tree.leaves(updates["patches"]):
        np.testing.assert_allclose(leaf, -0.001 * 0.5**9, rtol=1e-5)
    new = [updates["mixture"], updates["initial_memory"], updates["head_depth"]]
    for leaf in jax.tree.leaves(new):
        np.testing.assert_allclose(leaf, -0.01, rtol=1e-5)


def test_the_average_follows_the_parameters():
    update = optimizer.average(0.5)
    averaged = update({"a": jnp.float32(7.0)}, {"a": jnp.float32(1.0)}, jnp.int32(0))
    assert float(averaged["a"]) == pytest.approx(0.1 * 7 + 0.9 * 1)  # the start counts little
    averaged = update({"a": jnp.float32(7.0)}, {"a": jnp.float32(1.0)}, jnp.int32(1000))
    assert float(averaged["a"]) == pytest.approx(4.0)
