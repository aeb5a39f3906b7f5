"""
FitzHugh-Nagumo waves along the token line: `steps` implicit-explicit Euler steps of a chain of excitable sites.

A step solves (1 + L_t) v'_t - L_t v'_{t-1} = r_t with L_t = dt D g_t, r_t = v_t + dt (v_t - v_t^3 / 3 - w_t + I_t): a
gated recurrence along time (scan.py). Then w' = (w + dt eps (v' + a)) / (1 + dt eps b) at each site by itself. All
sites start at rest, and so does everything before the first token. The output is the deviation of v from rest.

`reference` is the plain loop, in any float type. The CPU path computes in deviations from rest, x = v - REST_V and u =
-dt (w - REST_W), where a step reads

    m_t = 1 / (1 + L_t)        x'_t = x'_{t-1} + m_t (r_t - x'_{t-1})        r_t = dt I_t + u_t + F(x_t)
    F(x) = x + dt ((1 - REST_V^2) x - REST_V x^2 - x^3 / 3)                  u' = p u + Q x' + U
    p = 1 / (1 + dt eps b)     Q = -dt^2 eps p                               U = Q (REST_V + a - b REST_W)

and starts from zeros, so that no precision is lost by cancellation and the first scan is linear in I. It streams blocks
of time through buffers that are reused; all steps of a block run while it is in the cache. The backward pass is written
by hand. From the last block to the first it recomputes the states of a block from those before it, and runs the adjoint
scans. A sequence of only one block keeps its states instead. On CUDA the operators call fhn_triton.py.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.forward_ad import unpack_dual

from kernels import triton_module
from kernels.fhn_rest import REST_V, REST_W
from kernels.scan import Scans, Stage, block_length, blocks, gated_scan, sum_dtype

FHN = {"a": 0.7, "b": 0.8, "eps": 0.08, "amplitude": 4.0}  # FitzHugh's own; the amplitude is ours (docs/log.md)

# ---------------------------------------------------------------------------------------------------------------------
# The reference.


def reference(stimulus, conductance, D, a, b, eps, dt, steps, state=None):
    """The same steps site by site, differentiable by autograd; see `fhn_propagate`."""
    v, w = torch.full_like(stimulus, REST_V), torch.full_like(stimulus, REST_W)
    last = []
    for s in range(steps):
        r = v + dt * (v - v**3 / 3 - w + stimulus)
        coupling = dt * D * conductance
        A = coupling / (1 + coupling)
        before = torch.full_like(v[:, 0], REST_V) if state is None else state[:, s].detach()
        sites = []
        for A_t, r_t in zip(A.unbind(1), r.unbind(1)):
            before = A_t * before + (1 - A_t) * r_t
            sites.append(before)
        v = torch.stack(sites, 1)
        w = (w + dt * eps * (v + a)) / (1 + dt * eps * b)
        last.append(before.detach())
    return v - REST_V, torch.stack(last, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The PyTorch path.
#
# With two steps or more the first one keeps X = x / dt, whose drive is the stimulus itself: this saves one pass forward
# and one backward.
# Steps count from 0 here.


class Medium:
    """The parameters as the deviations need them: (C,) each, in the type that sums are accumulated in."""

    def __init__(self, D, a, b, eps, dt, steps, dtype):
        D, self.a, self.b, self.eps = (x.to(dtype) for x in (D, a, b, eps))
        self.dt, self.dtD, self.one = dt, D * dt, torch.ones_like(D)
        self.p = torch.addcmul(self.one, self.eps, self.b, value=dt).reciprocal_()
        self.Q = self.eps * self.p * -(dt**2)
        self.pull = torch.add(self.a, self.b, alpha=-REST_W) + REST_V
        self.U = self.Q * self.pull
        self.units = [dt if s == 0 and steps > 1 else 1.0 for s in range(steps)]  # deviation = unit * state
        self.cubics = {unit: self.cubic(unit) for unit in self.units[:-1]}

    def cubic(self, unit):
        """(K1, K2, K3): F(x) + Q x = K1 X + K2 X^2 + K3 X^3 for x = unit X."""
        slope, square, cube = 1 + self.dt * (1 - REST_V**2), -self.dt * REST_V, -self.dt / 3
        return (self.Q + slope) * unit, self.one * (square * unit**2), self.one * (cube * unit**3)

    def parameter_gradients(self, dcoupling, dQ, dp, dU):
        """(dD, da, db, deps) from the gradients of dt D, Q, p and U, (C,) each."""
        dQ = dQ + dU * self.pull
        dp = dp - dQ * self.eps * self.dt**2
        dproduct = -self.dt * dp * self.p**2  # gradient of eps b
        da = dU * self.Q
        return dcoupling * self.dt, da, dproduct * self.eps - REST_W * da, dproduct * self.b - self.dt**2 * dQ * self.p


class Block:
    """One block of sites: its buffers, (B, n, C) each and reused for the next block, and the passes over it.

    states: one buffer per step, in which the block's sites follow the site before it: (B, n + 1, C), or all sites.
    """

    def __init__(self, medium, B, n, C, states):
        new = medium.one.new_empty
        self.medium, self.steps, self.states = medium, len(states), states
        self.scans = Scans(B, C, medium.one)
        self.m, self.base, self.r = new(3, B, n, C).unbind()
        self.u = new(max(0, self.steps - 2), B, n, C).unbind()

    def load(self, conductance, start=0):
        """start: the position in the states where the block begins."""
        n = conductance.size(1)
        self.m_n, self.base_n, self.r_n, *self.u_n = (x[:, :n] for x in (self.m, self.base, self.r, *self.u))
        sites = [x[:, start : start + n + 1] for x in self.states]
        self.before, self.x = [x[:, :-1] for x in sites], [x[:, 1:] for x in sites]
        self.scan = self.scans.of(n)
        torch.addcmul(self.medium.one, conductance, self.medium.dtD, out=self.m_n).reciprocal_()
        self.scan.load_weights(self.m_n)

    def run(self, stimulus, carry):
        """All steps: fills the states. carry (B, steps, C): those of the site before, then those of the last one."""
        drive, last = stimulus, self.steps - 1
        if last:  # dt I + U, which all steps but the first share
            torch.add(self.medium.U, stimulus, alpha=self.medium.dt, out=self.base_n)
        else:
            drive = torch.mul(stimulus, self.medium.dt, out=self.r_n)
        for s, x in enumerate(self.x):
            self.scan.average(drive, x, carry[:, s])
            self.before[s][:, 0] = carry[:, s]
            carry[:, s] = x[:, -1]
            if s < last:
                drive = self.drive(s)
                self.recover(s)

    def drive(self, s):
        """r of the next step."""
        (K1, K2, K3), x, r = self.medium.cubics[self.medium.units[s]], self.x[s], self.r_n
        torch.addcmul(K2, x, K3, out=r)
        torch.addcmul(K1, r, x, out=r)
        torch.addcmul(self.base_n, r, x, out=r)
        return r.addcmul_(self.u_n[s - 1], self.medium.p) if s else r

    def recover(self, s):
        """u after step s, for the steps whose u a later drive needs."""
        if s < self.steps - 2:
            torch.addcmul(self.medium.U, self.x[s], self.medium.Q * self.medium.units[s], out=self.u_n[s])
            if s:
                self.u_n[s].addcmul_(self.u_n[s - 1], self.medium.p)


class Adjoint:
    """The backward of a loaded block with its states: buffers, and the parameters' gradients, summed over blocks.

    lam is the gradient of a step's states, with all of their effects; r = m lam is the gradient of its drive.
    """

    def __init__(self, block):
        new = torch.empty_like
        self.block, self.medium, self.steps = block, block.medium, block.steps
        self.A, self.gx, self.gr, self.later, self.coupling = (new(block.m) for _ in range(5))
        self.gu = new(block.m) if self.steps > 2 else None
        B, _, C = block.m.shape
        self.ends = block.m.new_zeros(self.steps, B, C)  # the gradient of the last site of a block from the next block
        self.sums = list(block.m.new_zeros(4, C))  # gradients of dt D, Q, p, U

    def run(self, grad, conductance, d_stimulus, d_conductance):
        block, medium, n, last = self.block, self.medium, grad.size(1), self.steps - 1
        A, gx, gr, later, coupling = (x[:, :n] for x in (self.A, self.gx, self.gr, self.later, self.coupling))
        scratch = block.r_n
        block.scan.load_backward(torch.sub(medium.one, block.m_n, out=A))
        for s in range(last, -1, -1):
            block.scan.backward(gx if s < last else grad, gr, self.ends[s])
            gr.mul_(block.m_n)
            torch.sub(block.x[s], block.before[s], out=scratch)
            if s == last:
                torch.mul(gr, scratch, out=coupling)
            else:
                coupling.addcmul_(gr, scratch)
            if s:
                self.through_drive(s - 1, gr, gx, scratch)
                if s == last:
                    gr, later = later, gr
                else:
                    later += gr
        if last:
            torch.add(gr, later, alpha=medium.dt, out=d_stimulus)
        else:
            torch.mul(gr, medium.dt, out=d_stimulus)
        self.add(0, coupling, conductance, scratch, -1.0)
        torch.mul(coupling, -medium.dtD, out=d_conductance)

    def through_drive(self, s, gr, gx, scratch):
        """gx of the states after step s from gr of the next step's drive."""
        block, medium, gu = self.block, self.medium, gr
        unit, x = medium.units[s], block.x[s]
        K1, K2, K3 = medium.cubics[unit]
        torch.addcmul(2 * K2, x, 3 * K3, out=gx)
        torch.addcmul(K1, gx, x, out=gx).mul_(gr)
        if self.gu is not None:
            gu = self.gu[:, : gr.size(1)]
            if s == self.steps - 2:
                gu.copy_(gr)
            else:
                gu.mul_(medium.p)
                gx.addcmul_(gu, medium.Q * unit)
                gu += gr
        self.add(1, gu, x, scratch, unit)
        if s:
            self.add(2, gu, block.u_n[s - 1], scratch, 1.0)
        self.sums[3] += gu.sum((0, 1))

    def add(self, i, x, y, scratch, factor):
        self.sums[i].add_(torch.mul(x, y, out=scratch).sum((0, 1)), alpha=factor)


