"""
Muon: momentum whose matrices are made orthogonal before they are applied, for the linear layers inside blocks.

    M <- lerp(M, G, 1 - mu), u = lerp(G, M, mu)     momentum and Nesterov's look ahead, mu = 0.95
    O = orthogonalize(u)                            all singular values of u moved near 1
    W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) O

`orthogonalize` is five Newton-Schulz steps. X <- (a I + b A + c A^2) X with A = X X^T changes singular values alone, by
the polynomial a s + b s^3 + c s^5, whose coefficients are chosen for speed: values end in about [0.7, 1.2]. Matrices of
one shape are stacked and go through together. Jordan et al. 2024, kellerjordan.github.io/posts/muon.
"""

import torch
import torch.distributed as dist

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7  # keeps a gradient of zeros finite


def reference(u):
    """What `orthogonalize` makes of one matrix (r, c), by its singular value decomposition, in float64."""
    U, s, V = torch.linalg.svd(u.double() / (u.double().norm() + EPS), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return U * s @ V


def orthogonalize(u):
    """Near-orthogonal matrices (n, r, c), r <= c, with the singular vectors of u (n, r, c), in u's type.

    Wide ones in float32 iterate on the (r, r) Gram matrix alone: all steps are polynomials of it and commute.
    """
    (a, b, c), (r, columns) = COEFFICIENTS, u.shape[-2:]
    X = u / (u.norm(dim=(-2, -1), keepdim=True) + EPS)
    if columns < 2 * r or u.dtype == torch.bfloat16:  # in bfloat16 the error of a product of polynomials would show
        for _ in range(STEPS):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
        return X
    A, Q, I = X @ X.mT, None, torch.eye(r, dtype=u.dtype, device=u.device)
    for step in range(STEPS):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c) + a * I
        Q = P if Q is None else P @ Q
        if step < STEPS - 1:
            A = P @ A @ P
    return Q @ X


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have "splits", AdamW for the others; one optimiser, with one state dict.

    groups: dicts with "params", "lr", "weight_decay" and, for Muon, "splits": for each matrix the numbers of rows of
    the parts that are orthogonalised apart, or (). dtype: of Newton-Schulz's products; None is bfloat16 on CUDA,
    else float32.
    """

    def __init__(self, groups, betas=(0.9, 0.95), momentum=0.95, dtype=None, fused=None):
        self.adamw = torch.optim.AdamW([group for group in groups if "splits" not in group], betas=betas, fused=fused)
        self.momentum, self.dtype = momentum, dtype
        super().__init__(groups, self.adamw.defaults)
        self.share()

    def share(self):
        """AdamW works on this optimiser's own groups and state."""
        self.adamw.param_groups = [group for group in self.param_groups if "splits" not in group]
        self.adamw.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if "splits" in group:
                self.step_matrices(group)
        self.adamw.step()
        return loss

    def step_matrices(self, group):
        rows = [(p, split or (p.size(0),)) for p, split in zip(group["params"], group["splits"]) if p.grad is not None]
        if not rows:
            return
        for p, _ in rows:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        params, grads = [local(p) for p, _ in rows], [local(p.grad) for p, _ in rows]
        buffers = [local(self.state[p]["momentum_buffer"]) for p, _ in rows]
        torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
        updates = torch._foreach_lerp(grads, buffers, self.momentum)
        if params[0] is rows[0][0]:
            orthogonalize_parts([part for u, (_, split) in zip(updates, rows) for part in u.split(split)], self.dtype)
        else:
            orthogonalize_shared(updates, rows, self.dtype)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def local(tensor):
    """This process's rows of a tensor that FSDP has shared out; the tensor itself where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def orthogonalize_shared(updates, rows, dtype=None):
    """The same of matrices of which each process has some rows; rows: (parameter, rows of its parts) of each.

    Of the matrices of one shape, process r gathers numbers r, r + n, ..., makes them orthogonal and hands out the rows.
    """
    alike = {}
    for u, (p, split) in zip(updates, rows):
        alike.setdefault((p.shape, tuple(split)), []).append(u)
    for (shape, split), shares in alike.items():
        n = dist.get_world_size()
        height, each = -(-shape[0] // n), -(-len(shares) // n)  # rows per process, matrices per process
        sent = shares[0].new_zeros(each, n, height, shape[1])  # (matrix, its process, rows, columns)
        for number, u in enumerate(shares):
            sent[number // n, number % n, : len(u)] = u
        own = exchange(sent).flatten(1, 2)  # (matrix, all rows, columns)
        here = len(range(dist.get_rank(), len(shares), n))
        orthogonalize_parts([part for u in own[:here, : shape[0]] for part in u.split(split)], dtype)
        sent = exchange(own.unflatten(1, (n, height)))
        for number, u in enumerate(shares):
            u.copy_(sent[number // n, number % n, : len(u)])


def exchange(parts):
    """From parts (m, n, ...), [:, r] for process r of n, those that the processes have for this one, in their order."""
    parts = parts.transpose(0, 1).contiguous()
    got = torch.empty_like(parts)
    dist.all_to_all_single(got, parts)
    return got.transpose(0, 1)


def orthogonalize_parts(parts, dtype=None):
    """Make matrices (rows, columns) orthogonal in place, times sqrt(max(1, rows / columns))."""
    shapes = {}
    for part in parts:
        wide = part.mT if part.size(0) > part.size(1) else part
        shapes.setdefault(wide.shape, []).append((wide, max(1, part.size(0) / part.size(1)) ** 0.5))
    for alike in shapes.values():
        wide, scales = zip(*alike)
        u = torch.stack(wide)
        O = orthogonalize(u.to(dtype or (torch.bfloat16 if u.is_cuda else torch.promote_types(u.dtype, torch.float32))))
        torch._foreach_copy_(wide, list((O * O.new_tensor(scales)[:, None, None]).unbind()))
