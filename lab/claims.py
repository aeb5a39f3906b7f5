"""
Claim cards: what a trial found, as docs/claims/NAME.json and the same in words beside it.

Differences are losses of the idea minus its baseline's, in nats per token, paired by seed: negative is better.
"""

import json
import math
import statistics
from pathlib import Path

import numpy as np

from data.domains import SHUFFLED
from data.files import replace_file
from lab import stats
from lab.ablate import LEAST_SEEDS, difference, front, markdown
from lab.page import write_between_marks
from lab.pictures import COLOURS, LINES, TIGHT, png, pyplot, spread_out

SIGNIFICANT = 0.05


def gap(idea, baseline):
    """The comparison of {seed: loss} with {seed: loss}, as a card keeps it; None without two seeds in common."""
    seeds = sorted(idea.keys() & baseline.keys())
    if len(seeds) < 2:
        return None
    found = difference(idea, baseline)
    return {"difference": found.mean, "half": found.half, "p": found.p, "n": found.n, "seeds": seeds,
            "idea": [idea[seed] for seed in seeds], "baseline": [baseline[seed] for seed in seeds]}  # fmt: skip


def expected_best(losses):
    """[the expected best of n trials drawn from these, n = 1, 2, ...]: whether a lead depends on how much was tuned."""
    ordered, m = sorted(losses), len(losses)
    weights = [[((m - i) / m) ** n - ((m - i - 1) / m) ** n for i in range(m)] for n in range(1, m + 1)]
    return [sum(w * loss for w, loss in zip(row, ordered) if w) for row in weights]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts.


def confirmed(card):
    """{(baseline, domain): (gap, "test" or "val")}: what was confirmed, on the test split where it was revealed."""
    found = {}
    for name, each in card["baselines"].items():
        for domain, splits in each["confirm"].items():
            if is_control(domain):
                continue
            split = "test" if splits["test"] else "val"
            if splits[split]:
                found[name, domain] = splits[split], split
    return found


def is_control(domain):
    """Whether a text is shuffled: an idea that is better there is better at unigrams, and no verdict counts it."""
    return domain.endswith(SHUFFLED)


def judged(card, others=()):
    """{(baseline, domain): "better", "worse" or ""} by Holm's correction over the card's family, and that of others.

    Fewer than three seeds give no verdict.
    """
    ours = {key: each for key, (each, _) in confirmed(card).items() if each["n"] >= LEAST_SEEDS}
    rest = [each["p"] for other in others for each, _ in confirmed(other).values() if each["n"] >= LEAST_SEEDS]
    corrected = stats.holm([each["p"] for each in ours.values()] + rest)
    return {
        key: {"holm": p, "verdict": "" if p >= SIGNIFICANT else "better" if each["difference"] < 0 else "worse"}
        for (key, each), p in zip(ours.items(), corrected)
    }


def verdicts(card, others=()):
    """{baseline: a few words}: helps only where it is better on some text and worse on none."""
    found = {}
    corrected, measured = judged(card, others), confirmed(card)
    for name in card["baselines"]:
        said = [each["verdict"] for (of, _), each in corrected.items() if of == name]
        gaps = [each for (of, _), each in measured.items() if of == name]
        if not said:
            found[name] = "undecided: not confirmed"
            continue
        doubtful = any(each["difference"] > 0 and each["p"] < SIGNIFICANT for each, _ in gaps)
        if "better" in said:
            found[name] = "mixed" if "worse" in said or doubtful else "helps"
        elif "worse" in said:
            found[name] = "hurts"
        else:
            found[name] = f"no effect above {statistics.median(each['half'] for each, _ in gaps):.4f} nats"
        found[name] += " (val: the test split is sealed)" * any(split == "val" for _, split in gaps)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# In words.


def cell(found):
    return "" if found is None else f"{found['difference']:+.4f} ± {found['half']:.4f} ({found['n']})"


def times(ratio):
    return f"{ratio:.2f}x"


def survival(card):
    """The share of the gain on M0 that is left on M2; None where one was not run, or M0 shows no gain."""
    gaps = {name: each["select"] for name, each in card["baselines"].items()}
    was, now = gaps.get("M0"), gaps.get("M2")
    if not was or not now or was["difference"] + was["half"] >= 0:
        return None
    return now["difference"] / was["difference"]


