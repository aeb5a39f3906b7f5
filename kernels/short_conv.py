"""
A short causal convolution, one filter per channel, added to its input: y_t = x_t + sum_j w_j x_{t-j}, j < taps.

`reference` is the sum as it stands. On a CPU `short_conv` has a hand-written backward: autograd's makes a copy of the
whole gradient for each tap (2.5 times as long, forward and backward, for 4 taps of (12, 64, 128)).
"""

import torch

from kernels.autograd import is_plain


def reference(x, w, before=None):
    """x (B, T, C), w (taps, C), before: the taps - 1 vectors before x, zeros where it is None. Returns (B, T, C)."""
    reach = len(w) - 1
    y = torch.addcmul(x, w[0], x)
    if reach:
        before = x.new_zeros(x.size(0), reach, x.size(2)) if before is None else before
        x = torch.cat((before, x), 1)  # (B, reach + T, C)
    for j in range(1, len(w)):
        y = torch.addcmul(y, w[j], x[:, reach - j : x.size(1) - j])
    return y


class ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        y = torch.addcmul(x, w[0], x)
        for j in range(1, len(w)):
            y[:, j:].addcmul_(w[j], x[:, :-j])
        return y

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dx, dw = torch.addcmul(g, w[0], g), torch.empty_like(w)
        torch.sum(g * x, (0, 1), out=dw[0])
        for j in range(1, len(w)):
            dx[:, :-j].addcmul_(w[j], g[:, j:])
            torch.sum(g[:, j:] * x[:, :-j], (0, 1), out=dw[j])
        return dx, dw


def short_conv(x, w, before=None):
    """The same as `reference`, differentiable in x and w."""
    if before is None and x.device.type == "cpu" and is_plain(x, w):
        return ShortConvolution.apply(x, w)
    return reference(x, w, before)
