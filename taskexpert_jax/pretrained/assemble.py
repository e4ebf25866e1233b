"""Conversion of a file's tensors into parameters of our backbone; files that do not fit are refused.

Our names are paths such as `patches/embedding/kernel` or `blocks/norm1/norm/scale`. The blocks' arrays are stacked:
(depth, ...).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re

import numpy as np

from taskexpert_jax.errors import UserError

Shape = tuple[int | None, ...]  # None: any size
Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our parameters, or one block's slice of it, and the tensors that it is built from.

    Attributes:
      name: our path.
      block: index in the stacked array; None where the parameter is not stacked.
      sources: the tensors' names and shapes in the file.
      build: tensors, in the order of `sources` -> our array.
    """

    name: str
    block: int | None
    sources: Mapping[str, Shape]
    build: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
    """Naming scheme of the weights from one source.

    Attributes:
      title: its name in messages.
      parts: parts of a backbone; every parameter is covered once.
      dropped: regex of the tensors that the backbone does not use.
      prefix: prefix of the names of `parts` in the file; the names of `dropped` may have all of it, or its first parts.
      trained_with: known input normalisation of the training, for files that do not record it.
    """

    title: str
    parts: Sequence[Part]
    dropped: str
    prefix: str = ""
    trained_with: str = ""


@dataclasses.dataclass(frozen=True)
class Built:
    """Parameters built from a file.

    Attributes:
      arrays: by our path, float32; blocks stacked over the depth.
      used: number of the file's tensors that they are built from.
      unused: names of the others; the family drops them, or the config initialises their parameters at random.
    """

    arrays: dict[str, np.ndarray]
    used: int
    unused: tuple[str, ...]


def build(tensors: Tensors, family: Family, fresh: re.Pattern[str] | None, where: str) -> Built:
    """Builds all parameters from a file's tensors, except those whose whole path matches `fresh`.

    Raises:
      UserError: a tensor is missing, unknown or of another shape. The message lists the first twelve:
        + missing from the file, - only in the file, ! shapes differ.
    """
    wanted = [part for part in family.parts if not (fresh and fresh.fullmatch(part.name))]
    sources = {family.prefix + name: shape for part in wanted for name, shape in part.sources.items()}
    unwanted = {family.prefix + name for part in family.parts if part not in wanted for name in part.sources}
    unused = tuple(sorted(tensors.keys() - sources.keys()))
    dropped = re.compile(family.dropped)
    unknown = [
        name for name in unused if name not in unwanted and not dropped.fullmatch(_without_prefix(family.prefix, name))
    ]
    lines = [f"+ {name} {_text(sources[name])}: not in the file" for name in sorted(sources.keys() - tensors.keys())]
    lines += [f"- {name} {tensors[name].shape}: only in the file" for name in unknown]
    lines += [
        f"! {name}: {tensors[name].shape} in the file, {_text(shape)} in the model"
        for name, shape in sorted(sources.items())
        if name in tensors and not _fits(tensors[name].shape, shape)
    ]
    if lines:
        shown = "\n  ".join(lines[:12] + ([f"... and {len(lines) - 12} more"] if len(lines) > 12 else []))
        raise UserError(
            f"{where} ({family.title}) does not fit this config's backbone: {len(lines)} mismatches, {len(tensors)} "
            "tensors in the file; use the backbone variant of these weights, or list the parameters that may stay "
            f"random in config.model.pretrained_fresh:\n  {shown}"
        )
    return Built(_assembled(tensors, family.prefix, wanted), len(sources), unused)


def _assembled(tensors: Tensors, prefix: str, parts: Sequence[Part]) -> dict[str, np.ndarray]:
    whole: dict[str, np.ndarray] = {}
    blocks: dict[str, list[np.ndarray]] = {}
    for part in parts:
        array = part.build(*(np.asarray(tensors[prefix + name], np.float32) for name in part.sources))
        if part.block is None:
            whole[part.name] = array
        else:
            blocks.setdefault(part.name, []).append(array)
    return whole | {name: np.stack(arrays) for name, arrays in blocks.items()}


def _without_prefix(prefix: str, name: str) -> str:
    """The name without the leading parts that it shares with `prefix`, such as `module.` of `module.backbone.`."""
    for part in re.findall(r"[^./]*[./]", prefix):
        if not name.startswith(part):
            break
        name = name.removeprefix(part)
    return name


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))


def _text(shape: Shape) -> str:
    sizes = ", ".join("*" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"
