"""The ways of computing attention equal its definition, gradients included."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskexpert_jax.errors import UserError
from taskexpert_jax.models import attention
from taskexpert_jax.models import products as traced_products

TOKENS, HEADS, SIZE = 150, 2, 32  # no multiple of 128: splash pads


@pytest.fixture(scope="module")
def drawn():
    """(query, key, value, cotangent), each (2, TOKENS, HEADS, SIZE) float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (2, TOKENS, HEADS, SIZE)) for key in keys]


def plainly(query, key, value):
    scores = np.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(SIZE)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(axis=-1, keepdims=True), value)


def with_gradients(attend, query, key, value, cotangent):
    mixed, pull = jax.vjp(attend, query, key, value)
    return [np.asarray(array, np.float32) for array in (mixed, *pull(cotangent))]


def reference(drawn):
    return with_gradients(lambda *of: attention.attend(*of, kind="xla"), *drawn)


def worst(ours, theirs):
    """The largest difference, over the largest value, of the result and of the three gradients."""
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]


def test_float32_is_the_definition(drawn):
    np.testing.assert_allclose(reference(drawn)[0], plainly(*map(np.asarray, drawn[:3])), atol=1e-5)


def test_bfloat16_has_the_gradients_of_float32_up_to_its_rounding(drawn):
    rounded = [array.astype(jnp.bfloat16) for array in drawn]
    exact = reference([array.astype(jnp.float32) for array in rounded])
    ours = with_gradients(lambda *of: attention.attend(*of, kind="xla"), *rounded)
    derived = with_gradients(jax.nn.dot_product_attention, *rounded)  # float32 products in the backward pass
    assert max(worst(ours, exact)) < 1e-2
    assert max(worst(ours, exact)) < 2 * max(worst(derived, exact))


def test_bfloat16_multiplies_no_float32(drawn):
    """Attention with its gradient, as in a train step; test_precision.py looks at the whole step."""

    def step(query, key, value, cotangent):
        mixed, pull = jax.vjp(lambda *of: attention.attend(*of, kind="xla"), query, key, value)
        return mixed, pull(cotangent)

    traced = jax.make_jaxpr(step)(*(array.astype(jnp.bfloat16) for array in drawn))
    products = list(traced_products.products(traced.jaxpr))
    assert len(products) == 6  # two forward, four backward
    assert {dtype for product in products for dtype in product.dtypes} == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [TOKENS, 128])
def test_splash_is_the_same(tokens, drawn):
    """Its kernel is interpreted here, not compiled."""
    given = [array[:1, :tokens] for array in drawn]
    ours = with_gradients(lambda *of: attention.splash(*of, interpret=True), *given)
    assert max(worst(ours, reference(given))) < 1e-5


def device(platform, capability=None):
    """The compute capability is a number on NVIDIA GPUs and a name on AMD's; TPUs and CPUs have none."""
    return SimpleNamespace(platform=platform, **({"compute_capability": capability} if capability else {}))


@pytest.mark.parametrize(
    ("kind", "dtype", "platform", "message"),
    [
        (
            "splash",
            "bfloat16",
            "cpu",
            r"config.model.attention='splash' .*\bTPU\b.*\bcpu\b.*\bauto\b",
        ),
        ("splash", "bfloat16", "gpu", r"TPU.*\bgpu\b"),
        ("cudnn", "bfloat16", "tpu", r"'cudnn'.*GPU.*\btpu\b"),
        ("cudnn", "float32", "gpu", r"\bgpu\b.*float32"),
    ],
)
def test_kernels_are_refused_where_they_do_not_exist(kind, dtype, platform, message):
    with pytest.raises(UserError, match=message):
        attention.choose(kind, dtype, 64, device(platform))
    for kind, dtype, platform in (
        ("splash", "float32", "tpu"),
        ("cudnn", "bfloat16", "gpu"),
        ("xla", "float32", "cpu"),
    ):
        assert attention.choose(kind, dtype, 64, device(platform)) == kind


@pytest.mark.parametrize(
    ("on", "dtype", "size", "chosen"),
    [
        (device("gpu", "9.0"), "bfloat16", 64, "cudnn"),
        (device("gpu", "8.0"), "bfloat16", 128, "cudnn"),
        (device("gpu", "12.0"), "bfloat16", 64, "cudnn"),
        (device("gpu", "7.5"), "bfloat16", 64, "xla"),  # before Ampere
        (device("gpu", "9.0"), "float32", 64, "xla"),
        (device("gpu", "9.0"), "bfloat16", 20, "xla"),
        (device("gpu", "9.0"), "bfloat16", 136, "xla"),
        (device("gpu", "gfx942"), "bfloat16", 64, "xla"),  # AMD's
        (device("tpu"), "bfloat16", 64, "xla"),
        (device("cpu"), "float32", 64, "xla"),
    ],
)
def test_auto_is_the_fused_kernel_where_there_is_one_that_has_been_used(on, dtype, size, chosen):
    assert attention.choose("auto", dtype, size, on) == chosen
