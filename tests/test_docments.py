"""Every public name says what it is: a docstring, and beside each parameter (or field of a dataclass) a comment: shape, unit, meaning."""
import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]/"camflow"
OPEN = {"lab/doc_outputs", "lab/docs", "lab/views"}   # still without


def parameters(function):
    a = function.args
    return [p for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if p is not None and p.arg not in ("self", "cls")]


def fields(cls):
    made = any("dataclass" in ast.unparse(d) for d in cls.decorator_list)
    return [n for n in cls.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")] if made else []


def silent(source):
    "What of a module's public names is not documented."
    tree, found = ast.parse(source), []
    lines = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    public = next((set(ast.literal_eval(n.value)) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), set())
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
    wrong = [f"{p.relative_to(ROOT)}: {name}" for p in files if p.relative_to(ROOT).with_suffix("").as_posix() not in OPEN for name in silent(p.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


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
