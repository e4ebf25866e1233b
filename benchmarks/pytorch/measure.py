"""PyTorch's side of benchmarks/device.py: times of `reference`, and its distance from ours."""

from collections.abc import Callable, Mapping
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import random_batch
from benchmarks.accelerator import timing
from benchmarks.accelerator.variants import Variant
from benchmarks.pytorch import reference, weights
from taskexpert_jax.models import inputs
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config


def place() -> str:
    """PyTorch's device: the GPU, unless JAX runs on the CPU."""
    return "cuda" if torch.cuda.is_available() and jax.default_backend() != "cpu" else "cpu"


def training(variant: Variant, config: Any, tasks: Any, seconds: float) -> dict[str, Any]:
    """Times PyTorch's training step; compile_s is the time of the first call, with its compilation and tuning.

    float32 matmuls use TF32 if the GPU has it, like ours by default.
    """
    net, following = _network(variant, config, tasks)
    step = reference.make_train_step(
        net.train(), config, tasks, bfloat16=variant.dtype == "bfloat16", compiled=variant.compiled
    )
    return _timed(lambda: step(following()), lambda loss: loss.item(), seconds)


def latency(variant: Variant, config: Any, tasks: Any, seconds: float) -> dict[str, Any]:
    """Times PyTorch's predictions of one image, from uint8 to float32 maps on the device, each synchronised."""
    net, following = _network(variant, config, tasks)
    predict = reference.make_inference(
        net.eval(), config, bfloat16=variant.dtype == "bfloat16", compiled=variant.compiled
    )

    def run() -> None:
        predict(following())
        if place() == "cuda":
            torch.cuda.synchronize()

    return _timed(run, lambda _: None, seconds)


def _network(variant: Variant, config: Any, tasks: Any) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """The model with random weights and a function that alternates between two batches, all on the device."""
    device = place()
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    net = reference.TaskExpert(config, tasks).to(device, memory_format=torch.channels_last)
    batches = [random_batch.make(config, tasks, variant.batch, seed=seed) for seed in range(2)]
    return net, timing.in_turn([random_batch.as_tensors(batch, device) for batch in batches])


def _timed(run: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> dict[str, Any]:
    started = time.perf_counter()
    wait(run())
    first = time.perf_counter() - started
    times = timing.steady(run, wait, seconds=seconds)
    peak = torch.cuda.max_memory_allocated() if place() == "cuda" else None
    return {"compile_s": first, **times, "peak_memory_bytes": peak, "torch_device": place()}


def distances(config: Any) -> dict[str, Any]:
    """Relative differences of predictions on the same initial weights: ||ours - reference|| / ||reference||, by task.

    float32: both in full float32. bfloat16: both in bfloat16. The other entries are the distances of each side's
    bfloat16 from its own float32, the effect of rounding.
    """
    device = place()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    config.model.drop_path = 0.0
    tasks = from_config(config)
    batch = random_batch.make(config, tasks, config.batch_size, seed=0)
    found = {}
    variables: Any = None
    for dtype in ("float32", "bfloat16"):
        config.dtype = dtype
        model = taskexpert.from_config(config, tasks)
        normalised = inputs.normalise(jnp.asarray(batch["image"]), jnp.asarray(batch["window"]), model.normalisation)
        if variables is None:
            boxed = jax.jit(lambda m=model, x=normalised: m.init(jax.random.key(0), x, train=False))()
            variables = sharding.unbox(boxed)
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            ours = jax.jit(lambda v, x, m=model: m.apply(v, x, train=False))(variables, normalised)
        found[f"ours {dtype}"] = {name: np.asarray(maps) for name, maps in ours.items()}
    net = reference.TaskExpert(config, tasks)
    host = jax.device_get(variables)
    names = [task.name for task in tasks]
    net.load_state_dict(weights.state_dict(host["params"], host["batch_stats"], names))
    net = net.to(device, memory_format=torch.channels_last).eval()
    image = torch.from_numpy(np.array(normalised)).permute(0, 3, 1, 2).to(device)
    for dtype in ("float32", "bfloat16"):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            maps = net(image)
        found[f"torch {dtype}"] = {name: of.float().permute(0, 2, 3, 1).cpu().numpy() for name, of in maps.items()}
    pairs = {
        "float32": ("ours float32", "torch float32"),
        "bfloat16": ("ours bfloat16", "torch bfloat16"),
        "ours, bfloat16 from float32": ("ours bfloat16", "ours float32"),
        "torch, bfloat16 from float32": ("torch bfloat16", "torch float32"),
    }
    return {name: {task: _distance(found[a][task], found[b][task]) for task in names} for name, (a, b) in pairs.items()}


def are_equal(found: Mapping[str, Mapping[str, float]]) -> bool:
    """True if both agree: in float32, and in bfloat16 within twice the effect of rounding on each."""
    rounding = [found[f"{side}, bfloat16 from float32"] for side in ("ours", "torch")]
    half = all(distance <= 2 * max(of[task] for of in rounding) for task, distance in found["bfloat16"].items())
    return half and max(found["float32"].values()) < 1e-4


def _distance(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
