"""Every public name says what it is: a docstring, also of methods, and beside each parameter (or field of a dataclass) a comment: shape, unit, meaning."""
import ast
import importlib
import inspect
import io
import re
import tokenize
from functools import cache, lru_cache
from pathlib import Path

import pytest
from fastcore.basics import patch

ROOT = Path(__file__).resolve().parents[1]/"camflow"


def parameters(function):
    a = function.args
    return [p for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if p is not None and p.arg not in ("self", "cls")]


def fields(cls):
    made = any("dataclass" in ast.unparse(d) for d in cls.decorator_list)
    return [n for n in cls.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")] if made else []


parse = lru_cache(1)(ast.parse)   # one question after the other is asked of a file


@cache
def commented(source):
    "Numbers of the lines that hold a comment."
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}


def exported(tree):
    "The names in __all__."
    return next((set(ast.literal_eval(n.value)) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), set())


def silent(source):
    "What of a module's public names is not documented."
    tree, found = parse(source), []
    lines, public = commented(source), exported(tree)
    for node in tree.body:
        if getattr(node, "name", None) not in public: continue
        if not ast.get_docstring(node): found.append(f"{node.name}: no docstring")
        if isinstance(node, ast.ClassDef):
            found += [f"{node.name}.{n.target.id}" for n in fields(node) if not {n.lineno, n.end_lineno} & lines]
            starts = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        else: starts = [node]
        found += [f"{node.name}({p.arg})" for function in starts for p in parameters(function) if p.lineno not in lines]
    return found


@pytest.mark.parametrize("chapter", sorted({p.relative_to(ROOT).parts[0] for p in ROOT.rglob("*.py")}))
def test_public_names_are_documented(chapter):
    where = ROOT/chapter
    files = [p for p in ([where] if where.is_file() else sorted(where.rglob("*.py"))) if p.stem not in ("_modidx", "__init__")]
    wrong = [f"{p.relative_to(ROOT)}: {name}" for p in files for name in silent(p.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


def held(member):
    "The function of a method, static or class method (also of @patch) or cached property; None for other things."
    return next((f for name in ("__func__", "func", "f") if inspect.isfunction(f := getattr(member, name, None))), member if inspect.isfunction(member) else None)


def written(member):
    "Docstring of what stands in a class."
    return getattr(held(member) or member, "__doc__", None)


def silent_methods(cls):
    """Public methods and properties without a docstring. What overrides a documented method of a base is documented there (`forward`
    of a torch module, `score` of our metrics); `__call__` and other special methods belong to the docstring of the class."""
    members = [name for name, m in vars(cls).items() if not name.startswith("_") and (held(m) or isinstance(m, property))]
    return [f"{cls.__name__}.{name}" for name in members if not any(written(vars(base)[name]) for base in cls.__mro__ if name in vars(base))]


@pytest.mark.parametrize("chapter", sorted({p.relative_to(ROOT).parts[0] for p in ROOT.rglob("*.py")} - {"__init__.py", "_modidx.py"}))
def test_public_methods_are_documented(chapter):
    where, wrong = ROOT/chapter, []
    for p in [where] if where.is_file() else sorted(where.rglob("*.py")):
        module = importlib.import_module(".".join(("camflow", *p.relative_to(ROOT).with_suffix("").parts)))
        classes = [c for name in getattr(module, "__all__", ()) if inspect.isclass(c := getattr(module, name)) and c.__module__ == module.__name__]
        wrong += [f"{p.relative_to(ROOT)}: {name}" for c in classes for name in silent_methods(c)]
    assert not wrong, "\n".join(wrong)


def names(node):
    "Of a base or an annotation: `a.B` is B, `(A, B)` both."
    return {n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))}


def methods(source):
    "(class, its method, numbers of the module's lines with a comment), also those of @patch."
    tree, lines = parse(source), commented(source)
    for node in tree.body:
        if isinstance(node, ast.ClassDef): yield from ((node.name, m, lines) for m in node.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef)))
        elif isinstance(node, ast.FunctionDef) and any("patch" in names(d) for d in node.decorator_list):
            yield from ((name, node, lines) for name in names(node.args.args[0].annotation))


