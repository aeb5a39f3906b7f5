"""
One idea in one file: the model folded for the flags of a config, as PyTorch that needs nothing else from here.

    python -m lab.specialise config/presets/waves.py > waves_model.py
    python -m lab.specialise config/presets/chimera.py --out=chimera_model.py
    python -m lab.specialise config/presets/chimera.py --n_layer=6 --kernels=reference  # imports kernels/, shorter

Constants are in, branches that they decide are gone, and so is whatever the model does not use. The file has `GPT`,
whose checkpoints are those of model.py for these flags and whose logits are the same to the last bit, and `GPTConfig`
with the flags. Its docstring has a training loop. Kernels are inlined as they run on a CPU; there, and on a GPU too,
they are PyTorch alone. How it is done: lab/folding.py.
"""

import ast
import collections
import functools
import hashlib
import io
import pickle
import re
import shutil
import subprocess
import sys
import tokenize
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import configurator
import model
from configurator import ROOT, ConfigError
from lab.folding import bound, defined, fold, is_config, is_plain, literal, loads, read, shorten, walk
from model import GPTConfig
from train import TrainConfig


@dataclass
class SpecialiseConfig:
    """What to write."""

    # -- specialise ---------------------------------------------------------------------------------------------------
    out: str = ""  # the file; empty = standard output
    kernels: Literal["inline", "reference"] = "inline"  # copy what is used of kernels/ | import it

    def __post_init__(self):
        configurator.check_values(self, {})


ROOTS = {"model.GPT", "model.GPT.forward", "model.GPT.generate", "model.GPT.configure_optimizers"}
LEFT_OUT = {
    "configure_optimizers": "muon",
    "forward": "all_logits",
}  # function: the argument that the written file does not have
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
RULE = "# " + 117 * "-"
COMMENT, ABOVE = "§comment§", "§above§"  # statements that stand for comments until the text is written

LOOP = '''"""
nanoChimera folded for the flags in `GPTConfig` below, by `python -m lab.specialise`; it needs PyTorch alone.

    import torch
    from {name} import GPT, GPTConfig

    config, batch_size, steps = GPTConfig(), 12, 2000
    tokens = torch.randint(config.vocab_size, (100_000,))  # your text: token ids, one after the other
    model = GPT()  # or: model.load_state_dict(torch.load("ckpt.pt")["model"])
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.99), device_type="cpu")
    for step in range(steps):
        starts = torch.randint(len(tokens) - config.block_size, (batch_size, 1))
        rows = tokens[starts + torch.arange(config.block_size + 1)]
        logits, loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(step, loss.item())
    print(model.generate(tokens[None, :8], max_new_tokens=100))
"""
'''


# ---------------------------------------------------------------------------------------------------------------------
# Reading: modules as lists of statements whose global names are unique.


class Renamer(ast.NodeTransformer):
    """Global names of a module, as `names` has them; a name that a function binds is its own. `modules`: by alias."""

    def __init__(self, names, modules):
        self.names, self.modules, self.local = names, modules, [set()]

    def visit_Name(self, node):
        if node.id in self.names and not any(node.id in names for names in self.local):
            node.id = self.names[node.id]
        return node

    def visit_Attribute(self, node):
        if isinstance(node.value, ast.Name) and node.value.id in self.modules and len(self.local) >= 1:
            return ast.Name(f"{self.modules[node.value.id]}.{node.attr}", node.ctx)
        return self.generic_visit(node)

    def inside(self, node, parts):
        self.local.append({name for p in parts for name in own_bound(p)})
        for p in parts:
            self.visit(p)
        self.local.pop()
        return node

    def visit_FunctionDef(self, node):
        if len(self.local) == 1:
            node.name = self.names.get(node.name, node.name)
        for part in node.decorator_list + node.args.defaults + [d for d in node.args.kw_defaults if d]:
            self.visit(part)
        for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs:
            argument.annotation = argument.annotation and self.visit(argument.annotation)
        node.returns = node.returns and self.visit(node.returns)
        return self.inside(node, [node.args, *node.body])

    def visit_Lambda(self, node):
        return self.inside(node, [node.args, node.body])

    def visit_GeneratorExp(self, node):
        return self.inside(node, [*node.generators, *([node.key, node.value] if hasattr(node, "key") else [node.elt])])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp

    def visit_ClassDef(self, node):
        node.name = self.names.get(node.name, node.name)
        for part in node.bases + node.decorator_list:
            self.visit(part)
        self.local.append({t.id for s in node.body if isinstance(s, ast.Assign) for t in s.targets if hasattr(t, "id")})
        node.body = [self.member(s) for s in node.body]
        self.local.pop()
        return node

    def member(self, statement):
        return self.visit(statement)


