"""
Partial evaluation of a Python program, by its syntax trees: what lab.specialise folds model.py with.

A program is a list of top-level statements whose global names are unique ("kernels.scan.BLOCK"), so that no local name
can hide one. `fold` repeats until nothing changes: constants and attributes that have one value go to where they are
read, branches that a constant decides fall away, functions that became one short expression go to where they are
called, arguments that are the same in all calls go into the function, and what GPT does not reach is dropped.

It knows of the house's conventions and of no variant: a parameter `config` and an attribute `.config` are the
configuration, `having(name)` and `hasattr(module, name)` look for a hook, and a method of the configuration takes a
layer's index, from 0 to n_layer - 1.
"""

import ast
import copy
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn as nn

from configurator import ConfigError

UNKNOWN = object()
PLAIN = (int, float, str, bool, type(None))
SAFE = {f.__name__: f for f in (len, min, max, sum, abs, round, int, float, str, bool, tuple, any, all, set, map)}
HOOKS = ("having", "hasattr", "getattr", "setattr")  # functions that find an attribute by its name
EXTERNAL = (nn.Linear, nn.LayerNorm, nn.ModuleDict, torch.autograd.Function, torch.optim.Optimizer)
SCOPES = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DECISIONS = (ast.IfExp, ast.BoolOp, ast.Compare)
ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
PURE_METHODS = {"size", "dim", "numel", "items", "values", "keys", "split", "strip", "new_zeros", "is_floating_point"}
PURE_TORCH = {"arange", "zeros", "ones", "full", "eye", "linspace", "zeros_like", "ones_like"}
# fields of nodes that hold no node, and contexts and operators, which nothing here asks for
NOT_WALKED = {"ctx", "op", "ops", "id", "attr", "arg", "name", "module", "asname", "level", "is_async", "simple"}
NOT_WALKED |= {"conversion", "lineno", "type_comment"}
TREE = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
ARITHMETIC = (
    ast.Constant, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Starred,
    ast.Subscript, ast.Slice, ast.Call, ast.Name, *TREE,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Expressions: values, purity, what they bind and read.


@cache
def inner_fields(kind):
    """The fields of a class of nodes that hold nodes, contexts and operators left out."""
    return () if kind is ast.Constant else tuple(name for name in kind._fields if name not in NOT_WALKED)


def walk(node):
    """Every node inside, contexts and operators left out; three times as fast as ast.walk."""
    stack = [node]
    while stack:
        part = stack.pop()
        yield part
        for name in inner_fields(type(part)):
            value = getattr(part, name, None)
            if type(value) is list:
                stack += [v for v in value if isinstance(v, ast.AST)]
            elif isinstance(value, ast.AST):
                stack.append(value)


class Transformer(ast.NodeTransformer):
    """Python's own, but faster: it does not visit contexts and operators, and looks each method up once."""

    @classmethod
    @cache
    def visitor(cls, kind):
        return getattr(cls, f"visit_{kind.__name__}", cls.generic_visit)

    def visit(self, node):
        return self.visitor(type(node))(self, node)

    def generic_visit(self, node):
        for name in inner_fields(type(node)):
            value = getattr(node, name, None)
            if type(value) is list:
                value[:] = self.visited(value)
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        return node

    def visited(self, nodes):
        """What takes the place of a list of nodes: of each none, one or several."""
        found = []
        for node in nodes:
            new = self.visit(node) if isinstance(node, ast.AST) else node
            if isinstance(new, list):
                found += new
            elif new is not None or node is None:
                found.append(new)
        return found


def is_plain(value):
    return type(value) in PLAIN or (type(value) is tuple and all(is_plain(v) for v in value))


def literal(value):
    return ast.parse(repr(value), mode="eval").body


def value_of(node):
    """The value of a literal, or UNKNOWN."""
    if isinstance(node, ast.Constant):
        return node.value if is_plain(node.value) else UNKNOWN
    if isinstance(node, ast.Tuple):
        values = [value_of(e) for e in node.elts]
        return UNKNOWN if UNKNOWN in values else tuple(values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = value_of(node.operand)
        return -value if type(value) in (int, float) else UNKNOWN
    return UNKNOWN


def evaluate(node, known):
    """The value of an expression of literals, of a few functions and of `known` names; UNKNOWN for anything else."""
    names = {}
    for part in walk(node):
        if not isinstance(part, ARITHMETIC):
            return UNKNOWN
        if isinstance(part, ast.Call) and not (isinstance(part.func, ast.Name) and part.func.id in SAFE):
            return UNKNOWN
        if isinstance(part, ast.Name):
            if part.id not in known and part.id not in SAFE:
                return UNKNOWN
            names[part.id.replace(".", "__")] = known.get(part.id, SAFE.get(part.id))
    node = copy.deepcopy(node)
    for part in walk(node):
        if isinstance(part, ast.Name):
            part.id = part.id.replace(".", "__")
    try:
        value = eval(compile(ast.fix_missing_locations(ast.Expression(node)), "folded", "eval"), {}, names)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return UNKNOWN
    return value if is_plain(value) else UNKNOWN


def truth(node):
    """True or False where that is certain, else None."""
    if (value := value_of(node)) is not UNKNOWN:
        return bool(value)
    if isinstance(node, ast.Tuple | ast.List | ast.Set) and not any(isinstance(e, ast.Starred) for e in node.elts):
        return bool(node.elts)
    return bool(node.keys) if isinstance(node, ast.Dict) else None


def is_atom(node):
    """A literal, a name, or attributes of one: it may be read twice, or not at all."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) or value_of(node) is not UNKNOWN


def is_pure(node):
    """Whether an expression can be left out: it changes nothing and draws no random number."""
    for part in walk(node):
        if isinstance(part, ast.Await | ast.Yield | ast.YieldFrom | ast.NamedExpr):
            return False
        if isinstance(part, ast.Call) and not is_pure_call(part):
            return False
    return True


def is_pure_call(call):
    f = call.func
    if isinstance(f, ast.Name):
        return f.id in SAFE or f.id in ("zip", "range", "enumerate", "isinstance", "hasattr", "list", "dict", "getattr")
    if not isinstance(f, ast.Attribute):
        return False
    return f.attr in PURE_METHODS or (isinstance(f.value, ast.Name) and f.value.id == "torch" and f.attr in PURE_TORCH)


def is_config(node):
    """Whether an expression is the configuration, by the names that the house gives it."""
    return (isinstance(node, ast.Name) and node.id == "config") or (
        isinstance(node, ast.Attribute) and node.attr == "config"
    )


def is_self(node):
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def read(node):
    """The names that an expression or statement reads, as a list."""
    return [n.id for n in walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]


def bound(node):
    """Every name that is bound somewhere inside, once for each time."""
    found = []
    for part in walk(node):
        if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
            found.append(part.id)
        elif isinstance(part, ast.arg):
            found.append(part.arg)
        elif isinstance(part, ast.FunctionDef | ast.ClassDef) or isinstance(part, ast.ExceptHandler) and part.name:
            found.append(part.name)
        elif isinstance(part, ast.alias):
            found.append(part.asname or part.name)
        elif isinstance(part, ast.Global | ast.Nonlocal):
            found += 2 * part.names
    return found


def size(node):
    return sum(1 for _ in walk(node))


def decisions(node):
    return sum(isinstance(n, DECISIONS) for n in walk(node))


def assignments(statement):
    """(target, value) of an assignment, tuples taken apart; the value is None where it is not written out."""
    if isinstance(statement, ast.AugAssign):
        return [(statement.target, None)]
    if isinstance(statement, ast.AnnAssign):
        return [(statement.target, statement.value)]
    if isinstance(statement, ast.For):
        return unpacked(statement.target, None)
    if isinstance(statement, ast.With):
        return [pair for item in statement.items if item.optional_vars for pair in unpacked(item.optional_vars, None)]
    if isinstance(statement, ast.Assign):
        return [pair for target in statement.targets for pair in unpacked(target, statement.value)]
    return []


def unpacked(target, value):
    if not isinstance(target, ast.Tuple | ast.List):
        return [(target.value if isinstance(target, ast.Starred) else target, value)]
    parts = [None] * len(target.elts)
    if is_parallel(target, value):
        parts = value.elts
    return [pair for t, v in zip(target.elts, parts) for pair in unpacked(t, v)]


def is_parallel(target, value):
    """Whether this is a, b = x, y, without stars."""
    both = (target, value)
    if not all(isinstance(x, ast.Tuple | ast.List) for x in both) or len(target.elts) != len(value.elts):
        return False
    return not any(isinstance(e, ast.Starred) for x in both for e in x.elts)


class Substitution(Transformer):
    """Names replaced by expressions; a scope that binds one of them again is left alone."""

    def __init__(self, mapping):
        self.mapping = mapping

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and node.id in self.mapping:
            return copy.deepcopy(self.mapping[node.id])
        return node

    def visit_Lambda(self, node):
        return node if self.mapping.keys() & bound(node.args) else self.generic_visit(node)


def substitute(node, mapping):
    return Substitution(mapping).visit(copy.deepcopy(node))


# ---------------------------------------------------------------------------------------------------------------------
# Functions and calls.


def is_doc(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def without_doc(body):
    return body[1:] if body and is_doc(body[0]) else body


def result_of(function):
    """The expression that a function returns and that is all it does; None for another function."""
    body = without_doc(function.body)
    return body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) and body[0].value is not None else None


def decorators(function):
    return [d.id for d in function.decorator_list if isinstance(d, ast.Name)] if function.decorator_list else []


def takes_self(function):
    return bool(function.args.args) and function.args.args[0].arg == "self"


def parameters(function):
    """{name: default or None} of those that a call can be matched with; the first parameter self is left out."""
    a = function.args
    names = [p.arg for p in a.posonlyargs + a.args]
    defaults = dict(zip(reversed(names), reversed(a.defaults)))
    found = {name: defaults.get(name) for name in names if name != "self"}
    return found | {p.arg: d for p, d in zip(a.kwonlyargs, a.kw_defaults)}


def bind(function, call):
    """{parameter: argument} of a call; None where stars hide it."""
    if function.args.vararg or function.args.kwarg or any(isinstance(a, ast.Starred) for a in call.args):
        return None
    if any(k.arg is None for k in call.keywords):
        return None
    found = parameters(function)
    positional = [p.arg for p in function.args.posonlyargs + function.args.args if p.arg != "self"]
    if len(call.args) > len(positional):
        return None
    found |= dict(zip(positional, call.args)) | {k.arg: k.value for k in call.keywords}
    return None if None in found.values() or found.keys() != parameters(function).keys() else found


def inlined(expression, arguments):
    """An expression with arguments in place of parameters, or None where that would repeat or reorder work."""
    counts = read(expression)
    binders = [n for n in walk(expression) if isinstance(n, SCOPES)]
    for name, argument in arguments.items():
        uses = counts.count(name)
        if set(bound(expression)) & set(read(argument)) or name in bound(expression):
            return None
        if is_atom(argument) or (isinstance(argument, ast.Lambda) and uses <= 1):
            continue
        if uses > 1 or (uses == 0 and not is_pure(argument)) or any(name in read(b) for b in binders):
            return None
    return substitute(expression, arguments)


# ---------------------------------------------------------------------------------------------------------------------
# What is known of a program.


@dataclass
class Facts:
    """Tables over the top-level statements of a program; `config` is the configuration it is folded for."""

    body: list
    config: object
    classes: dict = field(default_factory=dict)
    functions: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)  # name: dict display
    known: dict = field(default_factory=dict)  # name: plain value
    stores: dict = field(default_factory=dict)  # class: {attribute: values that its methods store, None unknown}
    level: dict = field(default_factory=dict)  # class: {attribute: value in the body of the class}
    methods: dict = field(default_factory=dict)  # class: {name: function}
    foreign: set = field(default_factory=set)  # attributes that are stored from outside
    filled: set = field(default_factory=set)  # attributes that are dicts or lists and get items
    mutated: set = field(default_factory=set)  # fields of the configuration that are
    instantiated: set = field(default_factory=set)
    passed: dict = field(default_factory=dict)  # dataclass: fields that some call passes
    mentions: dict = field(default_factory=dict)  # global name or .attribute: how often it is read
    lookup: dict = field(default_factory=dict)  # class: what bases() found
    family: dict = field(default_factory=dict)  # class: what related() found

    def __post_init__(self):
        for node in self.body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
                self.read_class(node)
            elif isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self.read_constant(node.targets[0].id, node.value)
        for node in self.body:
            self.read_uses(node)

    def read_constant(self, name, value):
        if isinstance(value, ast.Dict) and all(k is not None for k in value.keys):
            self.tables[name] = value
        elif (plain := value_of(value)) is not UNKNOWN:
            self.known[name] = plain

    def read_class(self, node):
        self.methods[node.name] = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
        self.level[node.name] = {
            t.id: v for m in node.body for t, v in assignments(m) if isinstance(t, ast.Name)
        }  # fmt: skip
        stores = self.stores[node.name] = {}
        for part in walk(node):
            for target, value in assignments(part):
                if is_self(target):
                    stores.setdefault(target.attr, []).append(value)
            if (
                isinstance(part, ast.Call)
                and is_self(part.func)
                and part.func.attr.startswith("register_")
                and part.args
            ):
                name, given = value_of(part.args[0]), part.args[-1]
                if isinstance(name, str):
                    stores.setdefault(name, []).append(given if value_of(given) is None else None)

    def read_uses(self, node):
        """Stores from outside, and which classes are used other than as a base or in isinstance."""
        skipped = set()
        for part in walk(node):
            if isinstance(part, ast.Name | ast.Attribute) and isinstance(part.ctx, ast.Load):
                name = part.id if isinstance(part, ast.Name) else "." + part.attr
                self.mentions[name] = self.mentions.get(name, 0) + 1
            if isinstance(part, ast.ClassDef):
                skipped |= {id(n) for base in part.bases for n in walk(base)}
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "isinstance":
                skipped |= {id(n) for n in walk(part.args[1])}
            if isinstance(part, ast.Subscript) and isinstance(part.value, ast.Attribute):
                self.filled |= set() if isinstance(part.ctx, ast.Load) else {part.value.attr}
            if isinstance(part, ast.Attribute) and not isinstance(part.ctx, ast.Load):
                if is_config(part.value):
                    self.mutated.add(part.attr)
                elif not (isinstance(part.value, ast.Name) and part.value.id in ("self", "ctx")):
                    self.foreign.add(part.attr)
            if isinstance(part, ast.Name) and part.id in self.classes and id(part) not in skipped:
                self.instantiated.add(part.id)
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in self.classes:
                self.read_fields(part)

    def read_fields(self, call):
        names = [m.target.id for m in self.classes[call.func.id].body if isinstance(m, ast.AnnAssign)]
        if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
            given = names
        else:
            given = names[: len(call.args)] + [k.arg for k in call.keywords]
        self.passed.setdefault(call.func.id, set()).update(given)

    def bases(self, name):
        """A class and its bases in the program, in the order of lookup."""
        if name not in self.lookup:
            bases = [b.id for b in self.classes[name].bases if isinstance(b, ast.Name) and b.id in self.classes]
            self.lookup[name] = [name, *(b for base in bases for b in self.bases(base))]
        return self.lookup[name]

    def heirs(self, name):
        return [other for other in self.classes if name in self.bases(other)]

    def related(self, name):
        """The class, its bases, its heirs and their bases."""
        if name not in self.family:
            of_heirs = [b for heir in self.heirs(name) for b in self.bases(heir)]
            self.family[name] = dict.fromkeys([*self.bases(name), *of_heirs])
        return self.family[name]

    def is_passed(self, cls, name):
        """Whether a call gives a value to this field of a dataclass."""
        return name in self.passed.get(cls, ())

    def attribute(self, cls, name):
        """The expressions that self.name can be inside a class, or None where that is not known."""
        if name in self.foreign or any(self.is_passed(c, name) or name in self.methods[c] for c in self.related(cls)):
            return None
        stored = [v for c in self.related(cls) for v in self.stores[c].get(name, [])]
        level = [self.level[c][name] for c in self.related(cls) if name in self.level[c]]
        if not stored:
            owners = [c for c in self.heirs(cls) if c in self.instantiated] or [cls]
            found = [next((self.level[b][name] for b in self.bases(c) if name in self.level[b]), None) for c in owners]
            return None if None in found else found
        return None if None in stored + level else stored + level

    def constant(self, cls, name):
        """The one plain value that self.name has inside a class, or UNKNOWN."""
        values = [value_of(v) for v in self.attribute(cls, name) or ()]
        same = values and all(type(v) is type(values[0]) and v == values[0] for v in values)
        return values[0] if same else UNKNOWN

    def is_something(self, node, cls):
        """Whether an expression is certainly not None."""
        if isinstance(node, ast.Call):
            f = node.func
            if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name):
                return f.value.id == "nn" and f.attr[0].isupper()
            return isinstance(f, ast.Name) and (f.id in self.classes or f.id in SAFE)
        if isinstance(node, ast.Attribute) and is_config(node.value) and hasattr(self.config, node.attr):
            return getattr(self.config, node.attr) is not None
        if cls and is_self(node):
            values = self.attribute(cls, node.attr)
            return bool(values) and all(self.is_something(v, None) for v in values)
        value = value_of(node)
        return value is not None if value is not UNKNOWN else isinstance(
            node, ast.Tuple | ast.List | ast.Dict | ast.Lambda | ast.BinOp | ast.JoinedStr | ast.ListComp
        )  # fmt: skip

    def has(self, name):
        """Whether a class of the program has an attribute or a method of this name."""
        return any(name in table[c] for c in self.classes for table in (self.methods, self.stores, self.level))

    def method(self, cls, name):
        """The one function that self.name can be inside a class, or None."""
        owners = [c for c in self.related(cls) if name in self.methods[c]]
        return self.methods[owners[0]][name] if len(owners) == 1 else None

    def instance(self, node, cls):
        """The class of the program that an expression self.name is an instance of, or None."""
        values = self.attribute(cls, node.attr) if cls and is_self(node) else None
        if not values or not all(isinstance(v, ast.Call) and isinstance(v.func, ast.Name) for v in values):
            return None
        names = {v.func.id for v in values}
        return names.pop() if len(names) == 1 and names <= self.classes.keys() else None


# ---------------------------------------------------------------------------------------------------------------------
# One pass over the program.


class Folder(Transformer):
    """Replaces what is known, bottom up; `cls` is the class, `active` the functions that the visit is inside of."""

    def __init__(self, facts):
        self.facts, self.cls, self.active = facts, None, []
        self.something, self.empty = set(), set()  # local names that are not None, and such that are empty

    # Statements -----------------------------------------------------------------------------------------------------

    def block(self, body):
        found = []
        for statement in body:
            new = self.visit(statement)
            new = [] if new is None else new if isinstance(new, list) else [new]
            found += new
            if new and isinstance(new[-1], ENDS):
                break
        return returned(found)

    def visit_ClassDef(self, node):
        before, self.cls = self.cls, node.name
        node.body = self.block([self.own_static(m) for m in node.body]) or [ast.Pass()]
        self.cls = before
        return node

    def own_static(self, member):
        """name = staticmethod(function) as a method, where nothing else uses the function."""
        value = member.value if isinstance(member, ast.Assign) else None
        if not (
            isinstance(value, ast.Call) and is_name(value.func, "staticmethod") and isinstance(value.args[0], ast.Name)
        ):
            return member
        function = self.facts.functions.get(value.args[0].id)
        if function is None or self.facts.mentions[function.name] > 1 or function.decorator_list:
            return member
        made = copy.deepcopy(function)
        made.name, made.decorator_list = member.targets[0].id, [value.func]
        return made

    def visit_Name(self, node):
        """A function that only hands its arguments on to another one, as that one."""
        function = self.facts.functions.get(node.id) if isinstance(node.ctx, ast.Load) else None
        call = result_of(function) if function is not None and not function.decorator_list else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
            return node
        names = [a.id for a in call.args if isinstance(a, ast.Name)]
        plain = len(names) == len(call.args) and names == list(parameters(function)) and not function.args.defaults
        return copy.deepcopy(call.func) if plain and call.func.id in self.facts.functions else node

    def visit_FunctionDef(self, node):
        self.active.append(node)
        before = self.something, self.empty
        self.something = self.something | self.certain(node)
        self.empty = self.empty | empty_locals(node)
        node.decorator_list = [self.visit(d) for d in node.decorator_list]
        node.args = self.visit(node.args)
        node.body = self.block(node.body) or [ast.Pass()]
        self.active.pop()
        self.something, self.empty = before
        return node

    def certain(self, function):
        """The names of a function that are bound once, to something that is certainly not None."""
        pairs = [pair for part in walk(function) for pair in assignments(part)]
        found = {
            target.id
            for target, value in pairs
            if isinstance(target, ast.Name) and value is not None and self.facts.is_something(value, self.cls)
        }
        names = bound(function) if found else []
        return {name for name in found if names.count(name) == 1}

    def visit_If(self, node):
        node.test = self.test(node.test)
        if (known := truth(node.test)) is not None:
            return self.block(node.body if known else node.orelse)
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        is_empty = [all(isinstance(s, ast.Pass) for s in b) for b in (node.body, node.orelse)]
        if all(is_empty) and is_pure(node.test):
            return None
        if is_empty[0] and node.orelse:
            node.test, node.body, node.orelse = ast.UnaryOp(ast.Not(), node.test), node.orelse, []
        node.body = node.body or [ast.Pass()]
        return node

    def visit_For(self, node):
        node.iter = self.visit(node.iter)
        if is_empty_iterable(node.iter) and not node.orelse:
            return None
        if (unrolled := self.unroll(node)) is not None:
            return self.block(unrolled)
        node.body = self.block(node.body)
        if not node.body and is_pure(node.iter):
            return None
        node.body = node.body or [ast.Pass()]
        return node

    def unroll(self, node):
        """The statements of a loop over a few names and literals, for each of them; None where it is something else."""
        rows = node.iter.elts if isinstance(node.iter, ast.Tuple | ast.List) else zipped(node.iter)
        inside = [n for s in node.body for n in walk(s)]
        if rows is None or len(rows) > 8 or node.orelse or any(isinstance(n, ast.Break | ast.Continue) for n in inside):
            return None
        targets, found = bound(node.target), []
        if set(targets) & {name for s in node.body for name in bound(s)} or len(node.body) > 2:
            return None
        if self.active and any(
            read(self.active[-1]).count(t) > sum(read(s).count(t) for s in node.body) for t in targets
        ):
            return None
        for row in rows:
            pairs = unpacked(node.target, row)
            if any(v is None or not is_atom(v) for _, v in pairs) or len(pairs) != len(targets):
                return None
            found += [substitute(s, {t.id: v for t, v in pairs}) for s in node.body]
        return found

    def visit_While(self, node):
        node.test = self.test(node.test)
        if truth(node.test) is False:
            return None
        node.body = self.block(node.body)
        return node

    def visit_With(self, node):
        self.generic_visit(node)
        return node

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Constant):
            return node
        node.value = self.visit(node.value)
        if (stored := self.setattr_as_store(node.value)) is not None:
            return stored
        return None if is_pure(node.value) or self.does_nothing(node.value) else node

    def setattr_as_store(self, call):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "setattr":
            target, name, value = call.args
            if isinstance(target, ast.Name) and target.id == "self" and isinstance(value_of(name), str):
                return ast.Assign([ast.Attribute(target, name.value, ast.Store())], value, lineno=0)
        return None

    def does_nothing(self, call):
        """Whether this calls a function of the program whose body is empty."""
        function = self.called(call)
        if function is None or not all(is_pure(a) for a in call.args):
            return False
        return all(isinstance(s, ast.Pass) for s in without_doc(function.body)) and not function.decorator_list

    def visit_Assign(self, node):
        node.targets = [self.visit(t) for t in node.targets]
        node.value = self.visit(node.value)
        return node

    # Expressions ----------------------------------------------------------------------------------------------------

    def test(self, node):
        """An expression of which only the truth matters."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            operand = self.test(node.operand)
            known = truth(operand)
            return ast.UnaryOp(ast.Not(), operand) if known is None else literal(not known)
        if isinstance(node, ast.Name) and node.id in self.empty:  # a local {} or []
            return literal(False)
        if not isinstance(node, ast.BoolOp):
            return self.visit(node)
        stops, parts = isinstance(node.op, ast.Or), []
        for value in node.values:
            value = self.test(value)
            known = truth(value)
            if known is None:
                parts.append(value)
            elif known == stops:
                if all(is_pure(p) for p in parts):
                    return literal(stops)
                parts.append(literal(stops))
                break
        if not parts:
            return literal(not stops)
        return parts[0] if len(parts) == 1 else ast.BoolOp(node.op, parts)

    def visit_BoolOp(self, node):
        values, parts, stops = [self.visit(v) for v in node.values], [], isinstance(node.op, ast.Or)
        for value in values:
            known = truth(value)
            is_last = value is values[-1]
            if known is None or known == stops or is_last:
                parts.append(value)
            if known == stops:
                break
        if value_of(parts[-1]) is stops and all(map(is_pure, parts)):
            return literal(stops)  # which false value it is, None or 0 or False, never matters
        return parts[0] if len(parts) == 1 else self.folded(ast.BoolOp(node.op, parts))

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            return self.test(node)
        self.generic_visit(node)
        return node

    def visit_IfExp(self, node):
        node.test = self.test(node.test)
        if (known := truth(node.test)) is not None:
            return self.visit(node.body if known else node.orelse)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return node.body if ast.dump(node.body) == ast.dump(node.orelse) and is_pure(node.test) else node

    def visit_Compare(self, node):
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.Is | ast.IsNot) and value_of(node.comparators[0]) is None:
            is_none = isinstance(node.ops[0], ast.Is)
            if value_of(node.left) is None:
                return literal(is_none)
            is_something = isinstance(node.left, ast.Name) and node.left.id in self.something
            is_something |= self.facts.is_something(node.left, self.cls) and is_pure(node.left)
            return literal(not is_none) if is_something else node
        value = evaluate(node, self.facts.known)
        return node if value is UNKNOWN else literal(value)

    def folded(self, node):
        """A literal in place of an expression of literals; floats are left as they are written."""
        value = evaluate(node, {})
        plain = value is not UNKNOWN and not has_float(value)
        return ast.copy_location(literal(value), node) if plain else node

    def visit_DictComp(self, node):
        self.generic_visit(node)
        return ast.Dict([], []) if is_empty_iterable(node.generators[0].iter) else node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.BitOr) and isinstance(node.left, ast.Dict) and ast.unparse(node.right) == "{}":
            return node.left
        return self.folded(node)

    def visit_Tuple(self, node):
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            node.elts = [e for x in node.elts for e in spilled(x)]
            return self.folded(node) if any(isinstance(e, ast.Starred) for e in node.elts) else node
        return node

    def visit_ListComp(self, node):
        self.generic_visit(node)
        loop = node.generators[0]
        if len(node.generators) > 1 or loop.is_async:
            return node
        if is_empty_iterable(loop.iter):
            return ast.List([], ast.Load())
        is_short = isinstance(loop.iter, ast.Tuple | ast.List) and all(is_atom(e) for e in loop.iter.elts)
        if is_short and isinstance(loop.target, ast.Name):
            if not loop.ifs and len(loop.iter.elts) < 4:
                elements = [substitute(node.elt, {loop.target.id: e}) for e in loop.iter.elts]
                return ast.List([self.visit(e) for e in elements], ast.Load())
            return self.filtered(node, loop) if isinstance(node.elt, ast.Name) else node
        return node

    def filtered(self, node, loop):
        """[x for x in (a, b) if test(x)] where each test is decided."""
        kept = []
        for e in loop.iter.elts:
            tests = [truth(self.test(substitute(t, {loop.target.id: e}))) for t in loop.ifs]
            if None in tests:
                return node
            kept += [e] if all(tests) else []
        return ast.List(kept, ast.Load())

    def visit_comprehension(self, node):
        node.target, node.iter = self.visit(node.target), self.visit(node.iter)
        node.ifs = [t for t in map(self.test, node.ifs) if truth(t) is not True]
        if any(truth(t) is False for t in node.ifs):
            node.iter, node.ifs = ast.Tuple([], ast.Load()), []
        return node

    def visit_Attribute(self, node):
        node.value = self.visit(node.value)
        if not isinstance(node.ctx, ast.Load):
            return node
        facts = self.facts
        is_late = isinstance(node.value, ast.Attribute) and node.attr in facts.mutated  # read after construction
        if is_config(node.value) and hasattr(facts.config, node.attr) and not is_late:
            value = getattr(facts.config, node.attr)
            return literal(value) if is_plain(value) else node
        if node.attr == "is_cuda":
            return literal(False)  # kernels as they run on a CPU
        if is_self(node) and self.cls:
            return self.own_attribute(node)
        default = self.default_of(node)
        return node if default is None else copy.deepcopy(default)

    def own_attribute(self, node):
        value = self.facts.constant(self.cls, node.attr)
        if value is not UNKNOWN:
            return literal(value)
        function = self.facts.method(self.cls, node.attr)
        if function is not None and decorators(function) == ["property"] and function not in self.active:
            result = result_of(function)
            if result is not None and (is_atom(result) or truth(result) is not None):
                return copy.deepcopy(result)
        return node

    def default_of(self, node):
        """What a field of `run`, a Pass, holds that nobody passes or stores: a literal, a lambda, {}; else None."""
        facts, name, cls = self.facts, node.attr, "model.Pass"
        if not is_name(node.value, "run") or cls not in facts.classes or name in facts.foreign:
            return None
        value = facts.level[cls].get(name)
        if value is None or facts.is_passed(cls, name) or name in facts.stores[cls]:
            return None
        if isinstance(value, ast.Call):
            is_dict = any(is_name(k.value, "dict") for k in value.keywords)
            return ast.Dict([], []) if is_dict and name not in facts.filled else None
        return value if isinstance(value, ast.Lambda) or value_of(value) is not UNKNOWN else None

    def visit_Subscript(self, node):
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return node
        table = self.facts.tables.get(node.value.id) if isinstance(node.value, ast.Name) else node.value
        key = value_of(node.slice)
        if isinstance(table, ast.Dict):
            entries = {value_of(k): v for k, v in zip(table.keys, table.values) if k is not None}
            if key is not UNKNOWN and key in entries:
                return self.visit(copy.deepcopy(entries[key]))
            chosen = node.slice
            if isinstance(chosen, ast.Subscript) and isinstance(keys := value_of(chosen.value), tuple):
                chosen.value = ast.Tuple([copy.deepcopy(entries[k]) for k in keys], ast.Load())
                return chosen
        parts = table.elts if isinstance(table, ast.Tuple) and is_pure(table) else []
        if type(key) is int and -len(parts) <= key < len(parts) and not any(isinstance(e, ast.Starred) for e in parts):
            return parts[key]
        return self.folded(node)

    def visit_Call(self, node):
        node.func = self.visit(node.func)
        node.args = [e for a in node.args for e in spilled(self.visit(a))]
        node.keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords]
        f = node.func
        if isinstance(f, ast.Attribute) and is_config(f.value):
            return self.asked(node)
        if isinstance(f, ast.Lambda):
            arguments = dict(zip([a.arg for a in f.args.args], node.args))
            plain = len(arguments) == len(f.args.args) == len(node.args) and not node.keywords
            result = inlined(f.body, arguments) if plain else None
            return node if result is None else self.visit(result)
        if isinstance(f, ast.Name) and f.id == "hasattr" and isinstance(name := value_of(node.args[1]), str):
            return node if self.facts.has(name) or hasattr(nn.Module, name) else literal(False)
        if isinstance(f, ast.Name) and f.id in ("getattr", "isinstance"):
            return self.reflected(node)
        if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Dict) and not f.value.keys and not node.args:
            return ast.Tuple([], ast.Load())  # {}.items()
        if isinstance(f, ast.Attribute) and f.attr == "items" and isinstance(f.value, ast.Name):
            return self.items(node)
        if isinstance(f, ast.Attribute) and f.attr == "having" and node.args:
            name = value_of(node.args[0])
            return ast.List([], ast.Load()) if isinstance(name, str) and not self.facts.has(name) else node
        if self.is_no_dropout(node):
            return node.args[0]
        node = self.inline(node)
        return self.folded(node) if isinstance(node, ast.Call) else node

    def is_no_dropout(self, call):
        """Whether this is dropout with probability 0, which returns its input."""
        f = call.func
        if isinstance(f, ast.Attribute) and is_name(f.value, "F"):
            return f.attr == "dropout" and len(call.args) > 1 and value_of(call.args[1]) == 0
        values = self.facts.attribute(self.cls, f.attr) if self.cls and is_self(f) else None
        return bool(values) and all(is_dropout(v) and v.args and value_of(v.args[0]) == 0 for v in values)

    def asked(self, node):
        """The answer of a method of the configuration; of a layer's index, a tuple of answers and the index into it."""
        ask, arguments = getattr(self.facts.config, node.func.attr), [value_of(a) for a in node.args]
        if UNKNOWN not in arguments:
            answer = ask(*arguments)
            return literal(answer) if is_plain(answer) else node
        n = self.facts.config.n_layer
        answers = tuple(ask(layer) for layer in range(n))
        period = next(p for p in range(1, n + 1) if all(answers[i] == answers[i % p] for i in range(n)))
        if period == 1:
            return literal(answers[0])
        layer = node.args[0] if period == n else ast.BinOp(node.args[0], ast.Mod(), literal(period))
        return ast.Subscript(literal(answers[:period]), layer, ast.Load())

    def reflected(self, node):
        """getattr of None or of a constant name, and isinstance of classes that are never made."""
        if node.func.id == "isinstance":
            kinds = node.args[1]
            parts = kinds.elts if isinstance(kinds, ast.Tuple) else [kinds]
            own = all(isinstance(p, ast.Name) and p.id in self.facts.classes for p in parts)
            made = {c for p in parts for c in self.facts.heirs(p.id)} & self.facts.instantiated if own else True
            return node if made or not is_pure(node.args[0]) else literal(False)
        name = value_of(node.args[1])
        if value_of(node.args[0]) is None and len(node.args) == 3:
            return node.args[2]
        if isinstance(name, str) and len(node.args) == 2:
            return self.visit(ast.Attribute(node.args[0], name, ast.Load()))
        return node

    def items(self, node):
        """The pairs of a table of the program."""
        table = self.facts.tables.get(node.func.value.id)
        if table is None:
            return node
        pairs = [ast.Tuple([copy.deepcopy(k), copy.deepcopy(v)], ast.Load()) for k, v in zip(table.keys, table.values)]
        return ast.Tuple(pairs, ast.Load())

    # Inlining -------------------------------------------------------------------------------------------------------

    def called(self, call):
        """The function of the program that is called, or None: f(), self.f(), self.part.f(), self.part()."""
        f, facts = (call.func if isinstance(call, ast.Call) else None), self.facts
        if isinstance(f, ast.Name):
            return facts.functions.get(f.id)
        if not isinstance(f, ast.Attribute):
            return None
        if is_self(f) and self.cls and (own := facts.method(self.cls, f.attr)) is not None:
            return own
        if is_self(f) and (cls := facts.instance(f, self.cls)) is not None:
            return facts.method(cls, "forward")
        if (cls := facts.instance(f.value, self.cls)) is not None:
            return facts.method(cls, f.attr)
        return None

    def inline(self, node):
        """A call of a short function, as what it returns."""
        function = self.called(node)
        if function is None or function in self.active or function.decorator_list:
            return node
        result = result_of(function)
        is_star = len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Starred)
        if is_star and result is not None and is_identity(function, result):
            return node.args[0].value
        arguments = bind(function, node) if result is not None else None
        if arguments is None:
            return node
        is_own = is_self(node.func) and self.facts.method(self.cls, node.func.attr) is function
        if takes_self(function) and not is_own and "self" in read(result):
            return node
        new = inlined(result, arguments)
        if new is None or isinstance(result, ast.Yield):
            return node
        self.active.append(function)
        new = self.visit(new)
        self.active.pop()
        return new if self.is_worth_it(new, result, node, is_own) else node

    def is_worth_it(self, new, result, call, is_own):
        if is_atom(new) or size(new) <= size(call):
            return True
        if decisions(new) < decisions(result) and size(new) <= 24:
            return True
        stateless = takes_self(self.called(call) or call) if isinstance(self.called(call), ast.FunctionDef) else False
        if stateless and not is_own:  # a module without state of its own
            return size(new) <= 60
        f = call.func
        name = f.id if isinstance(f, ast.Name) else "." + f.attr
        return not decisions(new) and size(new) <= 12 or (self.facts.mentions.get(name) == 1 and size(new) <= 28)


