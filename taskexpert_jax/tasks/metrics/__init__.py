"""Metrics of the dense tasks: additive states, exact for any split of the set into batches and devices.

Every metric is a `clu.metrics.Metric`:
    from_model_output(prediction=, label=, mask=)   state of one batch; runs under jit
        prediction  (B, H, W, c) raw model output; logits for classification tasks
        label       (B, H, W, c_label) of any dtype, with its ignore value where there is no ground truth
        mask        (B,), 0 for padding examples, which are ignored; None when there are none
    empty(), state.merge(other)                     sum of states, in any order
    compute()                                       dict of floats, on the host, in float64

Without any valid pixel, means and shares are NaN, while IoU and F are 0 by definition.
"""

from taskexpert_jax.tasks.metrics.depth import Depth, depth
from taskexpert_jax.tasks.metrics.edge import EdgeLoss, edge_loss
from taskexpert_jax.tasks.metrics.normals import Normals
from taskexpert_jax.tasks.metrics.saliency import Saliency
from taskexpert_jax.tasks.metrics.segmentation import MeanIoU, mean_iou
from taskexpert_jax.tasks.metrics.sums import Count, PooledMetric, Sum, histogram, ratio

__all__ = [
    "Count",
    "Depth",
    "EdgeLoss",
    "MeanIoU",
    "Normals",
    "PooledMetric",
    "Saliency",
    "Sum",
    "depth",
    "edge_loss",
    "histogram",
    "mean_iou",
    "ratio",
]
