"""Backbones: what `config.model.backbone` names. docs/add_a_backbone.md adds one."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from taskexpert_jax.models.backbones import swin, vit
from taskexpert_jax.models.backbones.backbone import Backbone

BACKBONES: Mapping[str, Callable[[ConfigDict, Any], Backbone]] = {
    "vit": vit.from_config,
    "swin": swin.from_config,
}