def family(sources):
    "({class: names of its bases}, {(class, method): definitions with their lines}); classes of one name count as one."
    bases, defined = {}, {}
    for source in sources:
        for node in parse(source).body:
            if isinstance(node, ast.ClassDef): bases[node.name] = bases.get(node.name, set()).union(*map(names, node.bases))
        for name, method, lines in methods(source): defined.setdefault((name, method.name), []).append((method, lines))
    return bases, defined


@cache
def package(): return family([p.read_text(encoding="utf-8") for p in ROOT.rglob("*.py") if p.stem != "_modidx"])


def unsaid(method, lines):
    "Parameters with neither a comment on their line nor a word in the docstring, which may also give shapes, `[B,C] -> [B]`."
    said = ast.get_docstring(method) or ""
    if "->" in said or re.search(r"\[[^\]]*[A-Z0-9]", said): return []
    return [p.arg for p in parameters(method) if p.lineno not in lines and not re.search(rf"\b{p.arg}\b", said)]


def silent_parameters(source, bases, defined):
    """Of public methods, also those of @patch. A method that overrides one of a base, with the same parameters, is documented there;
    special methods belong to the docstring of the class."""
    def above(name): return {b for base in bases.get(name, ()) for b in (base, *above(base)) if b != name}
    def inherited(name, method):
        wanted = [p.arg for p in parameters(method)]
        found = [one for base in above(name) for one in defined.get((base, method.name), ())]
        return any([p.arg for p in parameters(m)] == wanted and not unsaid(m, lines) for m, lines in found)
    tree = parse(source)
    public, own = exported(tree), {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    return [f"{name}.{m.name}({p})" for name, m, lines in methods(source) if not m.name.startswith("_") and (name in public or name not in own)
            for p in unsaid(m, lines) if not inherited(name, m)]


@pytest.mark.parametrize("chapter", sorted({p.relative_to(ROOT).parts[0] for p in ROOT.rglob("*.py")} - {"__init__.py", "_modidx.py"}))
def test_parameters_of_methods_are_documented(chapter):
    where = ROOT/chapter
    files = [where] if where.is_file() else sorted(where.rglob("*.py"))
    wrong = [f"{p.relative_to(ROOT)}: {name}" for p in files for name in silent_parameters(p.read_text(encoding="utf-8"), *package())]
    assert not wrong, "\n".join(wrong)


def test_silent_parameters_are_heard():
    source = """__all__ = ['A', 'B']
class A:
    def f(self, x, # metres
          y): pass
    def g(self, x): "[N] -> [N]."
    def h(self, x): "Where x is."
    def base(self, x): pass # metres
    def _own(self, x): pass
    def __call__(self, x): pass
class B(A):
    def base(self, x): pass
    def f(self, x, y): pass
class _C:
    def f(self, x): pass
@patch
def base(self: B, x, more): pass
@patch(cls_method=True)
def made(cls: Elsewhere, x): pass
"""
    assert silent_parameters(source, *family([source])) == ["A.f(y)", "B.f(x)", "B.f(y)", "B.base(x)", "B.base(more)", "Elsewhere.made(x)"]


class Base:
    def heard(self):
        "Said here."


class Derived(Base):
    field = 3
    said = property(lambda self: 1, doc="Metres.")
    mute = property(lambda self: 1)

    def heard(self): return 1
    def quiet(self): return 1
    def __call__(self): return 1

    @classmethod
    def made(cls): return cls()

    @staticmethod
    def told():
        "Seconds."


@patch(cls_method=True)
def patched(cls: Derived): return cls()


def test_silent_methods_are_heard(): assert silent_methods(Derived) == ["Derived.mute", "Derived.quiet", "Derived.made", "Derived.patched"]


def test_silence_is_heard():
    assert silent("""__all__ = ['f', 'C', 'D']
def f(a, # first
      b, *c):
    return a
class C:
    "Fine."
    def __init__(self, x): pass
@dataclass
class D:
    "Fields."
    u: int = 0
    v: int = 0 # metres
def _g(y): pass
""") == ["f: no docstring", "f(b)", "f(c)", "C(x)", "D.u"]
