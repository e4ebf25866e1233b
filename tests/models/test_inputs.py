"""Normalisation and padding of a batch inside the jitted step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nyud
from taskexpert_jax.config import IMAGENET, Normalisation, normalisation
from taskexpert_jax.evaluation import full_pass, inference
from taskexpert_jax.models import inputs
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import make_train_step


def test_normalisation_is_the_familys_and_padding_is_exactly_zero():
    image = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
    window = np.array([[1, 2, 3, 4], [0, 0, 6, 8]], np.int32)
    ours = np.asarray(inputs.normalise(jnp.asarray(image), jnp.asarray(window), IMAGENET))
    expected = (image / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    inside = np.zeros((2, 6, 8), bool)
    inside[0, 1:4, 2:6] = True
    inside[1] = True
    np.testing.assert_allclose(ours[inside], expected[inside], rtol=1e-5, atol=1e-6)
    assert (ours[~inside] == 0).all()


def test_normalisation_is_that_of_the_config():
    config = nyud.get_config("tiny")
    assert normalisation(config) == IMAGENET
    config.model.image_mean, config.model.image_std = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)
    image = np.array([[[[255, 0, 51]]]], np.uint8)
    found = inputs.normalise(jnp.asarray(image), jnp.array([[0, 0, 1, 1]]), normalisation(config))
    np.testing.assert_allclose(found[0, 0, 0], [1.0, -1.0, 0.2], rtol=1e-6)


class Asked(Exception):
    """Carries the normalisation that was asked for."""


@pytest.mark.parametrize("where", ["train", "inference", "gates"])
def test_training_and_inference_normalise_as_the_config_says(where, monkeypatch):
    def ask(image, window, by=IMAGENET):
        raise Asked(by)

    monkeypatch.setattr(inputs, "normalise", ask)
    config = nyud.get_config("tiny")
    config.model.image_mean, config.model.image_std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    model = taskexpert.from_config(config, from_config(config))
    image, window = jnp.zeros((8, 64, 80, 3), jnp.uint8), jnp.zeros((8, 4), jnp.int32)
    infer = inference.make_inference(model, config)

    def train_step():
        mesh = sharding.make_mesh(config.mesh, {})
        tx = optimizer.build(config, model.backbone)
        with sharding.use(mesh):
            _, state, places = train_state.abstract_and_shardings(model, tx, mesh, 0)
            step = make_train_step(model, tx, config, mesh, places)
            jax.eval_shape(step, state, tally.empty(model.tasks), {"image": image, "window": window})

    def gates():
        totals = full_pass.empty_totals(model.tasks, model, single=True)
        full_pass.model_forward(model.tasks, model, infer)(
            None, totals.gates, {"image": image, "window": window, "mask": jnp.ones(8)}
        )

    program = {"train": train_step, "inference": lambda: infer(None, image, window), "gates": gates}[where]
    with pytest.raises(Asked) as asked:
        program()
    assert asked.value.args == (Normalisation((0.5, 0.4, 0.3), (0.5, 0.6, 0.7)),)
