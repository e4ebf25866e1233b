"""Every backbone keeps its interface: layers, the budget, its switches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.backbones import BACKBONES, swin
from taskexpert_jax.models.backbones.backbone import Backbone, Tap
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from tests.training import one_step

NAMES = ("nyud", "swin")


def built(name, **fields):
    config = one_step.small(name)
    config.update_from_flattened_dict({f"model.{field}": value for field, value in fields.items()})
    return taskexpert.from_config(config, from_config(config))


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_parameters_and_stacked_ones_as_many_as_their_first_axis(name):
    backbone, found = built(name).backbone, set()
    for path, shape in budget.parameter_shapes(built(name)).items():
        layer = backbone.layer(path)
        if isinstance(layer, tuple):
            assert shape[0] == len(layer), path
            found |= set(layer)
        elif layer is not None:
            found.add(layer)
    assert found == set(range(backbone.layers))


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_counts_the_traced_program(name, monkeypatch):
    """At 64x64, where Swin's windows of 3 need padding at each stage."""
    model = built(name)
    expected = budget.count(model).computed["backbone"]
    monkeypatch.setattr(type(model.backbone), "multiply_adds", Backbone.multiply_adds)
    assert budget.count(model).computed["backbone"] == expected


def test_swin_rematerialised_or_unrolled_has_the_same_gradient_at_every_parameter():
    image = jax.random.normal(jax.random.key(0), (2, 64, 96, 3))
    rngs = {"drop_path": jax.random.key(1), "gate_noise": jax.random.key(2)}
    model = built("swin", drop_path=0.0)
    variables = sharding.unbox(jax.jit(lambda: model.init(jax.random.key(3), image, train=False))())
    variables["params"] = jax.tree.map(lambda leaf: leaf + 0.01, variables["params"])  # even gates pass no gradient

    def gradients(**fields):
        other = built("swin", drop_path=0.0, **fields)

        def loss(params):
            given = {**variables, "params": params}
            maps, _ = other.apply(given, image, train=True, rngs=rngs, mutable=["batch_stats"])
            return sum(jnp.square(of).mean() for of in maps.values())

        return jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(variables["params"]))

    plain = gradients()
    largest = max(np.abs(leaf).max() for _, leaf in plain)
    assert [jax.tree_util.keystr(path) for path, leaf in plain if not np.abs(leaf).max() > 0] == []
    for (path, one), (_, other) in zip(plain, gradients(remat=True, unroll="yes"), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))


def test_a_shifted_window_sees_neighbours_alone():
    mask = swin.shift_mask(6, 6, 3, 1).reshape(2, 2, 9, 9)  # (rows and columns of windows, tokens, tokens)
    assert (mask[0, 0] == 0).all()  # whole inside of the map
    last = mask[1, 1].reshape(3, 3, 3, 3)
    assert last[0, 0, 1, 1] == 0 and last[2, 2, 2, 2] == 0
    assert last[0, 0, 2, 0] < -50 and last[0, 0, 0, 2] < -50 and last[1, 1, 2, 2] < -50


def test_relative_positions_are_the_same_for_the_same_offset():
    rows = swin.relative_positions(3)
    assert rows[0, 0] == rows[4, 4] == rows[8, 8] == 12  # the middle of a table of 5x5
    assert rows[0, 1] == rows[3, 4] == 11 and rows[1, 0] == 13 and rows[0, 8] == 0 and rows[8, 0] == 24


def test_the_grid_is_that_of_a_tap_and_images_are_multiples_of_the_coarsest_stride():
    with pytest.raises(UserError, match=r"grid_stride=12: must be the stride of a tap of the backbone: 4, 8, 16, 32"):
        built("swin", grid_stride=12)
    assert built("swin", grid_stride=8).decoder.taps[0] == (8, 32)
    with pytest.raises(UserError, match=r"model.patch_size=16: must be a multiple of 32"):
        built("swin", patch_size=16)


class Pyramid(Backbone):
    """A backbone of one's own: the means of 8x8 and 16x16 pixels, with two channels more in the second."""

    def __call__(self, image, train):
        halves = [image.reshape(len(image), image.shape[1] // s, s, image.shape[2] // s, s, 3) for s in (8, 16)]
        fine, coarse = (each.mean(axis=(2, 4)) for each in halves)
        return fine, jnp.concatenate([coarse, coarse[..., :2]], axis=-1)

    stride = property(lambda self: 16)
    taps = property(lambda self: (Tap(8, 3), Tap(16, 5)))
    layers = property(lambda self: 1)

    def layer(self, name):
        return None


def test_a_pyramid_of_ones_own_needs_no_further_field(monkeypatch):
    monkeypatch.setitem(BACKBONES, "pyramid", lambda config, device: Pyramid())
    model = built("nyud", backbone="pyramid", patch_size=16)
    assert model.decoder.taps == (Tap(16, 5),) * 2
    assert budget.count(model).parameters["backbone"] == 0
    assert budget.count(model).parameters["neck"] == 2 * (3 + 5) + (3 + 1) * 5 + (5 + 1) * 5
