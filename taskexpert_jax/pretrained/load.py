"""Initialises the backbone with pretrained weights; see docs/pretrained.md.

`config.model.pretrained` is a weight file, the directory of a finished run of this project, or a released folder, each
also in a bucket (gs://); or an hf:// address of a released model or of weight files. The weights are checked completely
first: every parameter of the backbone is there with its shape, and every tensor of the file is used or known to be
unnecessary.
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

from taskexpert_jax import paths, storage
from taskexpert_jax.config import normalisation, read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models.backbones import position_embedding
from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.pretrained import files as weight_files
from taskexpert_jax.pretrained import naming
from taskexpert_jax.pretrained.assemble import Family, Part, Shape, build
from taskexpert_jax.pretrained.files import Tensors
from taskexpert_jax.pretrained.naming import BLOCKS, POSITIONS
from taskexpert_jax.pretrained.recorded import Input, recorded_input
from taskexpert_jax.runs import hub, released, tree
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.runs.tree import Tree
from taskexpert_jax.tasks import best_task, from_config

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Backbone parameters by path, in the model's shapes, float32 on the host; and a report for the user."""

    arrays: Mapping[str, np.ndarray]
    report: str

    def placed(self, params: Tree) -> Tree:
        """`params` with these arrays substituted, in the dtypes and shardings of the originals."""

        def place(path: Any, leaf: jax.Array) -> jax.Array:
            value = self.arrays.get(jax.tree_util.keystr(path, simple=True, separator="/"))
            if value is None:
                return leaf
            value = value.astype(leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

        return jax.tree_util.tree_map_with_path(place, params)


def read(config: ConfigDict, model: TaskExpert) -> Weights | None:
    """The weights of `config.model.pretrained` for the backbone of `model`; None if the field is empty.

    Raises:
      UserError: the file is missing, unreadable or does not fit. Nothing is loaded partially.
    """
    if not config.model.pretrained:
        return None
    given, field = config.model.pretrained, "config.model.pretrained"
    where = str(hub.weights(given, field) if paths.is_hub(given) else paths.local(given, field))
    shapes = budget.parameter_shapes(model)
    backbone = {name: shape for name, shape in shapes.items() if is_backbone(name)}
    fresh = _pattern(config.model.pretrained_fresh, backbone)
    file = weight_files.find(where)
    if file is None and (storage.path(where) / "config.json").exists():
        tensors, family, trained_input = _read_run(storage.path(where), backbone)
    elif file is not None and released.is_model(storage.path(file)):
        where = str(storage.path(file).parent)
        tensors, family, trained_input = _read_released(storage.path(where), backbone)
    else:
        where = file or where
        tensors, metadata = weight_files.read(where)
        trained_input = recorded_input(where, metadata)
        family = naming.recognise(tensors, model.backbone, model.grid, trained_input.model_size, where)
    built = build(tensors, family, fresh, where)
    arrays, old_grid = _on_grid(built.arrays, model.grid)
    arrays = {name: array.reshape(backbone[name]) for name, array in arrays.items()}
    sides = [f"{height}x{width}" for height, width in (old_grid, model.grid)] if old_grid else []
    kept_or_resized = f"pos_embedding {' -> '.join(dict.fromkeys(sides))}; " if sides else ""
    lines = [
        f"loaded {built.used} of {built.used} tensors of {where} ({family.title}) into the backbone ({kept_or_resized}"
        f"unused: {_listed(built.unused)}); random: {_listed(name for name in shapes if name not in arrays)}",
        _input_line(trained_input, family.trained_with, old_grid, model, tuple(config.dataset.image_size)),
    ]
    return Weights(arrays, "\n".join(lines))


def is_backbone(name: str) -> bool:
    """True for the path of a backbone parameter."""
    return name.startswith(("patches/", BLOCKS))


def _read_run(workdir: pathlib.Path, backbone: Shapes) -> tuple[Tensors, Family, Input]:
    """Parameters of a run's best checkpoint (the latest if none was evaluated), their naming, their training input."""
    try:
        saved = read_run(workdir)
    except UserError as error:
        raise UserError(
            f"config.model.pretrained={workdir} has no weight file, and is no run of this project: {error}"
        ) from None
    best = best_task(from_config(saved), saved.checkpoint.best_task)
    with contextlib.closing(Checkpoints(workdir, best, read_only=True)) as checkpoints:
        step = checkpoints.select("best")
        params = checkpoints.restore_parameters(step)
    return _of_project(f"a run of this project at step {step}", tree.arrays(params), saved, backbone)


def _read_released(folder: pathlib.Path, backbone: Shapes) -> tuple[Tensors, Family, Input]:
    """As `_read_run`, of a released folder."""
    tensors, facts = released.restore_parameters(folder)
    return _of_project(f"a released model at step {facts.step}", tensors, read_run(folder), backbone)


def _of_project(kind: str, tensors: Tensors, saved: ConfigDict, backbone: Shapes) -> tuple[Tensors, Family, Input]:
    parts = []
    for name, shape in backbone.items():
        wanted: Shape = (None, None, shape[2]) if name == POSITIONS else shape
        parts.append(Part(name, None, {name: wanted}, lambda array: array))
    family = Family(kind, parts, r"(mixture|head_\w+)/.*|initial_memory|patches/class_token")
    return tensors, family, Input(*normalisation(saved), tuple(saved.dataset.image_size), "config.json")


def _on_grid(arrays: Tensors, grid: tuple[int, int]) -> tuple[Tensors, tuple[int, int] | None]:
    """The arrays with position embeddings resized to `grid`, and their old grid; None if they stay random."""
    if POSITIONS not in arrays:
        return arrays, None
    height, width, _ = arrays[POSITIONS].shape
    resized = np.asarray(position_embedding.resize(jnp.asarray(arrays[POSITIONS]), grid))
    return arrays | {POSITIONS: resized}, (height, width)


def _input_line(
    trained: Input, known: str, grid: tuple[int, int] | None, model: TaskExpert, image_size: tuple[int, ...]
) -> str:
    """One line that compares the input of the pretraining, as far as it is known, with the input of this run."""
    if trained.mean and trained.std:
        theirs = f"mean {trained.mean}, std {trained.std} ({trained.source})"
    else:
        theirs = f"mean and std not recorded in the file{f'; {known}' if known else ''}"
    size = trained.size
    if size is None and grid is not None:
        size = (grid[0] * model.backbone.patch_size, grid[1] * model.backbone.patch_size)
    at = f", {size[0]}x{size[1]}" if size else ""
    own = model.normalisation
    line = f"pretrained on: {theirs}{at}; this run: mean {own.mean}, std {own.std}, {image_size[0]}x{image_size[1]}"
    if trained.mean and trained.std and not np.allclose([trained.mean, trained.std], [own.mean, own.std], atol=1e-3):
        line += f" (to match: --config.model.image_mean='{trained.mean}' --config.model.image_std='{trained.std}')"
    return line


def _pattern(regex: str, backbone: Shapes) -> re.Pattern[str] | None:
    """The compiled regex, None if empty; raises UserError if it is malformed or matches no backbone parameter."""
    if not regex:
        return None
    try:
        pattern = re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"config.model.pretrained_fresh={regex!r} is not a regular expression: {error}") from None
    if not any(map(pattern.fullmatch, backbone)):
        raise UserError(
            f"config.model.pretrained_fresh={regex!r} matches no parameter of the backbone; its parameters: "
            f"{', '.join(sorted(backbone))}"
        )
    return pattern


def _listed(names: Iterable[str]) -> str:
    """A short list of names: one entry per module (`head.*`, `mixture/*`), backbone parameters in full."""
    groups = []
    for name in names:
        first, mark, rest = name.partition("/" if "/" in name else ".")
        if first == "Transformer":
            first = f"{first}/{rest.partition('/')[0]}"
        groups.append(name if is_backbone(name) or not mark else f"{first}{mark}*")
    return ", ".join(sorted(set(groups))) or "none"
