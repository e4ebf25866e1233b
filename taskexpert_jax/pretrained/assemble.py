"""Conversion of a file's tensors into parameters of our backbone; files that do not fit are refused.

Our names are paths such as `patches/embedding/kernel` or `blocks/norm1/norm/scale`. The blocks' arrays are stacked:
(depth, ...).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re

import jax.numpy as jnp
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
      dropped: regex of the tensors of a ViT that the backbone does not use.
      prefix: prefix of the names of `parts` and `dropped` in the file; tensors without it are those of other modules,
        such as `decode_head.` next to `backbone.`, and not used either.
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
      UserError: a tensor is missing, unknown, of another shape or of codes instead of weights, or has values that are
        not finite. The message lists the first twelve: + missing from the file, - only in the file, ! differs.
    """
    wanted = [part for part in family.parts if not (fresh and fresh.fullmatch(part.name))]
    sources = {family.prefix + name: shape for part in wanted for name, shape in part.sources.items()}
    unwanted = {family.prefix + name for part in family.parts if part not in wanted for name in part.sources}
    unused = tuple(sorted(tensors.keys() - sources.keys()))
    dropped = re.compile(family.dropped)
    unknown = [
        name
        for name in unused
        if name.startswith(family.prefix)
        and name not in unwanted
        and not dropped.fullmatch(name.removeprefix(family.prefix))
    ]
    lines = [f"+ {name} {_text(sources[name])}: not in the file" for name in sorted(sources.keys() - tensors.keys())]
    lines += [f"- {name} {tensors[name].shape}: only in the file" for name in unknown]
    lines += [
        f"! {name}: {tensors[name].shape} in the file, {_text(shape)} in the model"
        for name, shape in sorted(sources.items())
        if name in tensors and not _fits(tensors[name].shape, shape)
    ]
    lines += [
        f"! {name}: {tensors[name].dtype} in the file: codes of quantised weights? save them as floating point"
        for name in sorted(sources.keys() & tensors.keys())
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating)
    ]
    if lines:
        shown = "\n  ".join(lines[:12] + ([f"... and {len(lines) - 12} more"] if len(lines) > 12 else []))
        remedies = ["use the backbone variant of these weights"]
        if unknown:
            remedies.append("remove the tensors marked - from the file if they are of another module, such as a head")
        if len(lines) > len(unknown):
            remedies.append("list the parameters that may stay random in config.model.pretrained_fresh")
        raise UserError(
            f"{where} ({family.title}) does not fit this config's backbone: {len(lines)} mismatches, {len(tensors)} "
            f"tensors in the file; {', or '.join(remedies)}:\n  {shown}"
        )
    weights = {name: _float32(tensors[name]) for name in sources}
    _check_finite(weights, where)
    return Built(_assembled(weights, family.prefix, wanted), len(sources), unused)


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # `_check_finite` reports it
        return np.asarray(array, np.float32)


def _check_finite(weights: Tensors, where: str) -> None:
    """Raises UserError if a tensor holds NaN or Inf; it names the first four tensors."""
    damaged = [name for name, array in weights.items() if not np.isfinite(array).all()]
    if damaged:
        counts = [f"{name} ({np.isnan(of).sum()} nan, {np.isinf(of).sum()} inf)" for name, of in
                  ((name, weights[name]) for name in damaged[:4])]  # fmt: skip
        more = f" and {len(damaged) - 4} more" if len(damaged) > 4 else ""
        raise UserError(
            f"{where}: {len(damaged)} tensors have values that are not finite in float32: {', '.join(counts)}{more}; "
            "the file is damaged, or its training had diverged: use other weights"
        )


def _assembled(weights: Tensors, prefix: str, parts: Sequence[Part]) -> dict[str, np.ndarray]:
    whole: dict[str, np.ndarray] = {}
    blocks: dict[str, list[np.ndarray]] = {}
    for part in parts:
        array = part.build(*(weights[prefix + name] for name in part.sources))
        if part.block is None:
            whole[part.name] = array
        else:
            blocks.setdefault(part.name, []).append(array)
    return whole | {name: np.stack(arrays) for name, arrays in blocks.items()}


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))


def _text(shape: Shape) -> str:
    sizes = ", ".join("*" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"
