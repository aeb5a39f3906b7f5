"""
nanoGPT, for comparison: the same transformer and recipe in plain eager float32 PyTorch, sharing no code with model.py.

Layer by layer it does what nanoGPT's documented CPU recipe does, so its speed stands for nanoGPT's.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F


class PlainBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias):
        super().__init__()
        self.block_size = block_size
        self.tokens, self.places = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(n_embd, n_head) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd, bias=bias)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx):
        x = self.tokens(idx) + self.places(torch.arange(idx.size(1), device=idx.device))
        return self.norm(self.blocks(x))

    def loss(self, idx, targets):
        logits = F.linear(self(idx), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def write(self, idx, count):
        """Greedy text, each token from a forward pass over the whole context."""
        for _ in range(count):
            x = self(idx[:, -self.block_size :])[:, -1]
            idx = torch.cat((idx, F.linear(x, self.tokens.weight).argmax(-1, keepdim=True)), 1)
        return idx


def plain_step(flags, batch, device, folder, max_iters=2000):
    """(step, model): a training step as nanoGPT's train.py does it on a CPU, with the README's CPU recipe.

    float32, AdamW (fused on CUDA only), warm-up and cosine, clipping, loss fetched every step.
    """
    model = PlainGPT(**flags).to(device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=device.startswith("cuda"))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 100)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, max_iters - 100), 1e-4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [100])

    def step():
        data, T = np.memmap(Path(folder) / "train.bin", np.uint16, mode="r"), flags["block_size"]
        starts = torch.randint(len(data) - T, (batch,)).tolist()
        x = torch.stack([torch.from_numpy(data[s : s + T].astype(np.int64)) for s in starts]).to(device)
        y = torch.stack([torch.from_numpy(data[s + 1 : s + 1 + T].astype(np.int64)) for s in starts]).to(device)
        loss = model.loss(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        return loss.item()

    return step, model


@torch.no_grad()
def plain_val_loss(model, tokens):
    """Mean cross entropy over the whole split, in windows of block_size that do not overlap."""
    T, total = model.block_size, 0.0
    for start in range(0, len(tokens) - 1, 64 * T):
        piece = torch.from_numpy(tokens[start : start + 64 * T + 1].astype(np.int64))
        for x, y in zip(piece[:-1].split(64 * T), piece[1:].split(64 * T)):
            rows = len(x) // T * T
            for a, b in ((x[:rows].view(-1, T), y[:rows].view(-1, T)), (x[None, rows:], y[None, rows:])):
                total += model.loss(a, b).item() * b.numel() if b.numel() else 0.0
    return total / (len(tokens) - 1)