def returned(body):
    """A body that ends in `return value` in place of `x = value; return x`."""
    if len(body) < 2 or not isinstance(body[-1], ast.Return) or not isinstance(body[-2], ast.Assign):
        return body
    target, value = body[-2].targets[0], body[-1].value
    names = [e.id for e in getattr(target, "elts", [target]) if isinstance(e, ast.Name)]
    result = [e.id for e in getattr(value, "elts", [value]) if isinstance(e, ast.Name)]
    is_tuple = isinstance(target, ast.Tuple)
    if len(body[-2].targets) > 1 or names != result or not names or is_tuple != isinstance(value, ast.Tuple):
        return body
    is_whole = is_tuple and len(names) == len(target.elts) == len(value.elts)
    if is_tuple and not (is_whole and isinstance(body[-2].value, ast.Call | ast.Tuple)):
        return body
    body[-1].value = body[-2].value
    body[-1].comment = getattr(body[-2], "comment", "")
    return body[:-2] + body[-1:]


def empty_locals(function):
    """The names of a function that are bound once, to {} or [], and read only where that decides."""
    found = set()
    for part in walk(function):
        for target, value in assignments(part):
            is_empty = isinstance(value, ast.Dict | ast.List) and truth(value) is False
            if is_empty and isinstance(target, ast.Name) and bound(function).count(target.id) == 1:
                tests = [n for n in walk(function) if isinstance(n, ast.If | ast.IfExp) and is_name(n.test, target.id)]
                inside = sum(read(t).count(target.id) for t in tests)
                found |= {target.id} if inside == read(function).count(target.id) else set()
    return found


