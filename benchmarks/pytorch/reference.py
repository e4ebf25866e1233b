"""The reference for our training step: the default model, its losses and its training step in plain PyTorch.

The architecture is that of docs/model.md with the default switches: a ViT with scaled-dot-product attention, experts,
gates, a memory and a head per task; images and feature maps are (B, c, h, w) in channels_last memory. `weights`
converts our parameters to this model's, so that tests can compare both. The caller sets the precision: float32, or
bfloat16 under `torch.autocast`, which keeps the residual stream in float32 where ours is bfloat16.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import Task, losses

Batch = Mapping[str, Tensor]


class DropPath(nn.Module):
    """Stochastic depth: in training, drops an example's branch with probability `rate` and rescales the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        kept = branch.new_empty((branch.shape[0], 1, 1)).bernoulli_(1.0 - self.rate)
        return branch * kept / (1.0 - self.rate)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.out(mixed.transpose(1, 2).reshape(batch, count, width))


class Mlp(nn.Module):
    """Two dense layers with exact GELU between, (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(tokens)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, drop_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_ratio * width)
        self.drop_path = DropPath(drop_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.drop_path(self.attention(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class Gate(nn.Module):
    """One task's gate: (B, N, C) features and (B, C) context -> (B, N, K + 1) logits."""

    def __init__(self, width: int, hidden: int, choices: int):
        super().__init__()
        self.local = nn.Linear(width, hidden)
        self.context = nn.Linear(width, hidden)
        self.logits = nn.Linear(hidden, choices)

    def forward(self, features: Tensor, context: Tensor) -> Tensor:
        return self.logits(F.gelu(self.local(features) + self.context(context)[:, None]))


