"""MLoRE's decoder: the merged convolution equals the separate paths, and its cost equals the published model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nyud, pascal_context
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.decoders import mlore
from taskexpert_jax.models.decoders.decoder import GATES
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config

IMAGE = jax.random.normal(jax.random.key(0), (2, 64, 80, 3))


def built(**fields):
    config = nyud.get_config("tiny")
    config.tasks = ("semseg", "depth")
    config.dataset.image_size = (64, 80)
    config.model.update({"decoder": "mlore", "drop_path": 0.0, "depth": 2, "taps": 2, "norm": "layer"})
    config.model.mlore.update({"ranks": (2, 3, 5), "task_rank": 2, "top_k": 2, **fields})
    return taskexpert.from_config(config, from_config(config))


@pytest.fixture(scope="module")
def params():
    variables = sharding.unbox(jax.jit(lambda: built().init(jax.random.key(1), IMAGE, train=False))())
    key = jax.random.key(2)
    return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(key, leaf.shape), variables["params"])


def outputs_and_gradients(model, params, train):
    def loss(params):
        rngs = {"drop_path": jax.random.key(3)}
        maps, aux = model.apply({"params": params}, IMAGE, train=train, rngs=rngs, return_aux=True)
        return sum(jnp.square(of).mean() for of in maps.values()), (maps, aux)

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def test_merged_and_separate_paths_are_the_same_function(params):
    gradients, (maps, aux) = outputs_and_gradients(built(merge="never"), params, train=True)
    merged_gradients, (merged, _) = outputs_and_gradients(built(merge="always"), params, train=True)
    inferred = built(merge="inference").apply({"params": params}, IMAGE, train=False)
    for name, of in maps.items():
        np.testing.assert_allclose(merged[name], of, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(inferred[name], of, rtol=2e-5, atol=2e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), merged_gradients, gradients
    )
    weights = np.asarray(aux[GATES])  # (S, T, B, N, k), the mean of two mixtures
    assert weights.shape == (2, 2, 2, 20, 3)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights == weights[:, :, :, :1]).all()  # one weight for the whole image
    routers = np.asarray(aux[mlore.ROUTERS])
    assert routers.shape == (4, 2, 2, 3)
    assert ((routers == 0).sum(-1) == 1).all()  # two of three are kept


def test_images_of_another_size_have_routers_too(params):
    larger = jax.image.resize(IMAGE, (2, 96, 112, 3), "linear")
    maps = built().apply({"params": params}, larger, train=False)
    assert maps["depth"].shape == (2, 96, 112, 1)
    assert all(np.isfinite(of).all() for of in maps.values())


def test_the_penalty_is_zero_for_routers_that_use_all_experts_alike():
    decoder = built(balance=0.5).decoder
    even = jnp.full((4, 2, 2, 3), 1 / 3)
    one = jax.nn.one_hot(jnp.zeros((4, 2, 2), int), 3)
    pixels = lambda stride: jnp.ones((2, 20))  # noqa: E731
    assert decoder.penalty({mlore.ROUTERS: even}, pixels) == pytest.approx(0, abs=1e-6)
    assert decoder.penalty({mlore.ROUTERS: one}, pixels) == pytest.approx(0.5 * 2)  # k - 1, times the weight
    swapped = jnp.concatenate([jnp.roll(one[:, :, :1], 1, axis=-1), one[:, :, 1:]], axis=2)
    padded = pixels(16) * jnp.array([[0.0], [1.0]])  # the first image counts for nothing
    assert decoder.penalty({mlore.ROUTERS: swapped}, lambda stride: padded) == pytest.approx(0.5 * 2)


# Parameters and multiply-adds of the authors' model, counted by benchmarks/others.py: separate, and merged without the
# sums of kernels that merging needs.
PUBLISHED = {
    pascal_context: (452, {}, 407_690_406, 826_594_382_672, 613_314_024_272),
    nyud: (768, {"ranks": tuple(range(16, 241, 16)), "task_rank": 16}, 551_625_533, 1_405_801_058_304, 926_203_367_424),
}


@pytest.mark.parametrize("benchmark", PUBLISHED, ids=["pascal_context", "nyud"])
def test_its_cost_at_the_published_size_is_the_published_models(benchmark):
    width, fields, parameters, separate, merged = PUBLISHED[benchmark]
    config = benchmark.get_config("vit_l16")
    config.model.update({"decoder": "mlore", "feature_width": width})
    config.model.mlore.update(fields)
    model = taskexpert.from_config(config, from_config(config))
    count = budget.count(model)
    assert count.total_parameters == pytest.approx(parameters, rel=0.01)
    assert count.total_multiply_adds == pytest.approx(separate, rel=0.01)
    mixtures = mlore.MIXTURES * len(model.decoder.taps) * len(model.tasks)
    kernels = mixtures * 9 * width**2 * (sum(config.model.mlore.ranks) + config.model.mlore.task_rank)
    heads_early = count.multiply_adds["heads"] - count.computed["heads"]
    assert count.total_computed - kernels + heads_early == pytest.approx(merged, rel=0.01)
