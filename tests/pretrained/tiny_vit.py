"""A tiny ViT with random weights, its files in every format, and a config that loads them."""

import collections

import numpy as np
from safetensors.numpy import save_file

from configs import nyud
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.pretrained import load as pretrained
from taskexpert_jax.tasks import from_config
from tests.pretrained import weight_layouts

SHAPE = {"width": 32, "depth": 4, "heads": 2, "patch": 16, "grid": (4, 4)}
VIT = weight_layouts.random_blocks(**SHAPE)
WRITERS = {
    "augreg.npz": lambda path: np.savez(path, **weight_layouts.augreg(VIT)),
    "big_vision.npz": lambda path: np.savez(
        path, **{f"params/{name}": array for name, array in weight_layouts.augreg(VIT).items()}
    ),
    "timm.safetensors": lambda path: save_file(weight_layouts.timm(VIT), path),
    "timm.pth": lambda path: weight_layouts.write_torch(path, weight_layouts.timm(VIT)),
    "nested.pt": lambda path: weight_layouts.write_torch(
        path, {"epoch": 3, "model": {f"module.backbone.{k}": v for k, v in weight_layouts.timm(VIT).items()}}
    ),
    "hugging_face.safetensors": lambda path: save_file(weight_layouts.hugging_face(VIT), path),
    "hugging_face.bin": lambda path: weight_layouts.write_torch(
        path, collections.OrderedDict(weight_layouts.hugging_face(VIT, "vit."))
    ),
}


def tiny_config(path="", **model_fields):
    config = nyud.get_config("tiny")
    config.tasks, config.dataset.image_size = ("depth",), (64, 64)
    config.checkpoint.best_task = "depth"
    config.model.pretrained = str(path)
    config.model.update(model_fields)
    return config


def read(path, image_size=(64, 64), **model_fields):
    config = tiny_config(path, **model_fields)
    config.dataset.image_size = image_size
    return pretrained.read(config, taskexpert.from_config(config, from_config(config)))