def comparisons(card):
    """The table of differences, one line per baseline and text."""
    corrected, said, lines = judged(card), verdicts(card), []
    for name, each in card["baselines"].items():
        for domain, splits in each["confirm"].items() or {"": {"val": None, "test": None}}.items():
            p = corrected.get((name, domain))
            lines.append({
                "baseline": name, "text": domain, "selected": cell(each["select"]),
                "confirmed, val": cell(splits["val"]), "confirmed, test": cell(splits["test"]),
                "Holm p": f"{p['holm']:.3f}" if p else "", "verdict": "control" if is_control(domain) else said[name],
            })  # fmt: skip
    return [{name: (text, None) for name, text in line.items()} for line in lines]


def costs(card):
    lines = []
    for name, each in card["baselines"].items():
        speed = ", ".join(
            f"{r} {s['speed']:.2f}x ({s['low']:.2f} to {s['high']:.2f})" for r, s in each["speed"].items()
        )
        memory = each["memory_mb"]
        lines.append({
            "baseline": name, "parameters": times(each["parameters"]), "FLOPs per token": times(each["flops"]),
            "state, bytes": f"{each['state_bytes']['idea']:,} for {each['state_bytes']['baseline']:,}",
            "peak MB": f"{memory['idea']:,.0f} for {memory['baseline']:,.0f}" if memory else "",
            "training speed": speed,
        })  # fmt: skip
    return [{name: (text, None) for name, text in line.items()} for line in lines]


def ladders(card):
    lines = []
    for name, each in card["ladder"].items():
        for K, m in each["speedup"].items():
            lines.append({
                "baseline": name, "over": each["over"], "K": f"{float(K):.3g}",
                "m": f"{m['m']:.2f} ({m['low']:.2f} to {m['high']:.2f})",
                "w": f"{m['w']:.2f}" if m["w"] is not None else "", "verdict": each["verdict"],
            })  # fmt: skip
    return [{name: (text, None) for name, text in line.items()} for line in lines]


def tunings(card):
    """Sentences on the rates and weight decays that were tried."""
    told = []
    for name, each in card["baselines"].items():
        for row, tried in (each["tuning"] or {}).items():
            told.append(f"- {name}, {row}: {tuning(tried)}")
            if decays := tried.get("weight_decay"):
                told.append(f"- {name}, {row}, weight decay: {tuning(decays)}")
        for size, rates in each.get("ladder_rates", {}).items():
            found = ", ".join(f"{row} {rate:g}" for row, rate in rates.items())
            told.append(f"- {name}, at {size}: {found}")
    return told


def tuning(tried):
    values = ", ".join(f"{value:g}" for value in sorted(map(float, tried["losses"])))
    best = ", ".join("diverged" if loss is None else f"{loss:.4f}" for loss in tried["expected_best"])
    state = "tuned" if tried["is_bracketed"] else "unbracketed"
    return f"{state}, {tried['best']:g} of {values}; expected best of n trials: {best}"


def size_alone(card, name):
    """What a baseline's own law over sizes gives for the idea's parameters, nats per token; None without such a law.

    Along the ladder tokens are 20 per parameter, so that L = E + A K^-alpha holds for parameters too.
    """
    ladder = card["ladder"].get(name)
    if ladder is None or ladder["over"] != "sizes":
        return None
    _, A, alpha = (ladder["law"][key] for key in ("E", "A", "alpha"))
    K = min(map(float, ladder["losses"]["baseline"]))
    return A * K**-alpha * (card["baselines"][name]["parameters"] ** -alpha - 1)


def on_size(card):
    """A sentence where parameters differ by more than 1 %; "" where they do not."""
    if all(0.99 <= each["parameters"] <= 1.01 for each in card["baselines"].values()):
        return ""
    worth = {name: size_alone(card, name) for name in card["baselines"]}
    told = ", ".join(f"{name} {loss:+.4f}" for name, loss in worth.items() if loss is not None)
    law = f" By the baseline's law over sizes, that many parameters alone are worth {told}." if told else ""
    return f"**Parameters differ by more than 1 %**: part of a difference may be due to size.{law}"


def how_tuned(card):
    """Paragraphs on the rates, and their picture."""
    if not (lines := tunings(card)):
        return []
    image = f"../img/tuning-{card['name']}.png"
    return [
        "Rates:\n\n" + "\n".join(lines),
        f"![Loss over the learning rate of {card['name']} and its baselines]({image})",
    ]


def opened(card):
    """Who looked at a test split, and when."""
    return [
        f"{domain} on {look['date']}, sha256 {look['sha256'][:12]}, {look['looks']} look(s) so far"
        for domain, look in card["revealed"].items()
    ]


