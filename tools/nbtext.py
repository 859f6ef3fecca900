"""Edit notebooks as plain text: `python tools/nbtext.py to-text NB.ipynb FILE.py`, edit, `python tools/nbtext.py to-nb FILE.py NB.ipynb`.

The text is the percent format (`# %%` starts a code cell, `# %% [markdown]` a prose cell whose lines begin with `# `). A marker may carry
`id=` and `tags=a,b`. Cells keep their id; unchanged code cells keep their outputs. The text is scratch: only the notebook is committed.
"""
import hashlib
import re
import sys
from pathlib import Path

import nbformat

MARKER = re.compile(r"^# %%(?P<markdown> \[markdown\])?(?P<options>( \w+=\S+)*)\s*$")
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def to_text(nb) -> str:
    "Percent text of a notebook."
    out = []
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        head = "# %%" + (" [markdown]" if cell.cell_type == "markdown" else "") + f" id={cell.id}"
        out.append(head + (f" tags={','.join(tags)}" if tags else ""))
        lines = cell.source.split("\n")
        out += [f"# {line}".rstrip() for line in lines] if cell.cell_type == "markdown" else lines
        out.append("")
    return "\n".join(out).rstrip("\n") + "\n"


def parse(text: str):
    "Yields (kind, options, source) per cell of a percent text."
    kind, options, lines = None, {}, []
    for line in [*text.split("\n"), "# %%"]:
        if match := MARKER.match(line):
            if kind:
                body = [re.sub(r"^# ?", "", one) for one in lines] if kind == "markdown" else lines
                yield kind, options, "\n".join(body).strip("\n")
            kind = "markdown" if match["markdown"] else "code"
            options, lines = dict(pair.split("=", 1) for pair in match["options"].split()), []
        else:
            lines.append(line)


def to_notebook(text: str, old=None, seed: str = ""):
    "Notebook of a percent text; `old` lends ids, metadata and outputs to cells that did not change."
    by_id = {cell.id: cell for cell in old.cells} if old else {}
    by_source = {(cell.cell_type, cell.source): cell for cell in old.cells} if old else {}
    cells, used = [], set()
    for number, (kind, options, source) in enumerate(parse(text)):
        known = by_id.get(options.get("id")) or by_source.get((kind, source))
        fresh = hashlib.sha1(f"{seed}|{number}|{source}".encode()).hexdigest()[:8]
        name = options.get("id") or (known.id if known is not None else fresh)
        while name in used:
            name = hashlib.sha1(name.encode()).hexdigest()[:8]
        used.add(name)
        cell = (nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell)(source, id=name)
        if "tags" in options:
            cell.metadata["tags"] = options["tags"].split(",")
        if kind == "code" and known is not None and known.cell_type == "code" and known.source == source:
            cell.outputs = known.outputs
        cells.append(cell)
    return nbformat.v4.new_notebook(cells=cells, metadata=(old.metadata if old else KERNEL))


def main(verb: str, source: str, target: str):
    "Convert one file; to-nb updates an existing notebook in place."
    source, target = Path(source), Path(target)
    if verb == "to-text":
        target.write_text(to_text(nbformat.read(source, as_version=4)))
    elif verb == "to-nb":
        old = nbformat.read(target, as_version=4) if target.exists() else None
        nb = to_notebook(source.read_text(), old, seed=target.name)
        nbformat.validate(nb)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