def is_name(node, name):
    return isinstance(node, ast.Name) and node.id == name


def is_dropout(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Dropout"


def has_float(value):
    return any(map(has_float, value)) if isinstance(value, tuple) else type(value) is float


def is_identity(function, result):
    """Whether a function returns its arguments as a tuple."""
    names = [e.id for e in result.elts if isinstance(e, ast.Name)] if isinstance(result, ast.Tuple) else None
    return names == list(parameters(function))


def spilled(node):
    """The elements of *(a, b), or the node itself."""
    if not isinstance(node, ast.Starred):
        return [node]
    if isinstance(node.value, ast.Tuple | ast.List):
        return node.value.elts
    if isinstance(node.value, ast.Subscript) and isinstance(node.value.slice, ast.Slice) and is_atom(node.value.value):
        s = node.value.slice
        if s.lower is None and s.step is None and s.upper is not None and type(n := value_of(s.upper)) is int and n > 0:
            return [ast.Subscript(node.value.value, literal(i), ast.Load()) for i in range(n)]
    return [node]


def is_empty_iterable(node):
    """(), [], or a slice [:0] of something."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        s = node.slice
        return s.lower is None and s.upper is not None and value_of(s.upper) == 0 and is_pure(node.value)
    return isinstance(node, ast.Tuple | ast.List) and not node.elts


def zipped(node):
    """The rows of zip((a, b), (c, d)), or None."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip"):
        return None
    if not all(isinstance(a, ast.Tuple) for a in node.args) or node.keywords:
        return None
    return [ast.Tuple(list(row), ast.Load()) for row in zip(*(a.elts for a in node.args))]


