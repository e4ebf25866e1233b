"""Conversion of our parameters, gradients and batch statistics to the names and layouts of `reference`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def state_dict(params: Any, batch_stats: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Converts parameters (or gradients) and batch statistics to the PyTorch model's names.

    Args:
      params: the tree of `TrainState.params`: blocks stacked as (depth, ...), taps as (S, ...).
      batch_stats: the tree of `TrainState.batch_stats`; {} for none.
      names: task names in the config's order.

    Returns:
      float32 tensors on the CPU, for `load_state_dict` (strict where batch_stats are given).
    """
    found = {}
    for tree in (params, batch_stats):
        for path, leaf in _leaves(tree):
            for where, part in _unstacked(path, np.asarray(leaf, np.float32), names):
                name, array = _renamed(where, part)
                found[name] = torch.from_numpy(np.array(array, order="C"))
    for name in [name for name in found if name.endswith(".running_mean")]:
        found[name.replace("running_mean", "num_batches_tracked")] = torch.zeros((), dtype=torch.long)
    return found


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        return [(path, tree)]
    return [found for key, node in tree.items() for found in _leaves(node, (*path, key))]


def _unstacked(path: tuple[str, ...], leaf: np.ndarray, names: Sequence[str]) -> list[tuple[tuple[str, ...], Any]]:
    """Splits a leaf stacked over blocks, taps or tasks; returns each part with its PyTorch path."""
    if path[0] == "blocks":
        return [(("blocks", str(index), *path[1:]), block) for index, block in enumerate(leaf)]
    if path[0] == "mixture":
        return [
            found for index, tap in enumerate(leaf) for found in _of_tasks(("taps", str(index), *path[1:]), tap, names)
        ]
    if path[0] == "patches":
        return [(path[1:], leaf)]
    if path[0].startswith("head_"):
        return [(("heads", path[0].removeprefix("head_"), *path[1:]), leaf)]
    return [(path, leaf)]


def _of_tasks(path: tuple[str, ...], leaf: np.ndarray, names: Sequence[str]) -> list[tuple[tuple[str, ...], Any]]:
    if path[2] in ("gates", "read"):  # vmapped over the tasks
        return [((*path[:3], name, *path[3:]), part) for name, part in zip(names, leaf, strict=True)]
    layer, _, task = path[2].partition("_")
    if layer in ("write", "blend"):
        return [((*path[:2], layer, task, *path[3:]), leaf)]
    if path[-2].startswith("expert_"):
        return [((*path[:3], "spatial", path[-2].removeprefix("expert_"), path[-1]), leaf)]
    return [(path, leaf)]


def _renamed(path: tuple[str, ...], leaf: np.ndarray) -> tuple[str, np.ndarray]:
    """PyTorch name and layout of a parameter."""
    *modules, last = path
    if len(modules) > 1 and modules[-1] in ("norm", "batch") and modules[-2].startswith("norm"):
        modules.pop()  # the wrapper of a normalisation
    if last in ("qkv_kernel", "qkv_bias"):
        kernel = last == "qkv_kernel"
        array = leaf.reshape(len(leaf), -1).T if kernel else leaf.reshape(-1)
        return ".".join((*modules, "qkv", "weight" if kernel else "bias")), array
    if last == "pos_embedding":
        return last, leaf.reshape(1, -1, leaf.shape[-1])
    name = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(last, last)
    if last == "kernel":
        leaf = leaf.T if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)
        if (modules[0] == "heads" and modules[-1] == "logits") or "blend" in modules:
            leaf = leaf[:, :, None, None]
    return ".".join((*modules, name)), leaf