def text_of(card):
    """The card in words."""
    said = verdicts(card)
    parts = [
        f"# {card['name']}",
        "; ".join(f"**{name}**: {words}" for name, words in said.items()) + ".",
        f"`{card['flags']}`, {card['date']}. Made by `{card['command']}`; model {card['source']['model'][:12]} "
        f"(of {card['source']['of']}), training loop {card['source']['loop'][:12]}; {card['machine']}, "
        f"{card['dtype']}, torch {card['torch']}.",
        "Loss of the idea minus its baseline's, nats per token, paired by seed, ± a 95 % t interval (seeds). Selected "
        "on other seeds than confirmed; Holm's correction is over this card.",
        markdown(comparisons(card)),
        "Costs, idea over baseline; speed: training steps in the time of one of the baseline's, taking turns on one "
        "machine and one thread, median and quartiles.",
        markdown(costs(card)),
    ]
    if any(each["parameters"] > 1.01 or each["parameters"] < 0.99 for each in card["baselines"].values()):
        worth = {name: size_alone(card, name) for name in card["baselines"]}
        told = [f"{name} {loss:+.4f}" for name, loss in worth.items() if loss is not None]
        law = (
            f" By the baseline's law over sizes, that many parameters alone are worth {', '.join(told)}."
            if told
            else ""
        )
        parts.append(f"**Parameters differ by more than 1 %**: part of a difference may be due to size.{law}")
    if lines := ladders(card):
        parts += [
            "Effective speedup: the baseline would need m times the tokens to be as good, w = m times the speed. K in "
            "tokens; over: sizes of the ladder, or lengths of training at one size.",
            markdown(lines),
            f"![Loss of {card['name']} and its baselines over tokens](../img/claim-{card['name']}.png)",
        ]
    parts += how_tuned(card)
    parts += ["Repeated text: " + "; ".join(card["repeated"]) + "."] if card["repeated"] else []
    parts += [f"Test splits opened: {'; '.join(opened(card))}."] if card["revealed"] else []
    parts += [f"Skills:\n\n```\n{card['skills'].strip()}\n```"] if card["skills"] else []
    parts += ["Left out: " + "; ".join(card["left_out"]) + "."] if card["left_out"] else []
    parts += [f"Contradicts: {card['contradicts']}"] if card["contradicts"] else []
    return "\n\n".join(parts) + "\n"


def write(folder, card):
    """NAME.json and NAME.md; what was written by hand into "contradicts" stays."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{card['name']}.json"
    if path.exists():
        card = card | {"contradicts": json.loads(path.read_text(encoding="utf-8"))["contradicts"]}
    replace_file(path, (json.dumps(finite(card), indent=1) + "\n").encode())
    card = finite(card)
    if card["ladder"]:
        draw(folder, f"claim-{card['name']}", picture_ladder(card))
    if tunings(card):
        draw(folder, f"tuning-{card['name']}", picture_tuning(card))
    replace_file(path.with_suffix(".md"), text_of(card).encode())
    return path.with_suffix(".md")


def draw(folder, name, figure):
    """Write img/NAME.png beside the folder of the cards."""
    images = Path(folder).parent / "img"
    images.mkdir(parents=True, exist_ok=True)
    replace_file(images / f"{name}.png", png(figure))


def finite(value):
    """The same with None for numbers that JSON lacks: the loss of what diverged."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, legible at the width of a telephone.


def picture_ladder(card):
    """Loss over tokens of an idea and its baseline, both logarithmic, with 95 % t intervals and the baseline's law."""
    figure, panels = pyplot().subplots(
        len(card["ladder"]), 1, figsize=(6, 4 * len(card["ladder"])), squeeze=False, **TIGHT
    )
    for axes, (name, ladder) in zip(panels[:, 0], card["ladder"].items()):
        E, A, alpha = (ladder["law"][key] for key in ("E", "A", "alpha"))
        K = sorted(map(float, ladder["losses"]["baseline"]))
        x = np.geomspace(K[0] / 1.3, K[-1] * 1.3)
        axes.plot(x, E + A * x**-alpha, color="grey", lw=1, label=f"law: {E:.2f} + {A:.3g} K$^{{-{alpha:.2f}}}$")
        for row, colour in (("baseline", "black"), (card["name"], COLOURS[5])):
            each = {float(k): losses for k, losses in ladder["losses"][row].items()}
            means = [np.mean(each[k]) for k in K]
            halves = [stats.smallest_effect(each[k]) for k in K]
            label = f"baseline {name}" if row == "baseline" else row
            axes.errorbar(K, means, halves, fmt="o-", ms=4, capsize=3, color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="val loss, nats per token")
        axes.set_title(f"{card['name']} on {name}, {ladder['over']}: {ladder['verdict']}", fontsize=10)
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.2f}")
        axes.legend(fontsize=9)
        axes.grid(alpha=0.3, which="both")
    return figure


