"""Parameters and multiply-adds of a model, by part, without running it.

Multiply-adds are those of one image's forward pass at the model's image size: matmuls, convolutions, attention and
gated sums. Backbone and decoder count their own by formulas, or leave it to a count over the traced program. Norms,
activations and bilinear resizing are excluded, as is usual.

The program computes less than the model's definition, because the heads' 3x3 convolutions run before the upsampling
(`upsampling`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from taskexpert_jax import text_table
from taskexpert_jax.models import products, variables
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.models.neck import NECK
from taskexpert_jax.parallel import sharding

BACKBONE = "backbone"  # the first part; the others are the decoder's


@dataclasses.dataclass(frozen=True)
class Budget:
    """Counts by part, the backbone and those of the decoder.

    Attributes:
      parameters: number of parameters.
      multiply_adds: of the model's definition.
      computed: multiply-adds that the program computes.
    """

    parameters: dict[str, int]
    multiply_adds: dict[str, int]
    computed: dict[str, int]

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_multiply_adds(self) -> int:
        return sum(self.multiply_adds.values())

    @property
    def total_computed(self) -> int:
        return sum(self.computed.values())

    def table(self) -> str:
        """Formats a text table with one line per part and the total."""
        counts = [(p, self.parameters[p], self.multiply_adds[p], self.computed[p]) for p in self.parameters]
        counts.append(("total", self.total_parameters, self.total_multiply_adds, self.total_computed))
        rows = [["part", "parameters", "multiply-adds", "computed"]]
        for name, parameters, defined, computed in counts:
            rows.append([name, f"{parameters / 1e6:.2f} M", f"{defined / 1e9:.2f} G", f"{computed / 1e9:.2f} G"])
        return "\n".join(text_table.lines(rows, "<>>>"))


def parameter_shapes(model: MultiTaskModel) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by path (`head_depth/logits/bias`); nothing is allocated."""
    params = sharding.unbox(jax.eval_shape(lambda: variables.init(model, jax.random.key(0))))["params"]
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in flat}


def count(model: MultiTaskModel) -> Budget:
    """The model's budget; the module's docstring describes what is counted."""
    backbone, decoder = model.backbone, model.decoder
    necks = (NECK,) if model.neck else ()
    parameters = dict.fromkeys((BACKBONE, *necks, *decoder.parts), 0)
    for name, shape in parameter_shapes(model).items():
        of_neck = name.startswith(f"{NECK}/")
        part = BACKBONE if backbone.layer(name) is not None else NECK if of_neck else decoder.part(name)
        parameters[part] += math.prod(shape)
    traced = functools.cache(lambda: _traced(model))
    of_backbone = backbone.multiply_adds(*model.image_size)
    shared = {BACKBONE: traced()[BACKBONE] if of_backbone is None else of_backbone}
    if model.neck:
        shared[NECK] = model.neck.multiply_adds(*model.image_size)
    defined, computed = decoder.multiply_adds(*model.image_size), decoder.computed(*model.image_size)
    if defined is None or computed is None:
        defined = computed = {part: traced()[part] for part in decoder.parts}
    return Budget(parameters, {**shared, **defined}, {**shared, **computed})


def _traced(model: MultiTaskModel) -> dict[str, int]:
    """Multiply-adds of backbone and decoder in the traced forward pass of one image."""

    def forward(key: jax.Array, image: jax.Array) -> Any:
        return model.init_with_output(key, image, train=False, full_size=False)

    jaxpr = jax.make_jaxpr(forward)(jax.random.key(0), jnp.zeros((1, *model.image_size, 3)))
    counts = dict.fromkeys((BACKBONE, *model.decoder.parts), 0)
    for product in products.products(jaxpr.jaxpr):
        if any(f"/{scope}" in product.path for scope in ("upsample", "resize", NECK)):  # resizing may be by products
            continue
        part = BACKBONE if f"/{BACKBONE}" in product.path else model.decoder.parts[0]
        counts[part] += product.flops // 2
    return counts
