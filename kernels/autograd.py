"""When a hand-written backward may stand in for autograd's."""

import torch
from torch.autograd.forward_ad import unpack_dual


def is_plain(*tensors):
    """Whether an autograd.Function without forward mode may take these: not compiling, no transform, no tangent."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(unpack_dual(x).tangent is None for x in tensors)
