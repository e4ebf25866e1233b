"""Attention implementations that `config.model.attention` chooses from.

Dims: B batch, N tokens, heads, d = C / heads.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import sharding

Kind = Literal["xla", "cudnn", "splash"]
PerHead = Float[Array, "B N heads d"]

# Kind -> the only platform that has it, its name in messages, and the dtypes it takes.
_NEEDS = {
    "cudnn": ("gpu", "an NVIDIA GPU", ("bfloat16",)),
    "splash": ("tpu", "a TPU", ("bfloat16", "float32")),
}
_FUSED_SINCE = 8  # compute capability (Ampere) from which cuDNN has fused attention
_FUSED_SIZES = range(8, 129, 8)  # head sizes that it takes on all of these GPUs
_LANES = 128  # splash takes sequence lengths that are multiples of it
_LONGEST_BLOCK = 512  # queries or keys: a block of float32 scores is then 1 MiB of a TPU core's 16 MiB or more


def choose(choice: Kind | Literal["auto"], dtype: str, size: int, device: Any) -> Kind:
    """Attention implementation on a device, real or described: `choice` itself, or what auto resolves to.

    auto is cudnn where it exists for this dtype and head size, else xla. Splash is never chosen by auto because it has
    not been run on a TPU yet.

    Raises:
      UserError: the device has no such attention for this dtype.
    """
    platform = device.platform
    if choice == "auto":
        fused = _capability(device) >= _FUSED_SINCE and dtype in _NEEDS["cudnn"][2] and size in _FUSED_SIZES
        return "cudnn" if fused else "xla"
    if choice in _NEEDS:
        needed, name, dtypes = _NEEDS[choice]
        if platform != needed or dtype not in dtypes:
            words = [name, *(f"config.dtype={dtypes[0]}" for _ in dtypes[:1] if len(dtypes) == 1)]
            raise UserError(
                f"config.model.attention={choice!r} needs {' and '.join(words)}, but this is {platform} with {dtype}; "
                "use auto"
            )
    return choice


def _capability(device: Any) -> float:
    """Compute capability of an NVIDIA GPU; 0 for other devices (AMD's are names)."""
    try:
        return float(getattr(device, "compute_capability", 0))
    except ValueError:
        return 0.0


def attend(query: PerHead, key: PerHead, value: PerHead, kind: Kind) -> PerHead:
    """Scaled dot-product attention; softmax in float32. `kind` is what `choose` returns, never auto."""
    if kind == "splash":
        return splash(query, key, value)
    if kind == "xla" and query.dtype == jnp.bfloat16:
        with jax.named_scope("attend"):
            return _bfloat16(query, key, value)
    with jax.named_scope("attend"):
        return jax.nn.dot_product_attention(query, key, value, implementation=kind)


@jax.custom_vjp
def _bfloat16(
    query: BFloat16[Array, "B N heads d"], key: BFloat16[Array, "B N heads d"], value: BFloat16[Array, "B N heads d"]
) -> BFloat16[Array, "B N heads d"]:
    """Attention whose matmuls, including those of the gradient, all have bfloat16 operands.

    The derived gradient of `jax.nn.dot_product_attention` saves the attention weights in float32 and in bfloat16, and
    multiplies the gradient of the scores in float32. Here only the bfloat16 weights are saved, a third of the bytes,
    and the gradient of the scores is rounded first, as in FlashAttention (arXiv 2205.14135).
    """
    return _bfloat16_forward(query, key, value)[0]


def _bfloat16_forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores / math.sqrt(query.shape[-1]), axis=-1).astype(value.dtype)  # (B, heads, N, N)
    mixed = jnp.einsum("bhnm,bmhd->bnhd", weights, value)
    return mixed, (query, key, value, weights, mixed)


def _bfloat16_backward(residuals: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, weights, mixed = residuals
    of_weights = jnp.einsum("bnhd,bmhd->bhnm", gradient, value, preferred_element_type=jnp.float32)
    # Row sums of weights * their gradient, computed from (B, N, heads, d) without a second pass over N x N values.
    mean = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # (B, heads, N)
    of_scores = weights.astype(jnp.float32) * (of_weights - mean[..., None]) / math.sqrt(query.shape[-1])
    of_scores = of_scores.astype(query.dtype)
    of_query = jnp.einsum("bhnm,bmhd->bnhd", of_scores, key)
    of_key = jnp.einsum("bhnm,bnhd->bmhd", of_scores, query)
    of_value = jnp.einsum("bhnm,bnhd->bmhd", weights, gradient)
    return of_query, of_key, of_value


_bfloat16.defvjp(_bfloat16_forward, _bfloat16_backward)


def splash(query: PerHead, key: PerHead, value: PerHead, *, interpret: bool = False) -> PerHead:
    """JAX's fused attention kernel for TPUs; each device computes its own examples and heads.

    Tokens are padded to a multiple of 128; the padding is a segment of its own that no token attends to.
    interpret: run the Pallas kernel in interpret mode, on any device, for tests.
    """
    _, tokens, _, size = query.shape
    padding = -tokens % _LANES

    def local(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        arrange = lambda of: jnp.pad(of.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))  # noqa: E731
        kernel, segments = _splash_kernel(query.shape[2], tokens, padding, interpret=interpret)
        mixed = jax.vmap(kernel, in_axes=(0, 0, 0, None))(
            *map(arrange, (query / math.sqrt(size), key, value)), segments
        )
        return mixed[:, :, :tokens].swapaxes(1, 2)

    with jax.named_scope("attend"):
        if jax.sharding.get_abstract_mesh().empty:
            return local(query, key, value)
        # XLA cannot partition a Pallas kernel by itself.
        spec = sharding.spec(query.shape, "batch", None, "heads", None)
        return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(query, key, value)


def _splash_kernel(heads: int, tokens: int, padding: int, *, interpret: bool) -> tuple[Any, Any]:
    """Kernel for (heads, tokens + padding, d) arrays, and the segment ids to call it with."""
    # Imported here because Pallas takes a second to import and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = tokens + padding
    block = max(size for size in range(_LANES, _LONGEST_BLOCK + 1, _LANES) if length % size == 0)
    blocks = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,  # five matmuls of the scores' size, where two kernels would need seven
    )
    mask = masks.MultiHeadMask([masks.FullMask((length, length))] * heads)
    kernel = kernels.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
    if not padding:
        return kernel, None
    segment = (jnp.arange(length) >= tokens).astype(jnp.int32)
    return kernel, kernels.SegmentIds(segment, segment)
