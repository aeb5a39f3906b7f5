"""
Config files and command-line flags, typed, from one source.

A script's keys are the fields of ordinary dataclasses, each written on one line as

    learning_rate: float = 6e-4  # peak learning rate

and that line is everything: the name, the type, the default and the help. A comment rule such as `# -- optimiser ----`
starts a group in `--help`. Nothing is declared a second time.

    python train.py config/a.py config/b.py --learning_rate=1e-3 --compile --no-bias --max_iters 500

Config files are Python assignments, run in order; the command line wins over them.
"""

import ast
import difflib
import inspect
import math
import os
import re
import sys
import types
import typing
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
FIELD = re.compile(r"^    (\w+): .*?  # (.+)$")
GROUP = re.compile(r"^    # -- (.+?) -*$")
# what the code in a config file may raise: the user's mistake to mend, not ours
MISTAKES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError)
MISTAKES += (RuntimeError, SyntaxError, TypeError, ValueError)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
SCOPES += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class ConfigError(ValueError):
    """A user's mistake, told in one line."""


@dataclass
class Key:
    """One setting: what `--help` prints and what a value is checked against."""

    name: str
    type: object
    default: object
    meaning: str
    group: str

    @property
    def kinds(self):
        """The accepted types, e.g. (int, NoneType) for `int | None`."""
        union = typing.get_origin(self.type) in (typing.Union, types.UnionType)
        return typing.get_args(self.type) if union else (self.type,)

    @property
    def is_tuple(self):
        return self.type is tuple or typing.get_origin(self.type) is tuple

    @property
    def type_name(self):
        if self.is_tuple:
            return "str, may be repeated"
        return " or ".join("None" if k is type(None) else k.__name__ for k in self.kinds)

    def refuse(self, value, where=""):
        return ConfigError(f"{where}--{self.name}={value}: expected {self.type_name}")

    def parse(self, text):
        """The value that `text` from the command line stands for."""
        if self.is_tuple:
            return (text,)
        if type(None) in self.kinds and text.lower() == "none":
            return None
        if bool in self.kinds:
            if text.lower() not in BOOLS:
                raise self.refuse(text)
            return BOOLS[text.lower()]
        if str in self.kinds:
            return text
        try:
            return self.check(int(text) if int in self.kinds and not set(text) & set(".eE") else float(text))
        except (ValueError, OverflowError):
            raise self.refuse(text) from None

    def check(self, value, where=""):
        """`value` from a config file, int and float converted where nothing is lost; ConfigError for another type."""
        if self.is_tuple and isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        if type(value) in self.kinds and not self.is_tuple:
            return value
        if type(value) is int and float in self.kinds and abs(value) <= 2**53:  # beyond it, floats skip integers
            return float(value)
        if type(value) is float and int in self.kinds and value.is_integer():
            return int(value)
        raise self.refuse(repr(value), where)


def keys_of(*classes):
    """{name: Key} of the fields of `classes`, in order; types, defaults and comments are read from the classes."""
    keys = {}
    for cls in classes:
        meaning, group_of, group = {}, {}, cls.__name__
        for line in inspect.getsource(cls).splitlines():
            if rule := GROUP.match(line):
                group = rule[1]
            elif field := FIELD.match(line):
                meaning[field[1]], group_of[field[1]] = field[2], group
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            assert f.name not in keys and f.name in meaning, f"{f.name}: declared twice, or without its comment"
            keys[f.name] = Key(f.name, hints[f.name], f.default, meaning[f.name], group_of[f.name])
    return keys


