"""Decoders: what `config.model.decoder` names. docs/add_a_decoder.md adds one."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from taskexpert_jax.models.backbones.backbone import Tap
from taskexpert_jax.models.decoders import baseline, mlore, taskexpert
from taskexpert_jax.models.decoders.decoder import Decoder
from taskexpert_jax.tasks import Task

DECODERS: Mapping[str, Callable[[ConfigDict, tuple[Task, ...], tuple[Tap, ...], Any], Decoder]] = {
    "taskexpert": taskexpert.from_config,
    "baseline": baseline.from_config,
    "mlore": mlore.from_config,
}
