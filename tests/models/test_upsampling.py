"""The convolution that is computed before its upsampling equals the one after it, in value, gradients and borders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskexpert_jax.models import products as traced_products
from taskexpert_jax.models import upsampling

# Pixels in both directions, and the factor; one pixel is its own neighbour on both sides.
SHAPES = [(5, 6, 4), (3, 4, 2), (4, 3, 3), (1, 5, 4), (2, 1, 4), (3, 4, 1), (2, 2, 8)]


def draw(height, width, factor):
    """Maps of 5 channels, a kernel to 7, and a cotangent of the result at image size."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, height, width, 5), (3, 3, 5, 7), (2, factor * height, factor * width, 7)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def after(maps, kernel, factor):
    """By the definition: upsampled, then padded with zeros and convolved."""
    large = upsampling.resize_bilinear(maps, factor * maps.shape[1], factor * maps.shape[2])
    return jax.lax.conv_general_dilated(large, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def before(maps, kernel, factor):
    return upsampling.interleave(upsampling.conv_of_upsampled(maps, kernel, factor=factor))


@pytest.fixture(params=["sums", "products"])
def way(request, monkeypatch):
    """The implementation for TPUs and that for other devices; both run on the CPU."""
    choose = {"sums": lambda *of, tpu, default: default(*of), "products": lambda *of, tpu, default: tpu(*of)}
    monkeypatch.setattr(jax.lax, "platform_dependent", choose[request.param])


@pytest.mark.parametrize(("height", "width", "factor"), SHAPES)
def test_it_is_the_convolution_of_the_upsampled_maps(height, width, factor, way):
    *arguments, cotangent = draw(height, width, factor)

    def with_gradients(function):
        made, pull = jax.vjp(functools.partial(function, factor=factor), *arguments)
        return [np.asarray(array) for array in (made, *pull(cotangent))]

    for ours, expected in zip(with_gradients(before), with_gradients(after), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_is_as_near_to_float32_as_the_definition_in_bfloat16(way):
    maps, kernel, _ = draw(8, 8, 4)
    exact = np.asarray(after(maps, kernel, 4))
    rounded = [of.astype(jnp.bfloat16) for of in (maps, kernel)]
    large = jax.image.resize(rounded[0], (2, 32, 32, 5), "bilinear", antialias=False)
    dimensions = ("NHWC", "HWIO", "NHWC")
    plain = jax.lax.conv_general_dilated(large, rounded[1], (1, 1), "SAME", dimension_numbers=dimensions)
    ours, plain = (np.asarray(of, np.float32) for of in (before(*rounded, 4), plain))
    distance = lambda made: np.linalg.norm(made - exact) / np.linalg.norm(exact)  # noqa: E731
    assert distance(ours) < 1.5 * distance(plain) < 0.02


def test_products_of_channels_are_made_of_the_small_maps():
    maps, kernel, cotangent = draw(4, 6, 4)

    def step(maps, kernel, cotangent):
        return jax.vjp(functools.partial(before, factor=4), maps, kernel)[1](cotangent)

    found = traced_products.products(jax.make_jaxpr(step)(maps, kernel, cotangent).jaxpr)
    products = [of for of in found if "upsample" not in of.path]
    assert sum(of.flops for of in products) == 3 * 2 * maps.size * 9 * 7  # a sixteenth; backward twice as many


def test_phases_go_to_their_places():
    image = jnp.arange(2.0 * 6 * 9 * 2).reshape(2, 6, 9, 2)
    phases = jnp.stack([jnp.stack([image[:, p::3, q::3] for q in range(3)]) for p in range(3)])
    np.testing.assert_array_equal(upsampling.interleave(phases), image)


def test_weights_of_a_line_are_those_of_its_upsampled_neighbours():
    weights = upsampling.mixing_matrix(3, 2)  # (phase, pixel, offset, source)
    line = np.array([1.0, 10.0, 100.0])
    upsampled = np.array([0, 1, 3.25, 7.75, 32.5, 77.5, 100, 0])  # of quarters, and 0 outside
    for phase, pixel, offset in np.ndindex(2, 3, 3):
        assert weights[phase, pixel, offset] @ line == upsampled[2 * pixel + phase + offset]
