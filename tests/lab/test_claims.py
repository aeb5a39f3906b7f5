"""lab.claims and the verdicts of lab.laws on made-up numbers: each rule by hand, corrections against scipy."""

import itertools
import json
import re

import numpy as np
import pytest
from scipy import stats

from helpers import ROOT
from lab import claims, laws, pictures

pytestmark = pytest.mark.slow


def gap(idea, shift=0.0, spread=0.002, seeds=5, rng=0):
    """A comparison whose idea is `shift` nats off the baseline, with this spread of differences."""
    rng = np.random.default_rng(rng)
    base = {100 + s: float(rng.normal(2, 0.01)) for s in range(seeds)}
    ours = {s: loss + shift + float(rng.normal(0, spread)) for s, loss in base.items()}
    return claims.gap(ours, base)


def card(name="idea", **confirm):
    """A card with the comparisons {domain: (val, test)} on M1."""
    found = {domain: {"val": val, "test": test} for domain, (val, test) in confirm.items()}
    each = {
        "parameters": 1.02, "flops": 1.01, "state_bytes": {"idea": 100, "baseline": 200}, "memory_mb": None,
        "speed": {"r0": {"speed": 0.9, "low": 0.8, "high": 1.0}}, "screen": -0.01, "select": gap(name, -0.02, rng=9),
        "tuning": {"baseline": {"losses": {"0.001": 2.0, "0.002": None}, "best": 0.001, "is_bracketed": False,
                                "expected_best": [2.1, 2.0]}}, "confirm": found,
    }  # fmt: skip
    return {
        "name": name, "flags": "--x=1", "text": "", "date": "2026-01-01", "command": "c", "data": {},
        "dtype": "float32",
        "source": {"model": "m" * 64, "of": "its specialised file", "loop": "l" * 64}, "machine": "a CPU", "torch": "2",
        "baselines": {"M1": each}, "ladder": {}, "repeated": [], "revealed": {}, "skills": None, "left_out": ["x (1h)"],
        "contradicts": "",
    }  # fmt: skip


def test_expected_best_is_that_of_all_draws():
    losses = [2.3, 1.9, 2.0, 5.0]
    for n, found in enumerate(claims.expected_best(losses), start=1):
        brute = np.mean([min(draw) for draw in itertools.product(losses, repeat=n)])
        assert found == pytest.approx(brute)
    assert claims.expected_best([1.0, float("inf")])[0] == float("inf")  # half of the first trials diverge


def test_a_gap_is_scipys_paired_test():
    found = gap("x", -0.01, seeds=5)
    test = stats.ttest_rel(found["idea"], found["baseline"])
    interval = test.confidence_interval()
    assert found["p"] == pytest.approx(test.pvalue) and found["n"] == 5
    assert found["half"] == pytest.approx((interval.high - interval.low) / 2)
    assert claims.gap({0: 1.0}, {0: 2.0, 1: 2.0}) is None


@pytest.mark.parametrize("drama, code, said", [
    ((-0.02, -0.02), (-0.02, -0.02), "helps"),
    ((-0.02, -0.02), (0.0, 0.0), "helps"),
    ((-0.02, -0.02), (0.02, 0.02), "mixed"),  # worse on one text
    ((0.02, 0.02), (0.0, 0.0), "hurts"),
    ((0.0, 0.0), (0.0, 0.0), "no effect above 0.00"),
    ((-0.02, None), (-0.02, None), "helps (val: the test split is sealed)"),
    ((-0.02, 0.02), (-0.02, 0.02), "hurts"),  # better on val alone: the test split decides
])  # fmt: skip
def test_verdicts(drama, code, said):
    pairs = [
        [None if shift is None else gap("x", shift, rng=i) for shift in each] for i, each in enumerate((drama, code))
    ]
    assert claims.verdicts(card(drama=pairs[0], code=pairs[1]))["M1"].startswith(said)


def test_verdicts_need_three_seeds_and_no_control_counts():
    assert claims.verdicts(card(drama=(gap("x", -0.1, seeds=2), None)))["M1"] == "undecided: not confirmed"
    assert claims.verdicts(card())["M1"] == "undecided: not confirmed"
    assert claims.verdicts(card(drama_shuffled=(gap("x", -0.1), None)))["M1"] == "undecided: not confirmed"


def test_holms_family_is_all_cards():
    cards = [card(f"idea{i}", drama=(gap("x", -0.004, spread=0.0028, rng=i), None)) for i in range(12)]
    alone = [claims.judged(each)["M1", "drama"]["holm"] for each in cards]
    ps = [each["baselines"]["M1"]["confirm"]["drama"]["val"]["p"] for each in cards]
    assert alone == pytest.approx(ps)
    together = [claims.judged(each, [c for c in cards if c is not each])["M1", "drama"]["holm"] for each in cards]
    assert together == pytest.approx(claims.stats.holm(ps)) and sum(p < 0.05 for p in together) < sum(
        p < 0.05 for p in ps
    )


