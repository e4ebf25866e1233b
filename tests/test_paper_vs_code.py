"""docs/paper_vs_code.md and docs/model.md name real fields, all choices are named, and each has an effect."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo, nyud
from input_pipeline import pipeline, stream
from taskexpert_jax.compile.steps import tracers
from taskexpert_jax.config import flat
from taskexpert_jax.models import inputs
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.pretrained import load as pretrained
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import balancing, optimizer
from tests.conftest import ROOT
from tests.pretrained import weight_layouts

CHOICES = (ROOT / "docs" / "paper_vs_code.md").read_text()
MODEL = (ROOT / "docs" / "model.md").read_text()
# The first three change speed and memory, no value; of backbones there is one, besides those that users add.
NOT_CHOICES = {"model.attention", "model.remat", "model.unroll", "model.backbone"}


def named_fields(text: str) -> set[str]:
    """The fields in backquotes; `part.name_*` stands for all that begin so."""
    groups = "model|optimizer|augment|loss_weights|uncertainty|dwa|famo"
    found = re.findall(rf"`((?:(?:{groups})\.[\w.*]+)|dtype|num_steps|batch_size|balancing)`", text)
    fields = dict(flat(nyud.get_config("tiny")))
    named = set()
    for name in found:
        fitting = {field for field in fields if re.fullmatch(name.replace(".", r"\.").replace("*", r"\w+"), field)}
        assert fitting, f"no config field {name}"
        named |= fitting
    return named


@pytest.mark.parametrize("part", ["model.", "optimizer.", "augment.", "balancing", "uncertainty.", "dwa.", "famo."])
def test_every_field_of_a_choice_has_its_row(part: str) -> None:
    fields = {field for field in dict(flat(nyud.get_config("tiny"))) if field.startswith(part)}
    assert fields
    assert sorted(fields - named_fields(CHOICES) - NOT_CHOICES) == []


# --- what the choices change: compared are programs and values, for a small config and one with another choice ---


def model_program(config):
    """The model's initialisation and forward pass in training, as text, with its constants."""
    model = taskexpert.from_config(config, from_config(config))

    def program(key, image):
        picture = inputs.normalise(image, jnp.array([[0, 0, *image.shape[1:3]]]), model.normalisation)
        return model.init({"params": key, "drop_path": key, "gate_noise": key}, picture, train=True)

    image = jnp.zeros((1, *config.dataset.image_size, 3), jnp.uint8)
    closed = jax.make_jaxpr(program)(jax.random.key(0), image)
    return str(closed.jaxpr), [np.asarray(constant).tolist() for constant in closed.consts[1:]]


def train_step(config):
    """The text of the training step."""
    mesh = sharding.one_device_mesh()
    with sharding.use(mesh):
        model = taskexpert.from_config(config, from_config(config))
        return str(tracers(config, model, mesh)["train"]().jaxpr)


def balanced(config):
    """Weights of the methods that have fields, over steps with random losses."""
    tasks, found = from_config(config), []
    losses = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (402, len(tasks))), jnp.float32)
    for config.balancing in ("uncertainty", "dwa", "famo"):
        method = balancing.from_config(config, tasks)
        step = lambda state, now, of=method: (of.updated(state, now), of.weights(state, now))  # noqa: E731
        found.append(np.asarray(jax.lax.scan(step, method.init(), losses)[1]).tolist())
    return found


def updates(config):
    """Three steps of the optimiser on a block, an embedding and a head, and the moving average that is evaluated."""
    new = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}
    params = {"blocks": {"kernel": jnp.full((config.model.depth, 2), 2.0)}, "patches": new, "head_depth": new}
    tx, found = optimizer.build(config, taskexpert.from_config(config, from_config(config)).backbone), []
    state, averaged = tx.init(params), params
    for size in (0.01, 3.0, 30.0):
        gradient = jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), params)
        change, state = tx.update(gradient, state, params)
        averaged = optimizer.average(config.optimizer.ema_decay)(averaged, change, jnp.int32(100))
        found.append((change, averaged))
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(found)]


def augmented(config):
    """Augmented examples, at several positions of the stream, of an image whose left part is one class."""
    random = np.random.default_rng(0)
    height, width = 100, 140
    classes = random.integers(0, 40, (height, width, 1)).astype(np.uint8)
    classes[:, :110] = 3
    example = {
        "id": "one",
        "image": random.integers(0, 256, (height, width, 3), np.uint8),
        "semseg": classes,
        "depth": np.ones((height, width, 1), np.float32),
        "normals": np.ones((height, width, 3), np.float16),
        "edge": np.zeros((height, width, 1), np.uint8),
    }
    seen = [stream.augmented(example, config, from_config(config), position) for position in range(12)]
    return [each[name].tolist() for each in seen for name in ("image", "semseg", "depth")]


def first_batch(config):
    """The ids of the first training batch of the built-in scenes."""
    scenes = demo.get_config("tiny")
    scenes.batch_size = config.batch_size
    return next(pipeline.train_batches(scenes, from_config(scenes)))["id"].tolist()


def loaded(config):
    """The parameters of the backbone that are loaded."""
    found = pretrained.read(config, taskexpert.from_config(config, from_config(config)))
    return sorted(found.arrays) if found else []


