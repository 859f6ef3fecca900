"The pages of docs/ and the README say what is there: commands, links, names, files."
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from camflow.files import InputError
from camflow.lab.cli import _parser
from camflow.lab.parameters import notebook_parameters, parse_assignment
from camflow.lab.run import find_notebook, prepare
from camflow.lab.sweep import axis

ROOT = Path(__file__).parents[1]
PAGES = [ROOT/"README.md", ROOT/"CONTRIBUTING.md", *sorted((ROOT/"docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*?$", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^()\s]+)\)")
NAME = re.compile(r"camflow(?:\.\w+)+")
FILE = re.compile(r"(?:camflow|nbs|data/tiny|servers|reports/gallery|tests|tools|docs)/[\w./-]+")


def prose(text: str) -> str: return FENCE.sub("", text)


def code(text: str) -> list:
    "Lines of shell in a page: of fenced blocks (continued lines joined) and of spans."
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "bash", "sh", "console")]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + SPAN.findall(prose(text))


def commands(text: str) -> list:
    "Words of each `camflow ...` in a page."
    found = []
    for line in code(text):
        if "camflow " not in line: continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                while words and (re.fullmatch(r"\w+=\S*", words[0]) or words[0] == "$"): words = words[1:]
                if len(words) > 1 and words[0] == "camflow": found.append(words[1:])
                words = []
            else: words.append(word)
    return found


def template(words: list) -> bool: return any(word in ("NAME", "PROFILE", "key=value", "...") for word in words) # stands for any run


def check(words: list) -> str:
    "What is wrong with a command, or nothing; nothing is executed."
    if words[0] in ("run", "sweep", "resume", "rerun", "list", "show", "compare", "weights", "serve", "doctor") and len(words) == 1: # its name alone
        return ""
    try: args = _parser().parse_args(words)
    except SystemExit: return "the command line does not take these arguments"
    if args.command not in ("run", "sweep") or template(words): return ""
    try:
        profiles = [f for f in args.f if not f.endswith(".yaml")] # a reader's own file
        declared = notebook_parameters(find_notebook(args.name))
        if args.command == "run": prepare(args.name, profiles, dict(parse_assignment(text, declared) for text in args.p))
        else:
            for text in args.p:
                name, values = axis(text, declared)
                for value in values: prepare(args.name, profiles, {name: value})
    except InputError as error: return str(error)
    return ""


def imports(name: str) -> bool:
    "Whether a dotted name is there."
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try: found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)): raise
            continue
        for part in parts[n:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields: return False
            found = getattr(found, part, None)
        return True
    return False


def page_id(page): return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands(page):
    wrong = {shlex.join(words): said for words in commands(page.read_text(encoding="utf-8")) if (said := check(words))}
    assert not wrong, "\n".join(f"camflow {c}: {said}" for c, said in wrong.items())


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links(page):
    links = [link for link in LINK.findall(prose(page.read_text(encoding="utf-8"))) if not re.match(r"[a-z]+:|#", link)]
    gone = [link for link in links if not (page.parent/link.partition("#")[0]).exists()]
    assert not gone, f"{page_id(page)}: {gone} do not exist"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_and_files(page):
    spans = [part for span in SPAN.findall(prose(page.read_text(encoding="utf-8"))) for part in re.split(r"[(\s,:]", span)]
    names = {s for s in spans if NAME.fullmatch(s)}
    gone = sorted(n for n in names if not imports(n)) + sorted(s for s in spans if FILE.fullmatch(s) and not (ROOT/s).exists() and not list(ROOT.glob(s + "*")))
    assert not gone, f"{page_id(page)}: {gone} do not exist"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python(page):
    blocks = [ast.parse(body) for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "python"]
    asked = [f"{node.module}.{alias.name}" for block in blocks for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names]
    gone = [name for name in asked if name.startswith("camflow.") and not imports(name)]
    assert not gone, f"{page_id(page)}: {gone} cannot be imported"


def test_the_check_sees_mistakes():
    text = "```bash\n$ X=1 camflow run recam_grpo -f demo \\\n  -p seed=1  # why\ncamflow list; camflow run no_such_run\n```\nand `camflow run recam_grpo -p sed=1`"
    found = commands(text)
    assert found == [["run", "recam_grpo", "-f", "demo", "-p", "seed=1"], ["list"], ["run", "no_such_run"], ["run", "recam_grpo", "-p", "sed=1"]]
    assert [bool(check(words)) for words in found] == [False, False, True, True]
    assert "seed" in check(found[3]) and check(["run", "recam_grpo", "-f", "demoo"]) and check(["run", "recam_grpo", "-p", "seed=one"])
    assert imports("camflow.geometry.camera.Cameras.from_w2c") and not imports("camflow.geometry.camera.Cameras.from_nothing") and not imports("camflow.nothing")
