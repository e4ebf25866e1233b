"""Measures one variant of benchmarks/device.py; runs in its own process.

python benchmarks/accelerator/measure.py VARIANT.json RESULT.json

A result is always written; its status is an error if the variant does not fit, is refused or fails.
"""

import dataclasses
import json
import pathlib
import platform
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import flax
import jax
import numpy as np
import optax

from benchmarks import random_batch
from benchmarks.accelerator import parts, timing
from benchmarks.accelerator.variants import Variant
from configs import nyud, pascal_context
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import inference, steps
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import make_train_step

BENCHMARKS = {"nyud": nyud, "pascal_context": pascal_context}
# A multiply-add has two FLOPs. The backward pass has twice the FLOPs of the forward pass: gradients of inputs and of
# weights. Recomputation by remat is not counted.
TRAIN_FLOPS, EVAL_FLOPS = 6, 2
NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


def config_of(variant: Variant) -> Any:
    """The shipped config with the variant's fields."""
    config = BENCHMARKS[variant.benchmark].get_config(variant.size)
    config.dataset.image_size = variant.image
    config.batch_size = config.eval.batch_size = variant.batch
    config.dtype = variant.dtype
    config.model.remat, config.model.unroll = variant.remat, variant.unroll
    config.model.attention = variant.attention
    return config


class Ours:
    """Model, state and batches of a variant on the device, set up like a training run."""

    def __init__(self, variant: Variant):
        self.config = config_of(variant)
        self.tasks = from_config(self.config)
        sizes = {"batch_size": variant.batch}
        self.mesh = sharding.make_mesh(self.config.mesh, sizes, devices=jax.devices()[:1])
        self.model = taskexpert.from_config(self.config, self.tasks)
        self.tx = optimizer.build(self.config, self.model.backbone)
        self.flops = budget.count(self.model).total_computed * variant.batch
        initialise, _, self.shardings = train_state.abstract_and_shardings(
            self.model, self.tx, self.mesh, self.config.seed
        )
        self.state = jax.jit(initialise, out_shardings=self.shardings)()
        batches = [random_batch.make(self.config, self.tasks, variant.batch, seed=seed) for seed in range(2)]
        self.batches = list(sharding.to_devices(batches, self.mesh))


