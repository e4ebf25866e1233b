"""Cost of each part of the model in a training step, from gradient programs without the later parts.

Each program of `RUNGS` computes a loss and the gradient's norm with the parts up to its name; a part's time is the
difference between its program and the one before. An omitted part is replaced by a mean or a sum, which costs almost
nothing and keeps the compiler from removing the parts before it.
"""

from collections.abc import Callable
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from taskexpert_jax.models import budget, heads, inputs
from taskexpert_jax.models.decoders import mixture, taskexpert
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.training import objective

# Reading the memory belongs to "experts and gates", because the memory is one more expert. The whole step comes last.
RUNGS = ("backbone", "experts and gates", "memory writes", "heads", "upsampling and losses")


def program(rung: str, model: MultiTaskModel) -> Any:
    """Jitted (state, batch) -> (loss, gradient norm, batch statistics) with the parts up to `rung` of `RUNGS`."""
    index = RUNGS.index(rung)

    def loss_fn(params: Any, batch_stats: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        kept: list[jax.Array] = []
        with nn.intercept_methods(_omit_after(index, kept)):
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                inputs.normalise(batch["image"], batch["window"], model.normalisation),
                train=True,
                full_size=False,
                rngs={"drop_path": key, "gate_noise": key},
                mutable=["batch_stats"],
            )
        if rung == RUNGS[-1]:
            losses = objective.losses(model.tasks, logits, batch)
            return sum((t.loss_weight * losses[t.name] for t in model.tasks), start=jnp.zeros(())), updates
        return sum((jnp.square(maps).mean() for maps in kept), start=jnp.zeros(())), updates

    def run(state: Any, batch: Any) -> Any:
        key = jax.random.wrap_key_data(state.rng)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, updates), grads = grad_fn(state.params, state.batch_stats, batch, key)
        return loss, optax.tree.norm(grads), updates

    return jax.jit(run)


def _omit_after(index: int, kept: list[jax.Array]) -> Callable[..., Any]:
    """A Flax interceptor that omits the parts after `RUNGS[index]`; inputs or outputs of the heads go to `kept`."""

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if isinstance(module, mixture.MemorialMixture):
            if method == "__call__" and index < RUNGS.index("experts and gates"):
                tokens, memory = args[0], args[1]
                seen = tokens.mean(axis=-1).reshape(1, *memory.shape[1:4], 1)
                return memory + seen.astype(memory.dtype), jnp.zeros(())
            if method == "_write" and index < RUNGS.index("memory writes"):
                return args[0] + args[1]
        if isinstance(module, heads.Head) and method == "__call__":
            if index < RUNGS.index("heads"):
                kept.append(args[0].astype(jnp.float32))
                return args[0].mean(axis=-1, keepdims=True).astype(jnp.float32)  # resized but unused
            kept.append(call(*args, **kwargs))
            return kept[-1]
        return call(*args, **kwargs)

    return intercept


def differences(programs: dict[str, Any], model: MultiTaskModel, batch: int) -> dict[str, Any]:
    """The time each part adds, median_s, which noise can make negative, and its model FLOPs.

    programs: times of `RUNGS`, then of the whole step.
    """
    operations = _operations(model, batch)
    parts, before = {}, 0.0
    for name, times in programs.items():
        parts[name] = {"median_s": times["median_s"] - before, "model_flops": operations.get(name, 0)}
        before = times["median_s"]
    return parts


def _operations(model: MultiTaskModel, batch: int) -> dict[str, int]:
    """Model FLOPs of a training step by part, counted by `budget`."""
    counts, decoder = budget.count(model).computed, model.decoder
    assert isinstance(decoder, taskexpert.TaskExpert)
    stride, tokens = decoder.taps[0].stride, math.prod(model.image_size)
    writes = len(decoder.taps) * len(model.tasks) * tokens // stride**2 * decoder.memory.write_area * decoder.width**2
    split = {
        "backbone": counts["backbone"],
        "experts and gates": counts["experts"] + counts["gates"] + counts["memory"] - writes,
        "memory writes": writes,
        "heads": counts["heads"],
    }
    return {name: 6 * batch * count for name, count in split.items()}
