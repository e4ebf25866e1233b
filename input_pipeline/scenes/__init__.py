"""Built-in data set: rendered rooms with furniture and people, and exact labels for all six tasks."""

from input_pipeline.scenes.conditions import Condition, condition
from input_pipeline.scenes.scene import CLASSES, fingerprint, main, render, source

__all__ = ["CLASSES", "Condition", "condition", "fingerprint", "main", "render", "source"]
