"""The model of a config, for those who write their own training loop."""

from typing import Any

from ml_collections import ConfigDict

from taskexpert_jax import tasks
from taskexpert_jax.config import check
from taskexpert_jax.models import model
from taskexpert_jax.models.model import MultiTaskModel


def build_model(config: ConfigDict, *, device: Any = None) -> MultiTaskModel:
    """The Flax (Linen) module of a config: `config.model`, `config.tasks`, `config.dataset.image_size`, `config.dtype`.

    `model.init(key, image, train=False)` gives its variables, boxed with logical axis names (`flax.linen.meta.unbox`);
    `model.apply(variables, image, train=False)` gives {task: (B, H, W, channels) float32}: logits for classes and
    probabilities, metres, vectors of any length. The image is (B, H, W, 3) float32, normalised
    (`taskexpert_jax.models.inputs.normalise`). In training, `train=True` needs the RNG streams `drop_path` and
    `gate_noise`, and updates the collection `batch_stats`.

    Args:
      config: a config of configs/, of a run, or of `taskexpert_jax.config.base`.
      device: the device that it is for, which decides the attention kernel; default: this process's first.

    Raises:
      UserError: an invalid config, or a backbone or decoder that does not exist or does not fit the device.
    """
    check(config)
    return model.from_config(config, tasks.from_config(config), device)
