"""What every module keeps, read off its source: devices have one home, draws have a generator, files appear whole, foreign files run no code, errors are not swallowed.

An exception stands in a table here with its reason, and a row that nothing needs any more fails, too.
"""
import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]/"camflow"
DEVICES = {"cuda", "npu", "mps", "xpu", "hpu", "mlu"}
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like", "randint_like", "normal_", "uniform_", "random_", "exponential_", "bernoulli_", "trunc_normal_"}
WRITERS = {"write_text", "write_bytes", "imwrite", "savefig", "save_pretrained", "save_file", "copyfile", "copy2", "copytree"}
WRITES = {"torch.save", "np.save", "np.savez", "np.savez_compressed", "shutil.copy", "shutil.move"}
WHOLE = {"atomic_write", "whole_files", "TemporaryDirectory"}   # a `with` of these around a writer

# (module, function): why it stands
DEVICE = {("gflow/rasterise.py", "has_gsplat"): "torch.version.cuda: whether torch was built with the kernels that gsplat needs; no tensor goes anywhere"}
DRAW = {("stereo/attention.py", "__init__"): "first weights of a layer, drawn like those of torch's layers: by whoever builds the network, under fork_rng",
        ("wan/recam.py", "__init__"): "the same", ("vlm/endpoint.py", "_wait"): "spreads the retries of many clients; no result depends on it",
        ("rl/schedules.py", "draw_levels"): "a local function `rand` that has the generator", ("wan/conditions.py", "draw_hidden"): "the same"}
WRITE = {("data/stereo_files.py", "write_npy"): "into a buffer", ("rewards/client.py", "__call__"): "into a buffer", ("device.py", "reset_peak_memory"): "a switch of the kernel",
         ("files.py", "one_at_a_time"): "an empty lock", ("lab/registry.py", "_locked"): "an empty lock",
         ("gflow/layout.py", "_organise"): "into .NAME.part, renamed at the end", ("training/checkpoint.py", "_write_group"): "into a folder that is renamed at the end",
         ("joint/models.py", "_write_weights"): "into the place of whole_files", ("rl/recam_export.py", "save_transformer"): "into a folder that is renamed at the end",
         ("rl/recam_export.py", "save_parts"): "the same", ("lab/docs.py", "put"): "a site in a temporary folder", ("lab/docs.py", "section"): "the same",
         ("lab/docs.py", "contents"): "the same", ("lab/docs.py", "write_sources"): "the same",
         ("metrics/budget.py", "_put"): "a private folder; what says that the answer is whole is renamed", ("metrics/sfm.py", "_database"): "a private folder of one call",
         ("rewards/wire.py", "__call__"): "shared memory; its name is told afterwards", ("servers/http.py", "in_spool"): "the spool; its name is told afterwards",
         ("servers/http.py", "split_parts"): "the same", ("servers/plan.py", "build_venv"): "an environment that counts once its .stamp is there",
         ("servers/supervisor.py", "rotate"): "the old log, a convenience", ("training/heartbeat.py", "__init__"): "where faulthandler writes stacks",
         ("training/heartbeat.py", "__call__"): "renamed by hand: without fsync, once per step"}
SWALLOWED = {("metrics/streaming.py", "measure_clip"): "each metric reports it", ("lab/live.py", "_main"): "written to live.log"}
PICKLE = {("metrics/engine.py", "_child"): "of this program's own memory, to its own child", ("metrics/engine.py", "in_workers"): "the same"}


def named(node):
    "torch.load for torch.load(...), .write_text for f(x).write_text(...)."
    parts = []
    while isinstance(node, ast.Attribute): parts, node = [node.attr, *parts], node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "", *parts])


def walk(node, function="", withs=frozenset()):
    "(node, nearest function, names called by the `with` statements around it)."
    yield node, function, withs
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): function = node.name
    inside = withs | {named(n.func).split(".")[-1] for item in node.items for n in ast.walk(item.context_expr) if isinstance(n, ast.Call)} if isinstance(node, ast.With) else withs
    for child in ast.iter_child_nodes(node): yield from walk(child, function, withs if isinstance(child, ast.withitem) else inside)


def draws(node, name, withs):
    if name.startswith(("np.random.", "random.")):
        return name.split(".")[-1] not in {"default_rng", "RandomState", "Random", "get_state", "set_state", "getstate", "setstate"} or (not node.args and "state" not in name)
    if name.split(".")[0] in ("rng", "self") or "fork_rng" in withs: return False # numpy's generators are objects
    return name == "torch.manual_seed" or name.split(".")[-1] in DRAWS and not any(k.arg == "generator" for k in node.keywords)