def saved(B, T, C, steps, like):
    """What the backward needs, (B, n, steps, C), empty: states before each block; of one block, of all sites too."""
    length = block_length(B, C)
    n = T + 1 if length >= T else len(blocks(T, length))
    return like.new_empty(steps, B, n, C, dtype=sum_dtype(like)).permute(1, 2, 0, 3)


def torch_forward(stimulus, conductance, D, a, b, eps, dt, steps, state):
    """(deviation (B, T, C), new_state (B, steps, C), carries for the backward, see `saved`). Any device."""
    B, T, C = stimulus.shape
    dtype, length = sum_dtype(stimulus), block_length(B, C)
    medium, carries = Medium(D, a, b, eps, dt, steps, dtype), saved(B, T, C, steps, stimulus)
    out = torch.empty_like(stimulus, memory_format=torch.contiguous_format)
    I, g = Stage(stimulus, length, dtype), Stage(conductance, length, dtype)
    whole = length >= T
    states = carries.unbind(2) if whole else [carries.new_empty(B, length + 1, C)] * steps
    block = Block(medium, B, min(T, length), C, states)
    units = medium.one.new_tensor(medium.units)[:, None]
    carry = carries.new_zeros(B, steps, C) if state is None else (state - REST_V) / units
    for i, (s, e) in enumerate(blocks(T, length)):
        if not whole:
            carries[:, i] = carry
        block.load(g.read(s, e), s if whole else 0)
        block.run(I.read(s, e), carry)
        out[:, s:e] = block.x[-1]
    return out, carry * units + REST_V, carries