# ---------------------------------------------------------------------------------------------------------------------
# Local variables.


def propagate(function):
    """Literals of variables that are assigned once, at the top of a function's body, go to where they are read."""
    found = {}
    for statement in function.body:
        for target, value in assignments(statement) if isinstance(statement, ast.Assign) else ():
            is_one = isinstance(target, ast.Name) and value is not None and len(statement.targets) == 1
            if is_one and (value_of(value) is not UNKNOWN or is_row(value, target.id, function)):
                found[target.id] = value
    names = bound(function) if found else []
    found = {name: value for name, value in found.items() if names.count(name) == 1}
    if found:
        function.body = [Substitution(found).visit(s) for s in function.body]
    for i, statement in enumerate(function.body):
        for target, value in assignments(statement) if isinstance(statement, ast.Assign) else ():
            if isinstance(target, ast.Name) and value is not None and value_of(value) is not UNKNOWN:
                follow(function.body[i + 1 :], target.id, value)


def is_row(value, name, function):
    """Whether `name` is a tuple of parts of self that comprehensions go over, and nothing else."""
    if not isinstance(value, ast.Tuple) or not all(is_self(e) for e in value.elts):
        return False
    loops = sum(isinstance(n, ast.comprehension) and is_name(n.iter, name) for n in walk(function))
    return loops > 0 and read(function).count(name) == loops


