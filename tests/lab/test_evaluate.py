"""lab.evaluate: scores against sums by hand and against the harness's own `hf` model, on tasks that lie in a folder."""

import json
import math
import sys

import pytest
import torch
from torch.nn import functional as F

from data.corpus import build_tokenizer
from helpers import LINES
from lab import evaluate
from model import GPT, DecodingState, GPTConfig
from smoke_test import VARIANTS

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
harness = pytest.importorskip("lab.harness")
Instance = pytest.importorskip("lm_eval.api.instance").Instance
NanoChimeraLM, copied, sampling_of = harness.NanoChimeraLM, harness.copied, harness.sampling_of
write_tokenizer = pytest.importorskip("data.fast_tokenizers").write_tokenizer
pytestmark = pytest.mark.slow

TEXT = "".join(LINES)
QUESTIONS = [
    {"q": "HAMLET: To be, or not to be, that is the", "choices": [" question", " sea", " sleep of shock"], "gold": 0},
    {"q": "It is the east, and", "choices": [" Juliet the sun", " Romeo"], "gold": 1},
    {"q": "Deny thy father and refuse thy", "choices": [" name", " arms", " love", " heart"], "gold": 2},
    {"q": "x", "choices": [" name", " arms and the heart-ache"], "gold": 0},
]  # fmt: skip
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "roll": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}, {metric: word_perplexity}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n", "e t"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
DOCUMENTS = {
    "choose": QUESTIONS,
    "roll": [{"text": line} for line in (TEXT, *LINES[:3])],
    "write": [{"q": q["q"], "a": " question"} for q in QUESTIONS],
}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder with three tasks: YAML, and JSONL beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, yaml in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS[name]), encoding="utf-8")
        head = f"task: own_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}}}\n"
        head += "validation_split: validation\ntest_split: null\nnum_fewshot: 0\nmetadata: {version: 1}\n"
        (folder / f"own_{name}.yaml").write_text(head + yaml.lstrip(), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def small(flags=None, block_size=48, vocab_size=None, **more):
    """(model, tokenizer) over characters, or bytes where there is a vocab_size."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer("char", TEXT + "x") if vocab_size is None else build_tokenizer("byte")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": block_size, "vocab_size": tokenizer.vocab_size}
    model = GPT(GPTConfig(**sizes | (flags or {}) | more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval(), tokenizer


def requests(kind, *args):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(args)]


PAIRS = [(q["q"], choice) for q in QUESTIONS for choice in q["choices"]]
PAIRS += [("", "To be"), (TEXT[:300], " and more"), (TEXT[:300], " or less"), ("ends in a space ", "or two"), ("x", "")]


def by_hand(model, tokenizer, context, continuation):
    """log p(continuation | context) in float64, one forward per pair, the context cut as documented."""
    whole, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context.rstrip(" ")))
    if not start:
        whole, start = [tokenizer.encode("\n")[0] if tokenizer.eot is None else tokenizer.eot, *whole], 1
    n = len(whole) - start
    kept = torch.tensor(whole[-(model.config.block_size + 1) :])[None]
    logits = model(kept[:, :-1], kept[:, 1:])[0][0].double().log_softmax(-1) if n else torch.zeros(1, 1)
    rows, wanted = logits[len(logits) - n :], kept[0, kept.size(1) - n :]
    return sum(rows[i, t].item() for i, t in enumerate(wanted)), all(rows.argmax(-1) == wanted) if n else True


ROWS = ["baseline", "mfs_l4_regions", "short_conv_waves", "bio_adaptive", "sdr", "dfa_grape"]


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_log_likelihoods_by_hand(name):
    """Whatever the batch, and whether a context is read once or for each continuation."""
    model, tokenizer = small(VARIANTS[name])
    want = [by_hand(model.double(), tokenizer, *pair) for pair in PAIRS]
    for batch_size in (1, 3, 64):
        lm = NanoChimeraLM(model, tokenizer, batch_size)
        found = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
        for pair, (score, greedy), (wanted, wanted_greedy) in zip(PAIRS, found, want):
            assert score == pytest.approx(wanted, abs=1e-5) and greedy == wanted_greedy, pair
        assert lm.truncated == 2 + sum(len(a) + len(b) > 49 for a, b in PAIRS[:11])


@torch.no_grad()
def test_a_context_is_read_once():
    model, tokenizer = small()
    lm = NanoChimeraLM(model, tokenizer, 64)
    context = TEXT[:40]
    lm.loglikelihood(requests("loglikelihood", *[(context, c) for c in (" a", " b", " the", " o")]), disable_tqdm=True)
    assert lm.tokens_read == 40 + 1 + 1 + 3 + 1  # in four rows of a batch it would be 4 * 43


def test_a_copied_state_is_its_own():
    model, tokenizer = small(VARIANTS["short_conv_waves"])
    idx = torch.tensor([tokenizer.encode(TEXT[:20])])
    with torch.no_grad():
        state = DecodingState()
        model(idx, state=state)
        one = model(idx[:, :3], state=copied(state))[0]
        assert torch.equal(model(idx[:, :3], state=copied(state))[0], one) and state.pos == 20
        assert torch.equal(model(idx[:, :3], state=state)[0], one)


@torch.no_grad()
def test_whole_texts_by_hand(tmp_path):
    """Windows of block_size, each token once; bits per byte of what was written, not per token."""
    model, tokenizer = small(block_size=32)
    text = TEXT[:150]
    ids = [tokenizer.encode("\n")[0], *tokenizer.encode(text)]
    want, done = 0.0, 0
    while done < len(text):
        n = min(32, len(text) - done)
        window = torch.tensor(ids[max(0, done + n - 32) : done + n + 1])[None]
        log_probs = model(window[:, :-1], window[:, 1:])[0][0].double().log_softmax(-1)
        want += sum(log_probs[t, window[0, t + 1]].item() for t in range(window.size(1) - 1 - n, window.size(1) - 1))
        done += n
    lm = NanoChimeraLM(model, tokenizer, 4)
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), True)[0] == pytest.approx(
        want, abs=1e-3
    )
    bits, size, tokens = lm.bits_per_byte(text)
    assert bits == pytest.approx(-want / math.log(2) / 150, abs=1e-5) and (size, tokens, lm.truncated) == (150, 150, 0)
    umlaut = build_tokenizer("char", "\u00e4\n")
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=2))
    bits, size, tokens = NanoChimeraLM(model, umlaut).bits_per_byte("\u00e4" * 6)
    assert (size, tokens) == (12, 6) and 0 < bits < 1  # one bit per character, two bytes each


def test_texts_are_greedy_and_stop():
    model, tokenizer = small(block_size=16)
    lm = NanoChimeraLM(model, tokenizer, 2)
    contexts = ["To be", "or no", "x", TEXT[:60], ""]
    settings = {"until": ["\n"], "max_gen_toks": 6}
    found = lm.generate_until(requests("generate_until", *[(c, settings) for c in contexts]), disable_tqdm=True)
    for context, text in zip(contexts, found):
        idx = torch.tensor([tokenizer.encode(context)[-10:] or tokenizer.encode("\n")])
        want = tokenizer.decode(model.generate(idx, 6, temperature=0)[0, idx.size(1) :].tolist())
        assert text == want.split("\n")[0]
    assert lm.truncated == 1
    cfg = sampling_of({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "until": "a"})
    assert (cfg.temperature, cfg.top_p, cfg.stop, cfg.top_k, cfg.max_new_tokens) == (0.5, 0.9, ("a",), None, 256)
    with pytest.raises(ValueError, match="num_beams"):
        sampling_of({"num_beams": 4})


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """A small random GPT-2 over bytes, with its tokenizer, as transformers writes it."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=259, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    model.save_pretrained(folder)
    write_tokenizer(build_tokenizer("byte"), folder, 64)
    return folder


def own(words):
    evaluate.main([*map(str, words), "--device=cpu"])


def test_the_same_figures_as_the_harness_has_for_gpt2(gpt2_folder, tasks, tmp_path, capsys):
    from lm_eval.tasks import TaskManager

    names = ["own_choose", "own_roll", "own_write"]
    theirs = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": str(gpt2_folder), "dtype": "float32"}, tasks=names, device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), batch_size=1,
    )  # fmt: skip
    out = tmp_path / "evaluate.json"
    own([f"--init_from={gpt2_folder}", f"--tasks={','.join(names)}", f"--include_path={tasks}", f"--json={out}"])
    assert "own_choose" in capsys.readouterr().out
    ours = json.loads(out.read_text())
    for name in names:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    lm, compared = (
        NanoChimeraLM(*evaluate.sample.load(evaluate.EvaluateConfig(init_from=str(gpt2_folder), tasks="x"))),
        0,
    )
    for sample in (row for name in names for row in theirs["samples"][name]):
        args = [tuple(each) for each in sample["arguments"]]
        found = getattr(lm, kind_of(sample))(requests(kind_of(sample), *args), disable_tqdm=True)
        for got, want in zip(found, sample["resps"], strict=True):
            same(got, want[0])
            compared += 1
    assert compared == sum(len(q["choices"]) for q in QUESTIONS) + 4 + 4


