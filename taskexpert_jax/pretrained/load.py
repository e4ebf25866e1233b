"""A backbone that was trained before, in place of a random one; see docs/pretrained.md.

`config.model.pretrained` is a file of weights or the directory of a finished run of this project. What is loaded is
checked as a whole before anything else happens: every parameter of the backbone is found, with its shape, and every
tensor of the file is used or known to be of no use.
"""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.config import normalisation, read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models.backbones import position_embedding
from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.pretrained import files as weight_files
from taskexpert_jax.pretrained import naming
from taskexpert_jax.pretrained.assemble import Family, Part, Shape, build
from taskexpert_jax.pretrained.files import Input, Tensors
from taskexpert_jax.pretrained.naming import BLOCKS, POSITIONS
from taskexpert_jax.runs import tree
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.runs.tree import Tree
from taskexpert_jax.tasks import best_task, from_config

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters for a backbone: by path, in the model's shapes, float32 on the host; and what to tell the user."""

    arrays: Mapping[str, np.ndarray]
    report: str

    def placed(self, params: Tree) -> Tree:
        """`params` with these in their places, sharded as they are; the other arrays are the same."""

        def place(path: Any, leaf: jax.Array) -> jax.Array:
            value = self.arrays.get(jax.tree_util.keystr(path, simple=True, separator="/"))
            if value is None:
                return leaf
            value = value.astype(leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

        return jax.tree_util.tree_map_with_path(place, params)


def read(config: ConfigDict, model: TaskExpert) -> Weights | None:
    """The weights of `config.model.pretrained` for the backbone of `model`; None where it is empty.

    Raises:
      UserError: there is no such file, it cannot be read, or it does not fit; nothing is ever loaded in part.
    """
    where = config.model.pretrained
    if not where:
        return None
    shapes = budget.parameter_shapes(model)
    backbone = {name: shape for name, shape in shapes.items() if is_backbone(name)}
    fresh = _pattern(config.model.pretrained_fresh, backbone)
    if (pathlib.Path(where) / "config.json").exists():
        tensors, family, told = _read_run(pathlib.Path(where), backbone)
    else:
        tensors, metadata = weight_files.read(where)
        family = naming.recognise(tensors, model.backbone, where)
        told = weight_files.described_input(where, metadata)
    built = build(tensors, family, fresh, where)
    arrays, was = _on_grid(built.arrays, model.grid)
    arrays = {name: array.reshape(backbone[name]) for name, array in arrays.items()}
    sides = [f"{height}x{width}" for height, width in (was, model.grid)] if was else []
    kept_or_resized = f"pos_embedding {' -> '.join(dict.fromkeys(sides))}; " if sides else ""
    lines = [
        f"loaded {built.used} of {built.used} tensors of {where} ({family.title}) into the backbone ({kept_or_resized}"
        f"left out: {_listed(built.left_out)}); new: {_listed(name for name in shapes if name not in arrays)}",
        _compared(told, family.trained_with, was, model, tuple(config.dataset.image_size)),
    ]
    return Weights(arrays, "\n".join(lines))


def is_backbone(name: str) -> bool:
    """Whether the parameter at a path is the backbone's."""
    return name.startswith(("patches/", BLOCKS))


def _read_run(workdir: pathlib.Path, backbone: Shapes) -> tuple[Tensors, Family, Input]:
    """The parameters of a run's best checkpoint (the latest where none was evaluated), what they are, their input."""
    try:
        saved = read_run(workdir)
    except UserError as error:
        raise UserError(f"config.model.pretrained={workdir}: {error}") from None
    best = best_task(from_config(saved), saved.checkpoint.best_task)
    with contextlib.closing(Checkpoints(workdir, best, read_only=True)) as checkpoints:
        step = checkpoints.select("best")
        params = checkpoints.restore_parameters(step)
    tensors = tree.arrays(params)
    parts = []
    for name, shape in backbone.items():
        wanted: Shape = (None, None, shape[2]) if name == POSITIONS else shape
        parts.append(Part(name, None, {name: wanted}, lambda array: array))
    kind = f"a run of this project at step {step}"
    family = Family(kind, parts, r"(mixture|head_\w+)/.*|initial_memory|patches/class_token")
    return tensors, family, Input(*normalisation(saved), tuple(saved.dataset.image_size), "config.json")


def _on_grid(arrays: Tensors, grid: tuple[int, int]) -> tuple[Tensors, tuple[int, int] | None]:
    """The arrays with the position embeddings resized to `grid`, and the grid that they had (None: they are fresh)."""
    if POSITIONS not in arrays:
        return arrays, None
    height, width, _ = arrays[POSITIONS].shape
    resized = np.asarray(position_embedding.resize(jnp.asarray(arrays[POSITIONS]), grid))
    return arrays | {POSITIONS: resized}, (height, width)


def _compared(
    told: Input, known: str, grid: tuple[int, int] | None, model: TaskExpert, image_size: tuple[int, ...]
) -> str:
    """A line: the input that the weights were trained with, as far as it is known, and the one of this run."""
    if told.mean and told.std:
        theirs = f"mean {told.mean}, std {told.std} ({told.source})"
    else:
        theirs = f"mean and std not told by the file{f'; {known}' if known else ''}"
    size = told.size
    if size is None and grid is not None:
        size = (grid[0] * model.backbone.patch_size, grid[1] * model.backbone.patch_size)
    at = f", {size[0]}x{size[1]}" if size else ""
    own = model.normalisation
    line = f"their input: {theirs}{at}; this run's: mean {own.mean}, std {own.std}, {image_size[0]}x{image_size[1]}"
    if told.mean and told.std and not np.allclose([told.mean, told.std], [own.mean, own.std], atol=1e-3):
        line += f" (for theirs: --config.model.image_mean='{told.mean}' --config.model.image_std='{told.std}')"
    return line


def _pattern(regex: str, backbone: Shapes) -> re.Pattern[str] | None:
    """The regex compiled, None where it is empty; raises UserError where it is malformed or matches nothing."""
    if not regex:
        return None
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UserError(f"config.model.pretrained_fresh={regex!r} is not a regular expression: {error}") from None
    if not any(map(pattern.fullmatch, backbone)):
        raise UserError(
            f"config.model.pretrained_fresh={regex!r} matches no parameter of the backbone: they are "
            f"{', '.join(sorted(backbone))}"
        )
    return pattern


def _listed(names: Iterable[str]) -> str:
    """Names in short: those of one module as `head.*`, or `mixture/*`; a backbone's parameter in full."""
    groups = []
    for name in names:
        first, mark, rest = name.partition("/" if "/" in name else ".")
        if first == "Transformer":
            first = f"{first}/{rest.partition('/')[0]}"
        groups.append(name if is_backbone(name) or not mark else f"{first}{mark}*")
    return ", ".join(sorted(set(groups))) or "none"