def own_bound(node):
    """The names that a node binds in its own scope, not those of functions and comprehensions inside."""
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return set()
    own = {node.arg} if isinstance(node, ast.arg) else set()
    own |= {node.name} if isinstance(node, ast.ExceptHandler) and node.name else set()
    own |= {node.id} if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) else set()
    return own.union(*map(own_bound, ast.iter_child_nodes(node)))


class Stripped(ast.NodeTransformer):
    """No `config` as a parameter or an argument: what reads it is folded. GPT keeps one of its own."""

    def visit_FunctionDef(self, node):
        a, dropped = node.args, {"config", LEFT_OUT.get(node.name)}
        gone = LEFT_OUT.get(node.name)
        if gone:
            node.body = [Given(gone).visit(s) for s in node.body]
        first = len(a.args) - len(a.defaults)
        a.defaults = [d for p, d in zip(a.args[first:], a.defaults) if p.arg not in dropped]
        a.args = [p for p in a.args if p.arg not in dropped]
        return self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        node.args = [a for a in node.args if not is_config(a)]
        return node

    def visit_Assign(self, node):
        self.generic_visit(node)
        if isinstance(node.value, ast.Tuple) and any(
            isinstance(e, ast.Name) and e.id == "config" for e in node.value.elts
        ):
            made = ast.Call(ast.Name("GPTConfig", ast.Load()), [], [])
            node.value.elts = [made if isinstance(e, ast.Name) and e.id == "config" else e for e in node.value.elts]
        return node


class Given(ast.NodeTransformer):
    """None in place of an argument."""

    def __init__(self, name):
        self.name = name

    def visit_Name(self, node):
        return ast.Constant(None) if node.id == self.name else node


def read_module(name):
    """The statements of a module of this checkout, such as "kernels.scan", their global names made unique."""
    return pickle.loads(pickled_module(name))