def follow(body, name, value):
    """Put a literal where `name` is read, from its assignment to the next one."""
    for statement in body:
        if any(isinstance(n, SCOPES) and name in read(n) for n in walk(statement)):
            return
        if name in bound(statement):
            if isinstance(statement, ast.If):
                statement.test = Substitution({name: value}).visit(statement.test)
            elif isinstance(statement, ast.Assign):
                statement.value = Substitution({name: value}).visit(statement.value)
            return
        Substitution({name: value}).visit(statement)


class DeadStores(Transformer):
    """Drops assignments to what is never read: local `names`, and attributes of self other than `attributes`."""

    def __init__(self, is_dead, can_drop):
        self.is_dead, self.can_drop = is_dead, can_drop

    def visit_Assign(self, node):
        if any(t.id == node.value.id for t in node.targets if is_same_kind(t, node.value)):
            node.targets = [t for t in node.targets if t.id != node.value.id]  # x = x
        kept = [t for t in node.targets if not (self.is_dead(t) and self.can_drop(node.value))]
        if not kept:
            return None
        node.targets = kept
        if len(kept) == 1 and is_parallel(kept[0], node.value):
            pairs = list(zip(kept[0].elts, node.value.elts))
            same = [is_same_kind(t, v) and t.id == v.id for t, v in pairs]
            left = [p for p, s in zip(pairs, same) if not s and not (self.is_dead(p[0]) and self.can_drop(p[1]))]
            if not left:
                return None
            if len(left) == 1:
                node.targets, node.value = [left[0][0]], left[0][1]
            elif len(left) < len(pairs):
                kept[0].elts, node.value.elts = map(list, zip(*left))
        return node

    def visit_Lambda(self, node):
        return node


