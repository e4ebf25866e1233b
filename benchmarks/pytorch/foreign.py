"""Models of InvPT, TaskPrompter and MLoRE, built by their own code in a clone of yours, without weights.

The three repositories have one layout: `utils/config.py` reads a config, `utils/common_config.py` builds its model.
Some of their modules have the names of ours (`configs`), so a process that builds one of them builds nothing else.
"""

import functools
import importlib
import pathlib
import sys
from typing import Any, NamedTuple
from unittest import mock
import warnings

import torch
from torch import nn

from taskexpert_jax.errors import UserError

_PACKAGES = ("timm", "einops", "easydict", "pyyaml", "opencv-python-headless")
_BUILDER, _READER = "utils/common_config.py", "utils/config.py"


class Foreign(NamedTuple):
    """A model of others: the network, its tasks, and its number of parameters as it is trained."""

    net: nn.Module
    tasks: list[str]
    parameters: int


def check(flag: str, clone: pathlib.Path, configs: list[str]) -> None:
    """Raises a UserError if a clone lacks a file that `build` reads."""
    missing = [name for name in (_BUILDER, _READER, *configs) if not (clone / name).is_file()]
    if missing:
        raise UserError(
            f"{flag}={clone}: no {missing[0]} there; give the folder of the clone that has utils/ and configs/"
        )


def build(clone: pathlib.Path, config: str, frame: tuple[int, int]) -> Foreign:
    """Builds the model of a config file of the clone for frames of a size, on the meta device: without values.

    A model with mergeable experts (`repara` in the config's name) is merged after its parameters are counted.

    Raises:
      UserError: a package that the clone's code imports is not installed.
    """
    _without_torchvision()
    sys.path.insert(0, str(clone))
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]
    try:
        # They read the rates of stochastic depth from a linspace, which must have values.
        linspace = mock.patch.object(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
        with warnings.catch_warnings(), torch.device("meta"), linspace:
            warnings.simplefilter("ignore")  # names that timm has moved
            _without_downloads()
            settings = importlib.import_module("utils.config").create_config(str(clone / config), {"run_mode": "infer"})
            settings.TRAIN.SCALE = frame
            net = importlib.import_module("utils.common_config").get_model(settings)
    except ModuleNotFoundError as error:
        raise UserError(f"{clone}: its code imports {error.name}; pip install {' '.join(_PACKAGES)}") from error
    parameters = sum(parameter.numel() for parameter in net.parameters())
    if "repara" in config:
        with torch.device("meta"):
            net.backbone.reparameter()
    return Foreign(net, list(settings.TASKS.NAMES), parameters)


def _without_torchvision() -> None:
    """Lets timm be imported where torchvision is not installed; a ViT uses nothing of it."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".models"):
            sys.modules[f"torchvision{name}"] = mock.MagicMock(__path__=[], __spec__=None, FrozenBatchNorm2d=type)


def _without_downloads() -> None:
    """Replaces timm's builder, which would download pretrained weights, by one that does not."""

    def plain(model: Any, variant: str, pretrained: bool, **settings: Any) -> nn.Module:
        del variant, pretrained
        for name in ("default_cfg", "representation_size", "pretrained_filter_fn", "pretrained_custom_load"):
            settings.pop(name, None)
        return model(**settings)

    importlib.import_module("timm.models.helpers").build_model_with_cfg = plain
