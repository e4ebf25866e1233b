"""Metrics of the dense tasks: additive states, exact for any split of the set into batches and devices.

Every metric is a `clu.metrics.Metric`:
    from_model_output(prediction=, label=, mask=None)   state of one batch; runs under jit
        prediction  (B, H, W, c) raw model output; logits for classification tasks
        label       (B, H, W, c_label) of any dtype, with its ignore value where there is no ground truth
        mask        (B,), 0 for padding examples, which are ignored; None when there are none
    empty(), state.merge(other)                         sum of states, in any order
    compute()                                           dict of floats, on the host, in float64

Every value is NaN without any valid pixel, and if the prediction of any example is NaN or Inf.
"""

from taskexpert_jax.tasks.metrics.depth import Depth, depth
from taskexpert_jax.tasks.metrics.disparity import Disparity
from taskexpert_jax.tasks.metrics.edge import EdgeLoss, edge_loss
from taskexpert_jax.tasks.metrics.normals import Normals
from taskexpert_jax.tasks.metrics.saliency import Saliency
from taskexpert_jax.tasks.metrics.segmentation import MeanIoU, mean_iou
from taskexpert_jax.tasks.metrics.sums import Count, PooledMetric, Sum, histogram, nonfinite_examples, ratio

__all__ = [
    "Count",
    "Depth",
    "Disparity",
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
    "nonfinite_examples",
    "ratio",
]
