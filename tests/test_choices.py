"Every parameter of every run that takes weights is known: what is published for it, what is embedded, what its profiles leave to the caller."
import json
import re

import pytest

from camflow.assets import list_profiles, list_runs, profile_path, tiny_path
from camflow.files import InputError
from camflow.lab import choices
from camflow.lab.doctor import unset
from camflow.lab.parameters import notebook_parameters, read_profile
from camflow.lab.published import PUBLISHED
from camflow.lab.run import find_notebook, prepare
from tests.test_cli import camflow

# comments of parameters that take weights, as the parameters cells word them
TAKES = re.compile(r"checkpoint\b(?! or an)|diffusers|published (weights|\.pth)|shipped weights|folder of (a|an|the) (network|base|trained|ControlNet|adapter|depth network|camera estimator|UniCon|Depth)|model folder"
                   r"|of a Depth Anything|CLIP folder|CLIPVisionModel|GMFlow\b|weights of LPIPS|LoRA files|of the depth network|depth network of|estimator for|Stable (Video )?Diffusion|that svd_interpolate exported|address or class|options of its class"
                   r"|base and adapter|estimated flow|tokenizer/|the tiny weights|shipped one|load_flow|of a trained model|weights for", re.I)
NOT_WEIGHTS = {("flow_train", "model"): "a configuration", ("omnicam_finetune", "attention"): "a kernel", ("recam_grpo", "shift"): "a number"} # worded alike


def taking(run):
    "Names of its parameters that take weights, by their comments."
    return {name for name, p in notebook_parameters(find_notebook(run)).items()
            if TAKES.search(p.help) and (run, name) not in NOT_WEIGHTS and "export" not in name and p.type not in ("int", "float", "bool")}


@pytest.mark.parametrize("run", list_runs())
def test_every_parameter_is_known(run):
    known, declared = {c.parameter for c in choices.choices_of(run)}, notebook_parameters(find_notebook(run))
    assert known <= declared.keys(), f"{run} has no parameters {sorted(known - declared.keys())}"
    unknown = taking(run) - known
    assert not unknown, f"{run}: {sorted(unknown)} take weights and are not in camflow.lab.choices.CHOICES"


def test_comments_find_nearly_all():
    "So that a new parameter, worded like the others, is seen."
    pairs = [(run, c.parameter) for c in choices.CHOICES for run in c.runs.split()]
    assert len([1 for run, name in pairs if name not in taking(run)]) <= 3 and len(pairs) > 60


def test_the_check_sees_a_gap(monkeypatch):
    monkeypatch.setattr(choices, "CHOICES", [c for c in choices.CHOICES if c.parameter != "base"])
    assert "base" in taking("joint_finetune") - {c.parameter for c in choices.choices_of("joint_finetune")}


def test_the_table_is_whole():
    assert sorted(r for runs in choices.SYSTEMS.values() for r in runs) == list_runs()
    named = {n for c in choices.CHOICES for n in c.published.split()}
    assert named == set(PUBLISHED), f"no run takes {set(PUBLISHED) - named}; not published: {named - set(PUBLISHED)}"
    for c in choices.CHOICES:
        for run in c.runs.split(): assert c in choices.choices_of(run)
        for name in re.findall(r"\[([\w/]+)\]", c.instead): assert tiny_path(name.split("/")[0]).joinpath(*name.split("/")[1:], "card.md").is_file()
    rows = {row["name"]: row for row in choices.embedded()}
    assert {"joint/image_depth", "joint/video_flow", "recam", "stereo"} <= rows.keys() and all(row["licence"] == "Apache-2.0" and row["bytes"] > 1e5 and row["users"] for row in rows.values())


@pytest.mark.parametrize("run, profile", [(run, profile) for run in list_runs() for profile in list_profiles(run) if "# needs:" in profile_path(run, profile).read_text(encoding="utf-8")])
def test_needs_are_parameters(run, profile):
    "What a profile leaves open exists, is open, and is asked for until it is given."
    _, values, _ = prepare(run, profile)
    lines = [line for line in profile_path(run, profile).read_text(encoding="utf-8").splitlines() if line.startswith("# needs:")]
    needs = lines[0].removeprefix("# needs: ").split(", ")
    assert len(lines) == 1 and needs and all(values[name] in (None, "", []) for name in needs)
    assert all(f"-p {name}=..." in unset(run, profile, values) for name in needs) and unset(run, profile, values | {name: "X" for name in needs}) == ""


