"""
Leaky integrate-and-fire neurons along the tokens, each unit by itself, with a reset to 0 after a spike:
    v_t = beta (1 - s_{t-1}) v_{t-1} + (1 - beta) I_t,    s_t = 1 where v_t > theta, else 0.
This is tau dv/dt = I - v by steps of one token, beta = exp(-1 / tau) exactly, or 1 - 1 / tau by Euler.

`reference` is that loop. Without the reset the potential is one gated scan. The reset needs the last spike, which a
scan cannot have: it must know all its gates beforehand. `potentials` therefore runs several scans. The first has no
reset; the gates of each later one are beta (1 - s_{t-1}) with the spikes of the scan before it. Two scans with equal
spikes are the loop's fixed point, so they are its result; scan n is the loop's for at least n tokens from the first
spike on. Between that and the fixed point it is an approximation, causal like the loop, and its state is one potential
and one spike per unit and scan.
"""

import torch

from kernels.scan import gated_scan

SCANS = 4  # the first without reset has too many spikes, the second too few, and so on: even numbers are nearer
SLOPE = 4.0  # steepness of the surrogate gradient; potentials and thresholds seldom exceed 1


def reference(I, beta, theta):
    """(potentials, spikes) of currents I (B, T, h), token by token from rest; beta, theta (h,) or numbers."""
    v, s, out = torch.zeros_like(I[:, 0]), torch.zeros_like(I[:, 0]), []
    for I_t in I.unbind(1):
        v = beta * (1 - s) * v + (1 - beta) * I_t
        s = (v > theta).to(I.dtype)
        out.append((v, s))
    return tuple(torch.stack(x, 1) for x in zip(*out))


def potentials(I, beta, theta, store, scans=SCANS):
    """Potentials (B, T, h) of currents I (B, T, h), float32 or better, by `scans` scans; beta (h,).

    store: a dict with the potentials and spikes of the token before; it is updated. Gradients go through the last
    scan, whose gates are constants but for beta.
    """
    gates, inputs, fired = beta.expand_as(I), (1 - beta) * I, None
    for n in range(scans):
        with torch.set_grad_enabled(torch.is_grad_enabled() and n == scans - 1):
            v = gated_scan(gates if fired is None else gates * (1 - fired), inputs, store.get(f"v{n}"))
        s = (v.detach() > theta).to(I.dtype)
        before = store.get(f"s{n}", torch.zeros_like(s[:, :1]))
        store[f"v{n}"], store[f"s{n}"] = v[:, -1], s[:, -1:]
        fired = torch.cat((before, s[:, :-1]), 1)
    return v


class Spike(torch.autograd.Function):
    """1 where v > theta, else 0; backward: 1 / (1 + SLOPE |v - theta|)^2 (Zenke & Ganguli 2018, arXiv 1705.11146)."""

    @staticmethod
    def forward(ctx, v, theta):
        ctx.save_for_backward(v - theta)
        return (v > theta).to(v.dtype)

    @staticmethod
    def backward(ctx, g):
        (distance,) = ctx.saved_tensors
        return g / (1 + SLOPE * distance.abs()).square(), None