def torch_backward(grad, stimulus, conductance, D, a, b, eps, dt, steps, carries):
    """(d_stimulus, d_conductance, dD, da, db, deps); see `torch_forward`. Any device."""
    B, T, C = stimulus.shape
    dtype, length = sum_dtype(stimulus), block_length(B, C)
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (stimulus, conductance)]
    G, I, g, *outputs = (Stage(x, length, dtype) for x in (grad, stimulus, conductance, *results))
    whole = length >= T
    states = carries.unbind(2) if whole else carries.new_empty(steps, B, length + 1, C).unbind()
    block = Block(Medium(D, a, b, eps, dt, steps, dtype), B, min(T, length), C, states)
    adjoint = Adjoint(block)
    for i, span in reversed(list(enumerate(blocks(T, length)))):
        conductance = g.read(*span)
        block.load(conductance, span[0] if whole else 0)
        if whole:
            for s in range(steps):
                block.recover(s)
        else:
            block.run(I.read(*span), carries[:, i].clone())
        adjoint.run(G.read(*span), conductance, *(x.target(*span) for x in outputs))
        for x in outputs:
            x.write(*span)
    return (*results, *block.medium.parameter_gradients(*adjoint.sums))


def one_site(stimulus, conductance, D, a, b, eps, dt, steps, state):
    """`fhn_propagate` for T = 1, one token of generation: a few small operations that autograd can differentiate."""
    dtype = sum_dtype(stimulus)
    I, g = stimulus[:, 0].to(dtype), conductance[:, 0].to(dtype)
    D, a, b, eps = (x.to(dtype) for x in (D, a, b, eps))
    before = I.new_full((len(I), steps, I.size(1)), REST_V) if state is None else state.detach().to(dtype)
    m = 1 / (1 + dt * D * g)
    p = 1 / (1 + dt * eps * b)
    pull, gain, shift = dt * I, dt * eps * p, dt * eps * a * p
    x, w, sites = None, REST_W, []
    for s in range(steps):
        if s == 0:  # at rest the cubic and w cancel
            r = pull + REST_V
        else:
            r = x * (1 + dt - (dt / 3) * x * x) + (pull - dt * w)
        x = torch.lerp(before[:, s], r, m)
        sites.append(x)
        if s < steps - 1:
            w = w * p + (gain * x + shift)
    return (x - REST_V)[:, None].to(stimulus.dtype), torch.stack(sites, 1).detach()


