"""Initialises the backbone with pretrained weights; see docs/pretrained.md.

`config.model.pretrained` is a weight file, the directory of a finished run of this project, or a released folder, each
also in a bucket (gs://); or an hf:// address of a released model or of weight files. The weights are checked completely
first: every parameter of the backbone is there with its shape, and every tensor of the file is used or known to be
unnecessary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import pathlib
import re
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import paths, storage
from taskexpert_jax.config import normalisation, read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models.backbones import swin, vit
from taskexpert_jax.models.backbones.backbone import Backbone
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.pretrained import files as weight_files
from taskexpert_jax.pretrained import naming, swin_naming
from taskexpert_jax.pretrained.assemble import Family, Part, Shape, build
from taskexpert_jax.pretrained.files import Tensors
from taskexpert_jax.pretrained.recorded import Input, recorded_input
from taskexpert_jax.runs import hub, released, tree
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.runs.tree import Tree
from taskexpert_jax.tasks import best_task, from_config

Shapes = Mapping[str, tuple[int, ...]]

# Backbone -> naming schemes of its weight files: see `naming.recognise`.
_RECOGNISED: Mapping[type[Backbone], Callable[..., Family]] = {
    vit.ViT: naming.recognise,
    swin.Swin: swin_naming.recognise,
}


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


def read(config: ConfigDict, model: MultiTaskModel) -> Weights | None:
    """The weights of `config.model.pretrained` for the backbone of `model`; None if the field is empty.

    Raises:
      UserError: the file is missing, unreadable or does not fit. Nothing is loaded partially.
    """
    if not config.model.pretrained:
        return None
    given, field = config.model.pretrained, "config.model.pretrained"
    where = str(hub.weights(given, field) if paths.is_hub(given) else paths.local(given, field))
    backbone, names = model.backbone, budget.parameter_shapes(model)
    shapes = {name: shape for name, shape in names.items() if backbone.layer(name) is not None}
    fresh = _pattern(config.model.pretrained_fresh, shapes)
    file = weight_files.find(where)
    if file is None and (storage.path(where) / "config.json").exists():
        tensors, family, trained_input = _read_run(storage.path(where), backbone, shapes)
    elif file is not None and released.is_model(storage.path(file)):
        where = str(storage.path(file).parent)
        tensors, family, trained_input = _read_released(storage.path(where), backbone, shapes)
    else:
        where = file or where
        tensors, metadata = weight_files.read(where)
        trained_input = recorded_input(where, metadata)
        if type(backbone) not in _RECOGNISED:
            raise UserError(
                f"{field}={given}: names in weight files are not known for "
                f"config.model.backbone={config.model.backbone}; give a run or a released model of this project"
            )
        family = _RECOGNISED[type(backbone)](tensors, backbone, trained_input.model_size, where)
    built = build(tensors, family, fresh, where)
    resized = [name for name in backbone.of_image_size if name in built.arrays]
    sizes = [_sizes(name, built.arrays[name].shape, shapes[name]) for name in resized]
    arrays = built.arrays | {name: backbone.resized(name, built.arrays[name]) for name in resized}
    arrays = {name: array.reshape(shapes[name]) for name, array in arrays.items()}
    random = (name for name in names if name not in arrays)
    lines = [
        f"loaded {built.used} of {built.used} tensors of {where} ({family.title}) into the backbone ({''.join(sizes)}"
        f"unused: {_listed(built.unused, backbone)}); random: {_listed(random, backbone)}",
        _input_line(trained_input, family.trained_with, backbone.image_size_of(built.arrays), model),
    ]
    return Weights(arrays, "\n".join(lines))


def _read_run(workdir: pathlib.Path, backbone: Backbone, shapes: Shapes) -> tuple[Tensors, Family, Input]:
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
    return _of_project(f"a run of this project at step {step}", tree.arrays(params), saved, backbone, shapes)


def _read_released(folder: pathlib.Path, backbone: Backbone, shapes: Shapes) -> tuple[Tensors, Family, Input]:
    """As `_read_run`, of a released folder."""
    tensors, facts = released.restore_parameters(folder)
    return _of_project(f"a released model at step {facts.step}", tensors, read_run(folder), backbone, shapes)


def _of_project(
    kind: str, tensors: Tensors, saved: ConfigDict, backbone: Backbone, shapes: Shapes
) -> tuple[Tensors, Family, Input]:
    parts = []
    for name, shape in shapes.items():
        wanted: Shape = (*(None for _ in shape[1:]), shape[-1]) if name in backbone.of_image_size else shape
        parts.append(Part(name, None, {name: wanted}, lambda array: array))
    others = [name for name in tensors if backbone.layer(name) is None or name in backbone.optional]
    family = Family(kind, parts, "|".join(map(re.escape, others)))
    return tensors, family, Input(*normalisation(saved), tuple(saved.dataset.image_size), "config.json")


def _sizes(name: str, old: Sequence[int], new: Sequence[int]) -> str:
    """Sizes of a parameter in the weights and in the model: `pos_embedding 14x14 -> 28x36; `."""
    sides = ["x".join(map(str, shape[:-1])) for shape in (old, new)]
    return f"{name.rpartition('/')[2]} {' -> '.join(dict.fromkeys(sides))}; "


def _input_line(trained: Input, known: str, old_size: tuple[int, int] | None, model: MultiTaskModel) -> str:
    """One line that compares the input of the pretraining, as far as it is known, with the input of this run."""
    if trained.mean and trained.std:
        theirs = f"mean {trained.mean}, std {trained.std} ({trained.source})"
    else:
        theirs = f"mean and std not recorded in the file{f'; {known}' if known else ''}"
    size = trained.size or old_size
    at = f", {size[0]}x{size[1]}" if size else ""
    own, image_size = model.normalisation, model.image_size
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


def _listed(names: Iterable[str], backbone: Backbone) -> str:
    """A short list of names: one entry per module (`head.*`, `mixture/*`), backbone parameters in full."""
    groups = []
    for name in names:
        first, mark, rest = name.partition("/" if "/" in name else ".")
        if first == "Transformer":
            first = f"{first}/{rest.partition('/')[0]}"
        groups.append(name if backbone.layer(name) is not None or not mark else f"{first}{mark}*")
    return ", ".join(sorted(set(groups))) or "none"
