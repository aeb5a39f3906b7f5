"""Every benchmark runs, at toy sizes: ratios are positive numbers, and the last line is JSON."""

import json
import math
import sys
from functools import partial

import pytest
import torch

import bench
from bench import BenchConfig
from data import dataset

pytestmark = pytest.mark.slow

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}


@pytest.fixture
def run(monkeypatch, capsys):
    """run(what, *flags, parts={}) -> the results in the JSON line, of one round at toy sizes, and what was printed."""

    def run(what, *flags, parts=None):
        if parts:
            chosen = bench.each(parts) if what != "attention" else bench.bench_attention
            monkeypatch.setitem(bench.BENCHES, what, (chosen, parts))
        monkeypatch.setattr(sys, "argv", ["bench.py", what, "--repeats=1", "--memory=False", *flags])
        bench.main()
        printed = capsys.readouterr().out
        line = json.loads(printed.splitlines()[-1], parse_constant=pytest.fail)
        assert line["bench"] == what
        assert line["results"]
        check(line["results"])
        return line["results"], printed

    return run


def check(results):
    """Every number in the results is positive and finite."""
    if isinstance(results, dict | list):
        for value in results.values() if isinstance(results, dict) else results:
            check(value)
    elif isinstance(results, int | float) and not isinstance(results, bool):
        assert math.isfinite(results) and results >= 0


def names(rows):
    return [row["name"] for row in rows]


def rows_of(rows):
    return partial(bench.bench_training, rows, TINY, 2, 1)


def test_step(run):
    rows = {name: row for name, row in bench.STEP_ROWS.items() if "compiles" not in row}
    results, _ = run("step", parts={"tiny": rows_of(rows)})
    assert names(results["tiny"]) == list(rows)
    assert results["tiny"][0]["speed"] == 1
    assert all(row["tokens_per_s"] == pytest.approx(2 * 32 / row["seconds"]) for row in results["tiny"])


def test_presets(run, tmp_path):
    path = tmp_path / "toy.py"
    path.write_text("n_layer, n_head, n_embd, block_size = 1, 2, 16, 2048\nbatch_size = 64\nuse_swiglu = True\n")
    preset = partial(bench.bench_preset, path)
    results, _ = run("step", "--only=toy", parts={"toy": preset})
    assert names(results["toy"]) == [bench.REFERENCE, "ours, ideas off", "preset toy"]
    assert results["toy"][0]["tokens_per_s"] == pytest.approx(4096 / results["toy"][0]["seconds"])
    path.write_text("n_layer, n_head, n_embd = 12, 12, 768\n")
    assert preset(BenchConfig(), "cpu") is None  # too large, unless it is asked for


@pytest.mark.parametrize("what", ["heads", "residual", "local", "embeddings"])
def test_variants_of_a_training_step(run, what):
    tables = {"heads": bench.HEAD_ROWS, "residual": bench.RESIDUAL_ROWS, "local": bench.LOCAL_ROWS}
    table = (tables | {"embeddings": bench.EMBEDDING_ROWS})[what]
    table = {name: row | ({"mfs_layers": 2} if "use_mfs_head" in row else {}) for name, row in table.items()}
    results, printed = run(what, parts={"tiny": rows_of(table)})
    skipped = {line.split(": skipped")[0] for line in printed.splitlines() if ": skipped" in line}
    assert set(names(results["tiny"])) | skipped == set(table)


def test_the_packages_streams_are_what_it_says():
    pytest.importorskip("hyper_connections")
    torch.manual_seed(0)
    model = bench.GPT(bench.GPTConfig(**TINY | bench.COMMON))
    streams = bench.PackageStreams(model.transformer.h, 32, "hc", 3)
    assert len(streams.parts) == 2 * TINY["n_layer"]
    x = torch.randn(2, 8, 32)
    assert streams.expand(x).shape == (6, 8, 32) and streams(x).shape == x.shape


def test_head_flops(run, monkeypatch):
    monkeypatch.setattr(bench, "GPT2", bench.GPT2 | {"n_layer": 3})
    results, _ = run("heads", "--only=flops")
    ratios = {name: row["ratio"] for name, row in results["flops"].items()}
    assert ratios["linear"] == ratios["linear, loss_chunk"] == 1 < ratios["MFS"]


def test_decode(run):
    parts = {
        "tiny": partial(bench.bench_writing, TINY),
        "far": partial(bench.bench_far, TINY, 16, 64),
        "state": partial(bench.bench_state, TINY, 64),
    }
    results, _ = run("decode", "--tokens=4", parts=parts)
    assert len(results["tiny"]) == 1 + 2 * len(bench.DECODERS)
    assert set(results["far"]) == set(bench.FAR_DECODERS)
    assert results["state"]["waves"]["bytes"] == 3 * 4 * 32  # the last key and two fields, whatever the length
    assert results["state"]["softmax"]["bytes"] >= results["state"]["softmax"]["cache_bytes"]


def test_a_token_far_out_is_read_where_it_says():
    model, state = bench.after(40, TINY | {"block_size": 64}, "cpu")
    assert state.pos == 40 and model.config.pos_embedding == "none"


def test_mlp(run):
    parts = {
        "tiny": partial(bench.bench_mixers, bench.MIXERS | bench.EDGES, 16, (2, 8)),
        "edges": partial(bench.bench_edges, 8, 16, 4),
        "events": partial(bench.bench_events, 32),
    }
    results, _ = run("mlp", parts=parts)
    parameters = {row["name"]: row["parameters"] for row in results["tiny"]}
    assert parameters["MLP, GELU"] == parameters["MLP, ReLU^2"] == 8 * 16 * 16
    assert len(results["events"]) == 6


