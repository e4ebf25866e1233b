"""The bfloat16 train step: what is not bfloat16, and that its matmuls are those that the budget counts.

The step is traced, not compiled: these are the operands that a compiler gets to see.
"""

import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks.program.traced_step import part_of, trace_train_step
from configs import pascal_context
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models import products as traced_products
from taskexpert_jax.models.backbones import vit
from taskexpert_jax.tasks import from_config

# (part, operands) -> why it may be so. Everything else multiplies bfloat16 by bfloat16.
ALLOWED = {
    ("gates, assembling", "float32"): "the gates' logits: softmax is sensitive to rounding, and they are 0.01 % of all",
    ("upsampling to image size", "float32, high precision"): "outputs are float32 by contract; under 0.5 % of all",
}


def tiny_config():
    config = pascal_context.get_config("tiny")
    config.dtype = "bfloat16"
    return config


@pytest.fixture(scope="module")
def products():
    return list(traced_products.products(trace_train_step(tiny_config()).jaxpr.jaxpr))


def test_all_products_are_bfloat16_but_the_allowed_ones(products):
    others = {(part_of(product.path), product.kind) for product in products if set(product.dtypes) != {"bfloat16"}}
    assert others == set(ALLOWED)


def test_each_allowed_exception_is_one_place(products):
    """Not a whole part: the products of a part that are not bfloat16 are those that the reason speaks of."""
    paths = {
        allowed: {p.path.split("/", 2)[-1] for p in products if (part_of(p.path), p.kind) == allowed}
        for allowed in ALLOWED
    }
    assert all(path.endswith("vmap(gates)/logits") for path in paths["gates, assembling", "float32"])


def test_products_are_what_the_budget_counts(products):
    """Model FLOPs of a training step are six for each multiply-add of the forward pass, part by part."""
    config = tiny_config()
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    backbone, decoder = model.backbone, model.decoder
    counted = budget.count(model).computed
    traced: dict[str, int] = {}
    for product in products:
        part = part_of(product.path)
        traced[part] = traced.get(part, 0) + product.flops
    images = config.batch_size
    patches = 3 * 16**2 * backbone.architecture.width * math.prod(backbone.grid)  # the image needs no gradient
    of_backbone = traced["attention of tokens"] + traced["backbone, the rest"]
    assert of_backbone == images * (6 * counted["backbone"] - 2 * patches)
    assert traced["experts"] == images * 6 * counted["experts"]
    assert traced["memory"] == images * 6 * counted["memory"]
    assert traced["heads"] == images * 6 * counted["heads"]
    # The gated sum is counted, but is not a product in the program.
    summed = backbone.stages * len(tasks) * math.prod(backbone.grid) * (decoder.experts.count + 1) * decoder.width
    assert traced["gates, assembling"] == images * 6 * (counted["gates"] - summed)


def test_products_in_loops_are_counted_as_often_as_they_run():
    def looped(left, right):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ right), None), left, length=3)[0]

    (product,) = traced_products.products(jax.make_jaxpr(looped)(jnp.zeros((4, 5)), jnp.zeros((5, 5))).jaxpr)
    assert product.flops == 3 * 2 * 4 * 5 * 5


def test_attention_is_computed_as_the_config_says(monkeypatch):
    seen = []
    plain = jax.nn.dot_product_attention

    def recorded(*args, implementation=None, **kwargs):
        seen.append(implementation)
        return plain(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    tokens = jnp.zeros((1, 4, 32))
    for kind in ("xla", "cudnn"):
        block = vit.Block(vit.Architecture(32, 4, 2, 4, 16, attention=kind), jnp.dtype("float32"))
        jax.eval_shape(lambda block=block: block.init(jax.random.key(0), tokens, jnp.zeros(()), False))
    assert seen == ["xla", "cudnn"]


def test_fused_attention_is_refused_where_there_is_none():
    config = tiny_config()
    config.model.attention = "cudnn"
    with pytest.raises(UserError, match=r"config.model.attention='cudnn' .*\bcpu\b.*\bauto\b"):
        taskexpert.from_config(config, from_config(config))
