"""Counts of padding, of the bytes that scans keep, and of the roofline estimate, beside ones made by hand."""

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import pytest

from benchmarks import padding, roofline, scan_traffic, traced_products
from configs import pascal_context
from taskexpert_jax.models import attention, budget

Matrices = padding.Matrices


def matrices_of(function, *shapes, dtype="bfloat16"):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return [of for _, of in padding.products(jax.make_jaxpr(function)(*arrays).jaxpr)]


def convolution(images, kernel, stride=1):
    same = "SAME" if stride == 1 else "VALID"
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, kernel, (stride, stride), same, dimension_numbers=numbers)


def test_product_of_batches():
    (found,) = matrices_of(lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y), (3, 40, 130), (3, 130, 5))
    assert sorted((found.rows, found.columns)) == [5, 40]
    assert (found.count, found.contracted) == (3, 130)
    assert found.flops == 2 * 3 * 40 * 5 * 130
    assert found.padded(128) == 2 * 3 * 40 * 128 * 256  # the longer free dim is a multiple of 8 already
    assert found.padded(256) == 2 * 3 * 40 * 256 * 256


def test_free_dims_are_one_and_contracted_dims_too():
    (found,) = matrices_of(lambda x, y: jnp.einsum("abkl,kl->ab", x, y), (3, 7, 5, 4), (5, 4))
    assert {found.rows, found.columns} == {21, 1}
    assert found.contracted == 20
    assert found.padded(128) == 2 * 24 * 128 * 128


def test_whole_tiles_are_not_padded():
    found = Matrices(2, 8 * 1024, 512, 256)
    assert found.padded(128) == found.padded(256) == found.flops


def test_convolution_and_its_gradients():
    """Of 3x3: in features by place of the window; in the gradient of the kernel the images' places are contracted."""

    def gradients(images, kernel, outputs):
        return jax.vjp(convolution, images, kernel)[1](outputs)

    found = matrices_of(gradients, (2, 4, 6, 5), (3, 3, 5, 7), (2, 4, 6, 7))
    assert set(found) == {Matrices(9, 48, 7, 5), Matrices(9, 48, 5, 7), Matrices(9, 5, 7, 48)}


def test_convolution_of_patches_and_its_gradient():
    def gradient(images, kernel, outputs):
        return jax.vjp(lambda kernel: convolution(images, kernel, 4), kernel)[1](outputs)

    found = matrices_of(gradient, (2, 8, 12, 3), (4, 4, 3, 10), (2, 2, 3, 10))
    assert set(found) == {Matrices(16, 12, 10, 3), Matrices(16, 3, 10, 12)}


@pytest.fixture(scope="module")
def tiny_step():
    return traced_products.trace_train_step(pascal_context.get_config("tiny")).jaxpr.jaxpr


def test_matrices_are_the_products_that_are_counted(tiny_step):
    matrices = [of.flops for _, of in padding.products(tiny_step)]
    assert matrices == [product.flops for product in traced_products.products(tiny_step)]


def test_table_adds_up(tiny_step):
    found = list(padding.products(tiny_step))
    total = sum(of.flops for _, of in found)
    added = sum(of.padded(128) for _, of in found) - total
    assert f"| {100 * added / total:.1f} % | {100 * added / total:.2f} % |" in padding.table(found, 4).splitlines()[-1]
    row = padding.largest([("heads", Matrices(1, 128, 64, 128)), ("memory", Matrices(1, 128, 128, 128))], 1, 1)
    assert row.splitlines()[2].startswith("| heads: 128 x 64 x 128 | 0.00 | 0.00 | 100.0 % | 33.33 % |")


def kept_by(function, *arrays):
    return sorted((of.bytes, of.written) for of in scan_traffic.kept(jax.make_jaxpr(function)(*arrays).jaxpr))


def test_scan_writes_what_it_stacks_and_reads_what_it_takes():
    def body(carry, taken):
        kernel, bias = taken
        product = jax.jit(jnp.dot)(carry, kernel.astype(jnp.float32))  # the call and the dtype are looked through
        hidden = jnp.tanh(product + bias)
        return hidden, (checkpoint_name(product.reshape(2, 2, 3), "product"), hidden.T)

    def looped(kernels, biases):
        return jax.lax.scan(body, jnp.zeros((4, 3)), (kernels, biases))

    # The kernels are read by the product, and what it makes is written by it: both are counted as its own.
    kernels, biases = jnp.zeros((5, 3, 3), jnp.bfloat16), jnp.zeros((5, 3))
    assert kept_by(looped, kernels, biases) == [(5 * 3 * 4, False), (5 * 4 * 3 * 4, True)]


