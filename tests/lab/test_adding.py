"""
A new idea touches the places that CONTRIBUTING.md names, and no other: a copy of the repository gets a toy activation,
a toy token mixer and a toy head, each at these places alone, and their contracts, documents and smoke test pass there.
"""

import os
import re
import subprocess
import sys

import pytest

from helpers import PATIENCE, ROOT

pytestmark = pytest.mark.slow

# Where a piece of text goes, by place in CONTRIBUTING.md: (file, the line after which it is inserted; "" = the end)
AT = {
    "flag": ("model.py", "    # -- meta-updates -"),
    "rules": ("model.py", "NEEDS = ("),
    "ranges": ("model.py", "RANGES = {"),
    "MIXERS": ("model.py", "MIXERS = {"),
    "HEADS": ("model.py", "HEADS = {"),
    "smoke row": ("smoke_test.py", "VARIANTS = {"),
    "documentation": ("docs/variants.md", ""),
}

SNAKE = """
# ---------------------------------------------------------------------------------------------------------------------
# Snake: x + sin(x)^2.


def snake(x):
    return x + x.sin().square()


ACTIVATIONS["snake"] = snake
"""
EMA = """
# ---------------------------------------------------------------------------------------------------------------------
# Token mixer: an exponential moving average, y_t = d y_{t-1} + (1 - d) W x_t; x (B, T, C) -> (B, T, C).


class EMAMixer(nn.Module):
    has_ema = True

    def __init__(self, config, layer=0):
        super().__init__()
        self.decay = config.ema_decay
        self.c_value = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, run=ALONE):
        v, store = self.c_value(x), store_of(run.state, self)
        y = gated_scan(torch.full_like(v, self.decay), (1 - self.decay) * v, store.get("last"))
        store["last"] = y[:, -1]
        return self.c_proj(y)

"""
COSINE = """
# ---------------------------------------------------------------------------------------------------------------------
# Head: logits are a learned scale times the cosine between h and each row of the output embedding.


class CosineHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.chunk, self.scale = config.loss_chunk, nn.Parameter(torch.tensor(config.cosine_scale))

    def predict(self, h, context, run, shown, is_chunked):
        h, weight = self.scale * F.normalize(h, dim=-1), F.normalize(run.weight, dim=-1)
        logits = F.linear(h[:, shown], weight.to(h.dtype))
        if not is_chunked:
            return logits, None
        return logits, chunked_cross_entropy(h, weight, run.targets, self.chunk, per_token=True)


"""
CHOICE = 'mlp_act: Literal["gelu", '  # an activation's flag is one more choice of a line that is there
IDEAS = {  # kind: (name, its section, {place: text})
    "activation": ("snake", SNAKE, {
        "flag": 'mlp_act: Literal["snake", "gelu", ',
        "smoke row": '    "snake": {"mlp_act": "snake"},\n',
        "documentation": "\n## Snake: `mlp_act=\"snake\"`\n\nx + sin(x)^2.\n",
        "ablation config": 'mlp_act = "snake"\n',
    }),
    "token mixer": ("ema", EMA, {
        "flag": "    ema_decay: float = 0.9  # decay per token\n",
        "rules": '    ("ema_decay", "an ema layer", lambda c: c.has("has_ema")),\n',
        "ranges": '    "ema_decay": "(0, 1)",\n',
        "MIXERS": '    "ema": EMAMixer,\n',
        "smoke row": '    "ema": {"attn_mode": "ema", "ema_decay": 0.8},\n',
        "documentation": "\n## Moving average: `attn_mode=\"ema\"`, `ema_decay`\n\nA running mean.\n",
        "ablation config": 'attn_mode = "ema"\n',
    }),
    "head": ("cosine", COSINE, {
        "flag": "    use_cosine_head: bool = False  # cosines\n    cosine_scale: float = 8.0  # first scale\n",
        "rules": '    ("cosine_scale", "use_cosine_head", lambda c: c.use_cosine_head),\n',
        "ranges": '    "cosine_scale": "(0, inf)",\n',
        "HEADS": '    "cosine": CosineHead,\n',
        "smoke row": '    "cosine": {"use_cosine_head": True, "loss_chunk": 40},\n',
        "documentation": "\n## Cosine head: `use_cosine_head`, `cosine_scale`\n\nLogits are cosines.\n",
        "ablation config": "use_cosine_head = True\n",
    }),
}  # fmt: skip
SECTIONS = {"activation": "# Geometry: cells", "token mixer": "# A mixer declares", "head": "# A head declares"}