def picture_tuning(card):
    """Loss with seed 0 over the learning rate, idea and baseline, a ring around the best; a panel per baseline."""
    tuned = {name: each["tuning"] for name, each in card["baselines"].items() if each["tuning"]}
    figure, panels = pyplot().subplots(len(tuned), 1, figsize=(6, 3.2 * len(tuned)), squeeze=False, **TIGHT)
    for axes, (name, rows) in zip(panels[:, 0], tuned.items()):
        states = []
        for row, tried in rows.items():
            found = sorted((float(rate), loss) for rate, loss in tried["losses"].items() if loss is not None)
            rates, losses = zip(*found)
            colour = "black" if row == "baseline" else COLOURS[5]
            label = f"baseline {name}" if row == "baseline" else row
            axes.plot(rates, losses, "o-", ms=4, color=colour, label=label)
            best = min(losses)
            axes.plot(rates[losses.index(best)], best, "o", ms=11, mfc="none", mec=colour)
            states.append(f"{label} {'bracketed' if tried['is_bracketed'] else 'unbracketed'}")
        ticks = sorted({float(rate) for row in rows.values() for rate in row["losses"]})
        axes.set(xscale="log", xlabel="learning rate of the matrices in blocks", ylabel="val loss, nats per token")
        axes.set_xticks(apart(ticks), [f"{tick:g}" for tick in apart(ticks)])
        axes.set_xticks([], minor=True)
        axes.set_title("; ".join(states), fontsize=10)
        axes.legend(fontsize=9)
        axes.grid(alpha=0.3)
    return figure


def apart(ticks, ratio=1.25):
    """Those of sorted ticks whose labels have room on a logarithmic axis."""
    kept = []
    for tick in ticks:
        if not kept or tick / kept[-1] >= ratio:
            kept.append(tick)
    return kept


