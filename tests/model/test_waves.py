"""Waves and spectral coordinates: the gate against a plain loop, the balance of channels against its sum."""

import math

import pytest
import torch

from kernels.fhn import FHN
from model import GPT, BalancedChannelGroups, DecodingState, FHNMedium, GPTConfig, own_projections

SPECTRAL = {"use_manifold": True, "manifold_dim": 4, "n_eigenvectors": 3, "spectral_landmarks": 8}
CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=6, block_size=16, vocab_size=11, attn_mode="fhn", fhn_dynamics="linear",
                   **SPECTRAL)  # fmt: skip


def test_neighbours_of_one_community_conduct_better():
    """The linear wave token by token: g_t = sigmoid(s q_t k_{t-1} + k_t + bias + (U s_t)(U s_{t-1}))."""
    torch.manual_seed(0)
    medium = FHNMedium(CONFIG, takes_spectrum=True).double()
    v, q, k = (torch.randn(2, 9, 6, dtype=torch.float64) for _ in range(3))
    spectrum = torch.randn(2, 9, 3, dtype=torch.float64)
    U = torch.randn(6, 3, dtype=torch.float64)
    medium.spectral.weight = torch.nn.Parameter(U)
    found = medium(v, q, k, None, spectrum)
    strength, y = medium.log_lambda.exp(), torch.zeros(2, 6, dtype=torch.float64)
    for t in range(9):
        k_before = k[:, t - 1] if t else torch.zeros_like(k[:, 0])
        u_before = spectrum[:, t - 1] @ U.T if t else torch.zeros_like(k[:, 0])
        logit = q[:, t] * k_before + k[:, t] + (spectrum[:, t] @ U.T) * u_before
        Lambda = torch.sigmoid(logit) * strength
        y = (Lambda * y + FHN["amplitude"] * v[:, t]) / (1 + Lambda)
        torch.testing.assert_close(found[:, t], y, rtol=1e-10, atol=1e-10)


def test_signed_decay_by_a_loop():
    """h_t = A_t h_{t-1} + (1 - A_t) I_t with A_t = tanh(s q_t k_{t-1} + k_t + bias + log(1 + Lambda) / 2)."""
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=1, n_head=1, n_embd=6, block_size=16, vocab_size=11, attn_mode="fhn", fhn_dynamics="signed"
    )
    medium = FHNMedium(config).double()
    v, q, k = (3 * torch.randn(2, 9, 6, dtype=torch.float64) for _ in range(3))
    found, y = medium(v, q, k), torch.zeros(2, 6, dtype=torch.float64)
    signs = set()
    for t in range(9):
        k_before = k[:, t - 1] if t else torch.zeros_like(k[:, 0])
        A = torch.tanh(q[:, t] * k_before + k[:, t] + 0.5 * torch.log(1 + medium.log_lambda.exp()))
        signs |= set(A.sign().flatten().tolist())
        y = A * y + (1 - A) * FHN["amplitude"] * v[:, t]
        torch.testing.assert_close(found[:, t], y, rtol=1e-10, atol=1e-10)
    assert signs == {-1.0, 1.0}


def test_signed_starts_as_linear():
    """Where the logits are 0 the two decays are the same: Lambda / (2 + Lambda)."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 6, "block_size": 16, "vocab_size": 11, "attn_mode": "fhn"}
    zero = torch.zeros(1, 1, 6)
    decays = [FHNMedium(GPTConfig(**sizes, fhn_dynamics=kind)).decay(zero) for kind in ("linear", "signed")]
    torch.testing.assert_close(*decays)


def test_decoding_keeps_the_last_coordinates():
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    with torch.no_grad():
        model.transformer.h[0].attn.medium.spectral.weight.normal_()
    idx = torch.randint(11, (2, 12))
    whole, _ = model(idx, idx)
    state = DecodingState()
    steps = [model(idx[:, t : t + 1], state=state)[0] for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)


def test_rare_communities_weigh_as_much_as_frequent_ones():
    groups = BalancedChannelGroups(3, 2, communities=2).train()
    I = torch.tensor([[[1.0, 0.0, 2.0]] * 9 + [[0.0, 5.0, 2.0]]])  # nine tokens of one community, one of the other
    spectrum = torch.tensor([[[40.0, 0.0]] * 9 + [[0.0, 40.0]]])  # softmax: 1 and 0
    groups(I, spectrum)
    groups.before_step()
    torch.testing.assert_close(groups.level, torch.tensor([0.5, 2.5, 2.0]))  # not 0.9, 0.5, 2
    plain = BalancedChannelGroups(3, 2).train()
    plain(I)
    plain.before_step()
    torch.testing.assert_close(plain.level, torch.tensor([0.9, 0.5, 2.0]))


def test_a_model_from_before_goes_on_without():
    """Waves beside attention were accepted with spectral coordinates, which only attention used: U = 0."""
    config = GPTConfig(
        n_layer=2, n_head=1, n_embd=6, block_size=16, vocab_size=11, attn_pattern="fhn,softmax", **SPECTRAL
    )
    torch.manual_seed(0)
    model = GPT(config).eval()
    old = {name: w for name, w in model.state_dict().items() if not name.endswith("medium.spectral.weight")}
    again = GPT(config).eval()
    again.load_state_dict(own_projections(old, again))
    with torch.no_grad():
        model.transformer.h[0].attn.medium.spectral.weight.zero_()
    idx = torch.randint(11, (2, 12))
    assert torch.equal(model(idx)[0], again(idx)[0])


def test_layers_without_scores_or_waves_have_no_use_for_them():
    with pytest.raises(ValueError, match="scores or waves"):
        GPTConfig(attn_mode="gla", **SPECTRAL)
    assert math.isfinite(
        GPT(CONFIG)(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))[1].item()
    )