def is_same_kind(target, value):
    return isinstance(target, ast.Name) and isinstance(value, ast.Name)


def fill(node):
    """`pass` where a body has become empty."""
    for part in walk(node):
        if isinstance(part, ast.stmt | ast.ExceptHandler) and getattr(part, "body", None) == []:
            part.body = [ast.Pass()]
    return node


def drop_locals(function):
    """Assignments to what a function never reads go, as far as they do nothing else."""
    needed = set()
    for part in walk(function):
        if isinstance(part, ast.Name):
            if isinstance(part.ctx, ast.Load):
                needed.add(part.id)
        elif isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
            needed.add(part.target.id)
        elif isinstance(part, ast.Global | ast.Nonlocal):
            needed.update(part.names)
    DeadStores(lambda t: isinstance(t, ast.Name) and t.id not in needed, is_pure).visit(function)
    fill(function)


# ---------------------------------------------------------------------------------------------------------------------
# What is reached.


def is_framework(name):
    return name.startswith("__") or any(hasattr(kind, name) for kind in EXTERNAL)


def loads(node, found, cls=None):
    """Add the global names, attributes and hooks that a node reads to the set `found`; of self, with the class."""
    for part in walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
            found.add(part.id)
        elif isinstance(part, ast.Attribute):
            is_library = isinstance(part.value, ast.Name) and part.value.id in ("F", "nn", "torch", "math")
            if isinstance(part.ctx, ast.Load) and not is_config(part.value) and not is_library:
                found.add(f"{cls}|{part.attr}" if cls and is_self(part) else "." + part.attr)
        elif isinstance(part, ast.Call):
            name = part.func.id if isinstance(part.func, ast.Name) else getattr(part.func, "attr", "")
            if name in HOOKS:
                found.update("?" + a.value for a in part.args if isinstance(a, ast.Constant) and type(a.value) is str)
    return found