def test_profiles_that_speak_of_what_to_give_say_it_in_that_line():
    for run in list_runs():
        for profile in list_profiles(run):
            comments = [line for line in profile_path(run, profile).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
            assert not any(re.search(r"fill in|; set \w+,|pass -p", line, re.I) for line in comments), f"{run}.{profile}: write `# needs: ...`"


def named_files(value):
    "Strings in a profile's value that name a place on disk, however deep."
    if isinstance(value, dict): return [s for v in value.values() for s in named_files(v)]
    if isinstance(value, list): return [s for v in value for s in named_files(v)]
    return [value] if isinstance(value, str) and ("/" in value or value == "weights" or re.search(r"\.(pth?|ckpt|bin|safetensors)$", value)) else []


def astray(run, values):
    "Places of weights that are not where `camflow weights` says."
    wrong = []
    for c in choices.choices_of(run):
        homes = ["weights/" + PUBLISHED[n].file for n in c.published.split()]
        if len(homes) > 10: homes.append("weights")   # recam_evaluate looks for many files in the folder
        wrong += [f"{run} {c.parameter}: {s}" for s in named_files(values.get(c.parameter)) if not any(s == h or s.startswith(h + "/") for h in homes)]
    known = {c.parameter for c in choices.choices_of(run)}
    return wrong + [f"{run} {name}: {s}" for name, v in values.items() if name not in known for s in named_files(v) if re.search(r"weights|checkpoint|\.(pth?|ckpt|safetensors)$", s)]


def test_profiles_look_where_the_command_says(monkeypatch, tmp_path):
    monkeypatch.delenv("CAMFLOW_WEIGHTS", raising=False)
    profiles = [(run, read_profile(profile_path(run, profile))) for run in list_runs() for profile in list_profiles(run)]
    assert not [line for run, values in profiles for line in astray(run, values)] and sum(bool(re.search("'weights", str(v))) for _, v in profiles) > 10
    assert astray("stereo_depth", {"weights": "checkpoints/dynamic_stereo_sf.pth"}) and astray("stereo_depth", {"weights": "weights/other.pth"}) and astray("stereo_depth", {"out": "checkpoints/a"})
    monkeypatch.setenv("CAMFLOW_WEIGHTS", str(tmp_path))
    path = profile_path("stereo_depth", "custom")
    assert read_profile(path)["weights"] == str(PUBLISHED["stereo-sf"].path(tmp_path)) and read_profile(profile_path("recam_evaluate", "npu8"))["weights"] == str(tmp_path)
    (tmp_path/"own.yaml").write_text("options: {da3: {weights: weights/DA3-BASE}, word: weightsome/x}\nlist: [weights/a]\n")
    assert read_profile(tmp_path/"own.yaml") == {"options": {"da3": {"weights": f"{tmp_path}/DA3-BASE"}, "word": "weightsome/x"}, "list": [f"{tmp_path}/a"]}


def test_the_command_tells(tmp_path):
    text = camflow("weights", "--folder", str(tmp_path)).stdout
    for entry in PUBLISHED.values(): assert f"{entry.name}: missing" in text and entry.licence in text and entry.url in text
    assert "data/tiny/joint/video_flow" in text and "video_edit -p sd=..." in text and "Embedded" in text
    one = camflow("weights", "video_edit", "--json", "--folder", str(tmp_path))
    rows = {row["name"]: row for row in json.loads(one.stdout)}
    assert set(rows) == {"sd15", "svd", "unicon"} and "video_edit.appearance" in rows["unicon"]["users"] and not rows["svd"]["present"]
    none = camflow("weights", "gflow_cost")
    assert none.returncode == 2 and "gflow_cost takes no published weights" in none.stderr
    (tmp_path/"dynamic_stereo_sf.pth").write_bytes(b"x")
    row = next(r for r in choices.system_rows(tmp_path) if r[0] == "DynamicStereo")
    assert row[1:3] == (1, 7) and row[3] == ["stereo-dr-sf", *choices.RAFT_STEREO.split()] and row[4] == ["stereo"]


def test_the_doctor_tells(tmp_path):
    done = camflow("doctor", "--json", CAMFLOW_WEIGHTS=str(tmp_path))
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    for system in choices.SYSTEMS:
        row = rows[f"weights, {system}"]
        assert row["status"] == "optional" and f"published are in {tmp_path}" in row["detail"] and "without them: embedded" in row["detail"]
    assert rows["joint_finetune -f sd15"] == {"what": "joint_finetune -f sd15", "status": "not here", "detail": "give it -p base=..., -p table=..., -p folder=..."}
    assert "joint/video_flow" in rows["tiny weights"]["detail"]


def test_parameters_list_the_profiles():
    done = camflow("run", "joint_finetune", "--parameters")
    assert done.returncode == 0 and "base: str | None" in done.stdout and re.search(r"-f sd15 +UniCon.*needs: base, table, folder", done.stderr)


@pytest.mark.parametrize("name, build", [("musiq-spaq", "musiq:MUSIQ"), ("amt-s", "amt:AMT"), ("raft-things", "raft:RAFT"), ("inception-fid", "inception:InceptionFID"), ("i3d", "i3d:I3D"), ("gim-dkm", "dkm:DKM"), ("dino-b16", "dino:Dino")])
def test_sizes_are_those_of_the_networks(name, build):
    import importlib

    import torch
    module, _, cls = build.partition(":")
    with torch.device("meta"): net = getattr(importlib.import_module(f"camflow.metrics.{module}"), cls)()
    number, unit = PUBLISHED[name].size.split()
    assert float(number) * {"M": 1e6, "B": 1e9}[unit] == pytest.approx(sum(p.numel() for p in net.parameters()), rel=0.005)


def test_a_run_without_a_system_is_refused():
    with pytest.raises(InputError, match="belongs to no system"): choices.system_of("new_run")
