"""
Which ideas survive a modern baseline? One table over the rungs, from the committed records of lab.ablate.

    python -m lab.rungs    # writes it into README.md and docs/results.md, between their marks

docs/results.md also gets what each part of the modern block does, added to M0 and taken off M1, and what the search
on M2 with a short convolution found. M0 is nanoGPT's block, M1 a plain modern one (config/presets/modern.py), M2 the
same trained by Muon; none has an idea in it, and each is tuned by itself. A cell is an idea's loss minus its rung's,
paired by seed, with a 95 % interval.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
from lab import identity
from lab.ablate import (
    BASELINE,
    AblateConfig,
    best_rates,
    columns_of,
    difference,
    family,
    find_runs,
    markdown,
)
from lab.claims import draw, picture_survival
from lab.page import write_between_marks

RUNGS = {"M0": "out-ablation", "M1": "out-modern", "M2": "out-modern-muon"}
PARTS = {  # each part of the modern block: (the row that adds it to M0, the row that removes it from M1)
    "rotary positions": ("rope", "no_rope"), "untied head": ("untied", "tied"),
    "norm of the embedding": ("emb_norm", "no_emb_norm"),
    "QK-norm": ("qk_norm", "no_qk_norm"), "squared ReLU": ("relu2", "no_relu2"), "soft cap": ("softcap", "no_softcap"),
    "RMSNorm without gain": ("rms", "no_rms"), "outputs start at 0": ("zero_init", "no_zero_init"),
    "wider start": ("init_gain", "no_init_gain"), "short convolution": ("short_conv", None),
    "token shift": ("token_shift", None),
    "value embeddings": ("value_embeds", None), "skips from the embedding": ("x0_skip", None),
    "grouped keys and values": ("n_kv_head", None), "Muon": ("muon", None),
}  # fmt: skip
SEARCH = "conv_"  # rows of the search on M2: with a short convolution, and what else the name says
SEARCH_SHOWN = 8  # so many of these rows are shown, the best ones; all are in results/modern-muon.md
IN_WORDS = {
    "bio": "oscillators", "fhn": "waves", "fhn_linear": "waves without the cubic", "kan": "WaveKAN",
    "mla": "layer aggregation", "hc": "hyper-connections", "mhc": "constrained hyper-connections",
    "l4": "L4 auto-encoder", "sdr": "sparse codes", "sigmoid": "sigmoid attention", "mfs": "multi-facet softmax",
    "mlp_topk": "64 of 512 hidden units", "gla": "gated linear attention", "gdn": "gated delta rule",
    "m3": "all of M3", "short_conv": "convolution over 4 tokens", "token_shift": "token shift",
    "manifold_spectral": "sphere with spectra", "manifold_e7": "E7's cosets", "kaufmann": "Kaufmann attention",
    "ramanujan": "Ramanujan positions",
}  # fmt: skip
CONTROLS = {"m3", "short_conv", "token_shift", "value_embeds", "x0_skip", "gla", "gdn"}  # the field's first tries


@dataclass
class RungsConfig:
    """Where the table goes."""

    # -- rungs --------------------------------------------------------------------------------------------------------
    docs: str = "docs"  # where results/ and results.md lie
    readme: str = "README.md"  # the other page
    mix: bool = False  # compare records of different sources too, which the table then says


def tuned_rows(docs, out_dir):
    """{row: finished runs at its best learning rate} of a rung."""
    cfg = AblateConfig(out_dir=out_dir, docs=docs, learning_rates="1e-3,3e-3" if out_dir == RUNGS["M0"] else "")
    columns = columns_of(cfg, find_runs(cfg))
    return columns.get("tuned") or list(columns.values())[-1]


def mixtures_of(rungs, mix):
    """A sentence on the rungs whose records are of different sources; ConfigError where there are any, unless `mix`."""
    found = {
        rung: identity.check_same([run for runs in rows.values() for run in runs], mix, RUNGS[rung])
        for rung, rows in rungs.items()
    }
    return " ".join(f"{rung}: {told}" for rung, told in found.items() if told)


def open_rows(docs, out_dir):
    """The rows of a rung whose best learning rate has no worse one on one of its sides."""
    found = best_rates(find_runs(AblateConfig(out_dir=out_dir, docs=docs)))
    return {row for row, rate in found.items() if not rate["is_bracketed"]}


def losses(runs):
    return {run.pair: run.loss for run in runs}


def differences(rungs):
    """{row: {rung: Difference to the rung's baseline}} of the rows that were run on M1 or M2."""
    found = {}
    for rung, rows in rungs.items():
        for row in rows.keys() - {BASELINE}:
            found.setdefault(row, {})[rung] = difference(losses(rows[row]), losses(rows[BASELINE]))
    taken_off = {off for _, off in PARTS.values()}
    return {
        row: each
        for row, each in found.items()
        if each.keys() - {"M0"} and row not in taken_off and not row.startswith(SEARCH)
    }


def parts_table(rungs):
    """What each part of the modern block does: the lines of a table, largest effect on M1 first."""
    lines = []
    for part, (added, off) in PARTS.items():
        pairs = {"added to M0": ("M0", added), "taken off M1": ("M1", off)}
        found = {
            name: difference(losses(rungs[rung][row]), losses(rungs[rung][BASELINE])) if row in rungs[rung] else None
            for name, (rung, row) in pairs.items()
        }
        if any(found.values()):
            lines.append((part, found))
    lines.sort(key=lambda line: -abs(line[1]["taken off M1"].mean) if line[1]["taken off M1"] else 0.0)
    return [
        {name: (text, None) for name, text in {"part": part, **{k: str(d or "") for k, d in found.items()}}.items()}
        for part, found in lines
    ]


def search_table(rungs):
    """The search on M2: loss, seeds and the difference to M2 with a short convolution alone, best first."""
    rows, base = rungs["M2"], losses(rungs["M2"].get("short_conv", []))
    found = {row: losses(runs) for row, runs in rows.items() if row.startswith(SEARCH)}
    lines = []
    for row in sorted(found, key=lambda row: statistics.fmean(found[row].values())):
        ratio = rows[row][0].facts["parameters"] / rows[BASELINE][0].facts["parameters"]
        cells = {"beside short_conv": row.removeprefix(SEARCH), "loss": f"{statistics.fmean(found[row].values()):.4f}"}
        cells |= {"to short_conv alone": str(difference(found[row], base)), "seeds": str(len(found[row]))}
        lines.append({name: (text, None) for name, text in (cells | {"parameters": f"{ratio:.2f}x"}).items()})
    return lines


def survival(each):
    """The share of an idea's gain on M0 that is left on M2; "" where M0 shows no gain, or M2 was not run."""
    was, now = each.get("M0"), each.get("M2")
    if was is None or now is None or was.half is None or was.mean + was.half >= 0:
        return ""
    return f"{now.mean / was.mean:.0%}"


def verdicts(found):
    """{row: what M2's runs say}, of `differences`, by the same correction for many comparisons as every report."""
    judged = family({row: each["M2"] for row, each in found.items() if "M2" in each})
    return {row: (judged[row]["verdict"] or "no difference") if row in judged else "undecided" for row in found}


def table(rungs, unbracketed):
    """The lines of the table, best on M2 first, as `markdown` takes them; unbracketed: {rung: `open_rows`}."""
    found = differences(rungs)
    said = verdicts(found)
    worst = max((d.mean for each in found.values() for d in each.values()), default=0.0)
    order = sorted(found, key=lambda row: found[row]["M2"].mean if "M2" in found[row] else worst)
    lines = []
    for row in order:
        each = found[row]
        sizes = rungs["M2"].get(row) or rungs["M1"][row]
        base = (rungs["M2"] if row in rungs["M2"] else rungs["M1"])[BASELINE]
        name = f"{IN_WORDS[row]}, `{row}`" if row in IN_WORDS else row
        cells = {"idea": name + " (control)" * (row in CONTROLS)}
        for rung in rungs:
            cells[f"on {rung}"] = str(each.get(rung, "")) + "*" * (rung in each and row in unbracketed[rung])
        cells |= {"survives": survival(each), "on M2 it is": said[row]}
        cells["parameters"] = f"{sizes[0].facts['parameters'] / base[0].facts['parameters']:.2f}x"
        lines.append({name: (text, None) for name, text in cells.items()})
    return lines


def drawable(rungs):
    """What `picture_survival` takes: the rows that gain on M0 and have an interval on M2, best there first."""
    found = {row: {r: d for r, d in each.items() if d.half is not None} for row, each in differences(rungs).items()}
    found = {row: each for row, each in found.items() if survival(each)}
    return [
        {
            "name": IN_WORDS.get(row, row),
            "baselines": {r: {"select": {"difference": d.mean, "half": d.half}} for r, d in each.items()},
        }
        for row, each in sorted(found.items(), key=lambda item: item[1]["M2"].mean)
    ]


def describe(rungs):
    """A sentence on each rung's baseline."""
    parts = []
    for rung, rows in rungs.items():
        runs = rows[BASELINE]
        mean, n = statistics.fmean(losses(runs).values()), len({run.seed for run in runs})
        parts.append(f"{rung} {mean:.3f} ({n} seed{'s' * (n > 1)}, learning rate {runs[0].lr:g})")
    return (
        f"Loss of the rungs without any idea, in nats: {'; '.join(parts)}. Cells: loss minus the rung's, paired by "
        "seed, ± a 95 % t interval."
    )


CELLS_ARE = (
    "*survives*: the share of the gain on M0 that is left on M2. Verdicts need three seeds and Holm's correction over "
    "this table; *screened* passes Benjamini and Hochberg's q of 0.1 alone, which asks for more seeds and is no "
    "result. Every row is at its own best learning rate of those tried; \\*: no rate on one side of it was found "
    "worse, so that another may be better."
)
PARTS_ARE = (
    "Each part of the modern block by itself, added to M0 (at 3e-3) and taken off M1; positive: worse without it."
)
SEARCH_IS = (
    "The search on M2: what else, beside a short convolution, at its rung's rate. One seed selects, three confirm. Of "
    "{all} rows the best {shown}; the others: [results/modern-muon.md](results/modern-muon.md)."
)


def main(argv=None):
    with configurator.one_line_errors("lab.rungs", OSError):
        words = sys.argv[1:] if argv is None else argv
        cfg = configurator.read(words, RungsConfig, doc=__doc__).build(RungsConfig)
        rungs = {rung: tuned_rows(cfg.docs, out_dir) for rung, out_dir in RUNGS.items()}
        mixed = mixtures_of(rungs, cfg.mix)
        unbracketed = {rung: open_rows(cfg.docs, out_dir) for rung, out_dir in RUNGS.items()}
        notes = f"{CELLS_ARE} {mixed}".rstrip()
        text = "\n\n".join([describe(rungs), markdown(table(rungs, unbracketed)), notes])
        search = search_table(rungs)
        told = SEARCH_IS.format(all=len(search), shown=min(SEARCH_SHOWN, len(search)))
        more = {PARTS_ARE: parts_table(rungs), told: search[:SEARCH_SHOWN]}
        more = "".join(f"\n\n{title}\n\n{markdown(lines)}" for title, lines in more.items() if lines)
        for page, content in ((Path(cfg.readme), text), (Path(cfg.docs) / "results.md", text + more)):
            write_between_marks(page, "rungs", content)
            print(f"wrote {page}")
        if cards := drawable(rungs):
            draw(Path(cfg.docs) / "results", "rungs-survival", picture_survival(cards))


if __name__ == "__main__":
    main()
