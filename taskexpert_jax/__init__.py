"""TaskExpert in JAX and Flax: six dense predictions from one image, by dynamically assembled experts and a memory.

    import taskexpert_jax
    run = taskexpert_jax.load_run("RUN")
    depth = run.predict("image.jpg")["depth"]  # (H, W) float32, metres

Names are imported when they are first used: importing this package takes no time and changes nothing. docs/python.md
is the guide.
"""

import importlib
from typing import TYPE_CHECKING, Any

from taskexpert_jax.version import __version__

if TYPE_CHECKING:
    from taskexpert_jax import tasks
    from taskexpert_jax.errors import UserError
    from taskexpert_jax.models.build import build_model
    from taskexpert_jax.run import Gates, Prediction, Run, load_run
    from taskexpert_jax.tasks import losses, metrics
    from taskexpert_jax.tasks.metrics.boundary.benchmark import odsf

__all__ = [
    "Gates",
    "Prediction",
    "Run",
    "UserError",
    "__version__",
    "build_model",
    "load_run",
    "losses",
    "metrics",
    "odsf",
    "tasks",
]

# Where each public name comes from; a module without a name after the colon is the name itself.
_SOURCES = {
    "Gates": "run:Gates",
    "Prediction": "run:Prediction",
    "Run": "run:Run",
    "UserError": "errors:UserError",
    "build_model": "models.build:build_model",
    "load_run": "run:load_run",
    "losses": "tasks.losses",
    "metrics": "tasks.metrics",
    "odsf": "tasks.metrics.boundary.benchmark:odsf",
    "tasks": "tasks",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    source, _, attribute = _SOURCES[name].partition(":")
    module = importlib.import_module(f"{__name__}.{source}")
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
