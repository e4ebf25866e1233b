"""Multiply-adds of any PyTorch model, counted without computing anything."""

import torch
from torch import nn
from torch.nn import attention
from torch.utils import flop_counter


def count(net: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of a forward pass in evaluation mode: matmuls, attention and convolutions, wherever they stand.

    PyTorch's counter sees the operations that are dispatched, so functional calls and custom modules are counted too.
    Norms, activations, resizing and weighted sums are not. The counter has no formula for the CPU's fused attention
    and would count it as nothing, so attention is taken as plain matmuls here.

    Args:
      net: is moved to the meta device, which has shapes and no values: its weights are gone afterwards.
      shape: of the input.
    """
    net.eval().requires_grad_(False).to("meta")  # the counter's hooks fail on views of parameters that need gradients
    counter = flop_counter.FlopCounterMode(display=False)
    with torch.no_grad(), attention.sdpa_kernel(attention.SDPBackend.MATH), counter:
        net(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2
