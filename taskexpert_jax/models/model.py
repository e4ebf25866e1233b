"""The whole model: a backbone whose taps a decoder turns into predictions of all tasks. Dims: docs/conventions.md."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.config import Normalisation, normalisation
from taskexpert_jax.errors import UserError, shown
from taskexpert_jax.models import neck
from taskexpert_jax.models.backbones import BACKBONES
from taskexpert_jax.models.backbones.backbone import Backbone
from taskexpert_jax.models.decoders import DECODERS
from taskexpert_jax.models.decoders.decoder import Decoder
from taskexpert_jax.models.layers import Dtype
from taskexpert_jax.models.upsampling import resize_bilinear
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task


class MultiTaskModel(nn.Module):
    """Normalised image -> {task: (B, H, W, channels) float32}.

    Backbone and decoder share the model's scope: their parameters have paths such as `blocks/...` and `mixture/...`.

    Attributes:
      tasks: the task records.
      backbone, decoder: what `config.model.backbone` and `config.model.decoder` name.
      neck: between them, for backbones whose taps differ in stride or channels.
      image_size: height and width of the training images.
      dtype: compute dtype; parameters, statistics of norms, softmax and outputs are float32.
      normalisation: per-channel mean and std of the images; see `inputs.normalise`.
    """

    tasks: tuple[Task, ...]
    backbone: Backbone
    decoder: Decoder
    neck: neck.Neck | None
    image_size: tuple[int, int]
    dtype: Dtype
    normalisation: Normalisation

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)
        nn.share_scope(self, self.decoder)

    def __call__(
        self,
        image: Float[Array | np.ndarray, "B H W 3"],
        *,
        train: bool,
        return_aux: bool = False,
        full_size: bool = True,
    ) -> Any:
        """Predictions; with `return_aux` also the decoder's auxiliary results, such as the gates.

        Without `full_size` the predictions have the decoder's size and `dtype`. Training needs the RNG streams
        `drop_path` and `gate_noise`, and updates the collection `batch_stats`.
        """
        _, height, width, _ = image.shape
        stride = self.backbone.stride
        if height % stride or width % stride:
            raise UserError(f"image size {height}x{width}: sides must be multiples of {stride}, the backbone's stride")
        taps = _whole(self.backbone(jnp.asarray(image, self.dtype), train))
        maps, aux = self.decoder(_whole(self.neck(taps)) if self.neck else taps, train)
        outputs = {task.name: maps[task.name] for task in self.tasks}
        if full_size:
            outputs = {name: resize_bilinear(of, height, width) for name, of in outputs.items()}
        return (outputs, aux) if return_aux else outputs

    @property
    def expert_slots(self) -> tuple[str, ...]:
        """Names of the expert slots that the decoder's gates weight; none for a decoder without gates."""
        return self.decoder.gating.slots if self.decoder.gating else ()


def _whole(taps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Taps whose batch alone is sharded.

    Without it XLA's partitioner may shard their channels, and computed wrong gradients of a pyramid on a mesh with all
    three axes.
    """
    return tuple(sharding.constrain(tap, "batch", None, None, None) for tap in taps)


def from_config(config: ConfigDict, tasks: tuple[Task, ...], device: Any = None) -> MultiTaskModel:
    """The model of a config (`config.model`, `config.dataset.image_size`, `config.dtype`) that `check` has accepted.

    device: one of those that it is for, real or described; this process's first if None.

    Raises:
      UserError: no such backbone or decoder, or one that does not fit the device.
    """
    device = device or jax.local_devices()[0]
    backbone = _named("backbone", config, BACKBONES)(config, device)
    height, width = config.dataset.image_size
    if config.model.patch_size % backbone.stride:
        raise UserError(
            f"config.model.patch_size={config.model.patch_size}: must be a multiple of {backbone.stride}, the stride "
            f"of config.model.backbone={config.model.backbone}"
        )
    dtype = jnp.dtype(config.dtype)
    fused = neck.from_config(config, backbone.taps, dtype)
    taps = (fused.to,) * len(backbone.taps) if fused else backbone.taps
    return MultiTaskModel(
        tasks=tasks,
        backbone=backbone,
        decoder=_named("decoder", config, DECODERS)(config, tasks, taps, device),
        neck=fused,
        image_size=(height, width),
        dtype=dtype,
        normalisation=normalisation(config),
    )


def _named(kind: str, config: ConfigDict, known: Mapping[str, Any]) -> Any:
    """The entry of `known` that `config.model.KIND` names."""
    name = config.model[kind]
    if name not in known:
        raise UserError(
            f"config.model.{kind}={shown(name)}: choose one of {', '.join(known)}; docs/add_a_{kind}.md adds others"
        )
    return known[name]