def picture_time(cards):
    """Difference to the baseline over the time of a step, on the last baseline of each card; the front is labelled."""
    points = {"baseline": (1.0, 0.0, 0.0)}
    for card in cards:
        each = list(card["baselines"].values())[-1]
        if each["select"] and each["speed"]:
            speed = next(iter(each["speed"].values()))["speed"]
            points[card["name"]] = (1 / speed, each["select"]["difference"], each["select"]["half"])
    best = front({name: (x, y) for name, (x, y, _) in points.items()}) | {"baseline"}
    figure, axes = pyplot().subplots(figsize=(6, 4.5), **TIGHT)
    axes.axhline(0, color="black", lw=1)
    for name, (x, y, half) in points.items():
        colour = "black" if name == "baseline" else COLOURS[5] if name in best else "grey"
        axes.errorbar(x, y, half or None, fmt="o", ms=5, capsize=3, color=colour)
    low, high = axes.get_ylim()
    named = sorted(best, key=lambda name: points[name][1])
    heights = spread_out([points[name][1] for name in named], 0.05 * (high - low))
    right = max(x for x, *_ in points.values())
    for name, height in zip(named, heights):
        x, y, _ = points[name]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(name, (x, y), (right * 1.06, height), fontsize=9, va="center", bbox=box,
                      arrowprops={"arrowstyle": "-", "color": "lightgrey", "lw": 0.8})  # fmt: skip
    axes.set(xlabel="time of a training step, baseline = 1", ylabel="loss minus the baseline's, nats per token")
    axes.set_xlim(right=right * 1.35)
    axes.set_title("Loss against time; named: nothing is both faster and better", fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def picture_speedup(cards):
    """What each idea is worth in tokens of its baseline, over size, with 95 % intervals; the baseline is the line 1."""
    lines = [
        (f"{card['name']} on {name}", {float(k): m for k, m in ladder["speedup"].items()})
        for card in cards
        for name, ladder in card["ladder"].items()
    ]
    figure, axes = pyplot().subplots(figsize=(6, 4.5), **TIGHT)
    axes.axhline(1, color="black", lw=1, label="baseline")
    for number, (label, found) in enumerate(lines):
        K = np.array(sorted(found))
        m, low, high = (np.array([found[k][key] for k in K]) for key in ("m", "low", "high"))
        moved = K * 1.03 ** (number - len(lines) / 2)  # intervals beside each other
        axes.errorbar(
            moved, m, [m - low, high - m], fmt="o-", ms=4, capsize=3, label=label, color=COLOURS[number % len(COLOURS)]
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens of the baseline", ylabel="effective speedup in tokens")
    axes.set_title("Effective speedup over size", fontsize=10)
    low, high = axes.get_ylim()
    ticks = [m for m in (0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 3, 5, 10) if low <= m <= high]
    axes.set_yticks(ticks, [f"{m:g}" for m in ticks])
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def picture_survival(cards):
    """Each idea's difference to its baseline from M0 to M2, with 95 % intervals; the baselines are the line 0."""
    figure, axes = pyplot().subplots(figsize=(6, 4.5), **TIGHT)
    rungs = ("M0", "M1", "M2")
    axes.axhline(0, color="black", lw=1)
    ends = []
    for number, card in enumerate(cards):
        gaps = {i: card["baselines"][name]["select"] for i, name in enumerate(rungs) if name in card["baselines"]}
        gaps = {i: each for i, each in gaps.items() if each}
        if not gaps:
            continue
        x, colour = [i + 0.02 * (number - len(cards) / 2) for i in gaps], COLOURS[number % len(COLOURS)]
        style = LINES[number // len(COLOURS) % len(LINES)]
        means, halves = ([each[key] for each in gaps.values()] for key in ("difference", "half"))
        axes.errorbar(x, means, halves, fmt="o", ls=style, ms=4, capsize=3, color=colour)
        ends.append((x[-1], means[-1], card["name"], colour))
    low, high = axes.get_ylim()
    ends.insert(0, (2.0, 0.0, "baseline", "black"))
    heights = spread_out([end for _, end, *_ in ends], 0.05 * (high - low))
    for height, (x, end, name, colour) in zip(heights, ends):
        box, lead = (
            {"facecolor": "white", "edgecolor": "none", "pad": 1},
            {"arrowstyle": "-", "color": colour, "lw": 0.5},
        )
        axes.annotate(name, (x, end), (2.25, height), color=colour, fontsize=9, va="center", bbox=box, arrowprops=lead)
    axes.set_ylim(min(low, *heights), max(high, *heights) + 0.03 * (high - low))
    axes.set_xticks(range(3), rungs)
    longest = max(len(name) for *_, name, _ in ends)
    axes.set(xlim=(-0.2, 2.35 + 0.052 * longest), ylabel="loss minus the baseline's, nats per token")
    axes.set_title("What is left of an idea on a better baseline", fontsize=10)
    axes.grid(alpha=0.3)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# All cards in one table.


def cards_in(folder):
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]


def table(cards):
    """The README's table: a line per card, Holm's correction over all of them, best on the last baseline first."""
    lines = []
    for card in cards:
        said = verdicts(card, [other for other in cards if other is not card])
        last = list(card["baselines"].values())[-1]
        order = last["select"]["difference"] if last["select"] else math.inf
        cells = {"idea": f"[{card['name']}](docs/claims/{card['name']}.md)"}
        for name in ("M0", "M1", "M2"):
            each = card["baselines"].get(name)
            cells[f"on {name}"] = f"{cell(each['select'])} {said[name]}".strip() if each else ""
        share = survival(card)
        cells["survives"] = "" if share is None else f"{share:.0%}"
        ladder = [f"{name} {each['verdict']}" for name, each in card["ladder"].items()]
        cells["effective speedup"] = "; ".join(ladder)
        lines.append((order, {name: (text, None) for name, text in cells.items()}))
    return [cells for _, cells in sorted(lines, key=lambda line: line[0])]


def table_text(folder):
    """The Markdown between README's marks "claims"; "" without cards."""
    cards = cards_in(folder)
    return markdown(table(cards)) if cards else ""


def write_table(readme, folder):
    """Put it there, and pictures of all cards into img/; whether there are cards."""
    text, cards = table_text(folder), cards_in(folder)
    if text:
        write_between_marks(Path(readme), "claims", text)
        draw(folder, "claims-survival", picture_survival(cards))
        draw(folder, "claims-time", picture_time(cards))
    if any(card["ladder"] for card in cards):
        draw(folder, "claims-speedup", picture_speedup(cards))
    return bool(text)
