"""The config: default, rule and meaning of every field, validation, and reading a run's config."""

from taskexpert_jax.config.checking import check, flat
from taskexpert_jax.config.field import REQUIRED, Field
from taskexpert_jax.config.fields import DATA_SETS, FIELDS, LOSS_WEIGHT, base, fields_of, shrink_for_tests
from taskexpert_jax.config.frames import IMAGENET, Normalisation, frame_size, normalisation, whole_patches
from taskexpert_jax.config.model_fields import BACKBONES, DECODERS, VARIANTS
from taskexpert_jax.config.reading import read_run, restored

__all__ = [
    "BACKBONES",
    "DATA_SETS",
    "DECODERS",
    "FIELDS",
    "IMAGENET",
    "LOSS_WEIGHT",
    "REQUIRED",
    "VARIANTS",
    "Field",
    "Normalisation",
    "base",
    "check",
    "fields_of",
    "flat",
    "frame_size",
    "normalisation",
    "read_run",
    "restored",
    "shrink_for_tests",
    "whole_patches",
]
