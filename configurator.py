"""
Config files and command-line flags, typed, from one source.

A script's keys are the fields of ordinary dataclasses, each written on one line as

    learning_rate: float = 6e-4  # peak learning rate

and that line is everything: the name, the type, the default and the help. A comment rule such as `# -- optimiser ----`
starts a group in `--help`. Nothing is declared a second time. A fixed choice is a `Literal["a", "b"]`, which `--help`
prints too; a class that calls `check_values` in its `__post_init__` refuses other values, other types, and numbers
outside of the intervals that it names.

    python train.py config/a.py config/b.py --learning_rate=1e-3 --compile --no-bias --max_iters 500

Config files are Python assignments, run in order; the command line wins over them. A file that says

    base("config/train_shakespeare_char_cpu.py", init_from="auto")

runs that file and those assignments first, but only if no config file came before it: so a preset trains by itself,
and after a recipe it changes only what it is about.
"""

import ast
import difflib
import inspect
import itertools
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import types
import typing
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
FIELD = re.compile(r"^    (\w+): .*?  # (.+)$")
GROUP = re.compile(r"^    # -- (.+?) -*$")
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
SCOPES += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class ConfigError(ValueError):
    """A user's mistake, explained in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Values: their types, choices and intervals.


@cache
def bounds(interval):
    """(low, high) of "[0, 2^32)": a bound is a number, inf, or a power of a number."""
    return tuple(
        float(base) ** float(power or 1) for base, _, power in (b.partition("^") for b in interval[1:-1].split(","))
    )


def inside(value, interval):
    """Whether `value` is in the interval: [ and ] include a bound, ( and ) exclude it; nan is in none."""
    low, high = bounds(interval)
    is_above = value >= low if interval[0] == "[" else value > low
    is_below = value <= high if interval[-1] == "]" else value < high
    return bool(is_above and is_below)


def kinds_of(hint):
    """The types that a type hint accepts, e.g. (int, NoneType) for `int | None`; a Literal counts as one."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def choices_of(kinds):
    """The values of the Literal among the types; () if there is none."""
    return next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is typing.Literal), ())


def is_tuple(kinds):
    return any(kind is tuple or typing.get_origin(kind) is tuple for kind in kinds)


def convert(value, kinds):
    """`value` as one of the types, converted where nothing is lost: 2 to 2.0, 2.0 to 2, list to tuple. Or TypeError.

    Any str may be a choice here: `check_values` compares it with the Literal.
    """
    if is_tuple(kinds):
        if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise TypeError
    if type(value) in kinds or (type(value) is str and choices_of(kinds)):
        return value
    if type(value) is int and float in kinds and abs(value) <= 2**53:  # beyond it, floats skip integers
        return float(value)
    if type(value) is float and int in kinds and value.is_integer():
        return int(value)
    raise TypeError


