"""
What made a result: the code of the model and of the training loop, and whether two results may be compared.

A hash is that of code without comments and docstrings, so that better words change nothing. The model's is that of its
specialised file (lab/specialise.py), kernels inlined: only what a row uses counts. Where a row cannot be folded, it is
that of model.py and kernels/, and `of` says so.
"""

import ast
import hashlib
import inspect
from collections import Counter
from functools import cache

import model
from configurator import ROOT, ConfigError
from lab import specialise

LOOP = ("train.py", "data/dataset.py", "data/corpus.py")  # the loop, and how it reads data
OPTIMIZER = "kernels/muon.py"  # what the specialised file leaves out
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def bare(text):
    """Python code without comments and docstrings, written one way."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def sha256(*texts):
    return hashlib.sha256("\n".join(map(bare, texts)).encode()).hexdigest()


def texts_of(files):
    return [(ROOT / file).read_text(encoding="utf-8") for file in files]


def model_files():
    return ["model.py", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("kernels/*.py"))]


def on_disk():
    """sha256 of every source file that shapes a run, as it lies there now."""
    return hashlib.sha256("\n".join(texts_of([*model_files(), *LOOP])).encode()).hexdigest()


IMPORTED = on_disk()  # what this process runs, and folds


@cache
def of_config(config_items, optimizer):
    config = model.GPTConfig(**dict(config_items))
    more = texts_of([OPTIMIZER]) + [inspect.getsource(model.muon_groups)] if optimizer == "muon" else []
    try:
        return {"model": sha256(specialise.text(config), *more), "of": "its specialised file"}
    except ConfigError:  # a combination that the folding refuses
        return {"model": sha256(*texts_of(model_files())), "of": "model.py and kernels/"}


@cache
def of_loop():
    return sha256(*texts_of(LOOP))


def source(config, optimizer="adamw"):
    """{"model", "of", "loop"}: which code makes a run of this GPTConfig that starts now.

    ConfigError if the files are no longer those that this process has read: its hashes would be of other code.
    """
    if on_disk() != IMPORTED:
        raise ConfigError("model.py, kernels/, train.py or data/ changed since this command began: start it again")
    items = tuple((name, value) for name, value in vars(config).items() if name in config.__dataclass_fields__)
    return of_config(items, optimizer) | {"loop": of_loop()}


# ---------------------------------------------------------------------------------------------------------------------
# Comparing.

UNKNOWN = "not recorded"


def of_run(run):
    """(model, loop, data) of a lab.ablate.Run; "not recorded" in records from before identities."""
    made_by = run.asked.get("source") or {}
    return made_by.get("model", UNKNOWN), made_by.get("loop", UNKNOWN), run.facts.get("data_id", UNKNOWN)


def mixtures(runs):
    """What keeps finished runs from being compared, as sentences: several models of a row, loops, data or formats."""
    found = [(run.row, *of_run(run)) for run in runs if run.is_done]
    models = {row: {each[1] for each in found if each[0] == row} - {UNKNOWN} for row in {each[0] for each in found}}
    several = sorted(row for row, hashes in models.items() if len(hashes) > 1)
    told = [f"records of several sources under one name: {', '.join(several)}"] if several else []
    for what, column in (("training loop", 2), ("data set", 3)):
        hashes = {each[column] for each in found} - {UNKNOWN}
        told += [f"records of {len(hashes)} versions of the {what}"] if len(hashes) > 1 else []
    formats = Counter(run.facts.get("dtype", UNKNOWN) for run in runs if run.is_done)
    if len(formats) > 1:
        told.append("number formats " + ", ".join(f"{name} ({n})" for name, n in formats.most_common()))
    unknown = sum(UNKNOWN in each[1:] for each in found)
    return told + ([f"{unknown} of {len(found)} records do not say what made them"] if unknown else [])


def check_same(runs, mix, where):
    """A sentence for the table on what is mixed in it, "" if nothing; ConfigError if something is, unless `mix`."""
    told = "; ".join(mixtures(runs))
    if told and not mix:
        raise ConfigError(f"{where}: {told}; compare them all the same with --mix, or train again what differs")
    return f"**Mixed sources** (`--mix`): {told}." if told else ""
