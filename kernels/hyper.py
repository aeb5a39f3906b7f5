"""
Hyper-connections' hot loops: coefficients from the normalised streams, Sinkhorn's iteration, mixing and spreading
streams.

`reference` is a whole sublayer as formulas, for autograd. Four functions have a backward pass written by hand:
`rms_project` z = W x / rms(x); `sinkhorn`, which inside has the tokens last, (n, n, N), so that every operation works
on long vectors; `mix` h = pre x and r = res x; `spread` r + post f, in place. Streams take n times the residual's
memory. So the time depends on how often they are read or written, and only x itself is kept for the backward pass. On a
CPU some loops go through blocks of tokens that stay in the cache.
"""

import torch

BLOCK = 1 << 18  # elements of the streams in a block: 1 MiB of float32
LOWEST = -40.0  # least logit below its row's maximum: scalings stay within e^40, whose square fits float32


def reference(x, f, pre, post, res):
    """res x + post f(pre x): x (N, n, C), pre and post (N, n), res (N, n, n); f maps (N, C) to itself."""
    return res @ x + post[..., None] * f((pre[:, None] @ x)[:, 0])[:, None]


def wide(x):
    """The type to compute in."""
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Coefficients.


class RMSProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, eps):
        x_, W_ = x.to(wide(x)), W.to(wide(x))
        scale = (torch.linalg.vector_norm(x_, dim=-1, keepdim=True).square() / x.size(-1) + eps).rsqrt()
        z = (x_ @ W_.t()).mul_(scale)
        ctx.save_for_backward(x, W, z, scale)
        return z, x.view_as(x)

    @staticmethod
    def backward(ctx, g, dx):
        x, W, z, scale = ctx.saved_tensors
        x_, g_ = x.to(z.dtype), g * scale
        pull = (g * z).sum(-1, keepdim=True) * scale.square() / -x.size(-1)  # the norm's gradient, along x
        dW = (g_.t() @ x_).to(W.dtype)
        if blocks(x) is None:
            return (dx + x_ * pull + g_ @ W.to(z.dtype)).to(x.dtype), dW, None
        return dx.addcmul_(x_, pull).addmm_(g_, W.to(z.dtype)), dW, None  # dx has no other user: see `rms_project`


def rms_project(x, W, eps=1e-6):
    """W x / sqrt(mean(x^2) + eps), (N, k), of x (N, D) and W (k, D), in float32 or better, under autocast too; and x.

    Pass the returned x to `mix`: the gradient that comes back from there is added to in place, which saves two passes.
    """
    with torch.autocast(x.device.type, enabled=False):
        return RMSProject.apply(x, W, eps)


