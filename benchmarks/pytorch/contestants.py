"""The models that benchmarks/others.py compares, each in a process of its own that counts and times on request.

A time is the CPU time of the process, which runs on one core: other programs take turns with it and do not count.
"""

from collections.abc import Callable
import importlib
from multiprocessing.connection import Connection
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.pytorch import foreign, multiply_adds
from taskexpert_jax.errors import UserError

JAX, REFERENCE = "TaskExpert, ours in JAX", "TaskExpert, ours in PyTorch"


class Spec(NamedTuple):
    """A model on a benchmark: `JAX`, `REFERENCE`, or the name of another with its clone and its config file there."""

    name: str
    benchmark: str
    frame: tuple[int, int]
    clone: pathlib.Path | None = None
    config: str = ""


def serve(connection: Connection, spec: Spec) -> None:
    """Builds a model and answers requests by name until None comes; an exception is an answer too."""
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        torch.set_flush_denormal(True)  # as XLA does
        requests = _ours(spec) if spec.name == JAX else _in_pytorch(spec)
        connection.send(None)
        while (request := connection.recv()) is not None:
            connection.send(requests[request]())
    except Exception as error:  # of their code, whatever it is: reported, and the others go on
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        connection.send(UserError(message))


def _config(spec: Spec) -> Any:
    """Our config of the benchmark with ViT-L, in float32."""
    config = importlib.import_module(f"configs.{spec.benchmark}").get_config("vit_l16")
    config.dataset.image_size = spec.frame
    config.dtype = "float32"
    return config


def _in_pytorch(spec: Spec) -> dict[str, Callable[[], Any]]:
    if spec.clone is None:
        from benchmarks.pytorch import reference
        from taskexpert_jax.tasks import from_config

        config = _config(spec)
        tasks = from_config(config)
        names = [task.name for task in tasks]
        with torch.device("meta"):
            net = reference.TaskExpert(config, tasks)
        parameters = sum(parameter.numel() for parameter in net.parameters())
    else:
        net, names, parameters = foreign.build(spec.clone, spec.config, spec.frame)
    image = torch.randn(1, 3, *spec.frame)

    def forward() -> float:
        _materialise(net.eval())
        started = time.process_time()
        with torch.no_grad():
            net(image)
        return time.process_time() - started

    def training() -> float:
        _materialise(net.train())
        started = time.process_time()
        found = net(image)
        maps = [found[name] for name in names] + list(found.get("inter_preds", {}).values())
        sum(of.mean() for of in maps).backward()
        seconds = time.process_time() - started
        net.zero_grad(set_to_none=True)
        return seconds

    def count() -> dict[str, int]:
        return {"parameters": parameters, "multiply_adds": multiply_adds.count(net, tuple(image.shape))}

    return {"count": count, "forward": forward, "training": training}


def _materialise(net: torch.nn.Module) -> None:
    """Gives a model without values small random weights, and ones to its buffers."""
    if all(parameter.is_meta for parameter in net.parameters()):
        net.to_empty(device="cpu")
        for parameter in net.parameters():
            torch.nn.init.uniform_(parameter, -0.02, 0.02)
        for buffer in net.buffers():
            torch.nn.init.ones_(buffer)


def _ours(spec: Spec) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    from taskexpert_jax.models import budget, variables
    from taskexpert_jax.models import model as taskexpert
    from taskexpert_jax.parallel import sharding
    from taskexpert_jax.tasks import from_config

    config = _config(spec)
    model = taskexpert.from_config(config, from_config(config))
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, *spec.frame, 3), np.float32)
    state: dict[str, Any] = {}

    @jax.jit
    def predict(state: Any, image: Any) -> Any:
        return model.apply(state, image, train=False)

    @jax.jit
    def differentiate(state: Any, image: Any, key: Any) -> Any:
        def total(params: Any) -> Any:
            given = {**state, "params": params}
            keys = {"drop_path": key}
            found, updated = model.apply(given, image, train=True, rngs=keys, mutable=["batch_stats"])
            return sum(jnp.mean(maps) for maps in found.values()), updated

        return jax.grad(total, has_aux=True)(state["params"])

    def timed(run: Callable[[], Any]) -> float:
        if not state:
            shapes = sharding.unbox(jax.eval_shape(lambda: variables.init(model, jax.random.key(0))))
            state["params"] = jax.tree.map(
                lambda of: jnp.asarray(rng.random(of.shape, np.float32) * 0.04 - 0.02), shapes["params"]
            )
            state["batch_stats"] = jax.tree.map(lambda of: jnp.ones(of.shape, of.dtype), shapes["batch_stats"])
        started = time.process_time()
        jax.block_until_ready(run())
        return time.process_time() - started

    def count() -> dict[str, int]:
        found = budget.count(model)
        return {
            "parameters": found.total_parameters,
            "multiply_adds": found.total_multiply_adds,
            "computed": found.total_computed,
            "backbone_parameters": found.parameters["backbone"],
            "backbone_multiply_adds": found.multiply_adds["backbone"],
        }

    return {
        "count": count,
        "forward": lambda: timed(lambda: predict(state, image)),
        "training": lambda: timed(lambda: differentiate(state, image, jax.random.key(1))),
    }
