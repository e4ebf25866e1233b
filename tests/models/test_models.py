"""Facts about the model: what the experts, gates and memory do, and that the fast forms equal the plain ones."""

import zlib

import flax.linen as nn
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nyud
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import layers
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.backbones import vit
from taskexpert_jax.models.decoders import mixture
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config

IMAGE = jax.random.normal(jax.random.key(7), (2, 64, 80, 3))


def tiny_config(**model_fields):
    config = nyud.get_config("tiny")
    for field, value in model_fields.items():
        with config.unlocked():
            config.model.update_from_flattened_dict({field: value})
    return config


def build(**model_fields):
    config = tiny_config(**model_fields)
    return taskexpert.from_config(config, from_config(config))


def randomised(model):
    """Variables with nothing at its special initial value; a name and shape has the same values in all models."""
    shapes = sharding.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGE, train=False)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + 0.1 * noise if name.endswith(("['scale']", "['var']")) else 0.1 * noise)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def variables(model):
    return randomised(model)


def forward(model, variables, **settings):
    """Predictions and gates."""
    apply = jax.jit(lambda v, x: model.apply(v, x, return_aux=True, **{"train": False, **settings}))
    predictions, aux = apply(variables, IMAGE)
    return predictions, aux["gates"]


@pytest.fixture(scope="module")
def outputs(model, variables):
    return forward(model, variables)


def test_outputs_have_image_size_and_the_tasks_channels(outputs, model):
    predictions, gates = outputs
    assert {name: p.shape for name, p in predictions.items()} == {t.name: (2, 64, 80, t.channels) for t in model.tasks}
    assert all(p.dtype == jnp.float32 for p in predictions.values())
    assert gates.shape == (4, 4, 2, 20, 6)  # stages, tasks, images, tokens, experts and the memory


def test_gelu_is_the_exact_one_and_so_is_its_gradient():
    values = jnp.concatenate([jnp.linspace(-8, 8, 1001), jnp.array([-1e4, 1e4, 0.0])])
    exact = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    for ours, theirs in (
        (layers.gelu, exact),
        (jax.grad(lambda x: layers.gelu(x).sum()), jax.grad(lambda x: exact(x).sum())),
    ):
        np.testing.assert_allclose(ours(values), theirs(values), rtol=1e-6, atol=1e-6)
    half = values.astype(jnp.bfloat16)
    assert layers.gelu(half).dtype == jnp.bfloat16
    np.testing.assert_allclose(layers.gelu(half), exact(half.astype(jnp.float32)), rtol=2**-8, atol=2e-6)


def test_gates_sum_to_one(outputs):
    np.testing.assert_allclose(outputs[1].sum(axis=-1), 1.0, rtol=1e-6)


def test_gates_depend_on_place_image_and_task(outputs):
    gates = np.asarray(outputs[1])
    assert np.ptp(gates, axis=3).max() > 1e-3
    assert np.ptp(gates, axis=2).max() > 1e-3
    assert np.ptp(gates, axis=1).max() > 1e-3


@pytest.mark.parametrize("chosen", range(4))
def test_a_one_hot_gate_returns_that_expert(chosen):
    experts = jax.random.normal(jax.random.key(0), (3, 2, 5, 4))
    read = jax.random.normal(jax.random.key(1), (2, 2, 5, 4))
    gates = jnp.broadcast_to(jax.nn.one_hot(chosen, 4), (2, 2, 5, 4))
    expected = read if chosen == 3 else jnp.broadcast_to(experts[chosen], read.shape)
    np.testing.assert_array_equal(mixture.assemble(*map(jnp.asarray, (gates, experts, read))), expected)