def kind_of(sample):
    answer = sample["resps"][0][0]
    return {str: "generate_until", float: "loglikelihood_rolling"}.get(type(answer), "loglikelihood")


def same(got, want):
    if isinstance(want, str):
        assert got == want
    else:
        torch.testing.assert_close(
            torch.tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-3
        )


def test_a_run_beside_its_results(trained, tasks, tmp_path, capsys):
    """Tasks and a text in one command; JSON in the run's folder."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:200])
    own(
        [
            f"--out_dir={trained}",
            "--tasks=own_choose",
            f"--include_path={tasks}",
            "--limit=2",
            f"--bits_per_byte={text}",
        ]
    )
    out = capsys.readouterr().out
    assert "|own_choose|" in out.replace(" ", "") and "bits per byte (200 bytes, 200 tokens)" in out
    found = json.loads((trained / "evaluate.json").read_text())
    assert found["n-samples"]["own_choose"]["effective"] == 2 and found["asked"]["limit"] == 2
    assert found["text"]["bytes"] == 200 and found["truncated"] > 0 and "lost their first tokens" in out
    model, tokenizer = evaluate.sample.load(evaluate.EvaluateConfig(out_dir=str(trained), tasks="x"))
    bits = NanoChimeraLM(model, tokenizer).bits_per_byte(TEXT[:200])[0]
    assert found["text"]["bits_per_byte"] == pytest.approx(bits)


@pytest.mark.parametrize(
    "words, told",
    [
        ("", "nothing to evaluate"),
        ("--tasks=no_such_task", "no task or group 'no_such_task'"),
        ("--tasks=own_choose --include_path=nowhere", "is no folder"),
        ("--bits_per_byte=nowhere.txt", "no such file"),
        ("--bits_per_byte={folder}/foreign.txt", "cannot be read by this model's tokenizer"),
        ("--bits_per_byte={folder}/empty.txt", "is empty"),
        ("--tasks=own_foreign --include_path={folder}", "cannot be read by this model's tokenizer"),
        ("--tasks=x --out_dir=nowhere", "no such checkpoint"),
        ("--tasks=x --batch_size=0", "batch_size"),
    ],
)
def test_errors_are_one_line(words, told, trained, tasks, tmp_path, capsys):
    (tmp_path / "foreign.txt").write_text("\u0416", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("")
    data = tmp_path / "foreign.jsonl"
    data.write_text(json.dumps({"q": "\u0416", "choices": [" a", " b"], "gold": 0}), encoding="utf-8")
    yaml = (tasks / "own_choose.yaml").read_text().replace("own_choose", "own_foreign")
    (tmp_path / "own_foreign.yaml").write_text(yaml.replace(str(tasks / "choose.jsonl"), str(data)))
    words = words.format(folder=tmp_path).split()
    with pytest.raises(SystemExit, match="2"):
        own([*words, *([] if "--out_dir" in " ".join(words) else [f"--out_dir={trained}"])])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lab.evaluate: error: ") and told in last


def test_without_the_harness(trained, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "lab.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="2"):
        own([f"--out_dir={trained}", "--tasks=x"])
    assert "pip install lm-eval" in capsys.readouterr().err


def test_losses_are_those_of_training(trained):
    """Bits per byte of a text of one window are the loss that train.py would report."""
    model, tokenizer = evaluate.sample.load(evaluate.EvaluateConfig(out_dir=str(trained), tasks="x"))
    text = TEXT[: model.config.block_size]
    idx = torch.tensor([tokenizer.encode("\n" + text)])
    with torch.no_grad():
        logits = model.eval()(idx[:, :-1], all_logits=True)[0]
    loss = F.cross_entropy(logits[0], idx[0, 1:]).item()
    assert NanoChimeraLM(model, tokenizer).bits_per_byte(text)[0] == pytest.approx(loss / math.log(2), rel=1e-5)
