"""GPTConfig's rules: every flag has a type and an interval, is refused outside of them, and where it does nothing."""

import math
import typing
from dataclasses import fields

import numpy as np
import pytest
import torch

from configurator import inside
from model import CONFLICTS, MIXERS, NEEDS, RANGES, GPTConfig

TYPES = {f.name: typing.get_type_hints(GPTConfig)[f.name] for f in fields(GPTConfig)}
DEFAULTS = {f.name: f.default for f in fields(GPTConfig)}
INTERVALS = {name: interval for names, interval in RANGES.items() for name in names.split()}
WRONG = {  # by type: values that it does not hold
    int: [2.5, True, math.nan, "3", None, [3], math.inf],
    float: [True, "3", None, math.nan],
    bool: ["False", 1, 0.0, None],
    str: [3, None, True],
}
CHOICES = [name for name, kind in TYPES.items() if typing.get_args(kind)]


def refusal(**flags):
    """What the one line says."""
    with pytest.raises(ValueError) as error:
        GPTConfig(**flags)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_every_number_has_an_interval():
    assert INTERVALS.keys() == {name for name, kind in TYPES.items() if kind in (int, float)}
    assert all(inside(DEFAULTS[name], interval) for name, interval in INTERVALS.items())


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind in WRONG])
def test_values_of_other_types(name):
    for value in WRONG[TYPES[name]]:
        text = refusal(**{name: value})
        assert f"{name}={value!r}" in text and TYPES[name].__name__ in text or f"{name}={value!r}: must be in" in text
        assert INTERVALS.get(name, "") in text


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for value in ("nonsense", 3, None, True):
        text = refusal(**{name: value})
        assert f"{name}={value!r}" in text and all(choice in text for choice in typing.get_args(TYPES[name]))


@pytest.mark.parametrize("name", INTERVALS)
def test_values_outside_the_interval(name):
    low, high = (float(end.replace("^", "**")) for end in INTERVALS[name][1:-1].split(","))
    step = 1 if TYPES[name] is int else 1e-3
    outside = [low if INTERVALS[name][0] == "(" else low - step] if low > -math.inf else []
    outside += [high if INTERVALS[name][-1] == ")" else high + max(step, 1e-3 * high)] if high < math.inf else []
    for value in [*outside, math.inf, -math.inf]:
        value = int(value) if TYPES[name] is int and math.isfinite(value) else value
        text = refusal(**{name: value})
        assert name in text and repr(value) in text and INTERVALS[name] in text


def test_integers_of_other_libraries_become_int():
    c = GPTConfig(
        n_layer=np.int64(3), n_head=torch.tensor(4), n_embd=np.int32(8), dropout=np.float32(0.5), bias=np.True_
    )
    assert [type(x) for x in (c.n_layer, c.n_head, c.n_embd, c.dropout, c.bias)] == [int, int, int, float, bool]
    assert (c.n_layer, c.n_head, c.n_embd, c.dropout, c.bias) == (3, 4, 8, 0.5, True)
    assert GPTConfig(dropout=0).dropout == 0.0


# A configuration in which a need of the plain model is not met, by what is needed
OFF = {
    'norm="layer"': {"norm": "rms"},
    "a layer with values (c_attn)": {"attn_mode": "bare"},
    'dfa_feedback="matrix"': {"method": "dfa", "tie_weights": False, "dfa_feedback": "skip"},
    "a softmax layer": {"attn_mode": "sigmoid"},
    "the plain MLP": {"use_swiglu": True},
    'mlp_act="gelu"': {"mlp_act": "relu2"},
    "a layer of attention": {"attn_mode": "fhn"},
    "a softmax or sigmoid layer (kaufmann has knots anyway)": {"attn_mode": "fhn"},
    'ferope_freqs="log"': {"use_ferope": True, "ferope_freqs": "gaussian"},
    'fhn_dynamics="fhn"': {"attn_mode": "fhn", "fhn_dynamics": "linear"},
    'sdr_rule="hebb" or "willshaw"': {"use_sdr": True, "sdr_rule": "delta"},
    "a memory (sdr_rule)": {"use_sdr": True, "sdr_rule": "none"},
    'bio_lateral="concat" or "nonlinear"': {"use_bio_mlp": True, "bio_compartments": 4, "bio_lateral": "none"},
    "a gate (here neurons spike)": {"use_bio_mlp": True, "bio_spiking": True},
    'hc_mode="mhc"': {"use_mhc": True, "hc_mode": "hc"},
    "cells of their own (here anchors make them)": {"use_block_sparse": True, "use_knot_attention": True},
}


def another(name):
    """A value that the flag accepts besides its default."""
    default, kind = DEFAULTS[name], TYPES[name]
    if typing.get_args(kind):
        return next(choice for choice in typing.get_args(kind) if choice != default)
    if kind is bool:
        return not default
    if kind is str:
        return {"short_conv_at": "a", "region_feedback_edges": "0>1"}[name]
    tries = (default + 1, default - 1, default / 2 + 0.1, default * 0.9, 0.3)
    return next(kind(v) for v in tries if kind(v) != default and inside(kind(v), INTERVALS[name]))


@pytest.mark.parametrize("flags, switch, is_on", NEEDS, ids=[row[1] for row in NEEDS])
def test_a_flag_is_refused_where_it_does_nothing(flags, switch, is_on, monkeypatch):
    monkeypatch.setitem(MIXERS, "bare", type("Bare", (), {}))  # a mixer that declares nothing
    around = OFF.get(switch, {})
    assert not is_on(GPTConfig(**around)), "this row is met by the plain model: OFF needs an entry for it"
    for name in flags.split():
        if name == "ferope_anchor_relative":  # switches use_ferope on by itself
            assert GPTConfig(**around | {name: True}).use_ferope
            continue
        text = refusal(**around | {name: another(name)})
        assert text == f"{name}={another(name)} does nothing without {switch}: set that too"


def test_switches_say_what_needs_says():
    switches = GPTConfig.switches()
    assert switches["mhc_streams"] == "use_mhc" and "use_mhc" in switches["mhc_sinkhorn_iters"]
    assert switches.keys() == {name for flags, _, _ in NEEDS for name in flags.split()} <= DEFAULTS.keys()


def test_conflicts_name_flags_that_exist():
    values = vars(GPTConfig()) | {"head_dim": 64}
    for _, text in CONFLICTS:
        assert "{" not in text.format_map(values)  # KeyError for a flag that does not exist


def test_an_unknown_mixer():
    for flags in ({"attn_mode": "nonsense"}, {"attn_pattern": "fhn,nonsense"}):
        text = refusal(**flags)
        assert "nonsense" in text and "kaufmann" in text
