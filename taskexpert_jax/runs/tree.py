"""A training state as the arrays of a checkpoint, and how two such trees differ."""

from typing import Any

import jax

from taskexpert_jax.training.state import TrainState, Tree


def split(state: TrainState) -> dict[str, dict[str, Any]]:
    """The items of a checkpoint: what evaluation needs, and what only training does."""
    averaged = {"ema": state.ema} if state.ema else {}
    return {
        "params": {"params": state.params, "batch_stats": state.batch_stats, **averaged},
        "train": {"opt_state": state.opt_state, "step": state.step, "rng": state.rng},
    }


def arrays(tree: Tree) -> dict[str, Any]:
    """Name, as `params/head_depth/logits/bias`, -> every array of a tree or of its metadata."""

    def is_array(node: Any) -> bool:
        return hasattr(node, "shape") and hasattr(node, "dtype")

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_array)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat if is_array(leaf)}


def differences(saved: Tree, wanted: Tree, *, cast: bool = False) -> tuple[list[str], int]:
    """A line for every array that is in one alone, or that differs in shape or dtype; and the number of all arrays.

    cast: whether one float dtype may stand for another.
    """
    old, new = (
        {name: f"{tuple(leaf.shape)} {_dtype(leaf, cast)}" for name, leaf in arrays(tree).items()}
        for tree in (saved, wanted)
    )
    lines = [f"- {name} {old[name]}: only in the checkpoint" for name in sorted(old.keys() - new.keys())]
    lines += [f"+ {name} {new[name]}: only in the model" for name in sorted(new.keys() - old.keys())]
    lines += [
        f"! {name}: {old[name]} in the checkpoint, {new[name]} in the model"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]
    return lines, len(old | new)


def _dtype(leaf: Any, cast: bool) -> str:
    found = jax.numpy.dtype(leaf.dtype)
    return "float" if cast and jax.numpy.issubdtype(found, jax.numpy.floating) else found.name