def test_contenders_for_wavelets_and_events_compute_the_same():
    torch.manual_seed(0)
    x, (w, a, b) = torch.randn(4, 8), torch.randn(3, 16, 8)
    assert torch.allclose(bench.edges_reference(x, w, a, b, "mex"), bench.wavelet_edges(x, w, a, b, "mex"), atol=1e-5)
    layer = bench.SparseEventLayer(32, bench.GPTConfig(use_bio_mlp=True, **bench.COMMON))
    x, mask = torch.randn(1, 1, 32), (torch.rand(1, 1, 32) < 0.3).float()
    dense = bench.quietly(torch.nn.functional.linear, mask * x, layer.T.t(), layer.bias)()
    assert torch.allclose(bench.quietly(layer.read_active, mask * x, mask)(), dense, atol=1e-5)


def test_attention(run, monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    without_flex = {name: how for name, how in bench.ATTENTIONS.items() if "Flex" not in name}
    short = {name: (*how, 64 if longest < 2**16 else 128) for name, (*how, longest) in without_flex.items()}
    monkeypatch.setattr(bench, "ATTENTIONS", short)
    results, _ = run("attention", "--plot", parts=["64", "128"])
    assert set(results["seconds"][bench.DENSE]) == {"64"} and set(results["seconds"][bench.WAVES]) == {"64", "128"}
    assert results["faster"][bench.DENSE]["64"]["speed"] == 1
    assert all("backward" in name for name in results["faster"])
    assert {p.name for p in (tmp_path / "docs/img").iterdir()} == {"attention.png", "routing.png"}


def test_every_attention_is_causal_and_reaches_every_input():
    for name, (make, with_backward, _) in bench.ATTENTIONS.items():
        if "Flex" in name or not with_backward:
            continue
        torch.manual_seed(0)
        mix, inputs, *parameters = make(64, "cpu")
        leaves = [x.requires_grad_() for x in inputs]
        y = mix(*leaves)
        time = 1 if y.dim() == 3 else 2
        grads = torch.autograd.grad(y.narrow(time, 0, 32).square().sum(), [*leaves, *parameters])
        for x, g in zip(leaves, grads):
            if x.dim() == y.dim():
                assert g.narrow(time, 32, 32).abs().max() == 0 < g.narrow(time, 0, 32).abs().max(), name


def test_exponent():
    assert bench.exponent({512: 7.0, 1024: 1.0, 2048: 4.0, 4096: 16.0}) == pytest.approx(2)
    assert bench.exponent({512: 7.0, 1024: 1.0}) is None


def test_recipe(run, shakespeare, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(shakespeare.parent)
    monkeypatch.setattr(dataset, "ROOT", tmp_path)
    results, _ = run("recipe", "--seeds=1", "--max_iters=1")
    losses = results["cpu"]["means"]
    assert 2 < losses["ours"] == pytest.approx(losses[bench.REFERENCE], abs=1)


def test_kernels(run, monkeypatch):
    pytest.importorskip("triton")
    from kernels import aot, scan_triton

    first = list(scan_triton.aot_rows(False))[:1]
    monkeypatch.setattr(scan_triton, "aot_rows", lambda full: first)
    monkeypatch.setattr(aot, "SHARED_LIMIT", {90: aot.SHARED_LIMIT[90]})
    results, _ = run("kernels", "--only=scan")
    (row,) = results["scan"]["compiled"]
    assert row["fits"] and row["registers"] > 0
    assert all(1 <= way["ratio"] < 1.01 for way in results["scan"]["bytes"].values())


def test_speeds_are_ratios_of_the_same_round():
    rows = bench.speeds({"reference": [1.0, 2.0, 4.0], "other": [0.5, 1.0, 8.0]})
    assert [row["speed"] for row in rows] == [1, 2]
    assert rows[1]["low"] < 2 and rows[1]["high"] == 2


def test_memory_is_that_of_a_fresh_process():
    contender = partial(bench.edge_run, bench.edges_reference, 64, 256, 512, "cpu")
    found = bench.in_fresh_process(bench.peak_memory, contender, "cpu")
    assert found > 2 * 4 * 512 * 256 * 64 / 2**20  # of the naive layer: some (tokens, out, in) tensors


@pytest.mark.parametrize("words", [["mlp", "--only=nothing"], ["nothing"], ["step", "--repeats=0"]])
def test_refuses_in_one_line_what_it_does_not_know(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert capsys.readouterr().err.count("\n") == 1


def test_recall_texts():
    """Each pair is told in the first quarter and asked for in the last, where its value is the only target."""
    texts, targets = bench.recall_texts(32, torch.Generator().manual_seed(0))
    quarter = bench.TEXT // 4
    assert texts.shape == targets.shape == (32, bench.TEXT)
    for text, target in zip(texts, targets):
        told = {int(text[i]): int(text[i + 1]) for i in range(quarter) if text[i] < bench.KEYS}
        at = (target >= 0).nonzero().flatten().tolist()
        assert len(told) == len(at) == bench.PAIRS and min(at) >= 3 * quarter
        assert {int(text[i]): int(target[i]) for i in at} == told == {int(text[i]): int(text[i + 1]) for i in at}
        assert all(bench.KEYS <= value < 2 * bench.KEYS for value in told.values())
        assert (text[quarter : 3 * quarter] >= 2 * bench.KEYS).all()


def test_recall_runs():
    shares = bench.bench_recall(
        bench.BenchConfig(seeds=1, max_iters=1), "cpu", ["block-sparse", "block-sparse, sdr, delta"]
    )
    assert all(len(values) == 1 and 0 <= values[0] <= 0.1 for values in shares.values())
