"""Pretrained backbones: weight files and finished runs."""