def test_assemble_is_the_gated_sum():
    experts = np.asarray(jax.random.normal(jax.random.key(0), (3, 2, 5, 4)))
    read = np.asarray(jax.random.normal(jax.random.key(1), (2, 2, 5, 4)))
    gates = np.asarray(jax.nn.softmax(jax.random.normal(jax.random.key(2), (2, 2, 5, 4))))
    expected = np.zeros_like(read)
    for task in range(2):
        for k in range(3):
            expected[task] += gates[task, :, :, k, None] * experts[k]
        expected[task] += gates[task, :, :, 3, None] * read[task]
    np.testing.assert_allclose(
        mixture.assemble(*map(jnp.asarray, (gates, experts, read))), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_assembles_gradient_is_the_gated_sums(dtype, rtol):
    keys = jax.random.split(jax.random.key(0), 4)
    gates = jax.nn.softmax(jax.random.normal(keys[0], (2, 2, 5, 4)))
    experts, read = jax.random.normal(keys[1], (3, 2, 5, 8), dtype), jax.random.normal(keys[2], (2, 2, 5, 8), dtype)
    weights = jax.random.normal(keys[3], read.shape)

    def defined(gates, experts, read):
        choices = jnp.concatenate([jnp.broadcast_to(experts[:, None], (3, *read.shape)), read[None]])
        return jnp.sum(weights * jnp.einsum("tbnk,ktbnd->tbnd", gates, choices.astype(jnp.float32)))

    def ours(*args):
        return jnp.sum(weights * mixture.assemble(*args).astype(jnp.float32))

    for found, expected in zip(
        jax.grad(ours, (0, 1, 2))(gates, experts, read), jax.grad(defined, (0, 1, 2))(gates, experts, read), strict=True
    ):
        assert found.dtype == expected.dtype
        found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_top_k_keeps_the_largest_and_renormalises():
    logits = jnp.array([1.0, 3.0, 2.0, 0.0])
    kept = jnp.exp(jnp.array([3.0, 2.0]))
    expected = jnp.array([0.0, kept[0], kept[1], 0.0]) / kept.sum()
    np.testing.assert_allclose(mixture.gate_weights(logits, 2), expected, rtol=1e-6)
    np.testing.assert_allclose(mixture.gate_weights(logits, 0), jax.nn.softmax(logits), rtol=1e-6)
    np.testing.assert_array_equal(mixture.gate_weights(jnp.zeros(4), 2), (0.5, 0.5, 0, 0))  # as even gates start


def test_vmapped_gates_equal_a_loop_over_tasks(model, variables):
    of_taps = variables["params"]["mixture"]["gates"]
    gates = jax.tree.map(lambda leaf: leaf[0], of_taps)  # the first stage's, (T, ...)
    features = jax.random.normal(jax.random.key(3), (2, 20, 32))
    context = features.mean(axis=1)
    gate = mixture.Gate(model.decoder.gate, 6, jnp.float32)
    vmapped = jax.vmap(lambda p: gate.apply({"params": p}, features, context))(gates)
    for t in range(4):
        own = jax.tree.map(lambda leaf, t=t: leaf[t], gates)
        hidden = features @ own["local"]["kernel"] + own["local"]["bias"]
        hidden += (context @ own["context"]["kernel"] + own["context"]["bias"])[:, None]
        expected = jax.nn.gelu(hidden, approximate=False) @ own["logits"]["kernel"] + own["logits"]["bias"]
        np.testing.assert_allclose(vmapped[t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps", [4, 2])
def test_scanned_equals_a_plain_loop_over_stages_and_blocks(taps):
    model = build(taps=taps)
    variables = randomised(model)
    params, stats = variables["params"], variables["batch_stats"]

    @jax.jit
    def plain(image):
        patches = vit.PatchEmbed(model.backbone.architecture, model.backbone.grid, jnp.float32)
        tokens = patches.apply({"params": params["patches"]}, image)
        memory = jnp.broadcast_to(params["initial_memory"][:, None, None, None], (4, 2, 4, 5, 16))
        all_gates = []
        for s in range(taps):
            for b in range(s * 4 // taps, (s + 1) * 4 // taps):
                block = jax.tree.map(lambda leaf, b=b: leaf[b], params["blocks"])
                of_block = vit.Block(model.backbone.architecture, jnp.float32)
                tokens = of_block.apply({"params": block}, tokens, jnp.zeros(()), False)
            names = tuple(task.name for task in model.tasks)
            decoder = model.decoder
            tap = mixture.MemorialMixture(names, decoder.experts, decoder.gate, decoder.memory, jnp.float32)
            own = {"params": params["mixture"], "batch_stats": stats["mixture"]}
            own = jax.tree.map(lambda leaf, s=s: leaf[s], own)
            memory, gates = tap.apply(own, tokens, memory, False)
            all_gates.append(gates)
        return jnp.stack(all_gates)

    np.testing.assert_allclose(plain(IMAGE), forward(model, variables)[1], rtol=1e-4, atol=1e-5)


def test_unrolled_equals_scanned(variables, outputs):
    unrolled = build(unroll="yes")
    predictions = jax.jit(lambda v, x: unrolled.apply(v, x, train=False))(variables, IMAGE)
    for name, prediction in predictions.items():
        np.testing.assert_allclose(prediction, outputs[0][name], rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient(model, variables):
    target = jax.random.normal(jax.random.key(5), (2, 64, 80, 1))

    def loss(params):
        predictions, _ = model.apply(
            {**variables, "params": params},
            IMAGE,
            train=True,
            rngs={"drop_path": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return sum(jnp.mean(p * target) for p in predictions.values())

    grads = jax.jit(jax.grad(loss))(variables["params"])
    silent = [
        jax.tree_util.keystr(path)
        for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]
        if not (np.abs(grad).reshape(len(grad), -1).max(axis=1) > 1e-9).all()  # of every block and tap
        if path[0].key in ("blocks", "mixture") or not np.abs(grad).max() > 1e-9
    ]
    assert silent == []


SWITCHES = {
    "experts": {"experts": 3},
    "expert_kernel": {"expert_kernel": 1},
    "feature_width": {"feature_width": 24},
    "norm": {"norm": "layer"},
    "taps": {"taps": 2},
    "gate_local": {"gate.input": "local"},
    "gate_context": {"gate.input": "context"},
    "gate_image": {"gate.granularity": "image"},
    "gate_static": {"gate.granularity": "static"},
    "gate_uniform": {"gate.granularity": "uniform"},
    "gate_top_k": {"gate.top_k": 2},
    "gate_width": {"gate.width": 4},
    "gate_temperature": {"gate.temperature": 0.25},
    "memory_off": {"memory.read": "none"},
    "memory_identity": {"memory.read": "identity"},
    "memory_conv3x3": {"memory.read": "conv3x3"},
    "memory_zeros": {"memory.init": "zeros"},
    "memory_residual": {"memory.write": "residual"},
    "memory_replace": {"memory.write": "replace"},
    "head_upsample": {"head_upsample": 2},
    "mlp_ratio": {"mlp_ratio": 2},
    "layer_scale": {"layer_scale": 1.0},
    "class_token": {"class_token": True},
    "registers": {"registers": 2},
}


@pytest.mark.parametrize("fields", SWITCHES.values(), ids=SWITCHES)
def test_a_switch_changes_the_computation(fields, outputs):
    other = build(**fields)
    predictions, gates = forward(other, randomised(other))
    assert all(np.abs(p - outputs[0][name]).max() > 1e-4 for name, p in predictions.items())
    choices = fields.get("experts", 5) + (fields.get("memory.read") != "none")
    assert gates.shape == (fields.get("taps", 4), 4, 2, 20, choices)
    gates = np.asarray(gates)
    if fields.get("gate.granularity") == "uniform":
        np.testing.assert_allclose(gates, 1 / choices)
    elif fields.get("gate.granularity") == "static":
        assert np.ptp(gates, axis=(2, 3)).max() == 0 and np.ptp(gates, axis=1).max() > 0
    elif fields.get("gate.granularity") == "image" or fields.get("gate.input") == "context":
        assert np.ptp(gates, axis=3).max() == 0 and np.ptp(gates, axis=2).max() > 0
    elif "gate.top_k" in fields:
        assert ((gates > 0).sum(axis=-1) == 2).all()


def test_without_reading_the_memory_its_start_changes_only_a_constant():
    """Memory off: the gates' choices do not include it, and what the experts see does not depend on it."""
    model = build(**{"memory.read": "none"})
    variables = randomised(model)
    moved = jax.tree.map(lambda x: x, variables)
    moved["params"]["initial_memory"] = variables["params"]["initial_memory"] + 1.0
    np.testing.assert_array_equal(forward(model, variables)[1], forward(model, moved)[1])


@pytest.mark.parametrize(
    ("granularity", "same_over"), [("token", ()), ("image", (3,)), ("static", (2, 3))], ids=["token", "image", "static"]
)
def test_gate_noise_is_of_training_alone_and_as_coarse_as_the_gates(granularity, same_over):
    fields = {"gate.granularity": granularity, "drop_path": 0.0, "norm": "layer"}
    noisy, plain = build(**fields, **{"gate.noise": 0.5}), build(**fields)
    variables = randomised(plain)
    streams = {"drop_path": jax.random.key(0), "gate_noise": jax.random.key(1)}

    def gates(model, train, rngs):
        return np.asarray(forward(model, variables, train=train, rngs=rngs)[1])

    evaluated = gates(noisy, False, {})
    np.testing.assert_array_equal(evaluated, gates(plain, False, {}))
    trained = gates(noisy, True, streams)
    change = np.log(trained) - np.log(gates(plain, True, streams))
    change -= change.mean(axis=-1, keepdims=True)  # of the first stage: later ones see what the noise has changed
    assert 0.3 < change[0].std() < 0.6
    for axis in (2, 3):
        varies = np.ptp(change[0], axis=axis - 1).max() > 1e-3
        assert varies == (axis not in same_over)


def test_even_gates_start_with_the_same_weight_for_every_choice():
    def gates(fields):
        built = build(**fields)
        variables = sharding.unbox(built.init(jax.random.key(0), IMAGE, train=False))
        return np.asarray(built.apply(variables, IMAGE, train=False, return_aux=True)[1]["gates"])

    np.testing.assert_allclose(gates({}), 1 / 6, rtol=1e-6)
    assert np.ptp(gates({"gate.init": "random"})) > 0.05


def test_the_balance_loss_is_the_squared_coefficient_of_variation_of_the_mean_weights():
    gates = np.random.default_rng(0).dirichlet([0.5, 1, 2], size=(2, 3, 4, 5)).astype(np.float32)  # (S, T, B, N, 3)
    share = np.array([[1, 2, 0, 1, 3]] * 3 + [[0] * 5], np.float32)  # the last example is padding
    means = np.einsum("stbnk,bn->stk", gates, share) / share.sum()
    expected = np.mean(means.var(axis=-1) / means.mean(axis=-1) ** 2)
    np.testing.assert_allclose(mixture.balance_loss(jnp.asarray(gates), jnp.asarray(share)), expected, rtol=1e-5)
    np.testing.assert_allclose(
        mixture.balance_loss(jnp.asarray(np.full_like(gates, 1 / 3)), jnp.asarray(share)), 0, atol=1e-6
    )
    one_hot = np.zeros_like(gates)
    one_hot[..., 0] = 1
    np.testing.assert_allclose(mixture.balance_loss(jnp.asarray(one_hot), jnp.asarray(share)), 2, rtol=1e-5)


def test_stochastic_depth_drops_whole_branches_in_training_only():
    branch = jnp.ones((1000, 3, 4))

    class Drop(nn.Module):
        @nn.compact
        def __call__(self, train):
            return vit.drop_path(self, branch, jnp.asarray(0.25), train)

    kept = Drop().apply({}, True, rngs={"drop_path": jax.random.key(0)})
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    assert (np.ptp(kept, axis=(1, 2)) == 0).all()
    assert abs((kept[:, 0, 0] == 0).mean() - 0.25) < 0.05
    np.testing.assert_array_equal(Drop().apply({}, False), branch)


def test_drop_path_field_changes_training_only(variables, outputs):
    dropping = build(drop_path=0.9)
    evaluated = jax.jit(lambda v: dropping.apply(v, IMAGE, train=False))(variables)["depth"]
    np.testing.assert_allclose(evaluated, outputs[0]["depth"], rtol=1e-4, atol=1e-5)

    def trained(model):
        rngs = {"drop_path": jax.random.key(1)}
        step = jax.jit(lambda v: model.apply(v, IMAGE, train=True, rngs=rngs, mutable=["batch_stats"])[0])
        return step(variables)["depth"]

    assert np.abs(trained(dropping) - trained(build(drop_path=0.0))).max() > 1e-3


def test_remat_changes_no_value(variables):
    def grads(m):
        def loss(params):
            rngs = {"drop_path": jax.random.key(0)}
            p, _ = m.apply({**variables, "params": params}, IMAGE, train=True, rngs=rngs, mutable=["batch_stats"])
            return sum(jnp.square(x).mean() for x in p.values())

        return ravel_pytree(jax.jit(jax.grad(loss))(variables["params"]))[0]

    plain, recomputed = grads(build()), grads(build(remat=True))
    np.testing.assert_allclose(plain, recomputed, rtol=1e-4, atol=1e-6 * float(jnp.abs(plain).max()))


def test_any_image_size_that_is_a_multiple_of_the_patch(model, variables):
    predictions = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, jnp.ones((1, 32, 112, 3)))
    assert predictions["normals"].shape == (1, 32, 112, 3)
    with pytest.raises(UserError, match=r"60x80.*\b16\b"):
        model.apply(variables, jnp.ones((1, 60, 80, 3)), train=False)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(variables, outputs):
    config = tiny_config()
    config.dtype = "bfloat16"
    half = taskexpert.from_config(config, from_config(config))
    predictions = jax.jit(lambda v, x: half.apply(v, x, train=False))(variables, IMAGE)
    for name, prediction in predictions.items():
        assert prediction.dtype == jnp.float32
        difference = np.abs(prediction - outputs[0][name]).max() / np.abs(outputs[0][name]).max()
        assert 1e-5 < difference < 0.1, name
