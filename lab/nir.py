"""
Event layers of a trained model as a graph of the Neuromorphic Intermediate Representation (package nir, which
simulators and neuromorphic chips read).

    python -m lab.nir out-spiking OUT.nir                # the event layers of a run whose model has bio_spiking
    python -m lab.nir out-spiking OUT.nir --part=mixers  # whole channel mixers, oscillators included

A graph is written if each of its nodes has a primitive of NIR; otherwise one line names the node that has none. A layer
of spiking units has: Affine (or Linear), its current T x + b, and LIF, with tau = dt / (1 - beta), r = 1, v_leak = 0,
v_reset = 0, which by Euler's method at steps of dt, one token, is kernels/spiking.py's `reference`. The gated events
have none, because their mask multiplies a signal by a signal, nor have oscillators. NIR 1.0: Pedersen et al. 2024,
Nature Communications 15, 8122.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
from configurator import ConfigError
from model import GPT, BioMLP, CheckpointError, SpikingEventLayer, load_checkpoint


@dataclass
class NirConfig:
    # -- export -------------------------------------------------------------------------------------------------------
    part: Literal["events", "mixers"] = "events"  # event layers alone | channel mixers from end to end
    dt: float = 1e-3  # seconds that a token takes in NIR's time, in which its time constants are

    def __post_init__(self):
        configurator.check_values(self, {"dt": "(0, inf)"})


def package():
    try:
        import nir
    except ImportError:
        raise ConfigError("the export needs the package nir: pip install -e '.[nir]'") from None
    return nir


def numbers(x):
    return x.detach().float().numpy()


def affine(weight, bias):
    """weight (out, in) as NIR multiplies with it."""
    nir = package()
    return nir.Linear(numbers(weight)) if bias is None else nir.Affine(numbers(weight), numbers(bias))


def event_nodes(layer, name, dt):
    """[(name, node)] of an event layer; ConfigError names the node that NIR has no primitive for."""
    if not isinstance(layer, SpikingEventLayer):
        raise ConfigError(f"{name}: its mask multiplies a signal by a signal, which no NIR primitive does")
    if layer.plastic is not None:
        raise ConfigError(f"{name}.plastic: a weight that changes while it runs, which no NIR primitive has")
    beta = torch.sigmoid(layer.leak.detach().double())
    one, theta = torch.ones_like(beta), torch.as_tensor(layer.threshold, dtype=torch.float64).expand_as(beta)
    lif = [numbers(x) for x in (dt / (1 - beta), one, 0 * one, theta.clone(), 0 * one)]
    current = affine(layer.weight.t(), layer.bias)
    return [(f"{name}.current", current), (f"{name}.neurons", package().LIF(*lif))]


def mixer_nodes(mixer, name, part, dt):
    """[(name, node)] of a BioMLP in the order of its signals."""
    oscillator = f"{name}.dendrites: sin(omega x + phi) tanh(x) + baseline, which no NIR primitive computes"
    if part == "mixers" or mixer.events is None:
        raise ConfigError(oscillator)
    return event_nodes(mixer.events, f"{name}.events", dt)


def graph(model, part="events", dt=1e-3):
    """The NIR graph of a model, one chain from an input to an output per block; ConfigError for what has none."""
    nir, nodes, edges = package(), {}, []
    blocks = [(f"h.{i}.mlp", block.mlp) for i, block in enumerate(model.transformer.h)]
    if not any(isinstance(mixer, BioMLP) for _, mixer in blocks):
        raise ConfigError("the model has no event layers and no oscillators: it needs use_bio_mlp")
    for name, mixer in blocks:
        chain = mixer_nodes(mixer, name, part, dt)
        ends = [nir.Input(chain[0][1].input_type), nir.Output(chain[-1][1].output_type)]
        chain = [(f"{name}.input", ends[0]), *chain, (f"{name}.output", ends[1])]
        nodes |= {node.replace(".", "_"): primitive for node, primitive in chain}
        edges += [(a.replace(".", "_"), b.replace(".", "_")) for (a, _), (b, _) in zip(chain, chain[1:])]
    return nir.NIRGraph(nodes, edges, {"dt": dt})


def main(argv=None):
    with configurator.one_line_errors("lab.nir", CheckpointError, OSError):
        words = (sys.argv[1:] if argv is None else argv) or ["--help"]
        places = [w for w in words if not w.startswith("-")]
        cfg = configurator.read([w for w in words if w.startswith("-")], NirConfig, doc=__doc__).build(NirConfig)
        if len(places) != 2:
            raise ConfigError("name the folder of a run and the file to write")
        model = GPT.from_checkpoint(load_checkpoint(Path(places[0]) / "ckpt.pt"))
        found = graph(model, cfg.part, cfg.dt)
        package().write(places[1], found)
    print(f"wrote {places[1]}: {len(found.nodes)} nodes, {len(found.edges)} edges")


if __name__ == "__main__":
    main()