def test_a_card_is_written_and_what_was_added_by_hand_stays(tmp_path):
    first = card(drama=(gap("x", -0.02), gap("x", -0.01)))
    path = claims.write(tmp_path, first)
    text = path.read_text()
    for told in ("# idea", "**M1**: helps.", "-0.0", "1.02x", "100 for 200", "r0 0.90x (0.80 to 1.00)", "unbracketed",
                 "expected best of n trials: 2.1000, 2.0000", "Left out: x (1h)",
                 "differ by more than 1 %"):  # fmt: skip
        assert told in text
    stored = json.loads((tmp_path / "idea.json").read_text())
    (tmp_path / "idea.json").write_text(json.dumps(stored | {"contradicts": "another paper"}))
    claims.write(tmp_path, first)
    assert "Contradicts: another paper" in path.read_text()


def test_the_table_is_between_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# top\n")
    assert not claims.write_table(readme, tmp_path / "claims")
    for name, shift in (("good", -0.05), ("bad", 0.05)):
        made = card(name, drama=(gap("x", shift), gap("x", shift)))
        made["baselines"]["M1"]["select"] = gap("x", shift)
        claims.write(tmp_path / "claims", made)
    assert claims.write_table(readme, tmp_path / "claims")
    lines = [line for line in readme.read_text().splitlines() if line.startswith("| [")]
    assert [re.search(r"\[(\w+)\]", line)[1] for line in lines] == ["good", "bad"]
    assert "helps" in lines[0] and "hurts" in lines[1]


def test_readmes_table_is_made_from_the_cards():
    text = claims.table_text(ROOT / "docs/claims")
    if text:
        assert text in (ROOT / "README.md").read_text(encoding="utf-8"), "run python -m lab.trial --table"


def test_survival_is_the_share_of_a_gain():
    made = card()
    assert claims.survival(made) is None
    made["baselines"] = {"M0": {"select": gap("x", -0.1)}, "M2": {"select": gap("x", -0.05)}}
    assert claims.survival(made) == pytest.approx(0.5, abs=0.05)
    made["baselines"]["M0"]["select"] = gap("x", 0.0)
    assert claims.survival(made) is None


# -- effective speedup ------------------------------------------------------------------------------------------------

K = (1e6, 4e6, 16e6, 64e6)


def losses(multiplier, seed, spread=0.0005):
    """{K: [loss per seed]} of an idea worth multiplier(K) times the tokens, from a known law."""
    rng = np.random.default_rng(seed)
    return {k: (1.0 + 40 * (multiplier(k) * k) ** -0.3 + rng.normal(0, spread, 4)).tolist() for k in K}


@pytest.mark.parametrize("multiplier, said, slope", [
    (lambda k: 1.5, "holds", 0.0),
    (lambda k: 1.2 * (k / 1e6) ** 0.2, "grows", 0.2),
    (lambda k: 2.0 * (k / 1e6) ** -0.2, "fades", -0.2),
    (lambda k: 0.5, "loses", 0.0),
    (lambda k: 1.0, "undecided", 0.0),
])  # fmt: skip
def test_verdicts_over_sizes(multiplier, said, slope):
    base, idea = losses(lambda k: 1.0, 0), losses(multiplier, 1)
    line = laws.trend(base, idea, resamples=100)
    assert line["slope"] == pytest.approx(slope, abs=0.05) and line["low"] < line["slope"] < line["high"]
    found = laws.verdict(laws.speedup(base, idea, resamples=100), line, 4)
    assert found.startswith(said)
    if said == "fades":  # 2 (k / 1e6)^-0.2 = 1 at k = 32e6
        assert line["even"] == pytest.approx(32e6, rel=0.4) and "m = 1 at K = " in found


BETTER, EVEN, WORSE = (1.1, 1.2, 1.3), (0.9, 1.1, 1.3), (0.7, 0.8, 0.9)  # low, m, high
RISING, FLAT, FALLING = (0.1, 0.3), (-0.2, 0.2), (-0.3, -0.1)  # the slope's interval


@pytest.mark.parametrize("sizes, slope, said", [
    ((WORSE, BETTER, BETTER), RISING, "grows (m = 1 at K = 7.5e+05)"),
    ((BETTER, BETTER, BETTER), RISING, "grows"),
    ((BETTER, BETTER, BETTER), FLAT, "holds"),
    ((BETTER, BETTER, WORSE), FALLING, "fades (m = 1 at K = 7.5e+05)"),
    ((WORSE, WORSE, WORSE), RISING, "loses"),
    ((WORSE, BETTER, BETTER), FLAT, "undecided (better and worse without a trend)"),
    ((BETTER, BETTER, EVEN), FLAT, "undecided (needs 12 seeds)"),  # 3 (log(1.3 / 0.9) / 2 / log 1.1)^2 = 11.2
    ((BETTER, EVEN, (0.9, 1.1, 1.11)), FLAT, "undecided (needs 12 seeds)"),
    ((BETTER, BETTER, (0.99, 1.1, 1.2)), FLAT, "undecided (needs 4 seeds)"),  # more than there are, whatever the law
    ((BETTER, BETTER, (0.9, 1.001, 1.1)), FLAT, "undecided (no effect in sight)"),
])  # fmt: skip
def test_verdicts_by_hand(sizes, slope, said):
    found = {k: dict(zip(("low", "m", "high"), size)) for k, size in zip((1e5, 1e6, 1e7), sizes)}
    assert laws.verdict(found, {"low": slope[0], "high": slope[1], "even": 745909.0}, 3) == said


