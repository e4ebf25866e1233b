"""Every decoder keeps its interface, and a run of one without gates works in all programs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import random_batch
from configs import demo, nyud
import taskexpert_jax
from taskexpert_jax.app import answers
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.backbones.backbone import Backbone
from taskexpert_jax.models.decoders import DECODERS
from taskexpert_jax.models.decoders.decoder import Decoder
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from tests import random_runs
from tests.app.test_answers import unpacked

DECODER_NAMES = sorted(DECODERS)


def built(decoder, **fields):
    config = nyud.get_config("tiny")
    config.model.decoder = decoder
    config.model.mlore.update({"ranks": (2, 3, 5), "task_rank": 2, "top_k": 2})
    config.update_from_flattened_dict({f"model.{name}": value for name, value in fields.items()})
    return taskexpert.from_config(config, from_config(config))


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_every_parameter_has_a_gradient_and_a_part(decoder):
    model = built(decoder, drop_path=0.0)
    image = jax.random.normal(jax.random.key(0), (2, 64, 80, 3))
    variables = sharding.unbox(jax.jit(lambda: model.init(jax.random.key(1), image, train=False))())

    rngs = {"drop_path": jax.random.key(2), "gate_noise": jax.random.key(3)}

    def loss(params):
        maps, _ = model.apply({**variables, "params": params}, image, train=True, rngs=rngs, mutable=["batch_stats"])
        return sum(jnp.square(of).sum() for of in maps.values())

    # Even gates start with kernels of zeros, through which no gradient passes at first.
    params = jax.tree.map(lambda leaf: leaf + 0.01, variables["params"])
    gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
    assert [jax.tree_util.keystr(path) for path, leaf in gradients if not np.abs(leaf).max() > 0] == []
    names = [name for name in budget.parameter_shapes(model) if model.backbone.layer(name) is None]
    assert {model.decoder.part(name) for name in names} == set(model.decoder.parts)


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_the_formulas_count_what_the_traced_program_computes(decoder, monkeypatch):
    """A module without formulas is counted on the traced program; the gated sums are no products there."""
    model = built(decoder)
    by_formula = budget.count(model)
    monkeypatch.setattr(type(model.backbone), "multiply_adds", Backbone.multiply_adds)
    for name in ("multiply_adds", "computed", "parts", "part"):
        monkeypatch.setattr(type(model.decoder), name, getattr(Decoder, name))
    traced = budget.count(model)
    sums = 4 * 4 * 20 * 6 * 16 if decoder == "taskexpert" else 0  # taps, tasks, tokens, slots, D
    assert traced.computed["backbone"] == by_formula.computed["backbone"]
    assert traced.computed["decoder"] == by_formula.total_computed - by_formula.computed["backbone"] - sums
    assert traced.multiply_adds == traced.computed
    assert traced.total_parameters == by_formula.total_parameters


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"model.decoder='taskxpert': choose one of taskexpert, baseline, mlore; docs/"):
        built("taskxpert")
    with pytest.raises(UserError, match=r"model.backbone='resnet': choose one of vit, swin; docs/add_a_backbone.md"):
        built("taskexpert", backbone="resnet")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """A run of the baseline, which has no gates."""
    config = demo.get_config("tiny")
    config.model.decoder = "baseline"
    path = tmp_path_factory.mktemp("runs") / "baseline"
    random_runs.save(config, path)
    return taskexpert_jax.load_run(path)


def test_a_run_without_gates_predicts_evaluates_and_answers(baseline):
    image = np.full((32, 48, 3), 99, np.uint8)
    prediction = baseline.predict(image)
    assert {name: of.shape[:2] for name, of in prediction.items()} == dict.fromkeys(baseline.tasks, (32, 48))
    batch = random_batch.make(baseline.config, tuple(baseline.tasks.values()), 2, seed=0)
    assert np.isfinite(baseline.evaluate([batch])["semseg/mIoU"])
    facts, arrays, _ = unpacked(answers.answer(baseline, answers.keys.png(image)))
    assert facts["gates"] is None and arrays.keys() == set(baseline.tasks)
    json.dumps(facts)


def test_gates_of_a_run_without_gates_are_refused(baseline):
    with pytest.raises(UserError, match=r"baseline has no gates: config.model.decoder=baseline$"):
        baseline.gates(np.zeros((32, 48, 3), np.uint8))