class Read(nn.Module):
    """One task's memory as an expert, (B, D, h, w) -> (B, D, h, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project = nn.Linear(width, width)

    def forward(self, memory: Tensor) -> Tensor:
        return self.project(self.norm(memory.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Experts(nn.Module):
    """Decomposes features (B, N, C) into K maps (B, D, h, w)."""

    def __init__(self, width: int, depth: int, count: int, kernel: int):
        super().__init__()
        self.count = count
        self.reduce = nn.Linear(width, count * depth, bias=False)
        self.norm = nn.BatchNorm2d(count * depth, eps=1e-5, momentum=0.1)
        self.spatial = nn.ModuleList(nn.Conv2d(depth, depth, kernel, padding="same") for _ in range(count))

    def forward(self, features: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        hidden = self.reduce(features).unflatten(1, grid).permute(0, 3, 1, 2)
        parts = F.gelu(self.norm(hidden)).chunk(self.count, dim=1)
        return [conv(part) for conv, part in zip(self.spatial, parts, strict=True)]


class Tap(nn.Module):
    """One tap: the experts, and for each task its gate, memory read, gated sum and memory write."""

    def __init__(self, model: Any, names: Sequence[str]):
        super().__init__()
        width, depth = model.width, model.feature_width
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.experts = Experts(width, depth, model.experts, model.expert_kernel)
        self.gates = nn.ModuleDict({name: Gate(width, model.gate.width, model.experts + 1) for name in names})
        self.read = nn.ModuleDict({name: Read(depth) for name in names})
        self.write = nn.ModuleDict({name: nn.Conv2d(depth, depth, 3, padding="same") for name in names})
        self.blend = nn.ModuleDict({name: nn.Conv2d(depth, depth, 1) for name in names})

    def forward(self, tokens: Tensor, memory: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
        features = self.norm(tokens)
        experts = self.experts(features, grid)
        context = features.mean(dim=1)
        after = {}
        for name, past in memory.items():
            weights = self.gates[name](features, context).float().softmax(dim=-1)  # (B, N, K + 1)
            weights = weights.to(experts[0].dtype).transpose(1, 2).unflatten(2, grid)  # (B, K + 1, h, w)
            choices = [*experts, self.read[name](past)]
            mixed = functools.reduce(torch.add, (weights[:, k, None] * choice for k, choice in enumerate(choices)))
            mixed = mixed.contiguous(memory_format=torch.channels_last)
            after[name] = past + self.blend[name](mixed).sigmoid() * (self.write[name](mixed) - past)
        return after


class Head(nn.Module):
    """One task's head: (B, D, h, w) -> (B, channels, upsample * h, upsample * w)."""

    def __init__(self, depth: int, channels: int, upsample: int):
        super().__init__()
        self.upsample = upsample
        self.mix = nn.Conv2d(depth, depth, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(depth, eps=1e-5, momentum=0.1)
        self.logits = nn.Conv2d(depth, channels, 1)

    def forward(self, memory: Tensor) -> Tensor:
        maps = F.interpolate(memory, scale_factor=self.upsample, mode="bilinear", align_corners=False)
        return self.logits(F.relu(self.norm(self.mix(maps))))


class TaskExpert(nn.Module):
    """Normalised images (B, 3, H, W) -> {task: (B, channels, H, W) float32}, at the config's size only.

    Raises:
      UserError: a switch of the config does not have its default.
    """

    def __init__(self, config: Any, tasks: Sequence[Task]):
        super().__init__()
        model = config.model
        _only_default(model)
        names = [task.name for task in tasks]
        patch, (height, width) = model.patch_size, config.dataset.image_size
        self.grid = (height // patch, width // patch)
        self.embedding = nn.Conv2d(3, model.width, patch, stride=patch)
        self.pos_embedding = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], model.width))
        rates = np.linspace(0.0, model.drop_path, model.depth)
        self.blocks = nn.ModuleList(Block(model.width, model.heads, model.mlp_ratio, float(rate)) for rate in rates)
        self.initial_memory = nn.Parameter(torch.zeros(len(names), model.feature_width))
        self.taps = nn.ModuleList(Tap(model, names) for _ in range(model.taps))
        self.heads = nn.ModuleDict(
            {task.name: Head(model.feature_width, task.channels, model.head_upsample) for task in tasks}
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        tokens = self.embedding(image).flatten(2).transpose(1, 2) + self.pos_embedding  # (B, N, C)
        vectors = zip(self.heads, self.initial_memory, strict=True)
        memory = {name: vector[None, :, None, None].expand(len(image), -1, *self.grid) for name, vector in vectors}
        stage = len(self.blocks) // len(self.taps)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if (index + 1) % stage == 0:
                memory = self.taps[index // stage](tokens, memory, self.grid)
        return {
            name: F.interpolate(head(memory[name]).float(), image.shape[2:], mode="bilinear", align_corners=False)
            for name, head in self.heads.items()
        }


def _only_default(model: Any) -> None:
    expected = {
        "norm": "batch",
        "layer_scale": 0.0,
        "class_token": False,
        "registers": 0,
        "gate.input": "both",
        "gate.granularity": "token",
        "gate.top_k": 0,
        "gate.temperature": 1.0,
        "gate.noise": 0.0,
        "gate.balance": 0.0,
        "memory.init": "learned",
        "memory.read": "conv1x1",
        "memory.write": "gated",
    }
    for field, value in expected.items():
        part, _, last = field.rpartition(".")
        given = (model[part] if part else model)[last]
        if given != value:
            raise UserError(f"config.model.{field}={given!r}: the PyTorch reference supports only {value!r}")


# --- losses: see taskexpert_jax/tasks/losses.py; prediction (B, c, H, W) float32, label (B, H, W, c), mask (B,) ---


def _valid(label: Tensor, mask: Tensor, ignore: int = 255) -> Tensor:
    return (label != ignore).all(dim=-1) & (mask > 0)[:, None, None]


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def cross_entropy(prediction: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    valid = _valid(label, mask)
    classes = torch.where(valid, label[..., 0].long(), 255)
    return F.cross_entropy(prediction, classes, ignore_index=255, reduction="sum") / valid.sum().clamp(min=1)


def balanced_cross_entropy(prediction: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    valid, positive = _valid(label, mask), label[..., 0] == 1
    negatives = (valid & ~positive).sum() / valid.sum().clamp(min=1)
    classes = torch.where(valid, positive.long(), 255)
    weight = torch.stack([1.0 - negatives, negatives])
    total = F.cross_entropy(prediction, classes, weight=weight, ignore_index=255, reduction="sum")
    return total / valid.sum().clamp(min=1)


def edge_cross_entropy(pos_weight: float) -> Callable[..., Tensor]:
    def loss(prediction: Tensor, label: Tensor, mask: Tensor) -> Tensor:
        positive = label[..., 0] == 1
        plain = F.binary_cross_entropy_with_logits(prediction[:, 0], positive.float(), reduction="none")
        return _mean(plain * torch.where(positive, pos_weight, 1.0 - pos_weight), _valid(label, mask))

    return loss


def normals_l1(prediction: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    difference = F.normalize(prediction, dim=1, eps=1e-12) - label.float().permute(0, 3, 1, 2)
    return _mean(difference.abs().sum(dim=1), _valid(label, mask))


def depth_l1(prediction: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    return _mean((prediction[:, 0] - label[..., 0]).abs(), _valid(label, mask, losses.DEPTH_IGNORE))


def loss_functions(config: Any, tasks: Sequence[Task]) -> dict[str, Callable[..., Tensor]]:
    """PyTorch's version of the loss in each task's record."""
    p = config.edge_pos_weight
    twins = {
        losses.cross_entropy: cross_entropy,
        losses.balanced_cross_entropy: balanced_cross_entropy,
        losses.edge_cross_entropy(p): edge_cross_entropy(p),
        losses.normals_l1: normals_l1,
        losses.depth_l1: depth_l1,
    }
    return {task.name: twins[task.loss] for task in tasks}


# --- a training step ---


def normalise(image: Tensor, window: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in channels_last memory, 0 outside the windows (B, 4)."""
    scaled = (image.float() / 255.0 - image.new_tensor(mean, dtype=torch.float32)) / image.new_tensor(
        std, dtype=torch.float32
    )
    top, left, rows, columns = (window[:, i, None] for i in range(4))
    row, column = (torch.arange(side, device=image.device)[None] for side in image.shape[1:3])
    inside = ((row >= top) & (row < top + rows))[:, :, None] & ((column >= left) & (column < left + columns))[:, None]
    return (scaled * inside[..., None]).permute(0, 3, 1, 2)


def make_loss(net: nn.Module, config: Any, tasks: Sequence[Task]) -> Callable[[Batch], dict[str, Tensor]]:
    """A function from a batch of tensors (docs/conventions.md) to {task: unweighted loss}."""
    functions = loss_functions(config, tasks)
    mean, std = tuple(config.model.image_mean), tuple(config.model.image_std)

    def compute(batch: Batch) -> dict[str, Tensor]:
        predictions = net(normalise(batch["image"], batch["window"], mean, std))
        return {name: of(predictions[name], batch[name], batch["mask"]) for name, of in functions.items()}

    return compute


def make_optimizer(net: nn.Module, config: Any) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Adam with its L2 term and the polynomial decay; the caller clips gradients before a step."""
    settings = config.optimizer
    fused = next(net.parameters()).is_cuda
    adam = torch.optim.Adam(
        net.parameters(), settings.learning_rate, (0.9, 0.999), 1e-8, weight_decay=settings.weight_decay, fused=fused
    )
    decay = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: max(1.0 - step / config.num_steps, 0.0) ** settings.schedule_power
    )
    return adam, decay


def make_train_step(
    net: nn.Module, config: Any, tasks: Sequence[Task], *, bfloat16: bool, compiled: bool
) -> Callable[[Batch], Tensor]:
    """A function from a batch to the total loss, a scalar on the device, that updates `net` in place.

    bfloat16: run the forward pass under autocast. compiled: use torch.compile for model and losses.
    """
    compute = make_loss(net, config, tasks)
    compute = torch.compile(compute) if compiled else compute
    adam, decay = make_optimizer(net, config)
    weights = {task.name: task.loss_weight for task in tasks}
    kind = next(net.parameters()).device.type

    def step(batch: Batch) -> Tensor:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16, enabled=bfloat16):
            found = compute(batch)
        total = torch.stack([weights[name] * loss for name, loss in found.items()]).sum()
        total.backward()
        if config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(net.parameters(), config.optimizer.clip_norm)
        adam.step()
        decay.step()
        return total.detach()

    return step


def make_inference(
    net: nn.Module, config: Any, *, bfloat16: bool, compiled: bool
) -> Callable[[Batch], dict[str, Tensor]]:
    """A function from a batch to {task: (B, channels, H, W) float32}, without gradients. compiled: torch.compile."""
    mean, std = tuple(config.model.image_mean), tuple(config.model.image_std)
    kind = next(net.parameters()).device.type

    def predict(image: Tensor, window: Tensor) -> dict[str, Tensor]:
        return net(normalise(image, window, mean, std))

    predict = torch.compile(predict) if compiled else predict

    def run(batch: Batch) -> dict[str, Tensor]:
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=bfloat16):
            return predict(batch["image"], batch["window"])

    return run