@cache
def hints_of(cls):
    """{field: type hint} of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def check_values(config, ranges):
    """ValueError for the first field of a dataclass that holds another type, choice or number than it should.

    ranges: {"names of fields": interval}; None is in every interval of an optional field. Scalars of NumPy and PyTorch
    become Python's own, so that a checkpoint holds plain values.
    """
    intervals = {name: interval for names, interval in ranges.items() for name in names.split()}
    assert intervals.keys() <= hints_of(type(config)).keys(), "an interval for a field that does not exist"
    for name, hint in hints_of(type(config)).items():
        setattr(config, name, checked(name, getattr(config, name), kinds_of(hint), intervals.get(name)))


def checked(name, value, kinds, interval):
    """`value` as the field `name` holds it; ValueError if neither its type in `kinds` nor its interval allows it."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    choices = choices_of(kinds)
    is_none = value is None and type(None) in kinds
    if choices and not is_none and not (type(value) is str and value in choices):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choice or repr(choice) for choice in choices)}")
    try:
        value = convert(value, kinds)
    except TypeError:
        names = [kind.__name__ + (f" in {interval}" if interval else "") for kind in kinds if kind is not type(None)]
        expected = " or ".join(names + ["None"] * (type(None) in kinds))
        raise ValueError(f"{name}={value!r}: expected {expected}") from None
    if interval and type(value) is int and abs(value) >= 2**63:
        raise ValueError(f"{name}={value!r}: must be below 2^63, as PyTorch's integers are")
    if interval and not is_none and not inside(value, interval):
        raise ValueError(f"{name}={value!r}: must be in {interval}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Keys: what a dataclass declares.


@dataclass
class Key:
    """One setting: what `--help` prints and what a value is checked against."""

    name: str
    type: object
    default: object
    meaning: str
    group: str
    needs: str  # what it does nothing without; empty = it always acts

    @property
    def kinds(self):
        return kinds_of(self.type)

    @property
    def is_tuple(self):
        return is_tuple(self.kinds)

    @property
    def type_name(self):
        if self.is_tuple:
            return "str, may be repeated"
        names = {kind: "None" if kind is type(None) else kind.__name__ for kind in self.kinds}
        return " or ".join("str" if typing.get_origin(kind) is typing.Literal else name for kind, name in names.items())

    @property
    def help(self):
        """Choices, what the key means, and its switch."""
        choices = " | ".join(f'"{choice}"' for choice in choices_of(self.kinds))
        text = f"{choices}: {self.meaning}" if choices else self.meaning
        return f"{text} [needs {self.needs}]" if self.needs else text

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
        if str in self.kinds or choices_of(self.kinds):
            return text
        try:
            return self.check(int(text) if int in self.kinds and not set(text) & set(".eE") else float(text))
        except (ValueError, OverflowError):
            raise self.refuse(text) from None

    def check(self, value, where=""):
        """`value` from a config file, converted as `convert` does; ConfigError for another type."""
        try:
            return convert(value, self.kinds)
        except TypeError:
            raise self.refuse(repr(value), where) from None


@cache
def lines_of(cls):
    """The lines of a top-level class, without parsing its whole module as inspect.getsource does."""
    lines = inspect.getsource(sys.modules[cls.__module__]).splitlines()
    start = lines.index(f"class {cls.__name__}:") + 1
    return tuple(itertools.takewhile(lambda line: not line or line[0].isspace(), lines[start:]))


def keys_of(*classes):
    """{name: Key} of the fields of `classes`, in order; types, defaults and comments are read from the classes.

    A class may have a function switches() that returns {name: what it does nothing without}.
    """
    keys = {}
    for cls in classes:
        meaning, group_of, group = {}, {}, cls.__name__
        needs = cls.switches() if hasattr(cls, "switches") else {}
        for line in lines_of(cls):
            if rule := GROUP.match(line):
                group = rule[1]
            elif field := FIELD.match(line):
                meaning[field[1]], group_of[field[1]] = field[2], group
        for f in fields(cls):
            assert f.name not in keys and f.name in meaning, f"{f.name}: declared twice, or without its comment"
            hint, switch = hints_of(cls)[f.name], needs.get(f.name, "")
            keys[f.name] = Key(f.name, hint, f.default, meaning[f.name], group_of[f.name], switch)
    return keys


# ---------------------------------------------------------------------------------------------------------------------
# Config files and the command line.


def expand(path):
    """`path` with ~ and environment variables replaced, as a shell would."""
    return os.path.expandvars(os.path.expanduser(path))


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


def line_of(error, file):
    """ ", line N" of the line in `file` where an error arose; "" where none is known."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    return f", line {line}" if line else ""


def locate(path):
    """The config file that `path` names: from the working directory, beside this file, or one of ours by its last part.

    So the commands of the systems that presets come from work here; what was taken is told on stderr.
    """
    path = Path(path)
    if found := next((p for p in (path, ROOT / path) if os.path.isfile(p)), None):
        return found
    places = [ROOT / "config" / Path(*path.parts[-2:]), *(ROOT / "config" / d / path.name for d in ("", "presets"))]
    found = next((p for p in places if os.path.isfile(p)), None)
    if found is None:
        raise ConfigError(f"{path}: no such config file")
    print(f"{path}: taken for {found.relative_to(ROOT)}", file=sys.stderr)
    return found


def run_file(path, keys, values, is_first=False):
    """{key: value} that a config file assigns at module level, after `values`; names that start with `_` are its own.

    The file sees every key's value so far, so `min_lr = learning_rate / 10` works. Relative paths are looked up in the
    working directory, then beside this file.
    """
    file, found = locate(path), {}
    scope = {k: key.default for k, key in keys.items()} | values

    def base(other, **more):
        if is_first:
            found.update(run_file(other, keys, {}, is_first=True))
            found.update({k: find_key(keys, k, path).check(v, f"{path}: ") for k, v in more.items()})
            scope.update(found)

    scope["base"] = base
    try:
        tree = ast.parse(file.read_text(encoding="utf-8-sig"), str(file))
        exec(compile(tree, str(file), "exec"), scope)
    except ConfigError:
        raise
    except (Exception, SystemExit) as e:  # the file is a user's program: it may raise anything
        raise ConfigError(f"{path}{line_of(e, file)}: {type(e).__name__}: {e}") from e
    for name in dict.fromkeys(assigned(tree)):
        if name in scope and not name.startswith("_"):
            found[name] = find_key(keys, name, path).check(scope[name], f"{path}: ")
    return found


@dataclass
class Settings:
    """The values of all keys, and the names that the user gave explicitly (in a file or by a flag)."""

    keys: dict
    values: dict
    given: set
    files: tuple = ()  # names of the config files, without folder and .py

    def expanded(self, *names):
        """The same, with ~ and environment variables in these paths replaced."""
        return replace(self, values=self.values | {name: expand(self.values[name]) for name in names})

    def build(self, cls, **overrides):
        """An instance of the dataclass `cls`; its own ValueError becomes a one-line ConfigError."""
        names = {f.name for f in fields(cls)}
        try:
            return cls(**{k: v for k, v in self.values.items() if k in names} | overrides)
        except ValueError as e:
            raise ConfigError(str(e)) from e


def config_file(word):
    """`word`, which is no flag, if it may name a config file; else ConfigError."""
    if word.startswith("-") and word != "-":
        raise ConfigError(f"{word}: flags are written --key=value")
    if not word.endswith(".py"):
        raise ConfigError(f"{word}: expected a config file ending in .py, or --key=value")
    return word


def is_negation(name, keys):
    """Whether --no_KEY switches a bool off."""
    positive = keys.get(name.removeprefix("no_"))
    return name not in keys and name.startswith("no_") and positive is not None and bool in positive.kinds


def next_value(name, key, words):
    """The text of --key without "=": the next word, removed from `words`, or "true" for a bool on its own.

    key: None for --config and for aliases.
    """
    is_flag = key is not None and bool in key.kinds
    if words and (words[0].lower() in BOOLS if is_flag else not words[0].startswith("--")):
        return words.pop(0)
    if is_flag:
        return "true"
    raise ConfigError(f"--{name}: a value is missing" + (f" ({key.type_name})" if key else ""))


def parse_words(argv, keys, aliases):
    """(config files, {key: value}, "help", "print_config" or None) from command-line words."""
    words, files, flags, show = list(argv), [], {}, None
    while words:
        word = words.pop(0)
        if word != "-h" and not word.startswith("--"):
            files.append(config_file(word))
            continue
        name, equals, text = ("help" if word == "-h" else word[2:]).partition("=")
        name = name.replace("-", "_")
        if name in ("help", "print_config"):
            show = name
        elif is_negation(name, keys) and not equals:
            flags[name[3:]] = False
        else:
            key = None if name in aliases or name == "config" else find_key(keys, name, f"--{name}")
            text = text if equals else next_value(name, key, words)
            if name == "config":
                files.append(text)
            elif key is None:
                flags |= aliases[name](text)
            else:
                value = key.parse(text)
                flags[name] = flags.get(name, ()) + value if key.is_tuple else value
    return files, flags, show


def add(given, flags, source, classes):
    """Put `flags` over `given`, and drop, told on stderr, what does nothing since one of them turned its switch off."""
    for name in idle_since(given, flags, classes):
        tell_once(f"{name}={given.pop(name)!r}: left out, {source} turns its switch off")
    given |= flags


@cache
def tell_once(line):
    """Print a line on stderr, the first time that it is told: a lab command reads the same words for every run."""
    print(line, file=sys.stderr)


def idle_since(given, flags, classes):
    """Those of the values `given` before that do nothing under `flags`, and did something without."""
    found = []
    for cls in (cls for cls in classes if flags and hasattr(cls, "idle")):
        own = {f.name for f in fields(cls)}
        before, now = ({k: v for k, v in values.items() if k in own} for values in (given, given | flags))
        already = cls.idle(before)
        while more := [name for name in cls.idle(now) if name in before and name not in [*already, *flags, *found]]:
            found += more
            now = {k: v for k, v in now.items() if k not in found}
    return found


def read(argv, *classes, doc="", aliases=None):
    """Settings from command-line words.

    `aliases` maps a flag's name to a function of its value that returns {key: value}: names that other tools use, with
    a docstring for `--help`. A switch that a later file or the command line turns off takes its own flags in earlier
    files along, told on stderr, if a class can say so: `idle(values)` returns the flags among the given ones that do
    nothing. `--help` and `--print_config` print and exit 0. Raises ConfigError for anything a user got wrong.
    """
    keys, given = keys_of(*classes), {}
    files, flags, show = parse_words(argv, keys, aliases or {})
    if show == "help":
        print_help(keys, doc, aliases or {})
        raise SystemExit(0)
    for number, file in enumerate(files):
        add(given, run_file(file, keys, given, is_first=number == 0), file, classes)
    add(given, flags, "the command line", classes)
    values = {k: key.default for k, key in keys.items()} | given
    settings = Settings(keys, values, set(given), tuple(Path(file).stem for file in files))
    if show == "print_config":
        for cls in classes:
            settings.build(cls)  # refuses what the run itself would refuse
        print_config(settings)
        raise SystemExit(0)
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# Printing.


def listing(keys):
    """Lines for --help: each key with its default, type and meaning, under the heads of its groups."""
    lines, group = [], None
    for key in keys.values():
        if key.group != group:
            group = key.group
            lines += ["", f"{group}:"]
        lines.append(f"  --{key.name}={key.default!r}  ({key.type_name})  {key.help}")
    return lines


def documented(cls):
    """The docstring of a class of flags, with what --help says of them: for help(GPTConfig)."""
    return "\n".join((cls.__doc__, *listing(keys_of(cls))))


def print_help(keys, doc, aliases):
    print("\n".join((doc.strip(), *listing(keys))))
    if aliases:
        print("\nnames that other tools use:")
    for name, function in aliases.items():
        print(f"  --{name}  {function.__doc__}")
    print("\n--config FILE, --print_config (show the resolved configuration and stop), --help")


def outline(file, names):
    """A module in which only these names of a source file are defined, and what it imports of the standard library."""
    module = types.ModuleType(Path(file).stem)
    module.__file__ = str(file)
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    module.__doc__ = ast.get_docstring(tree, clean=False)
    tree.body = [node for node in tree.body if is_outlined(node, names)]
    sys.modules[module.__name__] = module  # where the source of its classes is looked up
    exec(compile(tree, str(file), "exec"), vars(module))
    return module


def is_outlined(node, names):
    if isinstance(node, ast.ImportFrom):
        return node.module in sys.stdlib_module_names
    targets = node.targets if isinstance(node, ast.Assign) else [node]
    return any(getattr(target, "name", getattr(target, "id", "")) in names for target in targets)


def help_before_imports(prog, files, aliases=()):
    """If --help is asked for, answer it from the sources alone, since importing PyTorch takes a second; and exit.

    files: {file: names to define from it}. Classes whose name ends in Config are shown, under the first file's
    docstring; `aliases` are names of functions in the first file, for `read`.
    """
    if not {"--help", "-h"} & set(sys.argv[1:]):
        return
    with one_line_errors(prog):
        modules = [outline(ROOT / file, (*names, *aliases)) for file, names in files.items()]
        shown = [getattr(m, n) for m, names in zip(modules, files.values()) for n in names if n.endswith("Config")]
        functions = {name: getattr(modules[0], name) for name in aliases}
        read(sys.argv[1:], *shown, doc=modules[0].__doc__, aliases=functions)


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


RANKS_WAIT = 2.0  # seconds


@contextmanager
def one_line_errors(prog, *kinds, interrupted="interrupted"):
    """Turn ConfigError and the exceptions in `kinds` into one line on stderr and exit status 2; Ctrl-C into 130.

    What stdout cannot encode is replaced. torchrun's other processes let the main one speak first: an error that all
    have is printed once, since torchrun ends them when the first one has ended.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's first lines set it aside for the imports
    try:
        yield
    except (ConfigError, *kinds) as e:
        if os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ:
            time.sleep(RANKS_WAIT)
        print(f"{prog}: error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{prog}: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