def insert(path, after, text):
    """Put `text` behind the line that starts with `after`, or at the end."""
    old = path.read_text(encoding="utf-8")
    if not after:
        path.write_text(old + text, encoding="utf-8")
        return
    at = [m.end() for m in re.finditer(rf"^{re.escape(after)}.*\n", old, re.MULTILINE)]
    assert len(at) == 1, f"{path.name} has {len(at)} lines that start with {after!r}"
    path.write_text(old[: at[0]] + text + old[at[0] :], encoding="utf-8")


def add(root, kind):
    """Add an idea to the copy: its section in the catalogue, then each place."""
    name, section, places = IDEAS[kind]
    model = (root / "model.py").read_text(encoding="utf-8")
    border = model.index(SECTIONS[kind])
    if kind == "activation":  # before the rule above the next section
        border = model.rindex("# ----", 0, border)
    model = model[:border] + section.lstrip("\n") + "\n" + model[border:]
    if kind == "activation":
        assert model.count(CHOICE) == 1
        model = model.replace(CHOICE, places["flag"])
    (root / "model.py").write_text(model, encoding="utf-8")
    for place, text in places.items():
        if place == "ablation config":
            (root / f"config/ablation/{name}.py").write_text(text, encoding="utf-8")
        elif (kind, place) != ("activation", "flag"):
            insert(root / AT[place][0], AT[place][1], text)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository as it is here, with all three ideas."""
    root = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for file in listed.stdout.splitlines():
        if (ROOT / file).is_file():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes((ROOT / file).read_bytes())
    for kind in IDEAS:
        add(root, kind)
    return root


def run(root, *words):
    """What a command prints in the copy, which must end well."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=env, capture_output=True, text=True, timeout=PATIENCE
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_places_are_those_that_contributing_names():
    """The table of CONTRIBUTING.md has a row per place and a mark where a kind of idea needs it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    start = next(i for i, row in enumerate(rows) if row[0] == "place")
    kinds, named = rows[start][2:], {}
    for row in rows[start + 2 :]:
        if len(row) != len(rows[start]):
            break
        for kind, mark in zip(kinds, row[2:]):
            named.setdefault(kind, set()).update([row[0]] if mark else [])
    same = {
        "ranges": "rules",
        "MIXERS": "table",
        "HEADS": "table",
    }  # one place each: the rules, and the table of classes
    used = {kind: {same.get(place, place) for place in places} for kind, (_, _, places) in IDEAS.items()}
    assert used == named
    counts = {kind: len(places) for kind, places in used.items()}
    assert counts == {"activation": 4, "token mixer": 6, "head": 6}
    for kind, count in counts.items():
        assert f"{kind} {count}" in text


def test_contracts_hold(copy):
    said = run(copy, "-m", "pytest", "tests/contracts", "--variant=snake,ema,cosine", "-p", "no:cacheprovider")
    assert int(re.search(r"(\d+) passed", said)[1]) >= 3 * 15


def test_documents_and_configs_hold(copy):
    run(
        copy,
        "-m",
        "pytest",
        "tests/train/test_docs.py",
        "-p",
        "no:cacheprovider",
        "-k",
        "snake or ema or cosine or flag",
    )
    assert "[needs an ema layer]" in run(copy, "train.py", "--help")


def test_the_smoke_test_has_them(copy):
    assert "3 passed, 0 failed" in run(copy, "smoke_test.py", "--only=snake,ema,cosine")


@pytest.mark.parametrize("flags", ['mlp_act="snake"', 'attn_mode="ema"', "use_cosine_head=True"])
def test_hugging_face_gets_them_with_their_code(copy, flags):
    """GPT-2 does not have them: the exported folder brings the folded model, and that has."""
    pytest.importorskip("transformers")
    code = (
        "from model import GPT, GPTConfig\n"
        f"model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=8, {flags}))\n"
        "model.export_hf('out')\n"
        "print(type(GPT.from_pretrained('out').config), open('out/config.json').read())\n"
    )
    out, name = run(copy, "-c", code), flags.partition("=")[0]
    assert f'"{name}"' in out and "modeling_nanochimera" in out
    assert (copy / "out" / "modeling_nanochimera.py").exists()


@pytest.mark.parametrize("flags, words", [
    ('attn_mode="ema", use_ferope=True', "a layer of attention"),
    ('attn_mode="ema", use_knot_attention=True', "a softmax or sigmoid layer"),
    ('attn_mode="ema", method="fa", tie_weights=False', 'method="bp"'),
    ('attn_mode="ema", htm_meta_strength=0.5', "c_attn"),
    ("use_cosine_head=True, use_mfs_head=True", "keep one"),
    ("ema_decay=0.5", "an ema layer"),
])  # fmt: skip
def test_what_a_class_does_not_declare_it_cannot_do(copy, flags, words):
    code = f"from model import GPTConfig\ntry:\n    GPTConfig({flags})\nexcept ValueError as e:\n    print(e)\n"
    assert words in run(copy, "-c", code)