def writes(node, name, withs):
    if withs & WHOLE: return False
    last = name.split(".")[-1]
    mode = [k.value for k in node.keywords if k.arg == "mode"] or (node.args[1:2] if name == "open" else node.args[:1] if last == "open" else [])
    opens = last == "open" and mode and isinstance(mode[0], ast.Constant) and isinstance(mode[0].value, str) and len(mode[0].value) < 4 and set(mode[0].value) & set("wx")
    return bool(opens) or last in WRITERS and name != "write_text" or name in WRITES   # write_text alone is a function of ours


def swallows(node):
    kinds = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"Exception"}
    inner = [n for s in node.body for n in ast.walk(s)]
    return bool(kinds & {"Exception", "BaseException"}) and not any(isinstance(n, ast.Raise) or isinstance(n, ast.Name) and n.id == node.name for n in inner)


def offences(text):
    "(kind, function, line) of a module."
    for node, function, withs in walk(ast.parse(text)):
        name = named(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Attribute) and node.attr in DEVICES or isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0].lower() in DEVICES:
            yield "device", function, node.lineno
        if name and draws(node, name, withs): yield "draw", function, node.lineno
        if name and writes(node, name, withs): yield "write", function, node.lineno
        if name == "torch.load" and not any(k.arg == "weights_only" and getattr(k.value, "value", 0) is True for k in node.keywords): yield "load", function, node.lineno
        if name == "np.load" and any(k.arg == "allow_pickle" and getattr(k.value, "value", 1) is not False for k in node.keywords): yield "load", function, node.lineno
        if name in {"pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps"}: yield "pickle", function, node.lineno
        if isinstance(node, ast.ExceptHandler) and swallows(node): yield "swallow", function, node.lineno
        # x.double().cpu(): float64 on the accelerator, for nothing
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cpu" and any(isinstance(n, ast.Attribute) and n.attr == "double" for n in ast.walk(node.func.value)):
            yield "float64", function, node.lineno


@cache
def everything():
    return [(kind, p.relative_to(ROOT).as_posix(), function, line) for p in sorted(ROOT.rglob("*.py")) if p.stem != "_modidx" for kind, function, line in offences(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("kind", "allowed", "advice"), [
    ("device", DEVICE, "ask camflow.device"), ("draw", DRAW, "pass generator=, or build under torch.random.fork_rng"), ("write", WRITE, "use atomic_write, whole_files or copy_file of camflow.files"),
    ("load", {}, "weights_only=True"), ("pickle", PICKLE, "send JSON or arrays"), ("swallow", SWALLOWED, "name the errors that are meant, or report what came"), ("float64", {}, "first .cpu(), then .double()")])
def test_contract(kind, allowed, advice):
    found = [(file, function, line) for k, file, function, line in everything() if k == kind and file != "device.py" or k == kind == "write"]
    wrong = [f"camflow/{file}:{line} in {function or 'the module'}" for file, function, line in found if (file, function) not in allowed]
    assert not wrong, f"{advice}:\n" + "\n".join(wrong)
    assert not (idle := set(allowed) - {(file, function) for file, function, _ in found}), f"no longer needed: {idle}"


def test_each_kind_is_seen():
    bad = """
def f(x, path, scheduler):
    y = torch.randn(3).to("cuda:0")
    torch.manual_seed(0)
    np.random.seed(0)
    path.write_text("a")
    with open(path, "w") as file: file.write("a")
    torch.load(path)
    pickle.loads(x)
    x.double().cpu()
    try: x.cuda()
    except Exception: return None
"""
    assert sorted((kind, line) for kind, _, line in offences(bad)) == sorted([
        ("draw", 3), ("device", 3), ("draw", 4), ("draw", 5), ("write", 6), ("write", 7), ("load", 8), ("pickle", 9), ("float64", 10), ("device", 11), ("swallow", 12)])


def test_good_code_is_left_alone():
    good = """
def f(x, path, g):
    y = torch.randn(3, generator=g).cpu().double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = torch.randn(3)
    with atomic_write(path) as file: torch.save(y, file)
    with open(path) as file: torch.load(file, weights_only=True)
    rng = np.random.default_rng(3)
    try: rng.normal()
    except Exception as error: report(error)
"""
    assert not list(offences(good))
