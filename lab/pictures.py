"""
What the ideas look like inside trained models.

    python -m lab.pictures waves out-ablation/fhn/lr0.003-seed0     # writes waves.png
    python -m lab.pictures alignment out/fa out/dfa --file=both.png  # several runs in one picture
    python -m lab.ablate --pictures                                  # all of them, from a comparison's runs

It needs a run's folder with ckpt.pt, whose model has what the picture shows, and its data set. Pictures: routing,
waves, knots, oscillators, wavelets, sdr, noise, mhc, spectrum, coxeter; and alignment and sparsity, from metrics.jsonl
of one run or more.
"""

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import configurator
from configurator import ConfigError
from data.corpus import DataError, load_tokenizer
from data.dataset import open_dataset
from kernels.e7 import SETS, SIMPLE, e7_roots
from kernels.engram import SDROperations
from kernels.wavekan import wavelet_bank
from model import (
    GPT,
    WIDTH_MIN,
    Cells,
    CheckpointError,
    FHNMedium,
    GPTConfig,
    HyperConnections,
    KnotGate,
    ManifoldProjection,
    OscillatingActivation,
    SDREmbedding,
    SpectralDecomposition,
    WaveletMap,
    load_checkpoint,
)
from train import TrainConfig

TIGHT = {"layout": "constrained"}
# Okabe and Ito's colours, which the colour-blind can tell apart, without black and the yellow that white swallows
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
LINES = ["-", "--", ":"]  # once the colours are used up


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cycler = plt.cycler
    plt.rcParams["axes.prop_cycle"] = cycler(linestyle=LINES) * cycler(color=COLOURS)
    return plt


def png(figure):
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120, metadata={"Software": None})
    pyplot().close(figure)
    return data.getvalue()


def spread_out(heights, least):
    """The same heights, moved apart until neighbours are `least` from each other: where labels go."""
    order, placed = np.argsort(heights), np.array(heights, float)
    for lower, upper in zip(order, order[1:]):
        placed[upper] = max(placed[upper], placed[lower] + least)
    return placed


def load(folder, kind):
    """(model, its modules of a kind) from a run's checkpoint; ConfigError if there are none."""
    model = GPT.from_checkpoint(load_checkpoint(Path(folder) / "ckpt.pt"))
    modules = [m for m in model.modules() if isinstance(m, kind)]
    if not modules:
        raise ConfigError(f"{folder}: the model has no {kind.__name__}, which this picture shows")
    return model, modules


