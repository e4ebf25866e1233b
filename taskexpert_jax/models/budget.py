"""Parameters and multiply-adds of a model, by part, without running it.

Multiply-adds are counted analytically over the matmuls, convolutions, attention and gated sums of one image's forward
pass. Norms, activations and bilinear resizing are excluded, as is usual. XLA's cost analysis cannot be used, because
it counts the body of a scan once.

The program computes less than the model's definition, because the heads' 3x3 convolutions run before the upsampling
(`upsampling`).
"""

import dataclasses
import math

import jax

from taskexpert_jax import text_table
from taskexpert_jax.models import variables
from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.parallel import sharding

PARTS = ("backbone", "experts", "gates", "memory", "heads")


@dataclasses.dataclass(frozen=True)
class Budget:
    """Counts by part (`PARTS`): parameters, multiply-adds of the model's definition, and those the program computes."""

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
        counts = [(p, self.parameters[p], self.multiply_adds[p], self.computed[p]) for p in PARTS]
        counts.append(("total", self.total_parameters, self.total_multiply_adds, self.total_computed))
        rows = [["part", "parameters", "multiply-adds", "computed"]]
        for name, parameters, defined, computed in counts:
            rows.append([name, f"{parameters / 1e6:.2f} M", f"{defined / 1e9:.2f} G", f"{computed / 1e9:.2f} G"])
        return "\n".join(text_table.lines(rows, "<>>>"))


def part_of(name: str) -> str:
    """The part of a parameter; name: its path, as in `parameter_shapes`."""
    first, _, rest = name.partition("/")
    if first.startswith("head_"):
        return "heads"
    if first in ("patches", "blocks"):
        return "backbone"
    if first == "initial_memory":
        return "memory"
    inside = rest.partition("/")[0]  # mixture/INSIDE/...
    if inside in ("norm", "experts"):
        return "experts"
    return "gates" if inside == "gates" else "memory"


def parameter_shapes(model: TaskExpert) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by path (`head_depth/logits/bias`); nothing is allocated."""
    params = sharding.unbox(jax.eval_shape(lambda: variables.init(model, jax.random.key(0))))["params"]
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in flat}


def count_parameters(model: TaskExpert) -> dict[str, int]:
    """Number of parameters by part."""
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, shape in parameter_shapes(model).items():
        counts[part_of(name)] += math.prod(shape)
    return counts


def count_multiply_adds(model: TaskExpert) -> dict[str, int]:
    """Multiply-adds by part of one image's forward pass by the model's definition, at the model's image size."""
    backbone, tokens = model.backbone, math.prod(model.grid)
    width, depth, patch = backbone.width, model.width, backbone.patch_size  # C, D, P
    tasks, taps = len(model.tasks), model.taps
    seen = tokens + backbone.extra_tokens
    block = (4 + 2 * backbone.mlp_ratio) * width**2 * seen + 2 * seen**2 * width
    experts = model.experts.count * tokens * (width * depth + model.experts.kernel**2 * depth**2)
    reads = model.memory.read != "none"
    slots = model.experts.count + reads
    read_area = {"conv1x1": 1, "conv3x3": 9, "identity": 0, "none": 0}[model.memory.read]
    positions = tokens * model.head_upsample**2
    return {
        "backbone": patch**2 * 3 * width * tokens + backbone.depth * block,
        "experts": taps * experts,
        "gates": taps * tasks * (_gate(model, tokens, slots) + tokens * slots * depth),
        "memory": taps * tasks * tokens * (read_area + write_area(model)) * depth**2,
        "heads": sum(positions * (9 * depth**2 + depth * task.channels) for task in model.tasks),
    }


def write_area(model: TaskExpert) -> int:
    """Kernel positions of a memory write: of its 3x3 convolution and, if writes are gated, of its 1x1 convolution."""
    return 9 + (model.memory.write == "gated")


def _gate(model: TaskExpert, tokens: int, slots: int) -> int:
    """Multiply-adds of one task's gating network at one tap."""
    if model.gate.granularity in ("static", "uniform"):
        return 0
    width, hidden = model.backbone.width, model.gate.width
    local = tokens if model.gate.input in ("local", "both") else 0
    context = 1 if model.gate.input in ("context", "both") else 0
    return (local + context) * width * hidden + (tokens if local else 1) * hidden * slots


def count_computed(model: TaskExpert) -> dict[str, int]:
    """Multiply-adds by part that the program computes: the heads' 3x3 convolutions run on the low-resolution memory."""
    tokens, depth = math.prod(model.grid), model.width
    upsampled = model.head_upsample**2
    heads = sum(tokens * (9 * depth**2 + upsampled * depth * task.channels) for task in model.tasks)
    return {**count_multiply_adds(model), "heads": heads}


def count(model: TaskExpert) -> Budget:
    """The model's budget; the module's docstring describes what is counted."""
    return Budget(count_parameters(model), count_multiply_adds(model), count_computed(model))