@torch.library.custom_op("nanochimera::sinkhorn", mutates_args=())
def sinkhorn_forward(logits: torch.Tensor, iters: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """P = u K v and K of logits (n, n, N), and the scalings u of rows and v of columns, (iters, n, N), for backward.

    This is one operation for a compiler: unrolled, the iterations of a model would be thousands of operations.
    """
    K = (logits - logits.amax(1, keepdim=True)).clamp_(min=LOWEST).exp_()
    us, vs, v = [], [], torch.ones_like(K[0])
    for _ in range(iters):
        us.append((K * v).sum(1).reciprocal_())
        v = (K * us[-1][:, None]).sum(0).reciprocal_()
        vs.append(v)
    return K * us[-1][:, None] * v, K, torch.stack(us), torch.stack(vs)


@sinkhorn_forward.register_fake
def _(logits, iters):
    scalings = logits.new_empty(iters, *logits.shape[1:])
    return torch.empty_like(logits), torch.empty_like(logits), scalings, torch.empty_like(scalings)


@torch.library.custom_op("nanochimera::sinkhorn_backward", mutates_args=())
def sinkhorn_backward(g: torch.Tensor, K: torch.Tensor, us: torch.Tensor, vs: torch.Tensor) -> torch.Tensor:
    """dL/dlogits from g = dL/dP, by the chain rule through every scaling, last to first."""
    gK, one = g * K, torch.ones_like(vs[0])
    du, dv = (gK * vs[-1]).sum(1), (gK * us[-1][:, None]).sum(0)
    pull = torch.zeros_like(K)  # dL/dK through the scalings
    for u, v, before in reversed(list(zip(us, vs, (one, *vs[:-1])))):
        dc = dv * v * -v  # v = 1 / c, c = K' u
        du = (K * dc).sum(1).add_(du)
        dr = du * u * -u  # u = 1 / r, r = K before
        pull.addcmul_(u[:, None], dc).addcmul_(dr[:, None], before)
        du, dv = torch.zeros_like(du), (K * dr[:, None]).sum(0)
    return pull.mul_(K).addcmul_(gK * us[-1][:, None], vs[-1])


@sinkhorn_backward.register_fake
def _(g, K, us, vs):
    return torch.empty_like(K)


sinkhorn_forward.register_autograd(
    lambda ctx, g, *_: (sinkhorn_backward(g, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[1:]),
)


def sinkhorn(logits, iters):
    """exp(logits), its rows and then its columns divided by their sums, `iters` times: (..., n, n) -> the same.

    The result's columns sum to 1 to rounding, its rows nearly; it is a view whose matrices are not contiguous.
    """
    n = logits.size(-1)
    P = sinkhorn_forward(logits.reshape(-1, n, n).permute(1, 2, 0).contiguous(), iters)[0]
    return P.permute(2, 0, 1).view(logits.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Streams.


def blocks(x):
    """Slices of tokens to process in turn, or None where one matrix product over all of them is better."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != wide(x):
        return None
    step = max(1, BLOCK // x[0].numel())
    return [slice(i, i + step) for i in range(0, len(x), step)]


def weighted(out, weights, parts):
    """out = sum of weights times parts, which broadcast to it."""
    torch.mul(weights[0], parts[0], out=out)
    for w, part in zip(weights[1:], parts[1:]):
        out.addcmul_(w, part)


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pre, res):
        ctx.save_for_backward(x, pre, res)
        if (steps := blocks(x)) is None:
            x_ = x.to(pre.dtype)
            return (pre[:, None] @ x_)[:, 0].to(x.dtype), (res @ x_).to(x.dtype)
        h, r = torch.empty_like(x[:, 0]), torch.empty_like(x)
        for s in steps:
            weighted(h[s], pre[s, :, None].unbind(1), x[s].unbind(1))
            weighted(r[s], res[s, :, :, None].unbind(2), x[s, :, None].unbind(1))
        return h, r

    @staticmethod
    def backward(ctx, dh, dr):
        x, pre, res = ctx.saved_tensors
        if (steps := blocks(x)) is None:
            x_, dh, dr = x.to(pre.dtype), dh.to(pre.dtype), dr.to(pre.dtype)
            dx = torch.baddbmm(pre[..., None] * dh[:, None], res.mT, dr)
            return dx.to(x.dtype), (x_ @ dh[..., None])[..., 0], dr @ x_.mT
        dx = (res.mT.contiguous() @ dr).addcmul_(pre[..., None], dh[:, None])  # else entry by entry
        dpre = torch.empty_like(pre)
        for s in steps:
            torch.sum(x[s] * dh[s, None], -1, out=dpre[s])
        return dx, dpre, dr @ x.mT


def mix(x, pre, res):
    """A sublayer's input pre x (N, C) and the mixed streams res x (N, n, C), of x (N, n, C), pre (N, n), res (N, n, n).

    res=None leaves the streams as they are.
    """
    with torch.autocast(x.device.type, enabled=False):
        if res is None:
            return (pre[:, None] @ x.to(pre.dtype))[:, 0].to(x.dtype), x
        return Mix.apply(x, pre, res)


class Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, f, post, in_place):
        ctx.save_for_backward(f, post)
        out = r
        if in_place:
            ctx.mark_dirty(r)
        else:
            out = r.clone()
        return out.addcmul_(post.to(r.dtype)[..., None], f.to(r.dtype)[:, None])

    @staticmethod
    def backward(ctx, g):
        f, post = ctx.saved_tensors
        if (steps := blocks(g)) is None:
            g_ = g.to(post.dtype)
            return g, (post[:, None] @ g_)[:, 0].to(f.dtype), (g_ @ f.to(post.dtype)[..., None])[..., 0], None
        df, dpost = torch.empty_like(g[:, 0]), torch.empty_like(post)
        for s in steps:
            weighted(df[s], post[s, :, None].unbind(1), g[s].unbind(1))
            torch.sum(g[s] * f[s, None], -1, out=dpost[s])
        return g, df.to(f.dtype), dpost, None


def spread(r, f, post, in_place=False):
    """r + post f: r (N, n, C), f (N, C), post (N, n) in float32 or better; in_place overwrites r, `mix`'s output."""
    return Spread.apply(r, f, post, in_place and not torch.compiler.is_compiling())
