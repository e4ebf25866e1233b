"""How tensors of a file become parameters of our backbone, and the refusal of files that do not fit.

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
    """One parameter of ours and the tensors that it is made of.

    Attributes:
      name: our path.
      block: the block whose share of the stacked array this is; None: the array is whole.
      sources: the tensors' names and shapes in the file.
      build: makes the parameter of them, in the order of `sources`.
    """

    name: str
    block: int | None
    sources: Mapping[str, Shape]
    build: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
    """How the weights of one origin are named.

    Attributes:
      title: what a message calls them.
      parts: of a backbone; every parameter is covered once.
      dropped: regex of the tensors that the backbone has no use for.
      prefix: what stands before the names of `parts` in the file, and perhaps in part before those of `dropped`.
      trained_with: what is known of the input that they were trained with, where files do not say it.
    """

    title: str
    parts: Sequence[Part]
    dropped: str
    prefix: str = ""
    trained_with: str = ""


@dataclasses.dataclass(frozen=True)
class Built:
    """Parameters made of a file.

    Attributes:
      arrays: by our path, float32; blocks stacked over the depth.
      used: how many of the file's tensors they are made of.
      left_out: names of the others, all of which the family drops or the config keeps fresh.
    """

    arrays: dict[str, np.ndarray]
    used: int
    left_out: tuple[str, ...]


def build(tensors: Tensors, family: Family, fresh: re.Pattern[str] | None, where: str) -> Built:
    """The parameters that a file has, but for those whose path matches `fresh` wholly.

    Raises:
      UserError: a tensor is missing, has another shape or is not known; the message has a line for each of the first
        twelve: + the model needs it, - only the file has it, ! the shapes differ.
    """
    wanted = [part for part in family.parts if not (fresh and fresh.fullmatch(part.name))]
    sources = {family.prefix + name: shape for part in wanted for name, shape in part.sources.items()}
    unwanted = {family.prefix + name for part in family.parts if part not in wanted for name in part.sources}
    left_out = tuple(sorted(tensors.keys() - sources.keys()))
    dropped = re.compile(family.dropped)
    unknown = [
        name for name in left_out if name not in unwanted and not dropped.fullmatch(_without(family.prefix, name))
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
            f"{where} ({family.title}) does not fit this config's backbone ({len(lines)} tensors; it has "
            f"{len(tensors)}); take the variant of these weights, or name what may stay fresh in "
            f"config.model.pretrained_fresh:\n  {shown}"
        )
    return Built(_assembled(tensors, family.prefix, wanted), len(sources), left_out)


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


def _without(prefix: str, name: str) -> str:
    """The name without what it shares with the prefix: of `module.backbone.`, also `module.` alone."""
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
