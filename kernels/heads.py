"""
Cross-entropy of a mixture of softmaxes over a large vocabulary, in chunks of tokens; one softmax is its case K = 1.

With N tokens, K softmaxes, facets f (C,) and the output embedding e_v, the rows of W (V, C):

    logits_k[v] = f_k e_v;   the first softmax has P facets, and token v uses number v mod P
    log p(y) = logsumexp_k(log prior_k + log softmax_k(logits_k)[y])

The gradient of -log p(y), with the responsibility r_k = prior_k softmax_k[y] / p(y), is r_k (softmax_k - onehot_y) with
respect to logits_k and -r_k with respect to log prior_k. Once a chunk's logits are computed, so are these, and the
forward pass therefore computes the gradients and frees the logits. About `chunk` rows of V numbers are in memory at
once, where autograd keeps several times K N. It is one operator, because a compiler that unrolled the loop would keep
the chunks for its backward graph. `reference` is the plain formula, for any float type.
"""

import torch
from torch.nn import functional as F


def sum_dtype(x):
    """The type in which losses and sums over tokens are accumulated: float64 stays, everything else is float32."""
    return torch.promote_types(x.dtype, torch.float32)


def mixture_log_probs(facets, log_prior, weight):
    """log p (..., V) of every token: facets (..., P + K - 1, C), log_prior (..., K), weight (V, C). Differentiable."""
    (*shape, _, C), V, K = facets.shape, weight.size(0), log_prior.size(-1)
    facets = facets.reshape(-1, facets.size(-2), C)  # (N, P + K - 1, C)
    P = facets.size(1) - K + 1
    rows = F.pad(weight, (0, 0, 0, -V % P)).unflatten(0, (-1, P)).transpose(0, 1)  # (P, ceil(V / P), C)
    first = facets[:, :P].transpose(0, 1) @ rows.mT  # (P, N, ceil(V / P))
    logits = torch.cat((first.permute(1, 2, 0).flatten(1)[:, None, :V], facets[:, P:] @ weight.T), 1)  # (N, K, V)
    scores = F.log_softmax(logits, -1, dtype=sum_dtype(logits)) + log_prior.reshape(-1, K, 1)
    return scores.logsumexp(1).view(*shape, V)


def reference(facets, log_prior, weight, targets):
    """-log p(targets), (mean over those that are not -1, each), by autograd: what the operator computes."""
    log_probs = mixture_log_probs(facets, log_prior, weight)
    each = F.nll_loss(log_probs, targets, ignore_index=-1, reduction="none")
    return each.sum() / (targets != -1).sum(), each.detach()


