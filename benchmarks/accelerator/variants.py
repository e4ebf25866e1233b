"""Variants that benchmarks/device.py measures, the most important first."""

from collections.abc import Iterator
import dataclasses
from typing import Any, Literal

Kind = Literal["ceilings", "ours", "torch", "parts", "equality"]

WORKLOAD = ("benchmark", "size", "image", "batch", "dtype", "inference")
IMAGES = {"pascal_context": (512, 512), "nyud": (448, 576)}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One measurement, run in its own process.

    Attributes:
      kind: ceilings (matmuls and copies on the device), ours (training and evaluation step), torch (the same in
        PyTorch), parts (time of each part of our training step), equality (predictions of both on the same weights).
      benchmark: data set whose tasks, classes and config are used.
      size: backbone variant of taskexpert_jax/config/fields.py.
      image: height and width in pixels.
      batch: images per step.
      dtype: bfloat16 or float32.
      remat, unroll, attention: fields of `config.model`.
      evaluated: also time the evaluation step.
      inference: time the predictions of one image, synchronised, instead of the training step.
      compiled: for torch: use torch.compile.
    """

    kind: Kind
    benchmark: str = "pascal_context"
    size: str = "vit_l16"
    image: tuple[int, int] = IMAGES["pascal_context"]
    batch: int = 8
    dtype: str = "bfloat16"
    remat: bool = False
    unroll: str = "auto"
    attention: str = "auto"
    evaluated: bool = False
    inference: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """Printed name, unique within a plan."""
        if self.kind == "ceilings":
            return "ceilings of the device"
        words = [self.kind, self.size, f"{self.image[0]}x{self.image[1]}", f"batch {self.batch}", self.dtype]
        if self.kind == "torch":
            words.append("torch.compile" if self.compiled else "eager")
        words += ["remat"] * self.remat + [f"unroll={self.unroll}"] * (self.unroll != "auto")
        words += [f"attention={self.attention}"] * (self.attention != "auto") + ["inference"] * self.inference
        return ", ".join((" ".join(words[:2]), *words[2:]))

    @property
    def workload(self) -> tuple[Any, ...]:
        """Fields that two variants must share for a comparison of speed."""
        return tuple(getattr(self, field) for field in WORKLOAD)


def full_plan() -> list[Variant]:
    """ViT-L and ViT-B on both benchmarks."""
    large = Variant("ours", evaluated=True)
    base = dataclasses.replace(large, size="vit_b16", batch=16)
    plan = [Variant("ceilings"), *_first(large), *_inference(large), *_first(base), *_slow(large), *_slow(base)]
    plan += [Variant("equality", size="vit_ti16", batch=2)]
    plan += [dataclasses.replace(large, benchmark="nyud", image=IMAGES["nyud"])]
    plan += _others(large, (16, 4, 32))
    plan += [dataclasses.replace(base, benchmark="nyud", image=IMAGES["nyud"])]
    plan += _others(base, (32, 8, 64))
    plan += _inference(base)
    plan += [dataclasses.replace(_torch(of, compiled=True), batch=1, inference=True) for of in (large, base)]
    plan += [
        _torch(dataclasses.replace(of, benchmark="nyud", image=IMAGES["nyud"]), compiled=True) for of in (large, base)
    ]
    return plan


def plan_of(ours: Variant) -> list[Variant]:
    """A variant of ours with its comparisons and variations."""
    equality = Variant("equality", ours.benchmark, ours.size, ours.image, batch=2)
    compiled = dataclasses.replace(_torch(ours, compiled=True), batch=1, inference=True)
    first = [Variant("ceilings"), *_first(ours), *_inference(ours), *_slow(ours), compiled]
    return [*first, equality, *_others(ours, (2 * ours.batch,))]


def _first(ours: Variant) -> Iterator[Variant]:
    """The training step with default settings, and PyTorch's."""
    yield ours
    yield _torch(ours, compiled=False)


def _slow(ours: Variant) -> Iterator[Variant]:
    """Variants that compile for minutes, PyTorch's compiled step and our parts; and ours without fused attention."""
    yield _torch(ours, compiled=True)
    yield _parts(ours)
    if ours.dtype == "bfloat16":
        yield dataclasses.replace(ours, attention="xla")


def _inference(ours: Variant) -> Iterator[Variant]:
    """Predictions of one image, ours and PyTorch's."""
    one = dataclasses.replace(ours, batch=1, evaluated=False, inference=True)
    yield one
    yield _torch(one, compiled=False)


def _parts(ours: Variant) -> Variant:
    return dataclasses.replace(ours, kind="parts", evaluated=False)


def _others(ours: Variant, batches: tuple[int, ...]) -> Iterator[Variant]:
    """Variations of one setting at a time: remat, batch, unrolling, dtype."""
    train = dataclasses.replace(ours, evaluated=False)
    yield dataclasses.replace(train, remat=True)
    for batch in batches:
        yield dataclasses.replace(train, batch=batch)
    yield dataclasses.replace(train, batch=batches[-1], remat=True)
    for unroll in ("yes", "no"):  # one equals `auto`, which shows the spread of measurements
        if unroll != train.unroll:
            yield dataclasses.replace(train, unroll=unroll)
    other = "float32" if ours.dtype == "bfloat16" else "bfloat16"
    yield dataclasses.replace(train, dtype=other)


def _torch(ours: Variant, *, compiled: bool) -> Variant:
    return dataclasses.replace(ours, kind="torch", evaluated=False, compiled=compiled)