@functools.cache
def pickled_module(name):
    """The same as bytes: each use changes them."""
    text = path_of(name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    add_comments(tree, text)
    names, modules, body = {}, {}, []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "kernels":
            modules |= {a.asname or a.name: f"kernels.{a.name}" for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("kernels."):
            names |= {a.asname or a.name: origin(node.module, a.name) for a in node.names}
        else:
            body.append(node)
            if not isinstance(node, ast.Import | ast.ImportFrom):
                names |= {n: f"{name}.{n}" for n in defined(node)}
    headers = model_headers(text) if name == "model" else {0: kernel_header(name, tree)}
    renamer, found = Renamer(names, modules), []
    for node in body[1:]:  # without the docstring
        node.header = headers[max(line for line in headers if line <= node.lineno)]
        found.append(node if isinstance(node, ast.Import | ast.ImportFrom) else Stripped().visit(renamer.visit(node)))
    counts = collections.Counter(node.header for node in found)
    for node in found:
        node.share = counts[node.header]  # statements in the section
    return pickle.dumps([plain_function(node, found) for node in found if not is_registration(node)])


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


@functools.cache
def origin(module, name):
    """The unique name of what a module of kernels/ calls `name`, which may have it from another one."""
    for node in ast.parse(path_of(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kernels."):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return origin(node.module, alias.name)
    return f"{module}.{name}"


def model_headers(text):
    """{line: header}: the comment after each dashed rule."""
    lines, found = text.splitlines(), {0: ""}
    for i, line in enumerate(lines):
        if line.startswith("# -----"):
            end = next(j for j in range(i + 1, len(lines)) if not lines[j].startswith("#"))
            found[i + 1] = "\n".join(lines[i + 1 : end])
    return found


def kernel_header(name, tree):
    """The first paragraph of a kernel's docstring, as a comment."""
    paragraph = (ast.get_docstring(tree) or "").split("\n\n")[0]
    return "\n".join(f"# {line}" for line in f"{name.replace('.', '/')}.py: {paragraph}".splitlines())


def add_comments(tree, text):
    """Keep with each statement the comment that ends its line, and those on lines of their own right above it."""
    comments, own = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            is_own = not token.line[: token.start[1]].strip()
            (own if is_own else comments)[token.start[0]] = token.string
    for node in walk(tree):
        if isinstance(node, ast.stmt):
            head = getattr(node, "test", None) or getattr(node, "iter", None) or node
            comment = "" if isinstance(node, ast.ClassDef | ast.FunctionDef) else comments.get(head.end_lineno, "")
            node.comment = "" if comment.startswith("# fmt") else comment
            lines, line = [], node.lineno - 1
            while line in own and node.col_offset:
                lines.insert(0, own[line])
                line -= 1
            node.above = [] if any("---" in x for x in lines) else lines


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's custom operators, which exist for compilers and for CUDA, as plain functions with a backward.


def is_registration(node):
    """Whether a statement tells a compiler about an operator."""
    decorators = getattr(node, "decorator_list", [])
    return any(isinstance(d, ast.Attribute) and d.attr == "register_fake" for d in decorators)


def registered(node):
    """The operator's name of a statement OPERATOR.register_autograd(...), or None."""
    call = node.value if isinstance(node, ast.Expr) else None
    is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    return call.func.value.id if is_call and call.func.attr == "register_autograd" else None


def plain_function(node, others):
    """An operator without its decorator; its registration as an autograd.Function, whose `apply` others call."""
    if isinstance(node, ast.FunctionDef):
        node.decorator_list = [d for d in node.decorator_list if "custom_op" not in ast.unparse(d)]
    if (operator := registered(node)) is None:
        return node
    module, _, own = operator.rpartition(".")
    name = f"{module}.{''.join(part.title() for part in own.split('_'))}"
    for other in others:
        Applied(operator, name).visit(other)
    setup = {k.arg: k.value for k in node.value.keywords}["setup_context"]
    parts = {"forward": ast.Name(operator, ast.Load()), "setup_context": setup, "backward": node.value.args[0]}
    made = ast.ClassDef(name, [ast.parse("torch.autograd.Function", mode="eval").body], [], [], [])
    for key, value in parts.items():
        static = ast.Call(ast.Name("staticmethod", ast.Load()), [value], [])
        made.body.append(ast.Assign([ast.Name(key, ast.Store())], static, lineno=0))
    made.type_params = []
    made.header, made.share = node.header, node.share
    return made


class Applied(ast.NodeTransformer):
    """Calls of an operator go through its autograd.Function."""

    def __init__(self, operator, function):
        self.operator, self.function = operator, function

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == self.operator:
            node.func = ast.Attribute(ast.Name(self.function, ast.Load()), "apply", ast.Load())
        return node


# ---------------------------------------------------------------------------------------------------------------------
# The program of a configuration.


def without_flags(body):
    """model.py without the class of all flags: what it makes of it at the top level becomes plain values."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == "model.GPTConfig":
            continue
        if isinstance(node, ast.Assign) and "model.GPTConfig" in read(node):
            values = [getattr(model, name.rpartition(".")[2]) for name in defined(node)]
            if not values or not is_plain(tuple(values)):  # not values: its docstring is set
                continue
            node.value = literal(tuple(values) if len(values) > 1 else values[0])
        found.append(node)
    return found


def kernels_of(body):
    """The modules in kernels/ that the statements use."""
    names = {name for node in body for name in loads(node, set())}
    return {name.rpartition(".")[0] for name in names if name.startswith("kernels.")}


def program(config, kernels):
    """The statements of the file, in the order of the modules, with unique names."""
    body = fold(without_flags(read_module("model")), config, ROOTS)
    if kernels == "reference":
        return shorten(body, config, ROOTS)
    known = set()
    while missing := sorted(kernels_of(body) - known):
        known |= set(missing)
        body += [node for name in missing for node in read_module(name)]
    return shorten(fold(body, config, ROOTS), config, ROOTS)


def flags_class(config):
    """`GPTConfig` with the sizes and the flags that are not at their defaults."""
    kept = [f for f in fields(config) if f.name in SIZES or getattr(config, f.name) != f.default]
    lines = [f"    {f.name}: {type(getattr(config, f.name)).__name__} = {getattr(config, f.name)!r}" for f in kept]
    head = (
        '@dataclass\nclass GPTConfig:\n    """What this file was folded for. Other flags are at their defaults."""\n\n'
    )
    return head + "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def pretty_names(body):
    """{unique name: the name in the file}: its last part, with the module's before it where two would be the same."""
    loaded = [(loads(node, set()), set(bound(node))) for node in body]
    parts = {name for (found, _), node in zip(loaded, body) for name in (*found, *own_names(node)) if "." in name[1:]}
    imported = {
        a.asname or a.name for node in body if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names
    }
    found = {}
    for name in sorted(parts, key=lambda n: (not n.startswith("model."), n)):
        module, _, own = name.rpartition(".")
        hidden = any(name in reads and own in names for reads, names in loaded)
        if own in found.values() or own in imported or hidden or own == "GPTConfig":
            prefix = module.rpartition(".")[2]
            own = (
                (prefix.title().replace("_", "") + own) if own[0].isupper() and not own.isupper() else f"{prefix}_{own}"
            )
            own = own.upper() if name.rpartition(".")[2].isupper() else own
        found[name] = own
    return found


def own_names(node):
    return [] if isinstance(node, ast.Import | ast.ImportFrom) else defined(node)


class Named(ast.NodeTransformer):
    """The names of the file."""

    def __init__(self, names):
        self.names = names

    def visit_Name(self, node):
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_FunctionDef(self, node):
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)

    visit_ClassDef = visit_FunctionDef


def at_import(node):
    """The global names that a statement needs when the file is imported."""
    if isinstance(node, ast.FunctionDef):
        parts = [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
    elif isinstance(node, ast.ClassDef):
        parts = [*node.bases, *node.decorator_list, *(m for m in node.body if not isinstance(m, ast.FunctionDef))]
    else:
        parts = [node, *getattr(node, "called", [])]
    return {name for part in parts for name in loads(part, set())}


def in_order(body):
    """The statements such that each comes after what it needs when the file is imported."""
    owner = {name: node for node in body for name in own_names(node)}
    placed, found = set(), []

    def place(node, deep):
        if id(node) in placed:
            return
        placed.add(id(node))
        needed = at_import(node) if not deep else loads(node, set())
        runs = not isinstance(node, ast.FunctionDef | ast.ClassDef)  # what it calls runs too, and what that calls
        for name in sorted(needed):
            if name in owner and owner[name] is not node:
                place(owner[name], deep or runs)
        found.append(node)

    for node in body:
        place(node, False)
    return found


def with_comments(body):
    """Statements with their comments as statements in front of them."""
    found = []
    for node in body:
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(node, name, None)
            if isinstance(inner, list) and not (name == "orelse" and len(inner) == 1 and isinstance(inner[0], ast.If)):
                setattr(node, name, with_comments(inner))
        marks = [(ABOVE, line) for line in getattr(node, "above", [])]
        marks += [(COMMENT, node.comment)] if getattr(node, "comment", "") else []
        found += [ast.Expr(ast.Name(mark + text, ast.Load())) for mark, text in marks]
        found.append(node)
    return found


def unparse(node):
    """The text of a top-level statement, its comments at the ends of lines where they fit."""
    lines, comment = [], ""
    for line in ast.unparse(ast.fix_missing_locations(ast.Module(with_comments([node]), []))).splitlines():
        text = line.strip()
        if text.startswith(COMMENT):
            comment = text.removeprefix(COMMENT)
        elif text.startswith(ABOVE):
            lines.append(line.replace(ABOVE, ""))
        else:
            line = wrapped(without_parentheses(line))
            fits = comment and "\n" not in line and len(line) + 2 + len(comment) <= 120
            lines.append(f"{line}  {comment}" if fits else line)
            comment = ""
    return "\n".join(lines)


def without_parentheses(line):
    """A line that returns or assigns a tuple, as one writes it by hand."""
    match = re.fullmatch(r"(\s*)(return |[\w., ()]+ = )\((.*)\)", line)
    if match is None:
        return line
    indent, start, inner = match.groups()
    try:
        same = ast.dump(ast.parse(f"def f():\n {start}{inner}")) == ast.dump(ast.parse(f"def f():\n {start}({inner})"))
    except SyntaxError:
        return line
    return f"{indent}{start}{inner}" if same else line


def wrapped(line):
    """A statement whose arguments do not fit on one line in as few lines as it takes; ruff would give each its own."""
    first = min((i for x in "({[" if (i := line.find(x)) > 0), default=0)
    end = line.rstrip(":")
    inner = line[first + 1 : len(end) - 1]
    indent = len(line) - len(line.lstrip()) + (8 if line != end else 4)
    if (
        not first
        or len(split_at_commas(inner)) < 4
        or indent + len(inner) <= 118
        or end[-1] not in ")}]"
        or closing(line, first) != len(end) - 1
    ):
        return line
    lines = [line[: first + 1]]
    for i, piece in enumerate(split_at_commas(inner)):
        if i and len(lines[-1]) + len(piece) < 106:
            lines[-1] += f" {piece}"
        else:
            lines.append(" " * indent + piece)
    return "\n".join(lines) + line[len(end) - 1 :] + "  # fmt: skip"


def outside(text):
    """(position, character, depth) of what is outside of quotes, with the depth of brackets before it."""
    depth, quote = 0, ""
    for i, x in enumerate(text):
        if quote or x in "'\"":
            quote = "" if x == quote else quote or x
            continue
        yield i, x, depth
        depth += (x in "([{") - (x in ")]}")


def split_at_commas(text):
    """`text` in pieces that end with the commas outside of brackets."""
    ends = [i + 1 for i, x, depth in outside(text) if x == "," and depth == 0]
    return [text[a:b].strip() for a, b in zip([0, *ends], [*ends, len(text)])]


def closing(line, opened):
    """Where the bracket at `opened` is closed."""
    return next((opened + i for i, x, depth in outside(line[opened:]) if x in ")]}" and depth == 1), 0)


def imports_of(body, names, kernels):
    """The lines that import what the statements use."""
    plain, parts = set(), {"dataclasses": {"dataclass"}}
    used = {name for node in body for name in loads(node, set())}
    for node in body:
        for a in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if (a.asname or a.name).split(".")[0] in used:
                line = a.name + (f" as {a.asname}" if a.asname else "")
                if isinstance(node, ast.Import):
                    plain.add(line)
                else:
                    parts.setdefault(node.module, set()).add(line)
    for name in sorted(n for n in used if n.startswith("kernels.") and kernels == "reference"):
        module, _, own = name.rpartition(".")
        parts.setdefault(module, set()).add(own + (f" as {names[name]}" if names[name] != own else ""))
    lines = [f"import {x}" for x in plain] + [f"from {m} import {', '.join(sorted(xs))}" for m, xs in parts.items()]
    foreign = [
        x for x in sorted(lines) if x.split()[1].split(".")[0] not in {*sys.stdlib_module_names, "torch", "kernels"}
    ]
    if foreign:
        raise ConfigError(f"cannot be folded: the model would still need {foreign[0]!r}")
    return sorted(lines, key=lambda x: ("torch" in x.split()[1], "kernels" in x, x))


def render(body, config, kernels, name):
    """The file, not formatted."""
    names = pretty_names(body)
    imports = imports_of(body, names, kernels)
    body = in_order([node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)])
    if any("config" in read(node) for node in body):
        raise ConfigError("cannot be folded: a flag is read in a way that has no constant value")
    parts, header = [LOOP.format(name=name), *imports, "\n", flags_class(config)], ""
    kept, before = collections.Counter(node.header for node in body), None
    for node in body:
        if node.header not in ("", header) and 2 * kept[node.header] >= node.share:
            parts += ["", RULE, node.header]
            header = node.header
        elif not (isinstance(node, ast.Assign) and isinstance(before, ast.Assign)):  # constants stand close together
            parts.append("")
        parts.append(unparse(Named(names).visit(short_docs(node))))
        before = node
    return "\n".join(parts) + "\n"


def short_docs(node):
    """A statement whose docstrings are their first paragraphs."""
    for part in walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(part, clean=False)):
            part.body[0].value.value = doc.split("\n\n")[0]
    return node


def formatted(text):
    """`text` by ruff, or as it is where there is no ruff."""
    beside = Path(sys.executable).with_name("ruff")
    ruff = str(beside) if beside.exists() else shutil.which("ruff")
    if ruff is None:
        return text
    command = [ruff, "format", "--isolated", "--line-length=120", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, encoding="utf-8").stdout


def text(config, kernels="inline", name="specialised"):
    """The file `name`.py for a GPTConfig; ConfigError where the model cannot be folded for it."""
    return formatted(render(program(config, kernels), config, kernels, name))


def identity(config):
    """What tells whether two runs had the same model: the sha256 of its file, kernels inlined."""
    return hashlib.sha256(text(config).encode()).hexdigest()


def main(argv=None):
    with configurator.one_line_errors("lab.specialise", OSError):
        words = sys.argv[1:] if argv is None else argv
        settings = configurator.read(words, SpecialiseConfig, TrainConfig, GPTConfig, doc=__doc__)
        cfg, config = settings.build(SpecialiseConfig), settings.build(GPTConfig)
        name = Path(cfg.out).stem if cfg.out else "specialised"
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"--out={cfg.out}: {name!r} cannot be imported: letters, digits and _")
        if not Path(cfg.out).parent.is_dir():
            raise ConfigError(f"--out={cfg.out}: there is no folder {Path(cfg.out).parent}")
        written = text(config, cfg.kernels, name)
        if cfg.out:
            Path(cfg.out).write_text(written, encoding="utf-8")
        else:
            print(written, end="")


if __name__ == "__main__":
    main()