# ---------------------------------------------------------------------------------------------------------------------
# The operators.


def import_triton():
    """The CUDA path."""
    return triton_module("fhn_triton")


@torch.library.custom_op("nanochimera::fhn", mutates_args=())
def fhn_op(
    stimulus: torch.Tensor, conductance: torch.Tensor, D: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
    eps: torch.Tensor, dt: float, steps: int, state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    forward = import_triton().triton_forward if stimulus.is_cuda else torch_forward
    return forward(stimulus, conductance, D, a, b, eps, dt, steps, state)


@fhn_op.register_fake
def _(stimulus, conductance, D, a, b, eps, dt, steps, state):
    (B, T, C), dtype = stimulus.shape, sum_dtype(stimulus)
    out = torch.empty_like(stimulus, memory_format=torch.contiguous_format)
    carries = (import_triton().saved if stimulus.is_cuda else saved)(B, T, C, steps, stimulus)
    return out, out.new_empty(B, steps, C, dtype=dtype), carries


@torch.library.custom_op("nanochimera::fhn_backward", mutates_args=())
def fhn_backward_op(
    grad: torch.Tensor, stimulus: torch.Tensor, conductance: torch.Tensor, D: torch.Tensor, a: torch.Tensor,
    b: torch.Tensor, eps: torch.Tensor, dt: float, steps: int, carries: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    backward = import_triton().triton_backward if stimulus.is_cuda else torch_backward
    return backward(grad, stimulus, conductance, D, a, b, eps, dt, steps, carries)


@fhn_backward_op.register_fake
def _(grad, stimulus, conductance, D, a, b, eps, dt, steps, carries):
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (stimulus, conductance)]
    return (*like, *(carries.new_empty(x.shape) for x in (D, a, b, eps)))


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.dt, ctx.steps, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    *inputs, carries = ctx.saved_tensors
    gradients = fhn_backward_op(grad, *inputs, ctx.dt, ctx.steps, carries)
    return (*(g.to(x.dtype) for g, x in zip(gradients, inputs)), None, None, None)


fhn_op.register_autograd(differentiate, setup_context=save_for_backward)


def fhn_propagate(stimulus, conductance, D, a, b, eps, dt, steps, state=None):
    """`steps` steps of the medium over the sites of a sequence, from rest.

    stimulus, conductance: (B, T, C) of one floating type; D, a, b, eps: (C,), floating. Conductance, D, b and eps must
    not be negative, which is not checked; dt > 0.
    state: (B, steps, C), what an earlier call returned for the tokens before these; None where there are none.
    Returns (deviation (B, T, C) of v from REST_V, new_state): new_state holds v of the last site after each step, in
    float32 or better. There are gradients for all inputs but the state. ValueError for arguments that do not fit,
    NotImplementedError for forward-mode inputs, whose tangents would be lost.
    """
    if stimulus.dim() != 3 or 0 in stimulus.shape or not stimulus.is_floating_point():
        raise ValueError(f"stimulus must be (B, T, C), floating, not empty: {tuple(stimulus.shape)} {stimulus.dtype}")
    B, T, C = stimulus.shape
    if conductance.shape != (B, T, C) or conductance.dtype != stimulus.dtype:
        what = f"{tuple(conductance.shape)} {conductance.dtype}"
        raise ValueError(f"conductance must be like stimulus, {(B, T, C)} {stimulus.dtype}, not {what}")
    if not all(x.shape == (C,) and x.is_floating_point() for x in (D, a, b, eps)):
        raise ValueError(f"D, a, b and eps must be floating and ({C},), not {[tuple(x.shape) for x in (D, a, b, eps)]}")
    if not dt > 0 or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"dt={dt} must be positive and steps={steps} a positive int")
    if state is not None and (state.shape != (B, steps, C) or state.dtype != sum_dtype(stimulus)):
        raise ValueError(f"state must be {(B, steps, C)} {sum_dtype(stimulus)}, not {tuple(state.shape)} {state.dtype}")
    inputs = [stimulus, conductance, D, a, b, eps]
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError("fhn_propagate has no forward-mode derivative: use reference(...)")
    if T == 1 and not stimulus.is_cuda:
        return one_site(*inputs, dt, steps, state)
    return fhn_op(*inputs, float(dt), steps, None if state is None else state.detach())[:2]


