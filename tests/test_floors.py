"Imports go down the floors of the design, and no module needs itself by a detour."
import ast
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]/"camflow"
FLOORS = ["lab", "servers", "rl", "rewards", "wan stereo joint gflow", "metrics", "depth flow vlm", "training", "world", "data", "geometry", "media", "device assets files processes"]
LEVEL = {name: len(FLOORS) - n for n, row in enumerate(FLOORS) for name in row.split()}


@lru_cache
def imports(path):
    "(module, line) of everything in the package that a file imports, at its top and inside functions."
    package, found, tree = ["camflow", *path.relative_to(ROOT).parts[:-1]], [], ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [(module, node.lineno), *((f"{module}.{a.name}", node.lineno) for a in node.names)]
    return [(name, line) for name, line in found if name.startswith("camflow.")]


def modules(): return {".".join(("camflow", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path for path in sorted(ROOT.rglob("*.py")) if path.stem != "_modidx"}


def test_imports_go_down():
    wrong = []
    for name, path in modules().items():
        if name == "camflow": continue
        own = name.split(".")[1]
        assert own in LEVEL, f"{name}: {own} has no floor; add it to FLOORS"
        for other, line in imports(path):
            floor = other.split(".")[1]
            if LEVEL.get(floor, 0) > LEVEL[own]: wrong.append(f"{path.relative_to(ROOT)}:{line} imports {other}")
    assert not wrong, "\n".join(wrong)


def knots(graph):
    "What is left of {module: modules that it imports} when everything that is in no cycle, nor on the way between two, is taken away."
    left = dict(graph)
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends: del left[name]
    while starts := [name for name in left if not any(name in others for others in left.values())]:
        for name in starts: del left[name]
    return sorted(left)


def test_no_module_needs_itself():
    "Not when it is imported, and not later either: imports inside functions count, too."
    known = modules()
    left = knots({name: {other for other, _ in imports(path) if other in known and other != name} for name, path in known.items()})
    assert not left, f"these need each other: {left}"


def test_a_lazy_cycle_is_seen(tmp_path, monkeypatch):
    (tmp_path/"joint").mkdir()
    for name, text in (("a", "from .b import x\n"), ("b", "def x():\n    from camflow.joint.a import y\n"), ("c", "from .a import y\n"), ("d", "")):
        (tmp_path/"joint"/f"{name}.py").write_text(text)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    imports.cache_clear()
    known = modules()
    graph = {name: {other for other, _ in imports(path) if other in known and other != name} for name, path in known.items()}
    imports.cache_clear()
    assert knots(graph) == ["camflow.joint.a", "camflow.joint.b"]


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    (tmp_path/"media").mkdir()
    (tmp_path/"media"/"frames.py").write_text("def f():\n    from ..rl import losses\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    imports.cache_clear()
    assert [name for name, _ in imports(tmp_path/"media"/"frames.py")] == ["camflow.rl", "camflow.rl.losses"]
    imports.cache_clear()