def defined(node):
    """The global names that a top-level statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(a.asname or a.name).split(".")[0] for a in node.names]
    return [t.id for t, _ in assignments(node) if isinstance(t, ast.Name)]


def is_read(name, found, related):
    """Whether the attribute `name` is read: of anything, or of self in one of the related classes."""
    return is_framework(name) or "?" + name in found or is_named(name, found, related)


def is_named(name, found, related):
    """The same, but not as a hook that is found by its name."""
    return "." + name in found or any(f"{cls}|{name}" in found for cls in related)


def is_reached(member, found, roots, cls, related):
    """Whether a member of a class that is reached is, too."""
    if isinstance(member, ast.FunctionDef):
        return f"{cls}.{member.name}" in roots or is_read(member.name, found, related)
    if isinstance(member, ast.Assign):
        return any(not isinstance(t, ast.Name) or is_read(t.id, found, related) for t in member.targets)
    return True


def prune(body, roots, facts):
    """The statements and methods that are reached from `roots`, names such as "GPT" and "GPT.forward"."""
    found, before = set(roots), -1
    loaded = {}  # (id of a node, class): what it loads

    def load(node, cls=None):
        if (id(node), cls) not in loaded:
            loaded[id(node), cls] = loads(node, set(), cls)
        found.update(loaded[id(node), cls])

    while len(found) > before:
        before = len(found)
        for node in body:
            if not set(defined(node)) & found or isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if not isinstance(node, ast.ClassDef):
                load(node)
                continue
            for part in (*node.bases, *node.decorator_list):
                load(part)
            for member in node.body:
                if is_reached(member, found, roots, node.name, facts.related(node.name)):
                    load(member, node.name)
    kept = [node for node in body if set(defined(node)) & found]
    for node in kept:
        if isinstance(node, ast.ClassDef):
            related = facts.related(node.name)
            node.body = [m for m in node.body if is_reached(m, found, roots, node.name, related)] or [ast.Pass()]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            node.names = [a for a in node.names if (a.asname or a.name).split(".")[0] in found]
    return kept, found


# ---------------------------------------------------------------------------------------------------------------------
# Attributes that nobody reads, parameters that are always the same, methods that do nothing.


def is_stateless(facts, node):
    """Whether an expression makes a module of the program that holds nothing: no weights, no buffers, no parts."""
    if is_dropout(node):
        return True
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in facts.classes):
        return False
    cls = node.func.id
    made = [m for c in facts.bases(cls) for m in [facts.methods[c].get("__init__")] if m is not None]
    statements = [s for m in made for s in without_doc(m.body) if not isinstance(s, ast.Pass)]
    return all(is_pure(a) for a in node.args) and all(
        is_super_init(s) or (isinstance(s, ast.Assign) and is_pure(s.value)) for s in statements
    )


def is_super_init(statement):
    return isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("super().__init__(")


def drop_attributes(facts, found):
    """Remove what is stored in self and never read, and fields of dataclasses that nobody uses."""
    for name, node in facts.classes.items():
        related = facts.related(name)

        def is_dead(t, related=related):
            return is_self(t) and not is_read(t.attr, found, related)

        DeadStores(is_dead, lambda v: is_pure(v) or is_stateless(facts, v)).visit(node)
        if "dataclass" in decorators(node):
            given = facts.passed.get(name, set())
            node.body = [
                m for m in node.body
                if not isinstance(m, ast.AnnAssign) or is_read(m.target.id, found, related) or m.target.id in given
            ] or [ast.Pass()]  # fmt: skip
        fill(node)
        node.body = [m for m in node.body if not is_idle(m, facts, name, found)] or [ast.Pass()]


def is_idle(member, facts, cls, found):
    """Whether a method does nothing any more and can go: what calls it finds it by `having`, and not as self.NAME."""
    if not isinstance(member, ast.FunctionDef) or any(member.name in facts.methods[c] for c in facts.bases(cls)[1:]):
        return False
    body = without_doc(member.body)
    if member.name == "__init__":
        return not parameters(member) and all(
            is_super_init(s) and ast.unparse(s)[-2:] == "()" or isinstance(s, ast.Pass) for s in body
        )
    is_empty = all(isinstance(s, ast.Pass) for s in body)
    of_self = any(f"{c}|{member.name}" in found for c in facts.related(cls))
    is_called = of_self or "." + member.name in found and "?" + member.name not in found
    return is_empty and not is_framework(member.name) and not is_called


class Calls:
    """Every call of every function of the program that is only ever called, by the function."""

    def __init__(self, body, facts):
        self.facts, self.calls, self.escaped = facts, {}, set()
        names = [n for c in facts.classes for n in facts.methods[c]]
        self.unique = {n: facts.methods[c][n] for c in facts.classes for n in facts.methods[c] if names.count(n) == 1}
        for node in body:
            self.cls = node.name if isinstance(node, ast.ClassDef) else None
            self.read(node)

    def read(self, node):
        callees = set()
        for part in walk(node):
            if isinstance(part, ast.Call):
                function = self.function(part.func)
                if function is not None:
                    callees.add(id(part.func))
                    self.calls.setdefault(id(function), (function, []))[1].append(part)
        for part in walk(node):
            if isinstance(part, ast.Name | ast.Attribute) and id(part) not in callees:
                function = self.function(part)
                if function is not None and isinstance(part.ctx, ast.Load) and part not in getattr(node, "bases", []):
                    self.escaped.add(id(function))

    def function(self, f):
        facts = self.facts
        if isinstance(f, ast.Name) and f.id in facts.functions:
            return facts.functions[f.id]
        if isinstance(f, ast.Name) and f.id in facts.classes:
            return self.init(facts.bases(f.id))
        if not isinstance(f, ast.Attribute):
            return None
        if f.attr == "__init__" and self.cls and ast.unparse(f.value) == "super()":
            return self.init(facts.bases(self.cls)[1:])
        is_ours = f.attr in self.unique and not is_framework(f.attr) and not hasattr(torch.Tensor, f.attr)
        return self.unique[f.attr] if is_ours else None

    def init(self, classes):
        return next((m for c in classes if (m := self.facts.methods[c].get("__init__")) is not None), None)


def settle_parameters(body, facts, roots):
    """Parameters that have one value in all calls become it, and those that a function does not read go."""
    calls = Calls(body, facts)
    kept = {id(m) for c in facts.classes for n, m in facts.methods[c].items() if f"{c}.{n}" in roots}
    for key, (function, found) in calls.calls.items():
        if key in calls.escaped or key in kept or any(d != "staticmethod" for d in decorators(function)):
            continue
        bindings = [bind(function, call) for call in found]
        if None in bindings or isinstance(function.body[0], ast.Pass):
            continue
        for name in parameters(function):
            settle(function, name, found, [b[name] for b in bindings])


def settle(function, name, calls, values):
    plain = [value_of(v) for v in values]
    same = plain[0] is not UNKNOWN and all(type(v) is type(plain[0]) and v == plain[0] for v in plain)
    if same and bound(function).count(name) == 1:
        function.body = [Substitution({name: values[0]}).visit(s) for s in function.body]
    if not any(is_name(n, name) for s in function.body for n in walk(s)) and all(is_pure(v) for v in values):
        remove_parameter(function, name, calls)


def remove_parameter(function, name, calls):
    a = function.args
    names = [p.arg for p in a.args]
    if name in names:
        at = names.index(name)
        of_default = at - (len(names) - len(a.defaults))
        if of_default >= 0:
            del a.defaults[of_default]
        del a.args[at]
        at -= names[0] == "self"
        for call in calls:
            if at < len(call.args):
                del call.args[at]
    else:
        at = [p.arg for p in a.kwonlyargs].index(name)
        del a.kwonlyargs[at], a.kw_defaults[at]
    for call in calls:
        call.keywords = [k for k in call.keywords if k.arg != name]


# ---------------------------------------------------------------------------------------------------------------------
# Functions that are called at one place only, and variables that are read at one place only, go there.


def one_return(body):
    """`if a: return x` and what follows it, as if and else, where that is how a body ends."""
    for i, statement in enumerate(body[:-1]):
        if isinstance(statement, ast.If) and not statement.orelse and isinstance(statement.body[-1], ast.Return):
            statement.orelse = one_return(body[i + 1 :])
            return body[: i + 1]
    return body


def all_return(node, returns):
    """Whether both branches of an if end in one of two `returns`."""
    ends = [b[-1] for b in (node.body, node.orelse) if b]
    return len(returns) == len(ends) == 2 and all(isinstance(e, ast.Return) for e in ends)


class Returned(Transformer):
    """Assignments in place of returns."""

    def __init__(self, targets):
        self.targets = targets

    def visit_Return(self, node):
        return ast.copy_location(ast.Assign(copy.deepcopy(self.targets), node.value, lineno=0), node)


class Splicer:
    """Puts the bodies of functions that one statement calls in its place: x = f(...), return f(...), f(...)."""

    def __init__(self, facts, roots):
        self.facts, self.roots, self.cls, self.done = facts, roots, None, set()

    def program(self, body):
        for node in body:
            self.cls = node.name if isinstance(node, ast.ClassDef) else None
            for function in [n for n in walk(node) if isinstance(n, ast.FunctionDef)]:
                if id(function) not in self.done:
                    self.visit(function, function)

    def visit(self, node, function):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                found = []
                for statement in statements:
                    new = self.spliced(statement, function)
                    found += [statement] if new is None else new
                    if new is None and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                        self.visit(statement, function)
                setattr(node, name, found)

    def spliced(self, statement, caller):
        """The statements in place of one that calls a function, or None."""
        call = statement.value if isinstance(statement, ast.Expr | ast.Return | ast.Assign) else None
        function = self.callee(call)
        if function is None or function is caller or (isinstance(statement, ast.Assign) and len(statement.targets) > 1):
            return None
        body, is_tail = copy.deepcopy(without_doc(function.body)), isinstance(statement, ast.Return)
        body = body if is_tail else one_return(body)
        last = body[-1] if isinstance(body[-1], ast.Return) else None
        returns = [n for s in body for n in walk(s) if isinstance(n, ast.Return)]
        if any(isinstance(n, ast.Yield | ast.Global) for s in body for n in walk(s)):
            return None
        if not is_tail and any(isinstance(n, ast.FunctionDef) for s in body for n in walk(s)):
            return None
        is_split = isinstance(statement, ast.Assign) and isinstance(body[-1], ast.If) and all_return(body[-1], returns)
        is_split = is_split and isinstance(statement.targets[0], ast.Name)
        is_open = (last is None) != isinstance(statement, ast.Expr) or (
            not is_tail and len(returns) > (last is not None)
        )
        if is_open and not is_split:
            return None
        given = self.given(function, call, caller, statement, body)
        if given is None:
            return None
        self.done.add(id(function))
        if isinstance(statement, ast.Assign) and last is None:
            return given + [Returned(statement.targets).visit(s) for s in body]
        if isinstance(statement, ast.Assign):
            body[-1] = ast.copy_location(ast.Assign(statement.targets, last.value, lineno=0), statement)
            body[-1].comment = getattr(last, "comment", "") or getattr(statement, "comment", "")
        return given + body

    def callee(self, call):
        if not isinstance(call, ast.Call):
            return None
        f, facts = call.func, self.facts
        name = f.id if isinstance(f, ast.Name) else "." + getattr(f, "attr", "")
        function = facts.functions.get(name) if isinstance(f, ast.Name) else None
        if is_self(f) and self.cls and not is_framework(f.attr) and f"{self.cls}.{f.attr}" not in self.roots:
            function = facts.method(self.cls, f.attr)
        is_once = facts.mentions.get(name) == 1 and function is not None and id(function) not in self.done
        return function if is_once and not function.decorator_list else None

    def given(self, function, call, caller, statement, body):
        """Assignments of arguments to parameters, where the names do not get into each other's way; else None."""
        arguments = bind(function, call)
        if arguments is None:
            return self.given_by_star(function, call) if isinstance(statement, ast.Return) else None
        own, is_tail = {n for s in body for n in bound(s)}, isinstance(statement, ast.Return)
        targets = set(bound(statement)) if isinstance(statement, ast.Assign) else set()
        moved = {p: a for p, a in arguments.items() if not is_name(a, p)}
        fresh = own | set(moved)  # names that are bound by this
        same = set(arguments) - set(moved)
        others = set(bound(caller)) | set(read(caller))
        if not is_tail and (fresh - same) & (others - targets):
            return None
        if not is_tail and ((own & same) - targets or any(fresh & set(read(a)) - {p} for p, a in moved.items())):
            return None
        if not moved:
            return []
        names = [ast.Name(p, ast.Store()) for p in moved]
        if len(moved) == 1:
            return [ast.Assign(names, *moved.values(), lineno=0)]
        return [ast.Assign([ast.Tuple(names, ast.Store())], ast.Tuple(list(moved.values()), ast.Load()), lineno=0)]

    @staticmethod
    def given_by_star(function, call):
        """a, b, c = value for a call f(x, *value) at the end of a function, whose first parameter is x."""
        names = list(parameters(function))
        plain = [a.id for a in call.args[:-1] if isinstance(a, ast.Name)]
        is_star = call.args and isinstance(call.args[-1], ast.Starred) and not call.keywords
        if not is_star or len(plain) != len(call.args) - 1 or plain != names[: len(plain)] or function.args.defaults:
            return None
        target = ast.Tuple([ast.Name(n, ast.Store()) for n in names[len(plain) :]], ast.Store())
        return [ast.Assign([target], call.args[-1].value, lineno=0)]


