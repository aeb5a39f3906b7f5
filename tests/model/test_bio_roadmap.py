"""BioMLP's connectivity, attention gain, plasticity and spikes, against loops over tokens in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kernels.spiking import SCANS, SLOPE, Spike, potentials, reference
from model import (
    GPT,
    BioMLP,
    DecodingState,
    DendriticCompartmentLayer,
    GPTConfig,
    HebbianTrace,
    Pass,
    SparseEventLayer,
    SpikingEventLayer,
)

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 31, "use_bio_mlp": True}


def config(**flags):
    return SimpleNamespace(**vars(GPTConfig()) | {"n_embd": 12, "bias": True, "dropout": 0.0} | flags)


def moved(module):
    """The module in float64 with every parameter off its start."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn_like(p)
    return module.double().eval()


# Connections and gain -----------------------------------------------------------------------------------------------


def neighbours(K, connectivity, L):
    """For each compartment, those that it reads."""
    if connectivity == "sparse":
        return [sorted(range(K), key=lambda j: -abs(L[k, j].item()))[: K // 2] for k in range(K)]
    reach = {"dense": K, "ring": 1, "none": 0}[connectivity]
    return [[j for j in range(K) if min((j - k) % K, (k - j) % K) <= reach] for k in range(K)]


@pytest.mark.parametrize("lateral", ["concat", "nonlinear"])
@pytest.mark.parametrize("connectivity", ["dense", "ring", "none", "sparse"])
@pytest.mark.parametrize("K", [4, 6])
def test_connections(K, connectivity, lateral):
    torch.manual_seed(K)
    flags = {"bio_compartments": K, "bio_dendrite_dim": 3, "bio_lateral": lateral, "bio_connectivity": connectivity}
    layer = moved(DendriticCompartmentLayer(config(**flags)))
    x = torch.randn(5, 12, dtype=torch.float64)
    C = [layer.A[k](u).tanh() for k, u in enumerate(x.split(12 // K, -1))]
    LC = [sum(layer.L[k, j] * C[j] for j in js) for k, js in enumerate(neighbours(K, connectivity, layer.L))]
    LC = [y.tanh() if lateral == "nonlinear" else y for y in LC]
    assert (layer(x) - layer.osc(layer.S(torch.cat((*C, *LC), -1)))).abs().max() < 1e-12


def test_a_pruned_connection_can_come_back():
    layer = DendriticCompartmentLayer(config(bio_compartments=4, bio_lateral="nonlinear", bio_connectivity="sparse"))
    assert ((layer.coupling() != 0).sum(1) == 2).all()
    layer(torch.randn(3, 12)).sum().backward()
    assert (layer.L.grad != 0).all()


def test_dense_is_what_it_was():
    """Old checkpoints have no such flag, and no new keys or parameters."""
    torch.manual_seed(0)
    layer = DendriticCompartmentLayer(config(bio_compartments=4))
    assert layer.coupling() is layer.L and not list(layer.buffers())
    assert {n.split(".")[0] for n, _ in layer.named_parameters()} == {"A", "L", "S", "osc"}


def test_attention_gain():
    """1 + tanh(w_k a) on compartment k; at the start 1, with a gradient."""
    torch.manual_seed(0)
    flags = {"bio_compartments": 3, "bio_dendrite_dim": 5, "bio_lateral": "none"}
    plain = DendriticCompartmentLayer(config(**flags))
    torch.manual_seed(0)
    layer = DendriticCompartmentLayer(config(**flags, bio_attention_gain=True))
    x, a = torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    assert torch.equal(layer(x, a), plain(x))
    layer(x, a).sum().backward()
    assert (layer.gain.weight.grad.abs().sum(1) > 0).all()
    layer, x, a = moved(layer), x.double(), a.double()
    C = [
        layer.A[k](u).tanh() * (1 + (a @ layer.gain.weight[k]).tanh())[..., None] for k, u in enumerate(x.split(4, -1))
    ]
    assert (layer(x, a) - layer.osc(layer.S(torch.cat(C, -1)))).abs().max() < 1e-12


def test_the_gain_reads_its_own_block():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, bio_compartments=2, bio_dendrite_dim=8, bio_attention_gain=True)).eval()
    wanted, got = [], []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda module, args, y: wanted.append(y))
        block.mlp.dendrites.register_forward_pre_hook(lambda module, args: got.append(args[1]))
    model(torch.randint(31, (2, 9)))
    assert len(got) == 2 and all(a is b for a, b in zip(wanted, got))


# Plasticity ---------------------------------------------------------------------------------------------------------


@given(T=st.integers(1, 20), h=st.integers(1, 5), cut=st.integers(0, 20), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_fast_weight_is_its_loop(T, h, cut, seed):
    """Also when the sequence comes in two parts with a state between them."""
    torch.manual_seed(seed)
    trace = moved(HebbianTrace(h))
    e, z = torch.randn(2, 3, T, h, dtype=torch.float64)
    decay, p, wanted = torch.sigmoid(trace.decay), torch.zeros(3, h, dtype=torch.float64), []
    for t in range(T):
        wanted.append(trace.gain * p * e[:, t])
        p = decay * p + (1 - decay) * e[:, t] * torch.tanh(z[:, t])
    wanted, state = torch.stack(wanted, 1), DecodingState()
    parts = [trace(e[:, s], z[:, s], state) for s in (slice(cut), slice(cut, T)) if e[:, s].size(1)]
    for got in (trace(e, z), torch.cat(parts, 1)):
        assert (got - wanted).abs().max() < 1e-12


def test_plasticity_starts_as_the_plain_layer():
    torch.manual_seed(0)
    plain = SparseEventLayer(12, config())
    plastic = SparseEventLayer(12, config(bio_plasticity=True))
    plastic.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 9, 12)
    assert torch.equal(plain(x), plastic(x))
    plastic(x).sum().backward()
    assert (plastic.plastic.gain.grad != 0).any()


def test_the_state_does_not_grow():
    torch.manual_seed(0)
    for flags in ({"bio_plasticity": True}, {"bio_spiking": True}):
        model, state, sizes = GPT(GPTConfig(**SMALL, pos_embedding="none", attn_mode="gla", **flags)).eval(), None, []
        state = DecodingState()
        for token in torch.randint(31, (1, 12)).split(1, 1):
            model(token, state=state)
            sizes.append(state.nbytes())
        assert len(set(sizes)) == 1


# Spikes -------------------------------------------------------------------------------------------------------------


def currents(seed, T=60, h=16, size=1.0, mean=0.0):
    torch.manual_seed(seed)
    return mean + size * torch.randn(2, T, h, dtype=torch.float64), torch.rand(h, dtype=torch.float64)


@pytest.mark.slow
@given(seed=st.integers(0, 99), size=st.floats(0.1, 3), mean=st.floats(-0.5, 1))
@settings(max_examples=20, deadline=None)
def test_enough_scans_are_the_loop(seed, size, mean):
    """Scan n is right for the first n tokens, so T scans are right for all."""
    I, beta = currents(seed, 24, 4, size, mean)
    v, s = reference(I, beta, 0.25)
    for scans in (1, 2, 5, 24):
        assert (potentials(I, beta, 0.25, {}, scans)[:, :scans] - v[:, :scans]).abs().max() < 1e-12
    first = s.cumsum(1).cumsum(1) <= 1  # up to the first spike, a potential without any reset is right
    assert ((potentials(I, beta, 0.25, {}, 1) - v).abs() * first).max() < 1e-12


def test_how_near_the_scans_come():
    """The share of wrong spikes under currents without a mean and, harder, under steady ones, which always fire."""
    for mean, without_reset, most in ((0.0, 0.06, 0.01), (1.0, 0.2, 0.12)):
        I, beta = currents(0, 400, 64, mean=mean)
        s = reference(I, beta, 0.25)[1]
        wrong = [((potentials(I, beta, 0.25, {}, n) > 0.25) != s).double().mean() for n in (1, SCANS)]
        assert wrong[0] > without_reset and wrong[1] < most


@pytest.mark.parametrize("cut", [1, 7, 23])
def test_potentials_in_parts(cut):
    I, beta = currents(1, 24, 4)
    store = {}
    parts = [potentials(part, beta, 0.25, store) for part in (I[:, :cut], I[:, cut:])]
    assert (torch.cat(parts, 1) - potentials(I, beta, 0.25, {})).abs().max() < 1e-12
    assert all(x.numel() == 2 * 4 for x in store.values())


def test_a_constant_current_in_closed_form():
    """v_t = I (1 - beta^t) after a reset: a spike each ceil(log(1 - theta / I) / log beta) tokens."""
    beta, theta, I = torch.tensor([0.9], dtype=torch.float64), 0.5, torch.full((1, 60, 1), 0.8, dtype=torch.float64)
    period = torch.ceil(torch.log(torch.tensor(1 - theta / 0.8)) / torch.log(torch.tensor(0.9))).int().item()
    for spikes in (reference(I, beta, theta)[1], potentials(I, beta, theta, {}, 60) > theta):
        assert spikes[0, :, 0].nonzero().flatten().tolist() == list(range(period - 1, 60, period))


def test_surrogate_gradient():
    v = torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    y = Spike.apply(v, 0.25)
    y.backward(torch.full_like(v, 3.0))
    assert torch.equal(y.detach(), (v > 0.25).double())
    assert torch.allclose(v.grad, 3 / (1 + SLOPE * (v.detach() - 0.25).abs()) ** 2, atol=1e-15)


def test_a_spiking_layer():
    torch.manual_seed(0)
    layer, x = moved(SpikingEventLayer(8, config(bio_spiking=True))), torch.randn(2, 30, 8, dtype=torch.float64)
    s = layer(x)
    v = potentials(x @ layer.T + layer.bias, torch.sigmoid(layer.leak), 0.25, {})
    assert torch.equal(s, (v > 0.25).double()) and set(s.unique().tolist()) == {0.0, 1.0}
    assert layer.measured["sparsity"].item() == pytest.approx(1 - s.mean().item(), abs=1e-6)
    assert {n for n, _ in layer.named_parameters()} == {"T", "bias", "leak"}


def test_spikes_are_neither_all_nor_none_at_first():
    for width in (32, 128, 256):
        torch.manual_seed(0)
        flags = {"n_layer": 1, "n_head": 2, "block_size": 64, "vocab_size": 65, "use_bio_mlp": True}
        model = GPT(GPTConfig(**flags, n_embd=width, bio_spiking=True))
        model(torch.randint(65, (4, 64)))
        assert 0.5 < model.get_avg_sparsity() < 0.99


@pytest.mark.slow
def test_thresholds_are_steered_by_spikes_too():
    torch.manual_seed(0)
    layer = SpikingEventLayer(16, config(bio_spiking=True, bio_adaptive_threshold=True, bio_target_sparsity=0.8))
    for _ in range(300):
        layer(torch.randn(2, 64, 16) / 12)
        layer.before_step()
    layer.eval()(torch.randn(8, 256, 16) / 12)
    assert abs(layer.measured["sparsity"] - 0.8) < 0.05


def test_the_mixer_hands_on_what_is_needed():
    torch.manual_seed(0)
    mixer = BioMLP(config(bio_plasticity=True, bio_compartments=2, bio_attention_gain=True)).eval()
    x, a, state = torch.randn(1, 6, 12), torch.randn(1, 6, 12), DecodingState()
    whole = mixer(x, Pass(attended=a))
    steps = [mixer(x[:, t : t + 1], Pass(attended=a[:, t : t + 1], state=state)) for t in range(6)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
