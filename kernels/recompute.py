"""
Activation checkpointing: a block keeps its input alone, and the backward pass computes the rest of it again.

Same numbers to the last bit: random states and autocast are those of the first time, and what modules count in their
buffers (thresholds, groups of channels) stays as the first time left it. Chen et al. 2016, arXiv 1604.06174.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


@contextmanager
def uncounted(module):
    """While it is open, the module computes again what it has computed before: changes to its buffers are undone."""
    before = {buffer: (buffer._version, buffer.clone()) for buffer in module.buffers()}
    try:
        yield
    finally:  # also when the last saved tensor is there, which PyTorch signals by an exception
        with torch.no_grad():
            for buffer, (version, value) in before.items():
                if buffer._version != version:  # others may be saved for this backward pass: writing would spoil them
                    buffer.copy_(value)


def has_counts(module):
    """Whether a module inside `module` changes its buffers in forward, to apply them before the optimiser's step."""
    return any(hasattr(part, "before_step") and getattr(part, "counted", None) is not None for part in module.modules())


def recomputed(block, forward, x, run):
    if not torch.is_grad_enabled():
        return forward(x, run)
    # torch.compile knows no contexts of ours, and needs none where nothing is counted
    contexts = {"context_fn": lambda: (nullcontext(), uncounted(block))} if has_counts(block) else {}
    return checkpoint(forward, x, run, use_reentrant=False, **contexts)


def recompute_blocks(model):
    """From now on, each of the model's blocks is recomputed in the backward pass. In place; names stay."""
    for block in model.transformer.h:
        block.forward = partial(recomputed, block, block.forward)