OTHER = {
    model_program: {
        "dtype": "bfloat16",
        "model.class_token": True,
        "model.decoder": "baseline",
        "model.depth": 8,
        "model.drop_path": 0.5,
        "model.expert_kernel": 5,
        "model.experts": 3,
        "model.feature_width": 24,
        "model.gate.granularity": "image",
        "model.gate.init": "random",
        "model.gate.input": "local",
        "model.gate.noise": 1.0,
        "model.gate.temperature": 0.5,
        "model.gate.top_k": 2,
        "model.gate.width": 16,
        "model.head_upsample": 2,
        "model.heads": 4,
        "model.image_mean": (0.5, 0.5, 0.5),
        "model.image_std": (0.5, 0.5, 0.5),
        "model.layer_scale": 1e-5,
        "model.memory.init": "zeros",
        "model.memory.read": "conv3x3",
        "model.memory.write": "residual",
        "model.mlore.merge": "always",
        "model.mlore.ranks": (4, 8),
        "model.mlore.task_rank": 4,
        "model.mlore.top_k": 1,
        "model.mlp": "swiglu",
        "model.mlp_ratio": 2,
        "model.norm": "layer",
        "model.norm_epsilon": 1e-5,
        "model.patch_size": 8,
        "model.positions": "rotary",
        "model.registers": 4,
        "model.taps": 2,
        "model.width": 64,
    },
    train_step: {
        "balancing": "pcgrad",
        "loss_weights.depth": 2.0,
        "loss_weights.edge": 20.0,
        "loss_weights.normals": 5.0,
        "loss_weights.semseg": 3.0,
        "model.gate.balance": 0.1,
        "model.mlore.balance": 0.1,
    },
    balanced: {
        "dwa.temperature": 1.0,
        "dwa.window": 100,
        "famo.gamma": 0.1,
        "famo.learning_rate": 0.1,
        "uncertainty.learning_rate": 0.1,
    },
    updates: {
        "num_steps": 100,
        "optimizer.algorithm": "adamw",
        "optimizer.backbone_rate": 0.1,
        "optimizer.clip_norm": 0.0,
        "optimizer.ema_decay": 0.9,
        "optimizer.layer_decay": 0.5,
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "cosine",
        "optimizer.schedule_power": 2.0,
        "optimizer.warmup_steps": 10,
        "optimizer.weight_decay": 0.1,
    },
    augmented: {
        "augment.brightness": 8.0,
        "augment.contrast_max": 3.0,
        "augment.contrast_min": 0.1,
        "augment.crop_max_class_share": 1.0,
        "augment.crop_redraws": 0,
        "augment.flip_probability": 0.0,
        "augment.hue": 90,
        "augment.photometric_probability": 0.0,
        "augment.saturation_max": 3.0,
        "augment.saturation_min": 0.1,
        "augment.scale_max": 1.2,
        "augment.scale_min": 1.0,
    },
    first_batch: {"batch_size": 3},
    loaded: {"model.pretrained": "backbone.npz", "model.pretrained_fresh": ".*pos.*"},
}
EFFECTS = [(field, value, effect) for effect, values in OTHER.items() for field, value in values.items()]


def small(**fields):
    config = nyud.get_config("tiny")
    config.dataset.image_size = (32, 32)
    config.num_steps = 10
    config.update_from_flattened_dict(fields)
    return config


@functools.cache
def as_shipped(effect):
    return effect(small())


def test_every_field_of_a_choice_has_another_value_here():
    assert {field for field, _, _ in EFFECTS} == named_fields(CHOICES)


@pytest.mark.parametrize(("field", "value", "effect"), EFFECTS, ids=[field for field, _, _ in EFFECTS])
def test_every_field_of_a_choice_changes_something(field, value, effect, tmp_path, monkeypatch):
    others = {"model.decoder": "mlore"} if field.startswith("model.mlore.") else {}
    before = effect(small(**others)) if others else as_shipped(effect)
    assert small()[field] != value
    if effect is loaded:
        monkeypatch.chdir(tmp_path)
        blocks = weight_layouts.random_blocks(width=32, depth=4, heads=2, patch=16, grid=(2, 2))
        np.savez("backbone.npz", **weight_layouts.augreg(blocks))
        if field == "model.pretrained_fresh":
            before = effect(small(**{"model.pretrained": "backbone.npz"}))
            assert before != effect(small(**{"model.pretrained": "backbone.npz", field: value}))
            return
    assert effect(small(**others, **{field: value})) != before


@pytest.mark.parametrize("effect", [model_program, train_step, balanced, updates, augmented, first_batch])
def test_nothing_else_makes_the_difference(effect):
    assert effect(small()) == as_shipped(effect)


def test_the_switches_of_the_model_page_are_fields_with_their_defaults() -> None:
    config = nyud.get_config("vit_b16")
    rows = re.findall(r"^\| `([\w.]+)`(?:, `([\w.]+)`)? \| ([^|]*) \|", MODEL, re.MULTILINE)
    assert len(rows) > 10
    for first, second, values in rows:
        for name, value in zip(filter(None, (first, second)), values.split(", "), strict=False):
            assert f"model.{name}" in dict(flat(config)), name
            default = config.model
            for part in name.split("."):
                default = default[part]
            if name != "feature_width":  # by size
                assert str(default) in (value, f"{value}.0"), (name, default, value)
