"""Every benchmark runs, at toy sizes: ratios are positive numbers, and the last line is JSON."""

import json
import math
from functools import partial

import pytest
import torch

from data import dataset
from lab import attention, bench, measure
from lab.bench import Bench, BenchConfig

pytestmark = pytest.mark.slow

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}


@pytest.fixture
def run(monkeypatch, capsys):
    """run(what, *words, parts={}, rows=[]) -> the results in the JSON line, of one toy round; what was printed."""

    def run(what, *words, parts=None, rows=None):
        if parts:
            there = bench.BENCHES[what]
            how = bench.each(parts) if isinstance(parts, dict) else there.run
            monkeypatch.setitem(bench.BENCHES, what, Bench(how, list(parts), there.rows if rows is None else rows))
        bench.main([what, "--repeats=1", "--memory=False", *map(str, words)])
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


tiny = partial(bench.bench_training, TINY, 2, 1)


def test_step(run):
    rows = [row for row in bench.STEP_ROWS if "compiled" not in row]
    results, _ = run("step", parts={"tiny": tiny}, rows=rows)
    assert names(results["tiny"]) == rows
    assert results["tiny"][0]["speed"] == 1
    assert all(row["tokens_per_s"] == pytest.approx(2 * 32 / row["seconds"]) for row in results["tiny"])


def test_a_config_file_is_a_further_row(run, tmp_path):
    """A variant is measured without an edit of this project."""
    path = tmp_path / "my idea.py"
    path.write_text('out_dir = "x"\nmlp_act = "relu2"\n')
    results, _ = run("heads", path, parts={"tiny": tiny}, rows=["baseline"])
    assert names(results["tiny"]) == ["baseline", f"'{path}'"]
    assert measure.flags_of(f"'{path}' --bias=False") == {"mlp_act": "relu2", "bias": False}


def test_only_takes_the_name_of_a_config(run, monkeypatch):
    """Of config/ablation: beside nanoGPT and the same model without the idea, on the CPU recipe's size."""
    monkeypatch.setattr(bench, "bench_training", lambda size, batch, steps, rows, cfg, device: [size, batch, rows])
    results, _ = run("step", "--only=relu2")
    size, batch, rows = results["relu2"]
    assert (size["n_layer"], size["n_embd"], size["block_size"], batch) == (4, 128, 64, 12)
    assert rows == [bench.REFERENCE, "baseline", "config/ablation/relu2.py --dropout=0"]


def test_rows_are_configs():
    tables = [bench.HEAD_ROWS, bench.RESIDUAL_ROWS, bench.LOCAL_ROWS, bench.EMBEDDING_ROWS, bench.DECODERS]
    tables += [bench.MIXERS, bench.EDGES]
    for row in {row for rows in tables for row in rows} - set(bench.SPECIAL):
        bench.GPTConfig(**bench.COMMON | TINY | {"n_layer": 3} | measure.flags_of(row))
    assert measure.flags_of("baseline") == {}


def test_presets(run, tmp_path):
    path = tmp_path / "toy.py"
    path.write_text("n_layer, n_head, n_embd, block_size = 1, 2, 16, 2048\nbatch_size = 64\nuse_swiglu = True\n")
    preset = partial(bench.bench_config, str(path))
    results, _ = run("step", "--only=toy", parts={"toy": preset}, rows=[])
    assert names(results["toy"]) == [bench.REFERENCE, "baseline", f"{path} --dropout=0"]
    assert results["toy"][0]["tokens_per_s"] == pytest.approx(4096 / results["toy"][0]["seconds"])
    path.write_text("n_layer, n_head, n_embd = 12, 12, 768\n")
    assert preset([], BenchConfig(), "cpu") is None  # too large, unless it is asked for


@pytest.mark.parametrize("what", ["heads", "residual", "local", "embeddings"])
def test_variants_of_a_training_step(run, what):
    rows = [row.replace("mfs", "mfs --mfs_layers=2") for row in bench.BENCHES[what].rows]
    results, printed = run(what, parts={"tiny": tiny}, rows=rows)
    skipped = {line.split(": skipped")[0] for line in printed.splitlines() if ": skipped" in line}
    assert set(names(results["tiny"])) | skipped == set(rows)


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
    assert ratios["baseline"] == ratios["baseline --loss_chunk=256"] == 1 < ratios["mfs"]


def test_decode(run):
    parts = {
        "tiny": partial(bench.bench_writing, TINY),
        "far": partial(bench.bench_far, TINY, 16, 64),
        "state": partial(bench.bench_state, TINY, 64),
    }
    results, _ = run("decode", "--tokens=4", parts=parts)
    assert len(results["tiny"]) == 1 + 2 * len(bench.DECODERS)
    assert set(results["far"]) == set(bench.DECODERS) - {"knots"}
    assert results["state"]["fhn"]["bytes"] == 3 * 4 * 32  # the last key and two fields, whatever the length
    assert results["state"]["baseline"]["bytes"] >= results["state"]["baseline"]["cache_bytes"]


def test_a_token_far_out_is_read_where_it_says():
    model, state = bench.after(40, TINY | {"block_size": 64}, "cpu")
    assert state.pos == 40 and model.config.pos_embedding == "none"