# -- pictures ---------------------------------------------------------------------------------------------------------


def with_ladder(name, shift, multiplier):
    """A card that has everything the pictures show."""
    made, (base, idea) = card(name, drama=(gap("x", shift), None)), (losses(lambda k: 1.0, 0), losses(multiplier, 1))
    each, found = made["baselines"]["M1"], laws.speedup(base, idea, resamples=50)
    made["baselines"] = {rung: each | {"select": gap("x", shift * left)} for rung, left in (("M0", 1), ("M2", 0.5))}
    law = dict(zip(("E", "A", "alpha"), laws.fit(K, [np.mean(base[k]) for k in K])))
    made["ladder"] = {"M2": {"over": "sizes", "law": law, "losses": {"baseline": base, name: idea}, "verdict": "holds",
                             "speedup": {k: m | {"w": None} for k, m in found.items()}}}  # fmt: skip
    return claims.finite(made)


def boxes_of(figure):
    """Where a figure's texts lie, in pixels, without the lines that lead to them."""
    Text = pytest.importorskip("matplotlib.text").Text
    figure.canvas.draw()
    return [Text.get_window_extent(text) for axes in figure.axes for text in axes.texts]


def test_labels_do_not_collide():
    cards = [with_ladder(f"idea{i}", -0.01 - 0.0005 * i, lambda k: 1.2) for i in range(6)]
    boxes = boxes_of(claims.picture_survival(cards))
    assert len(boxes) == 7  # the baseline is one of them
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    placed = pictures.spread_out([0.0, 0.01, -0.02, 0.011], 0.05)
    assert min(abs(a - b) for a, b in itertools.combinations(placed, 2)) >= 0.05 - 1e-12
    assert list(np.argsort(placed)) == [2, 0, 1, 3]


def test_ladder_and_speedup_show_their_baseline_and_units():
    made = with_ladder("idea", -0.02, lambda k: 1.5)
    figure = claims.picture_ladder(made)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert {"baseline M2", "idea"} <= set(labels) and "nats" in figure.axes[0].get_ylabel()
    figure = claims.picture_speedup([made])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    assert labels == ["baseline", "idea on M2"] and 1 in figure.axes[0].get_yticks()
    shown = figure.axes[0].containers[0].lines[0].get_ydata()
    assert list(shown) == pytest.approx([each["m"] for each in made["ladder"]["M2"]["speedup"].values()])
    assert claims.png(figure)[:4] == b"\x89PNG"


def test_tuning_and_time_show_their_baseline_and_the_best():
    made = with_ladder("idea", -0.02, lambda k: 1.5)
    tried = {"losses": {"0.001": 2.1, "0.0015": 2.0, "0.0016": 2.3, "0.1": None}, "best": 0.0015, "is_bracketed": True,
             "expected_best": [2.1]}  # fmt: skip
    made["baselines"]["M2"] |= {"tuning": {"baseline": tried, "idea": tried | {"is_bracketed": False}}}
    axes = claims.picture_tuning(made).axes[-1]
    assert axes.get_legend_handles_labels()[1] == ["baseline M2", "idea"]
    assert axes.get_title() == "baseline M2 bracketed; idea unbracketed" and "nats" in axes.get_ylabel()
    rings = [line for line in axes.lines if line.get_markersize() == 11]
    assert [list(ring.get_xdata()) for ring in rings] == [[0.0015], [0.0015]]
    assert claims.apart([0.001, 0.0015, 0.0016, 0.1]) == [0.001, 0.0015, 0.1]  # 0.0016 would be written over 0.0015
    slow = with_ladder("slow", 0.02, lambda k: 0.5)  # slower and worse: not named
    figure = claims.picture_time([made, slow])
    named = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(named) == ["baseline", "idea"]
    a, b = boxes_of(figure)
    assert not a.overlaps(b)


def test_what_parameters_alone_are_worth_is_read_off_the_law():
    """1.02 times the parameters at L = E + A K^-alpha: the loss at 1.02 times the tokens, less that at K."""
    made = with_ladder("idea", -0.02, lambda k: 1.2)
    E, A, alpha = (made["ladder"]["M2"]["law"][key] for key in ("E", "A", "alpha"))
    wanted = (E + A * (1.02 * 1e6) ** -alpha) - (E + A * 1e6**-alpha)
    assert claims.size_alone(made, "M2") == pytest.approx(wanted) and wanted < 0
    assert claims.size_alone(made, "M0") is None and f"M2 {wanted:+.4f}" in claims.text_of(made)
