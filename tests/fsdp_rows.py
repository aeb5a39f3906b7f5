"""
Rows of smoke_test.VARIANTS under --parallel=fsdp beside one process; started by torchrun, see tests/train/test_fsdp.py.

    torchrun --standalone --nproc_per_node=2 tests/fsdp_rows.py adamw baseline mhc

Prints a line per row: its name, the largest difference of losses and gradient norms, and of weights and buffers, after
two steps of four micro-steps, in float64 where a row can be computed in it.
"""

import sys
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist

import model
from kernels import sharding
from model import GPT, GPTConfig
from smoke_test import VARIANTS

SIZES = {"block_size": 64, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 32}
MUON = {"matrices": 0.02, "embedding": 0.03, "head": 0.003, "vectors": 0.003}
MICRO_STEPS, CLIP = 4, 0.2
has_processes = model.has_processes


def start(config, is_shared):
    torch.manual_seed(0)
    with sharding.weightless() if is_shared and dist.get_rank() else nullcontext():
        gpt = GPT(config)
    return sharding.shard(gpt, "cpu", torch.float32) if is_shared else gpt


def train(config, muon, is_shared):
    """(losses and norms, whole state) after two steps, of this process alone or of all together."""
    model.has_processes = has_processes if is_shared else lambda: False
    gpt, size = start(config, is_shared), dist.get_world_size() if is_shared else 1
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", muon)
    clip, seen = sharding.clip_grad_norm if is_shared else torch.nn.utils.clip_grad_norm_, []
    own = range(MICRO_STEPS)[dist.get_rank() * MICRO_STEPS // size :][: MICRO_STEPS // size] if is_shared else range(4)
    for step in range(2):
        total = torch.zeros(())
        for micro in own:
            x = torch.randint(65, (2, 65), generator=torch.Generator().manual_seed(10 * step + micro))
            if is_shared:
                gpt.set_requires_gradient_sync(micro == own[-1])
            loss = gpt(x[:, :-1], x[:, 1:])[1] / len(own)
            loss.backward()
            total += loss.detach() / size
        if is_shared:
            dist.all_reduce(total)
        seen += [total, clip(gpt.parameters(), CLIP)]
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(seen), sharding.whole(gpt.state_dict())


def differences(name, muon):
    """(of losses and norms, of the state, number format) of a row."""
    config = GPTConfig(**(SIZES | VARIANTS[name]))
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        has_table = config.pos_embedding == "ramanujan" or config.kaufmann_resonance
        if dtype == torch.float64 and (has_table or len({p.dtype for p in GPT(config).parameters()}) > 1):
            continue  # part of it is float32 always
        (a, one), (b, two) = train(config, muon, False), train(config, muon, True)
        assert one.keys() == two.keys()
        states = [(one[k].double() - two[k].double()).abs().max() for k in one if torch.is_tensor(one[k])]
        return (a - b).abs().max().item(), max(states).item(), dtype
    raise AssertionError(f"{name}: no format")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    optimizer, *names = sys.argv[1:]
    for name in names:
        a, b, dtype = differences(name, MUON if optimizer == "muon" else None)
        if dist.get_rank() == 0:
            print(name, a, b, str(dtype), flush=True)
    dist.destroy_process_group()
