"""
FSDP2, `--parallel=fsdp`: each process keeps a share of every weight, its gradient and its optimiser state.

A block's weights are gathered before it runs and dropped after it; its gradients are summed and shared out at once.
The values at the start are those that the main process made, so they are those of one process; the others build a
model without numbers (`weightless`) and never hold a whole one. A state that is saved is whole, and made one tensor at
a time. PyTorch's own gathering of an optimiser's state is not used: where there is no state yet it takes a step to make
one, and our hooks on the step would count it.

Parameters of no dimension (gates) cannot be shared out: every process keeps them, and their gradients are averaged
here. Zhao et al. 2023, arXiv 2304.11277; pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
"""

import warnings
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from kernels.muon import local


@contextmanager
def weightless():
    """Modules built inside have parameters of the device "meta": shapes without numbers. Buffers are as always."""

    def without_numbers(module, name, p):
        return None if p is None or p.is_meta else nn.Parameter(p.to("meta"), p.requires_grad)

    hook = register_module_parameter_registration_hook(without_numbers)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*meta parameter.*")  # loading into them does nothing: as it should
            yield
    finally:
        hook.remove()


class Hidden:
    """A value that FSDP does not look into: of a dataclass it makes a copy, in which a block's losses would be lost."""

    def __init__(self, value):
        self.value = value


def hide_run(block):
    """From now on FSDP's hooks on `block` see the stream alone, and its forward gets the Pass itself."""
    forward = block.forward
    block.forward = lambda x, run: forward(x, run.value)
    block.register_forward_pre_hook(lambda _, args: (args[0], Hidden(args[1])), prepend=True)


def shard(model, device, dtype, compiles=False):
    """Share `model` out over all processes, in place; the values are those of the main process.

    On a GPU the blocks compute with weights in `dtype`; those outside of blocks stay in float32, as does the stream.
    """
    mesh = init_device_mesh(device.split(":")[0], (dist.get_world_size(),))
    tensors = chain(model.named_parameters(), model.named_buffers(remove_duplicate=False))  # to_empty parts twins
    values = {name: t.detach() for name, t in tensors}
    ignored = {p for p in model.parameters() if p.dim() == 0}
    narrow = {"param_dtype": dtype, "reduce_dtype": torch.float32} if device.startswith("cuda") else {}
    # mHC's blocks return views; nothing changes them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    policy = MixedPrecisionPolicy(**narrow, cast_forward_inputs=False)
    for block in model.transformer.h:
        if compiles:  # block by block: between them weights are gathered and dropped
            block.forward = torch.compile(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        hide_run(block)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), ignored_params=ignored)
    model.to_empty(device=device)
    fill(model, values)
    return model


@torch.no_grad()
def fill(model, values):
    """Give every process its share of the main process's `values`, by the names of parameters and buffers."""
    for name, own in chain(model.named_parameters(), model.named_buffers()):
        if name in values:
            own.copy_(share_of(values[name], own))


def share_of(whole, like):
    """This process's share of the main process's tensor, shared out as `like` is. All processes must call it."""
    kind = {"dtype": like.dtype, "device": like.device}
    whole = whole.to(**kind).contiguous() if dist.get_rank() == 0 else torch.empty(like.shape, **kind)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements)
    dist.broadcast(whole, 0)
    return whole


def shares_of(state, optimizer):
    """An optimiser's whole state, {number: {name: tensor}}, with its tensors shared out as its parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        number: {k: t if k == "step" else share_of(t, params[number]) for k, t in each.items()}
        for number, each in state.items()
    }


def whole(state, is_kept=True):
    """Nested dicts and lists with each shared tensor whole, on the CPU; None in its place unless `is_kept`."""
    if isinstance(state, dict):
        return {k: whole(v, is_kept) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(v, is_kept) for v in state)
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if is_kept else None
    return state


@torch.no_grad()
def clip_grad_norm(params, most):
    """Scale all gradients so that their norm is at most `most`; the norm before, a 0-d tensor.

    First those of what every process keeps are averaged, as FSDP has done with those that it shares out.
    """
    grads = [p.grad for p in params if p.grad is not None]
    shared, kept = ([g for g in grads if isinstance(g, DTensor) == is_shared] for is_shared in (True, False))
    for g in kept:
        dist.all_reduce(g)
        g /= dist.get_world_size()
    norms = [nn.utils.get_total_norm(shared).full_tensor()] + ([nn.utils.get_total_norm(kept)] if kept else [])
    norm = torch.stack(norms).norm()
    torch._foreach_mul_([local(g) for g in grads], (most / (norm + 1e-6)).clamp(max=1.0))  # as PyTorch's does
    return norm