def compiled(jitted: Any, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The compiled program for these arguments, with seconds of tracing and compilation and planned bytes of memory."""
    started = time.perf_counter()
    lowered = jitted.lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    memory = program.memory_analysis()
    planned = None
    if memory is not None:
        planned = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        planned -= memory.alias_size_in_bytes
    return program, {"trace_s": traced - started, "compile_s": done - traced, "planned_memory_bytes": planned}


def measure_ours(variant: Variant, seconds: float) -> dict[str, Any]:
    """Times a variant's latency, or its training step and, if `variant.evaluated`, its evaluation step."""
    ours = Ours(variant)
    backbone: Any = ours.model.backbone  # a ViT
    result: dict[str, Any] = {"scanned": not backbone.unroll, "attention_is": backbone.architecture.attention}
    with sharding.use(ours.mesh):
        if variant.inference:
            return {**result, "latency": latency(ours, seconds)}
        if variant.evaluated:
            result["evaluation"] = evaluation(ours, seconds)
        result["training"] = training(ours, seconds)
    return result


def training(ours: Ours, seconds: float) -> dict[str, Any]:
    """Times the training step of `make_train_step`, carrying the state from step to step."""
    step = make_train_step(ours.model, ours.tx, ours.config, ours.mesh, ours.shardings)
    following = timing.in_turn(ours.batches)
    carried: tuple[Any, Any] = (ours.state, tally.empty(ours.tasks))
    program, facts = compiled(step, *carried, following())

    def run() -> Any:
        nonlocal carried
        carried = program(*carried, following())
        return carried[1]

    times = timing.steady(run, jax.block_until_ready, seconds=seconds)
    ours.state = carried[0]
    finite = int(carried[1].skipped) == 0
    return {**facts, **times, "model_flops": TRAIN_FLOPS * ours.flops, "loss_is_finite": finite}


def evaluation(ours: Ours, seconds: float) -> dict[str, Any]:
    """Times the step of `evaluation.steps.make_eval_step`: one forward pass and the sums of all metrics."""
    step = steps.make_eval_step(ours.tasks, inference.make_inference(ours.model, ours.config), ours.mesh)
    following = timing.in_turn(ours.batches)
    variables = ours.state.variables()
    states = jax.device_put(steps.empty_states(ours.tasks), sharding.replicated(ours.mesh))
    program, facts = compiled(step, variables, states, following())

    def run() -> Any:
        nonlocal states
        states = program(variables, states, following())
        return states

    times = timing.steady(run, jax.block_until_ready, seconds=seconds)
    return {**facts, **times, "model_flops": EVAL_FLOPS * ours.flops}


def latency(ours: Ours, seconds: float) -> dict[str, Any]:
    """Times the predictions of one image, each call synchronised; results stay on the device."""
    infer = inference.make_inference(ours.model, ours.config)
    following = timing.in_turn([(batch["image"], batch["window"]) for batch in ours.batches])
    variables = ours.state.variables()
    program, facts = compiled(jax.jit(infer), variables, *following())
    run = lambda: jax.block_until_ready(program(variables, *following()))  # noqa: E731
    return {
        **facts,
        **timing.steady(run, lambda _: None, seconds=seconds),
        "model_flops": EVAL_FLOPS * ours.flops,
    }


def measure_parts(variant: Variant, seconds: float) -> dict[str, Any]:
    """Time that each part adds to the training step, from programs without the later parts."""
    ours = Ours(variant)
    with sharding.use(ours.mesh):
        rungs = {}
        for name in parts.RUNGS:
            program, facts = compiled(parts.program(name, ours.model), ours.state, ours.batches[0])
            following = timing.in_turn(ours.batches)
            run = lambda program=program, following=following: program(ours.state, following())  # noqa: E731
            rungs[name] = {**facts, **timing.steady(run, jax.block_until_ready, seconds=seconds)}
        rungs["optimiser"] = training(ours, seconds)
    return {"parts": parts.differences(rungs, ours.model, variant.batch), "programs": rungs}


def measure_ceilings(variant: Variant, seconds: float) -> dict[str, Any]:
    """Ceilings of the device; see `timing.ceilings`."""
    del variant
    return {"ceilings": timing.ceilings(seconds=min(seconds, 2.0), quick=seconds < 1.0)}


def measure_torch(variant: Variant, seconds: float) -> dict[str, Any]:
    """Times PyTorch's training step of the same model, losses and optimiser, or its predictions of one image."""
    from benchmarks.pytorch import measure as pytorch

    config = config_of(variant)
    tasks = from_config(config)
    flops = budget.count(taskexpert.from_config(config, tasks)).total_multiply_adds * variant.batch
    if variant.inference:
        return {"latency": {**pytorch.latency(variant, config, tasks, seconds), "model_flops": EVAL_FLOPS * flops}}
    return {"training": {**pytorch.training(variant, config, tasks, seconds), "model_flops": TRAIN_FLOPS * flops}}


def measure_equality(variant: Variant, seconds: float) -> dict[str, Any]:
    """Relative differences of our predictions and PyTorch's on the same weights."""
    from benchmarks.pytorch import measure as pytorch

    del seconds
    found = pytorch.distances(config_of(variant))
    return {"distances": found, "equal": pytorch.are_equal(found)}


MEASURES = {
    "ceilings": measure_ceilings,
    "ours": measure_ours,
    "torch": measure_torch,
    "parts": measure_parts,
    "equality": measure_equality,
}


def environment() -> dict[str, Any]:
    """Device and package versions."""
    device = jax.devices()[0]
    versions = {module.__name__: module.__version__ for module in (jax, flax, optax, np)}
    if "torch" in sys.modules:
        versions["torch"] = sys.modules["torch"].__version__
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "platform_version": str(device.client.platform_version),
        "versions": {"python": platform.python_version(), **versions},
    }


def attempt(variant: Variant, seconds: float) -> dict[str, Any]:
    """Result of a variant with its status: measured, does not fit, refused, not installed (PyTorch) or failed."""
    try:
        result = {"status": "measured", **MEASURES[variant.kind](variant, seconds)}
    except UserError as error:
        return {"status": "refused", "reason": str(error)}
    except ModuleNotFoundError as error:
        return {"status": "not installed", "reason": str(error)}
    except Exception as error:  # anything a device, its compiler or PyTorch may raise
        text = f"{type(error).__name__}: {error}"
        status = "does not fit" if any(sign in text for sign in NO_MEMORY) else "failed"
        return {"status": status, "reason": text[:2000]}
    statistics = jax.local_devices()[0].memory_stats() or {}
    if variant.kind in ("ours", "parts") and "peak_bytes_in_use" in statistics:
        result["peak_memory_bytes"] = statistics["peak_bytes_in_use"]
    return result


def main() -> None:
    """Measures the variant in the first file and writes the result to the second."""
    asked = json.loads(pathlib.Path(sys.argv[1]).read_text())
    asked["variant"]["image"] = tuple(asked["variant"]["image"])
    variant = Variant(**asked["variant"])
    if asked["seconds"]:  # a cached program would have no compile time
        jax.config.update("jax_enable_compilation_cache", False)
    result = attempt(variant, asked["seconds"])
    record = {"name": variant.name, **dataclasses.asdict(variant), **result, "environment": environment()}
    pathlib.Path(sys.argv[2]).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