def in_order_of_evaluation(node):
    """The nodes inside an expression, each after what it is made of."""
    for child in ast.iter_child_nodes(node):
        yield from in_order_of_evaluation(child)
    yield node


def merge_single_uses(body, names, reads):
    """`x = value; return f(x)` as `return f(value)`, where x is bound and read once and nothing is reordered."""
    found = []
    for statement in body:
        for part in ("body", "orelse", "finalbody"):
            if isinstance(getattr(statement, part, None), list) and not isinstance(
                statement, ast.FunctionDef | ast.ClassDef
            ):
                setattr(statement, part, merge_single_uses(getattr(statement, part), names, reads))
        if found and can_merge(found[-1], statement, names, reads):
            before = found.pop()
            statement.value = Substitution({before.targets[0].id: before.value}).visit(statement.value)
        found.append(statement)
    return found


def can_merge(before, statement, names, reads):
    is_plain_assign = (
        isinstance(before, ast.Assign) and len(before.targets) == 1 and isinstance(before.targets[0], ast.Name)
    )
    if not is_plain_assign or not isinstance(statement, ast.Return | ast.Assign) or statement.value is None:
        return False
    name = before.targets[0].id
    if (
        names.count(name) != 1
        or reads.count(name) != 1
        or getattr(before, "above", [])
        or not isinstance(before.value, ast.Call | ast.Subscript)
    ):
        return False
    if any(isinstance(n, (ast.IfExp, ast.BoolOp, *SCOPES)) for n in walk(statement.value)):
        return False
    for node in in_order_of_evaluation(statement.value):
        if is_name(node, name):
            return len(ast.unparse(statement.value)) + len(ast.unparse(before.value)) < 84
        if isinstance(node, ast.Call | ast.Subscript | ast.BinOp):
            return False
    return False


# ---------------------------------------------------------------------------------------------------------------------
# All of it.


def functions_in(body):
    for node in body:
        for part in walk(node):
            if isinstance(part, ast.FunctionDef):
                yield part


def shorten(body, config, roots):
    """The same program with fewer functions and variables, none of which others had to have."""
    before = None
    while before != (before := len(list(functions_in(body)))):
        splicer = Splicer(Facts(body, config), roots)
        splicer.program(body)
        if splicer.done:
            body = fold(body, config, roots)
    for function in functions_in(body):
        function.body = merge_single_uses(function.body, bound(function), read(function))
    return fold(body, config, roots)


def fold(body, config, roots, most=40):
    """The program `body` for this configuration, with what is reached from `roots`; see the top of this file."""
    before = None
    for _ in range(most):
        facts = Facts(body, config)
        body = [n for node in body for n in Folder(facts).block([node])]
        for function in functions_in(body):
            propagate(function)
            drop_locals(function)
        body, found = prune(body, roots, facts)
        facts = Facts(body, config)
        drop_attributes(facts, found)
        settle_parameters(body, facts, roots)
        now = hash(tuple(map(ast.dump, body)))
        if now == before:
            return body
        before = now
    raise ConfigError("cannot be folded: folding does not come to an end")