class Reading:
    """A trained model, the first blocks of the val split, and what its modules of a kind return for them."""

    def __init__(self, folder, kind, blocks=1):
        checkpoint = load_checkpoint(Path(folder) / "ckpt.pt")
        data = open_dataset(TrainConfig(**checkpoint["config"]))
        self.model, self.modules = load(folder, kind)
        self.model.eval()
        T, text = self.model.config.block_size, data.splits["val"]
        blocks = max(1, min(blocks, len(text) // T))
        idx = torch.from_numpy(text[: blocks * T].astype(np.int64)).view(blocks, -1)
        tokenizer = load_tokenizer(checkpoint["meta"], data.folder)
        self.words = [tokenizer.decode([token]).replace("\n", "/") for token in idx.flatten().tolist()]
        self.outputs = []
        for module in self.modules:
            module.register_forward_hook(lambda module, args, output: self.outputs.append(output))
        self.idx = idx
        with torch.no_grad():
            self.model(idx)


def picture_routing(folder):
    """Which key positions each query position may attend to, by the routing mask; lines are the borders of cells."""
    cells = load(folder, Cells)[1][0]
    figure, axes = pyplot().subplots(figsize=(6, 6), **TIGHT)
    axes.imshow(cells.route.mask(), cmap="Blues", vmax=1.5, interpolation="nearest")
    for border in cells.starts[1:-1]:
        axes.axhline(border - 0.5, color="grey", lw=0.5)
        axes.axvline(border - 0.5, color="grey", lw=0.5)
    axes.set(xlabel="key position", ylabel="query position", title=f"{len(cells.starts) - 1} cells")
    return figure


def picture_waves(folder, tokens=96):
    """The deviation from rest of each channel along a text, slow channels below; one panel per layer of waves."""
    read = Reading(folder, FHNMedium)
    n, words = len(read.modules), read.words[:tokens]
    figure, panels = pyplot().subplots(n, 1, figsize=(12, 2.2 * n + 1), sharex=True, squeeze=False, **TIGHT)
    for layer, (axes, medium, field) in enumerate(zip(panels[:, 0], read.modules, read.outputs), 1):
        field = field[0, : len(words), medium.log_lambda.argsort()].T.float()  # (C, tokens)
        most = field.abs().quantile(0.99).item()
        image = axes.imshow(field, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        axes.set_ylabel(f"{layer}: channel")
        figure.colorbar(image, ax=axes)
    axes.set_xticks(range(len(words)), words, fontsize=7, family="monospace")
    figure.suptitle("FitzHugh-Nagumo waves: deviation from rest, channels from short to long reach")
    return figure


def picture_knots(folder):
    """Which cells each head of each knotted layer attends to: own and near ones grey, those linked by a knot red."""
    from matplotlib.colors import ListedColormap

    read = Reading(folder, KnotGate)
    heads = read.modules[0].n_head
    shape = len(read.modules), heads
    figure, panels = pyplot().subplots(*shape, figsize=(2.4 * heads, 2.6 * shape[0]), squeeze=False, **TIGHT)
    for layer, (gate, (_, allowed, _)) in enumerate(zip(read.modules, read.outputs)):
        C = allowed.size(-1)
        near = gate.cells.allowed[:C, :C]
        for head in range(heads):
            kind = torch.where(allowed[0, head], torch.where(near, 1, 2), 0)
            colours = ListedColormap(["white", "lightgrey", "crimson"])
            panels[layer, head].imshow(kind, cmap=colours, vmin=0, vmax=2)
            panels[layer, head].set_title(f"gate {layer + 1}, head {head + 1}", fontsize=8)
    figure.suptitle("Grey: near cells; red: linked by a knot")
    figure.supxlabel("key cell")
    figure.supylabel("query cell")
    return figure


def picture_oscillators(folder):
    """Frequencies after training, one histogram per layer; a line where they started."""
    model, oscillators = load(folder, OscillatingActivation)
    layers = [m.omega.detach() for m in oscillators]
    figure, axes = pyplot().subplots(figsize=(7, 4.5), **TIGHT)
    for layer, omega in enumerate(layers, 1):
        axes.hist(omega.numpy(), bins=60, histtype="step", label=f"{layer}: {omega.mean():.2f} ± {omega.std():.2f}")
    axes.axvline(model.config.bio_omega, color="black", lw=0.8, ls="--", label="mean at the start")
    axes.set(xlabel="omega, radians per unit of input", ylabel="oscillators", title="Learned frequencies")
    axes.legend(fontsize=8)
    return figure


def picture_wavelets(folder, units=24):
    """The activation of the hidden units whose wavelets are the strongest: silu plus its wavelets."""
    maps = load(folder, WaveletMap)[1]
    n, x = len(maps), torch.linspace(-4, 4, 401)
    figure, panels = pyplot().subplots(1, n, figsize=(4 * n, 4), **TIGHT, sharey=True, squeeze=False)
    for layer, (axes, wave) in enumerate(zip(panels[0], maps), 1):
        m, t, s = (p.detach().view(-1, wave.in_features) for p in (wave.m, wave.t, wave.s))
        a = 1 / (WIDTH_MIN + F.softplus(s))
        y = wavelet_bank(x[:, None].expand(-1, wave.in_features), m, a, -t * a, wave.kind)
        axes.plot(x, y[:, m.abs().sum(0).topk(min(units, wave.in_features)).indices], lw=0.8)
        axes.plot(x, F.silu(x), "k--", lw=1)
        axes.set(xlabel="normed input", title=f"layer {layer}")
    figure.suptitle("Learned activations, strongest wavelets; dashed: silu alone")
    return figure


def picture_sdr(folder, words=8):
    """The active bits of a text's first distinct words on the retina's map, before smoothing and after."""
    read = Reading(folder, SDREmbedding)
    embedding, tokens = read.modules[0], list(dict.fromkeys(read.idx[0].tolist()))[:words]
    with torch.no_grad():
        scores, active, _ = embedding.encoder()
        smooth, _ = embedding.retina(scores, active, embedding.encoder.vectors)
    figure, panels = pyplot().subplots(2, len(tokens), figsize=(1.8 * len(tokens), 2.6), squeeze=False, **TIGHT)
    for column, token in enumerate(tokens):
        for axes, bits in zip(panels[:, column], (active, smooth)):
            axes.imshow(embedding.retina.map(bits[token]), cmap="Greys", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        panels[0, column].set_title(repr(read.words[read.idx[0].tolist().index(token)]), fontsize=9)
    panels[0, 0].set_ylabel("bits")
    panels[1, 0].set_ylabel("smoothed")
    return figure


@torch.no_grad()
def recall_under_noise(embedding, pairs, flipped, seed=0):
    """The share of stored pairs whose second word is recalled from the first one's set with `flipped` bits moved.

    A text of pairs + 1 distinct words at random is written; then each but the last is asked for in a copy of its own.
    """
    memory, generator = embedding.memory, torch.Generator().manual_seed(seed)
    active, words, _ = embedding.look_up()
    text = torch.randperm(len(words), generator=generator)[: pairs + 1]
    noisy = SDROperations.noise(active[text[:-1]], memory.size, flipped, generator)
    slots = torch.cat((text, text[:1])).expand(pairs, -1)  # a pair can be read from the second token after it on
    queries = (len(words) + torch.arange(pairs))[:, None].expand_as(slots)
    both = torch.cat((active, noisy)), torch.cat((words, words[:pairs]))  # the noisy sets are further words to ask with
    read, _ = memory.read(slots, *both, embedding.encoder.vectors, None, queries)
    return (memory.nearest(read[:, -1:], words)[:, 0] == text[1:]).float().mean().item()


def picture_noise(folder, texts=8):
    """Recall of pairs of distinct words by the trained codes and memory, over the share of flipped bits of the cue."""
    model, (embedding, *_) = load(folder, SDREmbedding)
    if embedding.memory is None:
        raise ConfigError(f'{folder}: sdr_rule="none" has no memory, which this picture shows')
    k, V = model.config.sdr_active, model.config.vocab_size
    model.eval()
    figure, axes = pyplot().subplots(figsize=(7, 4.5), **TIGHT)
    for pairs in sorted({min(n, V - 1) for n in (8, 32, 128)}):
        shares = []
        for flipped in range(k + 1):
            runs = [recall_under_noise(embedding, pairs, flipped, seed) for seed in range(texts)]
            shares.append(sum(runs) / texts)
        axes.plot([m / k for m in range(k + 1)], shares, marker=".", label=f"{pairs} pairs")
    axes.axhline(1 / V, color="black", lw=0.8, ls="--", label="chance")
    axes.set(xlabel=f"share of the cue's {k} bits that were moved", ylabel="share of pairs recalled", ylim=(0, 1.02))
    axes.set_title(f'Recall from noisy cues, sdr_rule="{model.config.sdr_rule}", {texts} random texts')
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def picture_mhc(folder):
    """How each sublayer mixes the residual streams at the last token of a text, and the product of all that."""
    read = Reading(folder, HyperConnections)
    read.model.train()  # which keeps what was mixed with
    with torch.no_grad():
        read.model(read.idx, read.idx)
    mixing = [m.last_res[0].float() for m in read.modules if m.last_res is not None]
    product = mixing[0]
    for H in mixing[1:]:
        product = H @ product
    columns = min(8, len(mixing) + 1)
    rows = -(-(len(mixing) + 1) // columns)
    figure, panels = pyplot().subplots(rows, columns, figsize=(1.8 * columns, 2 * rows), squeeze=False, **TIGHT)
    for axes in panels.flat:
        axes.set_axis_off()
    names = [f"sublayer {i}" for i in range(1, len(mixing) + 1)] + ["product"]
    for axes, name, H in zip(panels.flat, names, (*mixing, product)):
        image = axes.imshow(H, cmap="viridis", vmin=min(0.0, H.min().item()), vmax=max(1.0, H.max().item()))
        axes.set_title(name, fontsize=8)
    figure.colorbar(image, ax=panels.ravel().tolist(), shrink=0.8)
    return figure


def picture_spectrum(folder, blocks=64):
    """Mean spectral coordinates of a text's tokens on the first two eigenvectors; colour: the first three's sides."""
    read = Reading(folder, SpectralDecomposition, blocks)
    coordinates, tokens = read.outputs[0].flatten(0, 1).float(), read.idx.flatten()
    words, middle = dict(zip(tokens.tolist(), read.words)), coordinates.median(0).values
    figure, axes = pyplot().subplots(figsize=(8, 7), **TIGHT)
    for token, word in words.items():
        place = coordinates[tokens == token].mean(0)
        community = sum(2**i for i, x in enumerate((place - middle)[:3].tolist()) if x > 0)
        axes.plot(*place[:2], ".", color=f"C{community}", alpha=0.3)
        axes.annotate(word.replace(" ", "space"), place[:2].tolist(), color=f"C{community}", family="monospace")
    axes.set(xlabel="spectral coordinate 1", ylabel="spectral coordinate 2", title="Communities of tokens")
    return figure


def coxeter_plane():
    """E7's 126 roots on the plane that its Coxeter element turns by 2 pi / 18, (126, 2)."""
    simple = torch.tensor(SIMPLE[:7], dtype=torch.float64) / 2
    turn = torch.eye(8, dtype=torch.float64)
    for a in simple:
        turn = turn @ (torch.eye(8, dtype=torch.float64) - torch.outer(a, a))  # a^2 = 2
    values, vectors = torch.linalg.eig(turn)
    v = vectors[:, (values.angle() - 2 * torch.pi / 18).abs().argmin()]
    x = torch.stack((v.real, v.imag), 1)
    return e7_roots().double() / 2 @ (x / x.norm(dim=0))


def picture_coxeter(folder, blocks=16):
    """E7's roots on the Coxeter plane, each coloured by how far a text's points move along it: mean |coordinate|."""
    point = Reading(folder, ManifoldProjection, blocks).outputs[0][1].flatten(0, 1).float()
    used = point[:, 7:].abs().mean(0)  # use of the positive roots
    places, roots = coxeter_plane(), e7_roots()
    figure, axes = pyplot().subplots(figsize=(8, 7), **TIGHT)
    near = (roots @ roots.T == 4).triu().nonzero().tolist()  # doubled coordinates: inner product 1, the nearest
    for i, j in near:
        axes.plot(*places[[i, j]].T, color="lightgrey", lw=0.25, zorder=0)
    dots = axes.scatter(*places.T, c=used.repeat(2), cmap="viridis", s=60, edgecolors="black", linewidths=0.5)
    figure.colorbar(dots, ax=axes, label="mean |coordinate| of the text's points")
    axes.set_axis_off()
    axes.set(aspect="equal", title=f"The {len(roots)} roots of E7, {sum(SETS)} coordinates and their negatives")
    return figure


def logged(folder, name):
    """[(step, value)] of what a run logged under that name."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["iter"], line[name]) for line in lines if name in line]


def picture_alignment(folders):
    """Over training: mean angle between feedback and weights, and mean cosine with backpropagation's gradient."""
    figure, panels = pyplot().subplots(1, 2, figsize=(12, 4.5), **TIGHT)
    for i, (row, folder) in enumerate(folders.items()):
        for axes, name in zip(panels, ("angle", "cosine")):
            if points := logged(folder, name):
                axes.plot(*zip(*points), marker=".", color=f"C{i}", label=f"{row} {points[-1][1]:.2f}")
    panels[0].axhline(90, color="black", lw=0.8, ls="--")
    panels[1].axhline(0, color="black", lw=0.8, ls="--")
    panels[0].set(xlabel="step", ylabel="degrees", title="Feedback against weights, mean over layers; 90 is chance")
    panels[1].set(xlabel="step", ylabel="cosine", title="Gradients against backpropagation's, mean over layers")
    for axes in panels:
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


WIGGLE = {"first": (0.60, 0.70), "last": (0.13, 0.30)}  # WiggleGPT's published shares of silent units


def picture_sparsity(folders):
    """Over training: the share of hidden units whose events are silent, beside what WiggleGPT publishes."""
    figure, axes = pyplot().subplots(figsize=(7.5, 4.5), **TIGHT)
    end = 1
    for i, (row, folder) in enumerate(folders.items()):
        if points := logged(folder, "sparsity"):
            axes.plot(*zip(*points), color=f"C{i}", label=f"{row}: {points[0][1]:.2f} to {points[-1][1]:.2f}")
            end = max(end, points[-1][0])
    for when, (start, stop) in zip(WIGGLE, ((0, 0.1 * end), (0.9 * end, end))):
        low, high = WIGGLE[when]
        label = f"WiggleGPT, {when}: {low:.2f} to {high:.2f}"
        axes.fill_between((start, stop), low, high, color="grey", alpha=0.25 if when == "first" else 0.5, label=label)
    axes.set(
        xlabel="step", ylabel="silent share of hidden units", ylim=(0, 1), title="Sparsity of events over training"
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def attention_over_length(seconds, fits):
    """Time of each attention over T, from {name: {T: seconds}} and {name: exponent or None}."""
    figure, axes = pyplot().subplots(figsize=(7.5, 5), **TIGHT)
    for name, times in seconds.items():
        dash = "-" if "backward" in name else "--"
        label = f"{name}: T^{fits[name]:.2f}" if fits[name] else name
        axes.loglog(list(times), list(times.values()), dash, marker="o", base=2, label=label)
    axes.set(xlabel="T, tokens", ylabel="seconds", title="Mixing 1 x T x 384 (6 heads of 64), cells of about 256")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    return figure


def routing_by_kind(flags, T=512):
    """The routing graph of a model with `flags` at block T, each edge coloured by what put it there."""
    from matplotlib.colors import ListedColormap

    config = GPTConfig(**flags | {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": T})
    cells = GPT(config).transformer.h[0].attn.cells
    mask, cell = cells.route.mask(), cells.cell
    back = cell[:, None] - cell[None, :]
    kind = torch.where(mask, torch.where(back == 0, 1, torch.where(back == 1, 2, 3)), 0)
    figure, axes = pyplot().subplots(figsize=(6.4, 6.4), **TIGHT)
    axes.imshow(kind.numpy(), cmap=ListedColormap(["white", "#1f4e79", "#6fa8dc", "#f6b26b"]), interpolation="nearest")
    for c, start in enumerate(cells.route.starts[1:-1], 1):
        region = c % config.region_size == 0
        for line in (axes.axhline, axes.axvline):
            line(start - 0.5, color="black" if region else "grey", lw=0.8 if region else 0.25)
    for color, label in (("#1f4e79", "own cell"), ("#6fa8dc", "ring: the cell before"), ("#f6b26b", "region edges")):
        axes.plot([], [], "s", color=color, label=label)
    axes.legend(loc="upper right")
    share = mask.float().sum() / (T * (T + 1) / 2)
    axes.set(xlabel="key position", ylabel="query position")
    cells_and_regions = f"{len(cells.route.starts) - 1} cells, regions of {config.region_size} (black)"
    axes.set_title(f"{cells_and_regions}: {share:.0%} of the causal pairs")
    return figure


MOTIF = (  # cortical layer, what it is said to do, what does that here
    ("L1", "what other regions say", "RegionFeedback: the past of nearby or chosen regions"),
    ("L2/3", "neighbours, sequence", "attention within the cell and its rings, anchor-relative Fe-RoPE"),
    ("L4", "input and its error", "auto-encoder of hidden states: reconstruction, next step"),
    ("L5", "output", "head: a mixture of softmaxes, conditioned on the slate"),
    ("L6", "prior, back to L4", "region slate: moving average of hidden states, active columns"),
)
WIRES = ((1, 0, "feedback"), (2, 1, "stream"), (1, 3, "stream"), (2, 4, "error"), (4, 3, "slate"))  # from, to, what


def picture_motif():
    """The six-layer motif of a cortical column beside the parts of the model that stand for its layers."""
    figure, axes = pyplot().subplots(figsize=(10, 5.2), **TIGHT)
    for i, (layer, role, code) in enumerate(MOTIF):
        y = -1.2 * i
        axes.text(0, y, f"{layer}: {role}", ha="left", va="center", weight="bold")
        axes.text(
            3.5, y, code, ha="left", va="center", bbox={"boxstyle": "round,pad=0.4", "fc": "#eaf1f8", "ec": "#1f4e79"}
        )
    for n, (a, b, label) in enumerate(WIRES):
        x, start, end = (
            10.1 + 0.45 * n,
            0.12 * (n - 2) - 1.2 * a,
            0.12 * (n - 2) - 1.2 * b,
        )  # no two lines on each other
        axes.plot([9.8, x, x, 9.8], [start, start, end, end], color=f"C{n}", lw=1.2)
        axes.plot(9.8, end, "<", color=f"C{n}")
        axes.text(x + 0.05, (start + end) / 2, label, rotation=90, va="center", fontsize=8, color=f"C{n}")
    axes.set(xlim=(-0.1, 12.6), ylim=(-5.4, 0.6), title="A cortical column's layers, and what stands for them here")
    axes.set_axis_off()
    return figure


# picture: (rows that show it, the first finished one is drawn; how)
PICTURES = {
    "routing": (("region_edges", "block_sparse_1"), picture_routing),
    "waves": (("fhn", "fhn_softmax"), picture_waves),
    "knots": (("knots", "knots_and_rings", "kaufmann"), picture_knots),
    "oscillators": (("bio",), picture_oscillators),
    "wavelets": (("kan",), picture_wavelets),
    "sdr": (("sdr",), picture_sdr),
    "noise": (("sdr", "sdr_delta"), picture_noise),
    "mhc": (("mhc", "mhc_2"), picture_mhc),
    "spectrum": (("manifold_spectral",), picture_spectrum),
    "coxeter": (("manifold_e7", "manifold_e7_spectral"), picture_coxeter),
}
# the same, of all finished rows in one picture
COMPARISONS = {
    "alignment": (("fa", "fa_grape", "dfa", "dfa_grape", "sign_sym", "sign_sym_init"), picture_alignment),
    "sparsity": (("bio_events", "bio_adaptive", "bio_plastic", "bio_spiking"), picture_sparsity),
}
DIAGRAMS = {"motif": picture_motif}  # pictures that need no run


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


@dataclass
class PictureConfig:
    # -- picture ------------------------------------------------------------------------------------------------------
    file: str = ""  # the PNG to write; empty = the picture's name


def main(argv=None):
    with configurator.one_line_errors("lab.pictures", CheckpointError, DataError, OSError):
        words = (sys.argv[1:] if argv is None else argv) or ["--help"]
        name, *folders = [w for w in words if not w.startswith("-")] or [""]
        cfg = configurator.read([w for w in words if w.startswith("-")], PictureConfig, doc=__doc__)
        file = cfg.build(PictureConfig).file or f"{name}.png"
        known = PICTURES | COMPARISONS
        if name in DIAGRAMS:
            Path(file).write_bytes(png(DIAGRAMS[name]()))
            return print(f"wrote {file}")
        if name not in known:
            raise ConfigError(f"{name or 'a picture'}: expected {' or '.join([*known, *DIAGRAMS])} first")
        if not folders or (name in PICTURES and len(folders) > 1):
            raise ConfigError(f"{name}: name the folder of a run{' or more' * (name in COMPARISONS)}")
        draw = known[name][1]
        figure = draw(folders[0]) if name in PICTURES else draw({Path(folder).name: folder for folder in folders})
        Path(file).write_bytes(png(figure))
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