def find_key(keys, name, where):
    if name not in keys:
        near = difflib.get_close_matches(name, keys, n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; see --help"
        raise ConfigError(f"{where}: unknown key {name!r}{hint}")
    return keys[name]


def assigned(node):
    """The names that `node` assigns in its own scope: not those inside a function, a class or a comprehension."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif not isinstance(child, SCOPES):
            yield from assigned(child)


def run_file(path, keys, values):
    """Run a config file. What it assigns at module level becomes `values`, but for names that start with `_`.

    The file sees every key's value so far, so `min_lr = learning_rate / 10` works. Relative paths are looked up in the
    working directory, then beside this file.
    """
    file = next((p for p in (Path(path), ROOT / path) if os.path.isfile(p)), None)
    if file is None:
        raise ConfigError(f"{path}: no such config file")
    scope = {k: key.default for k, key in keys.items()} | values
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        exec(compile(tree, str(file), "exec"), scope)
    except MISTAKES as e:
        raise ConfigError(f"{path}: {type(e).__name__}: {e}") from e
    for name in dict.fromkeys(assigned(tree)):
        if name in scope and not name.startswith("_"):
            values[name] = find_key(keys, name, path).check(scope[name], f"{path}: ")


@dataclass
class Settings:
    """What the user asked for: `values` of every key, and the names `given` explicitly (in a file or a flag)."""

    keys: dict
    values: dict
    given: set

    def build(self, cls, **overrides):
        """An instance of the dataclass `cls`; its own ValueError becomes a one-line ConfigError."""
        names = {f.name for f in fields(cls)}
        try:
            return cls(**{k: v for k, v in self.values.items() if k in names} | overrides)
        except ValueError as e:
            raise ConfigError(str(e)) from e


def read(argv, *classes, doc="", aliases=None):
    """Settings from command-line words.

    `aliases` maps a flag's name to a function of its value that returns {key: value}, for names other tools taught.
    `--help` and `--print_config` print and exit 0. Raises ConfigError for anything a user got wrong.
    """
    keys, aliases = keys_of(*classes), aliases or {}
    files, flags, show = [], {}, None
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if word == "-h":
                show = "help"
            elif word.startswith("-") and word != "-":
                raise ConfigError(f"{word}: flags are written --key=value")
            elif not word.endswith(".py"):
                raise ConfigError(f"{word}: expected a config file ending in .py, or --key=value")
            else:
                files.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in ("help", "print_config"):
            show = name
            continue
        negated = name.startswith("no_") and name not in keys and name[3:] in keys
        if negated and bool in keys[name[3:]].kinds and not equals:
            flags[name[3:]] = False
            continue
        taken = name in aliases or name == "config"
        key = None if taken else find_key(keys, name, f"--{name}")
        if not equals:  # --key value, or --flag alone
            is_flag = key is not None and bool in key.kinds
            if words and (words[0].lower() in BOOLS if is_flag else not words[0].startswith("--")):
                text = words.pop(0)
            elif is_flag:
                text = "true"
            else:
                raise ConfigError(f"--{name}: a value is missing" + (f" ({key.type_name})" if key else ""))
        if name == "config":
            files.append(text)
        elif taken:
            flags |= aliases[name](text)
        elif key.is_tuple:
            flags[name] = flags.get(name, ()) + key.parse(text)
        else:
            flags[name] = key.parse(text)
    if show == "help":
        print_help(keys, doc)
        raise SystemExit(0)
    given = {}
    for file in files:
        run_file(file, keys, given)
    given |= flags
    values = {k: key.default for k, key in keys.items()} | given
    settings = Settings(keys, values, set(given))
    if show == "print_config":
        for cls in classes:
            settings.build(cls)  # refuses what the run itself would refuse
        print_config(settings)
        raise SystemExit(0)
    return settings


def print_help(keys, doc):
    print(doc.strip())
    group = None
    for key in keys.values():
        if key.group != group:
            group = key.group
            print(f"\n{group}:")
        print(f"  --{key.name}={key.default!r}  ({key.type_name})  {key.meaning}")
    print("\n--config FILE, --print_config (show the resolved configuration and stop), --help")


def print_config(settings):
    """Print the configuration as a config file; defaults are comments, so that a data set may still choose its own."""
    group = None
    for key in settings.keys.values():
        if key.group != group:
            group = key.group
            print(f"# -- {group}")
        value = settings.values[key.name]
        special = type(value) is float and not math.isfinite(value)  # Python has no literal for inf and nan
        text = f"float('{value}')" if special else repr(value)
        print(f"{'' if key.name in settings.given else '# '}{key.name} = {text}")


@contextmanager
def one_line_errors(prog, *kinds):
    """Turn ConfigError and the exceptions in `kinds` into one line on stderr and exit status 2."""
    try:
        yield
    except (ConfigError, *kinds) as e:
        print(f"{prog}: error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None
