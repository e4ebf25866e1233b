"""Backbones: image -> tokens at several depths."""