def test_scan_in_a_scan_is_counted_as_often_as_it_runs_and_once():
    def inner(carry, _):
        carry = jnp.sin(carry)
        return carry, carry

    def outer(carry, _):
        carry, stacked = jax.lax.scan(inner, carry, length=3)
        return carry, stacked

    assert kept_by(lambda x: jax.lax.scan(outer, x, length=5), jnp.zeros(2)) == [(5 * 3 * 2 * 4, True)]


def test_what_the_backward_pass_keeps_is_written_and_read():
    def loss(x):
        return jax.lax.scan(lambda carry, _: (jnp.sin(carry), None), x, length=5)[0].sum()

    assert kept_by(jax.grad(loss), jnp.zeros(2)) == [(5 * 2 * 4, False), (5 * 2 * 4, True)]


BATCH, TOKENS, HEADS, SIZE, LAYERS = 3, 6, 2, 4, 5


@pytest.fixture(scope="module")
def attention_work():
    """Of scanned bfloat16 attention and its gradient."""

    def layer(carry, _):
        mixed = attention.attend(carry, 2 * carry, 3 * carry, "xla")
        return mixed, None

    def loss(tokens):
        return jax.lax.scan(layer, tokens, length=LAYERS)[0].astype(jnp.float32).sum()

    tokens = jax.ShapeDtypeStruct((BATCH, TOKENS, HEADS, SIZE), "bfloat16")
    return roofline.work(jax.make_jaxpr(jax.grad(loss))(tokens).jaxpr, TOKENS)


def test_fused_attention_drops_the_bytes_of_scores_and_no_others(attention_work):
    fused = roofline.fused(attention_work, TOKENS)
    scores = BATCH * HEADS * TOKENS**2 * LAYERS
    # float32: the scores and the gradient of the weights are results. bfloat16: the weights are an operand twice, and
    # the scores' gradient is; the scan stacks the weights.
    dropped = (4 + 4 + 2 + 2 + 2 + 2 + 2) * scores
    assert sum(of.bytes for of in attention_work) - sum(of.bytes for of in fused) == dropped
    # Forward: queries, keys, values, output. Backward: these, the output's gradient, and three gradients.
    tokens = 2 * BATCH * HEADS * TOKENS * SIZE * LAYERS
    assert sum(of.bytes for of in fused if of.matrices != roofline.NOTHING) == (4 + 8) * tokens


def test_fused_attention_computes_the_scores_once_more(attention_work):
    one = 2 * BATCH * HEADS * TOKENS**2 * SIZE * LAYERS
    assert sum(of.matrices.flops for of in attention_work) == 6 * one
    assert sum(of.matrices.flops for of in roofline.fused(attention_work, TOKENS)) == 7 * one


def test_part_takes_the_longer_of_arithmetic_and_memory():
    found = [
        roofline.Work("head_a/mix", Matrices(1, 1000, 64, 128), 819),
        roofline.Work("head_a/mix", roofline.NOTHING, 819 * 10**6),
        roofline.Work("blocks/mlp", Matrices(1, 197 * 10**6, 128, 128), 1),
    ]
    of = roofline.bound(found, 10**6, "TPU v5e")
    assert of.arithmetic["heads"] == pytest.approx(2 * 1000 * 64 * 128 / 197e12)
    assert of.padded["heads"] == pytest.approx(2 * 1000 * 128 * 128 / 197e12)
    assert of.longer["heads"] == pytest.approx((819e6 + 819) / 819e9)
    assert of.longer["backbone, the rest"] == pytest.approx(2 * 128 * 128 * 1e-6)
    assert of.longer["optimiser"] == pytest.approx(32e6 / 819e9)
    assert (of.limit("heads"), of.limit("backbone, the rest")) == ("bytes", "arithmetic")
    assert of.seconds == pytest.approx(1e-3 + 1e-9 + 32.768e-3 + 32e-3 / 819)


def test_device_row_says_what_limits_and_the_mfu_that_is_left():
    found = [roofline.Work("blocks/mlp", Matrices(1, 197 * 10**6, 64, 128), 1)]
    counts = budget.Budget({"backbone": 0}, {"backbone": 0}, {"backbone": 197 * 10**6 * 64 * 128 // 3})
    row = next(line for line in roofline.devices_table(found, counts, 1).splitlines() if "v5e" in line)
    assert row == "| TPU v5e | 16.4 | 32.8 | 0.0 | 32.8 | 50 % | backbone, the rest: 32.8 ms, arithmetic |"


@pytest.mark.parametrize(("precision", "passes"), [(None, 1), ("high", 3), ("highest", 6)])
def test_float32_at_a_high_precision_takes_several_passes(precision, passes):
    def product(x, y):
        return jnp.dot(x, y, precision=precision)

    (found,) = roofline.work(jax.make_jaxpr(product)(jnp.zeros((128, 128)), jnp.zeros((128, 128))).jaxpr, 7)
    padded = roofline.bound([found], 0, "TPU v4").padded["upsampling to image size"]
    assert padded == passes * found.matrices.flops / 275e12
