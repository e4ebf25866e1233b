"""Trees of arrays: names of the arrays, and differences between two trees."""

from typing import Any

import jax

Tree = Any  # a pytree of arrays


def arrays(tree: Tree) -> dict[str, Any]:
    """Flattens a tree of arrays, or of their metadata, by name (`params/head_depth/logits/bias`)."""

    def is_array(node: Any) -> bool:
        return hasattr(node, "shape") and hasattr(node, "dtype")

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_array)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat if is_array(leaf)}


def differences(saved: Tree, wanted: Tree, *, cast: bool = False) -> tuple[list[str], int]:
    """One line per array that is in only one tree or differs in shape or dtype; and the number of all arrays.

    cast: treats all float dtypes as equal.
    """
    old, new = (
        {_one_line(name): f"{tuple(leaf.shape)} {_dtype(leaf, cast)}" for name, leaf in arrays(tree).items()}
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


def listed(lines: list[str], most: int = 12) -> str:
    """The lines of `differences` for the end of a message, indented, each on a line of its own."""
    return "".join(f"\n  {line}" for line in lines[:most] + [f"... and {len(lines) - most} more"] * (len(lines) > most))


def _one_line(name: str) -> str:
    """The name for a message: a file of others may have line breaks and escape sequences in it."""
    return name if name.isprintable() else repr(name)


def _dtype(leaf: Any, cast: bool) -> str:
    found = jax.numpy.dtype(leaf.dtype)
    return "float" if cast and jax.numpy.issubdtype(found, jax.numpy.floating) else found.name
