"""Decoders: backbone features -> a feature map for each task."""