# ---------------------------------------------------------------------------------------------------------------------
# The equations by themselves: excitable sites on a line, each coupled to the one before it.
#   dv_t/dtau = g_t D (v_{t-1} - v_t) + v_t - v_t^3 / 3 - w_t + I_t,  dw_t/dtau = eps (v_t + a - b w_t)
# IMEX step: r = v + dt (v - v^3 / 3 - w + I); (1 + Lambda_t) v'_t - Lambda_t v'_{t-1} = r_t, Lambda = dt g D, a gated
# scan along the line; w' = (w + dt eps (v' + a)) / (1 + dt eps b). Explicit step: everything at the old values.
# Sources: FitzHugh 1961; Nagumo, Arimoto & Yoshizawa 1962.


@dataclass
class FHNDynamics:
    """The equations and their two solvers. a, b, eps: numbers, or tensors that broadcast to (B, T, C).

    `threshold` puts Nagumo's cubic v (1 - v) (v - threshold), without recovery, in place of the reaction.
    """

    a: float = FHN["a"]
    b: float = FHN["b"]
    eps: float = FHN["eps"]
    threshold: float | None = None

    def rest(self, I=0.0):
        """The equilibrium (v, w) under a constant stimulus I, for numbers a, b with b < 1, where there is only one."""
        low, high = -10.0 - abs(I), 10.0 + abs(I)
        while high - low > 1e-15 * max(1.0, abs(low)) and low < (v := (low + high) / 2) < high:
            low, high = (low, v) if v - v**3 / 3 - (v + self.a) / self.b + I < 0 else (v, high)
        return v, (v + self.a) / self.b

    def jacobian(self, v):
        """d(dv/dtau, dw/dtau) / d(v, w) at an uncoupled site: (2, 2) float64."""
        return torch.tensor([[1 - v * v, -1.0], [self.eps, -self.eps * self.b]], dtype=torch.float64)

    def reaction(self, v, w):
        """dv/dtau of an uncoupled site without stimulus."""
        if self.threshold is not None:
            return v * (1 - v) * (v - self.threshold)
        return v - v**3 / 3 - w

    def step(self, v, w, I, dt, coupling=0.0, before=None, imex=True, two_way=False):
        """(v, w) after dt. v, w (B, T, C); I and coupling, g D, broadcast; before (B, C): v before the first site.

        imex: the coupling is implicit, stable for every dt. Otherwise Lambda = dt coupling is limited to 1 and a step
        reaches no further than the next site. two_way (explicit only) couples to the right as well, with no flux at the
        ends. Without `before` the sites on the left are at rest. ValueError for two_way with imex.
        """
        if imex and two_way:
            raise ValueError("two_way is for the explicit scheme: the implicit one solves along one direction")
        before = torch.full_like(v[:, 0], REST_V) if before is None else before
        push = v + dt * (self.reaction(v, w) + I)
        strength = torch.as_tensor(dt * coupling, dtype=v.dtype, device=v.device).expand_as(v)
        if imex:
            A = strength / (1 + strength)
            new = gated_scan(A, (1 - A) * push, before)
            recovery = (w + dt * self.eps * (new + self.a)) / (1 + dt * self.eps * self.b)
            return new, recovery
        left = torch.cat((before[:, None], v[:, :-1]), 1) - v
        right = torch.cat((v[:, 1:], v[:, -1:]), 1) - v if two_way else 0.0
        return push + strength.clamp(max=1) * (left + right), w + dt * self.eps * (v + self.a - self.b * w)


def fhn_bound(dt):
    """(largest |v|, largest |I| + |w|) for which a step of length dt keeps |v| within its bound. dt < 2."""
    return 2 * math.sqrt((1 + dt) / dt), 2 / 3 * (2 - dt) / dt * math.sqrt((1 + dt) / dt)


def fhn_eps_limit(dt, steps, a=FHN["a"]):
    """The eps up to which |w| <= |w_rest| + steps dt eps (|v| + |a|) leaves 2 % of the bound to the stimulus."""
    v, force = fhn_bound(dt)
    return (0.98 * force + REST_W) / (steps * dt * (v + abs(a)))