@torch.library.custom_op("nanochimera::mixture_nll", mutates_args=())
def mixture_nll(
    facets: torch.Tensor, log_prior: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-log p(targets): (sum, each (N,), d sum / d facets, / d log_prior, / d weight), empty if not with_grad."""
    (N, n_facets, _), (V, _), K = facets.shape, weight.shape, log_prior.size(1)
    P, acc = n_facets - K + 1, sum_dtype(weight)
    sizes = [len(range(p, V, P)) for p in range(P)]
    ends = torch.tensor(sizes, device="cpu").cumsum(0).tolist()
    begin = torch.tensor([0, *ends[:-1]], device=targets.device)  # where the columns of partition p begin

    def parts(k):
        """For softmax k, whose columns are ordered by partition: a list of (facet, its rows of W, its columns)."""
        if k:
            return [(P - 1 + k, weight, slice(0, V))]
        return [(p, weight[p::P], slice(ends[p] - sizes[p], ends[p])) for p in range(P)]

    each = facets.new_empty(N, dtype=acc)
    d_facets = torch.empty_like(facets, dtype=acc) if with_grad else each.new_empty(0)
    d_prior = torch.empty_like(log_prior, dtype=acc) if with_grad else each.new_empty(0)
    d_weight = torch.zeros_like(weight, dtype=acc) if with_grad else each.new_empty(0)
    rows_at_once = max(1, chunk // K)
    for begins in range(0, N, rows_at_once):
        now = slice(begins, begins + rows_at_once)
        f, y = facets[now], targets[now, None].clamp(min=0)
        seen = targets[now] != -1
        scores, errors = log_prior[now].to(acc, copy=True), []  # (n, K); K of (n, V)
        for k in range(K):
            logits = f.new_empty(len(f), V)
            for i, rows, columns in parts(k):
                torch.mm(f[:, i], rows.T, out=logits[:, columns])
            log_softmax = F.log_softmax(logits, -1, dtype=acc)
            at = y if k else begin[y % P] + y // P
            picked = log_softmax.gather(1, at)
            scores[:, k] += picked[:, 0]
            if with_grad:  # softmax - onehot
                errors.append(log_softmax.exp_().scatter_(1, at, picked.expm1()).to(weight.dtype))
        log_p = scores.logsumexp(1)
        each[now] = torch.where(seen, -log_p, 0.0)
        if not with_grad:
            continue
        r = (scores - log_p[:, None]).exp() * seen[:, None]
        d_prior[now] = -r
        for k, error in enumerate(errors):
            for i, rows, columns in parts(k):
                d_facets[now, i] = r[:, k, None] * (error[:, columns] @ rows)
                update = (r[:, k, None] * f[:, i]).to(weight.dtype)
                d_rows = d_weight if k else d_weight[i::P]
                if acc == weight.dtype:
                    d_rows.addmm_(error[:, columns].T, update)
                else:
                    d_rows += error[:, columns].T @ update
    return each.sum(), each, d_facets, d_prior, d_weight


@mixture_nll.register_fake
def _(facets, log_prior, weight, targets, chunk, with_grad):
    acc = sum_dtype(weight)
    inputs = (facets, log_prior, weight)
    grads = [torch.empty_like(x, dtype=acc) if with_grad else x.new_empty(0, dtype=acc) for x in inputs]
    return facets.new_empty((), dtype=acc), facets.new_empty(len(facets), dtype=acc), *grads


def save_for_backward(ctx, inputs, output):
    ctx.dtypes = [x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    return *((grad * d).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes)), None, None, None


mixture_nll.register_autograd(differentiate, setup_context=save_for_backward)


def mixture_cross_entropy(facets, log_prior, weight, targets, chunk):
    """Mean over the targets that are not -1 of -log p, and each token's, without a gradient: (0-d, (N,)), in nats.

    facets (N, P + K - 1, C), log_prior (N, K) that sums to 1, weight (V, C), targets (N,); chunk: rows of logits in
    memory at once, 0 = all. In float32 or better. No valid target: nan, with zero gradients, as F.cross_entropy.
    """
    device = facets.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        facets, weight = facets.to(dtype), weight.to(dtype)
    with_grad = torch.is_grad_enabled() and (facets.requires_grad or log_prior.requires_grad or weight.requires_grad)
    rows = chunk or len(facets) * log_prior.size(1)
    total, each, *_ = mixture_nll(facets, log_prior, weight, targets, rows, with_grad)
    count = (targets != -1).sum()
    return total / count.clamp(min=1) + torch.where(count > 0, 0.0, torch.nan), each.detach()


def chunked_cross_entropy(x, weight, targets, chunk, per_token=False):
    """F.cross_entropy(x weight^T, targets) in nats, with at most `chunk` rows of logits in memory; 0 = all.

    x (..., C), weight (V, C), targets (...) with -1 where there is nothing to predict. per_token: also each token's
    loss, of the shape of targets, 0 where the target is -1, without a gradient.
    """
    x = x.flatten(0, -2)
    no_prior = x.new_zeros(len(x), 1)
    loss, each = mixture_cross_entropy(x[:, None], no_prior, weight, targets.flatten(), chunk)
    return (loss, each.view(targets.shape)) if per_token else loss