def test_mlp(run):
    parts = {
        "tiny": partial(bench.bench_mixers, 16, (2, 8)),
        "edges": partial(bench.bench_edges, 8, 16, 4),
        "events": partial(bench.bench_events, 32),
    }
    results, _ = run("mlp", parts=parts)
    parameters = {row["name"]: row["parameters"] for row in results["tiny"]}
    assert parameters["baseline"] == parameters["relu2"] == 8 * 16 * 16
    assert len(results["events"]) == 6


def test_contenders_for_wavelets_and_events_compute_the_same():
    torch.manual_seed(0)
    x, (w, a, b) = torch.randn(4, 8), torch.randn(3, 16, 8)
    assert torch.allclose(bench.edges_reference(x, w, a, b, "mex"), bench.wavelet_edges(x, w, a, b, "mex"), atol=1e-5)
    layer = bench.SparseEventLayer(32, bench.GPTConfig(use_bio_mlp=True, **bench.COMMON))
    x, mask = torch.randn(1, 1, 32), (torch.rand(1, 1, 32) < 0.3).float()
    dense = measure.without_grad(torch.nn.functional.linear, mask * x, layer.T.t(), layer.bias)()
    assert torch.allclose(measure.without_grad(layer.read_active, mask * x, mask)(), dense, atol=1e-5)


def test_attention(run, monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(attention, "ROOT", tmp_path)
    without_flex = {name: how for name, how in attention.ATTENTIONS.items() if "Flex" not in name}
    short = {name: (*how, 64 if longest < 2**16 else 128) for name, (*how, longest) in without_flex.items()}
    monkeypatch.setattr(attention, "ATTENTIONS", short)
    results, _ = run("attention", "--plot", parts=["64", "128"])
    assert set(results["seconds"][attention.DENSE]) == {"64"}
    assert set(results["seconds"][attention.WAVES]) == {
        "64",
        "128",
    }
    assert results["faster"][attention.DENSE]["64"]["speed"] == 1
    assert all("backward" in name for name in results["faster"])
    assert {p.name for p in (tmp_path / "docs/img").iterdir()} == {"attention.png", "routing.png"}


def test_every_attention_is_causal_and_reaches_every_input():
    for name, (make, with_backward, _) in attention.ATTENTIONS.items():
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
    assert attention.exponent({512: 7.0, 1024: 1.0, 2048: 4.0, 4096: 16.0}) == pytest.approx(2)
    assert attention.exponent({512: 7.0, 1024: 1.0}) is None


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
    rows = measure.speeds({"reference": [1.0, 2.0, 4.0], "other": [0.5, 1.0, 8.0]})
    assert [row["speed"] for row in rows] == [1, 2]
    assert rows[1]["low"] < 2 and rows[1]["high"] == 2


def test_memory_is_that_of_a_fresh_process():
    contender = partial(bench.edge_run, bench.edges_reference, 64, 256, 512, "cpu")
    found = measure.in_fresh_process(measure.peak_memory, contender, "cpu")
    assert found > 2 * 4 * 512 * 256 * 64 / 2**20  # of the naive layer: some (tokens, out, in) tensors


@pytest.mark.parametrize(
    "words",
    [["mlp", "--only=nothing"], ["nothing"], ["step", "--repeats=0"], ["heads", "no.py"], ["recipe", "config/demo.py"]],
)
def test_refuses_in_one_line_what_it_does_not_know(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(words)
    error = capsys.readouterr().err
    assert error.startswith("lab.bench: error: ") and error.count("\n") == 1


def test_the_history_says_what_became_slower(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "HISTORY", tmp_path / "results" / "bench.jsonl")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results.md")
    here = {"cpu": "a CPU", "cores": 2, "threads": 1, "gpu": None}

    waves = {"waves": {"1024": {"speed": 2.0, "low": 1.9, "high": 2.1}}}

    def rows(speed):
        ours = {"name": "ours", "speed": speed, "low": speed - 0.1, "high": speed + 0.1, "seconds": 1.0}
        return {"cpu": [ours], "faster": waves, "exponents": {"waves": 1.0}}

    bench.record("step", "auto", rows(1.5), here)
    bench.record("step", "auto", rows(1.55), here)  # within the quartiles
    bench.record("step", "auto", rows(1.0), here | {"threads": 2})  # another machine
    assert "slower" not in capsys.readouterr().out
    bench.record("step", "auto", rows(1.0), here)
    said = capsys.readouterr().out
    assert said.startswith("slower: cpu / ours: 1.00x, 1.55x on 20") and said.count("slower") == 1
    lines = [json.loads(line) for line in bench.HISTORY.read_text().splitlines()]
    assert len(lines) == 4 and lines[0]["speeds"] == {
        "cpu / ours": [1.5, 1.4, 1.6], "faster / waves / 1024": [2.0, 1.9, 2.1]
    }  # fmt: skip
    bench.record("step", "auto", rows(3.0), here)
    assert "faster: cpu / ours: 3.00x, 1.00x" in capsys.readouterr().out
    text = bench.RESULTS.read_text()
    assert text.startswith("<!-- speeds:start -->") and "a CPU, 1 thread(s)" in text
    assert (
        "- cpu: ours 3.00 (2.90 to 3.10)\n- faster: waves / 1024 2.00 (1.90 to 2.10)" in text
    )  # the last record alone
