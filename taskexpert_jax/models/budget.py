"""Parameters and multiply-adds of a model, by part, without running it.

Backbone and decoder count their own multiply-adds, analytically: matmuls, convolutions, attention and gated sums of one
image's forward pass at the model's image size. Norms, activations and bilinear resizing are excluded, as is usual.
XLA's cost analysis cannot be used, because it counts the body of a scan once.

The program computes less than the model's definition, because the heads' 3x3 convolutions run before the upsampling
(`upsampling`).
"""

import dataclasses
import math

import jax

from taskexpert_jax import text_table
from taskexpert_jax.models import variables
from taskexpert_jax.models.model import MultiTaskModel
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
    parameters = dict.fromkeys((BACKBONE, *decoder.parts), 0)
    for name, shape in parameter_shapes(model).items():
        parameters[BACKBONE if backbone.layer(name) is not None else decoder.part(name)] += math.prod(shape)
    of_backbone = {BACKBONE: backbone.multiply_adds(*model.image_size)}
    return Budget(
        parameters=parameters,
        multiply_adds=of_backbone | decoder.multiply_adds(*model.image_size),
        computed=of_backbone | decoder.computed(*model.image_size),
    )
