"""Every command of README.md and docs/, and how it is executed here.

The text of a command is what runs, in bash, in a folder of a user's, with `camflow` on the path. What is added or put in its place is stated in RULES:
mostly `-f smoke` behind it (a later profile overrides an earlier one, single parameters override both), and folders named FOLDER, SEQ, my_clips and so on, which
the procedural world's writers fill beforehand. What cannot run here is listed with its reason.
"""
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.test_doc_pages import FENCE, PAGES, SPAN, prose

ROOT = Path(__file__).resolve().parents[1]
STARTS = re.compile(r"(?:\w+=\S+ )*(?:camflow \w|python -m camflow|make \w|pip \w|python3\.11 |source )")
NPU, WEIGHTS, NETWORK = "asks for eight devices", "needs published weights", "needs a network"


@dataclass(frozen=True)
class How:
    "What is done with the commands that a pattern finds; the first pattern that finds one counts."
    pattern: str
    skip: str = ""                               # reason; "": it runs
    add: str = ""                                # behind the command
    put: tuple = ()                              # pairs (word, its place-taker)
    link: tuple = field(default=(), repr=False)  # pairs (name in the user's folder, what it points to, from the repository's root)
    why: str = ""                                # of `--dry-run`: why the command is only taken in and checked


TINY_SD = (("FOLDER", "data/tiny/joint/image_depth"),)
RULES = [
    How(r"omnicam_generate -f wan -p 'slg_layers=", put=((r"(-f wan)", "-f smoke -p guidance=5.0"), (r"(\[9\])", "[2]"))), # the tiny model has four blocks
    # ---- cannot run here
    How(r"^make ", "make: builds an environment first; demo is `camflow run recam_grpo -f demo`, the others have jobs of their own"),
    How(r"^source \.venv/", "the environment that make has built"),
    How(r"^(pip|source|python3\.11) ", f"{NETWORK}, or an Ascend host"),
    How(r"^camflow (run|serve|sweep|resume|rerun|list|show|compare|weights|doctor)$(?<!list)(?<!weights)(?<!doctor)", "names a command"),
    How(r"python -m camflow\.data\.download", NETWORK),
    How(r"run \w+ -f (npu8|npu32|fsdp8|vllm8|dr_sf)\b(?!.*--dry-run)", NPU),
    How(r"run \w+ -f (wan|svd|sd15)\b", WEIGHTS), How(r"=weights/(dynamic_stereo|raftstereo)|run stereo_depth -f custom|run stereo_evaluate -f (sintel|table5)", WEIGHTS),
    How(r"omnicam_finetune -f original", f"{WEIGHTS} of a size that no CPU holds"),
    How(r"omnicam_cache .*-p vae=FOLDER", f"{WEIGHTS}; without those parameters it runs below"),
    How(r"multicam_caption .*-p model=FOLDER", f"{WEIGHTS} of a vision-language model"),
    How(r"joint_sample -p folder=SD15", f"{WEIGHTS}: UniCon's"),
    How(r"webvid_prepare -p table=", f"{NETWORK}: the table holds addresses"),
    How(r"gflow_fit -f paper", "its recipe takes minutes even on three small frames; tests/test_gflow_fit.py has it"),
    How(r"^camflow run (\w+)$", "tests/test_runs.py executes it with -f smoke"), How(r"^camflow run \w+ -f smoke$", "tests/test_runs.py executes it"),
    How(r"^camflow run \w+ -f (demo|small|tiny|tiny_base)( -p (seed|export)=\w+)?$", "minutes to hours of CPU; tests/test_runs.py validates the profile and executes the notebook with -f smoke"),
    How(r"\.\.\.", "stands for others of its kind"),
    # ---- run as they are
    How(r"--dry-run|--parameters|^camflow (weights|doctor|list)", put=(("NAME", "recam_grpo"),)),
    How(r"^camflow serve up servers/cameraflow", "ports and servers of CameraFlow: tests/test_servers.py has its endpoints"),
    How(r"^camflow serve up"), How(r"^camflow serve status"), How(r"^camflow serve down"),
    How(r"^camflow resume RUN$", put=(("RUN", "@stopped"),)), How(r"^camflow rerun RUN$", put=(("RUN", "@recam_finetune"),)), How(r"^camflow resume \w+$", "`camflow resume RUN` is executed"),
    How(r"^camflow compare", put=(("RUN_A", "@recam_evaluate"), ("RUN_B", "@recam_evaluate"))),
    How(r"lab\.audit"),
    # ---- taken in and checked, not executed: another line here executes the same notebook in the same way with other numbers
    *(How(pattern, add="--dry-run", why=f"{other} is executed") for pattern, other in (
        (r"recam_grpo -f small -p loss=ppo|recam_grpo -p loss=ppo .*window=2|recam_grpo -p std=|recam_grpo -p k=8", "loss=ppo with kl=0.004"),
        (r"recam_evaluate -f cameraflow( -p 'metrics=\[(vbench|camera_sfm_global|matched_pixels)\]')?$", "metrics=[text, synchrony, distribution]"),
        (r"omnicam_generate -p output=both|omnicam_generate -p 'images=\[.room\.png.\]' -p 'cameras=\[.zoom_in", "a picture along a script"), (r"omnicam_finetune -p (timesteps|epochs)", "offload=block"),
        (r"omnicam_cache .*-p (gc|overlay|take)=|omnicam_cache -p toml=mine", "export"), (r"joint_sample -p (mode=joint|mode=coarse|signal)|joint_sample -p folder=FOLDER -p mode=second", "the other ways of sampling"),
        (r"svd_finetune -p motion_bucket", "target=flow"), (r"gflow_fit -p sequence=(FOLDER|SEQ)|gflow_fit -f davis -p sequence=(SEQ|my_video)", "gflow_fit of DAVIS' bear"), (r"multicam_clean -p table=metadata.csv$", "that with root"),
        (r"gflow_priors -f davis -p sequences=PARENT", "gflow_priors of DAVIS"))),
    # ---- with little data, or a small profile behind it
    How(r"gflow_priors -f davis -p sequences=", add="-p masks=none"),
    How(r"gflow_fit .*-p sequence=", add="-f smoke -p depth=bootstrap"),
    How(r"stereo_depth -p left=", add="-p weights=sgbm"),
    How(r"recam_grpo -f servers", add="-p steps=1"),
    How(r"recam_evaluate -f cameraflow", add="-p weights= -p samples=100"),
    How(r"recam_evaluate -p folder=", add="-p 'metrics=[temporal_flickering]' -p samples=100"), How(r"recam_evaluate", add="-f smoke"),
    How(r"joint_sample -p folder=FOLDER", add="-f smoke -p samples=3", link=TINY_SD),
    How(r"joint_finetune -f tiny -p base=base", add="-f smoke -p size=[16,16]", link=(("base", "data/tiny/joint/image_depth"),)),
    How(r"^(PYTHONPATH=\S+ )?camflow run ", add="-f smoke"),
]


@dataclass(frozen=True)
class Command:
    "A distinct command, and where it stands."
    text: str
    pages: tuple
    how: How

    @property
    def id(self): return re.sub(r"[^\w.=-]+", "_", self.text.removeprefix("camflow "))[:90].strip("_")


def cut(line: str) -> list:
    "Commands of a line of shell as they are written, without comments: cut at ; outside quotes."
    found, text, quote = [], "", ""
    for i, c in enumerate(line):
        if not quote and c == "#" and (i == 0 or line[i - 1].isspace()): break
        if quote: quote = "" if c == quote else quote
        elif c in "'\"": quote = c
        if c == ";" and not quote: found, text = [*found, text], ""
        else: text += c
    return [t for part in (*found, text) if (t := " ".join(part.split()) if "'" not in part and '"' not in part else part.strip())]


def lines(text: str) -> list:
    "Shell of a page: of fenced blocks (continued lines joined), and spans that are a command."
    blocks = [line.removeprefix("$ ") for language, body in FENCE.findall(text) if language in ("bash", "sh", "console") for line in body.replace("\\\n", " ").splitlines()]
    return [command for line in (*blocks, *SPAN.findall(prose(text))) for command in cut(line) if STARTS.match(command)]


def rule(text: str) -> How:
    "What is done with a command."
    found = [how for how in RULES if re.search(how.pattern, text)]
    if not found: raise LookupError(f"no rule for {text!r}; tests/doc_commands.py; add one to RULES")
    return found[0]


def all_commands() -> list:
    "Every distinct command that is camflow's own; those of the originals in the tables of coming_from are not."
    seen = {}
    for page in PAGES:
        foreign = {c for row in prose(page.read_text(encoding="utf-8")).splitlines() if page.parent.name == "coming_from" and row.startswith("|") for span in SPAN.findall(row.split("|")[1]) for c in cut(span)}
        for text in lines(page.read_text(encoding="utf-8")):
            if text not in foreign: seen.setdefault(text, []).append(str(page.relative_to(ROOT)))
    return [Command(text, tuple(pages), rule(text)) for text, pages in seen.items()]


def python_blocks() -> list:
    "(page, number, code) of every block of Python."
    return [(page, i, code) for page in PAGES for i, code in enumerate(body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "python")]


def as_run(command: Command, newest) -> str: # function: name of a run notebook -> NAME/ID of its newest run, made if there is none
    "The line that bash gets."
    text = command.text
    for word, instead in command.how.put:
        text = re.sub(word if "(" in word else rf"\b{word}\b", instead, text)
    text = re.sub(r"@(\w+)", lambda m: newest(m[1]), text)
    return f"{text} {command.how.add}".strip()


# ---- a user's folder
def user_folder(folder: Path):
    "What the commands name, small, from the world's writers."
    import numpy as np
    import torch

    from camflow.data.dynamic_replica import read_annotations, write_annotations
    from camflow.data.stereo_files import write_image
    from camflow.data.webvid import write_presets
    from camflow.gflow.layout import write_frames
    from camflow.gflow.truth import truth_clip
    from camflow.media.frames import Frames
    from camflow.media.video import write_video
    from camflow.processes import free_port
    from camflow.world.clips import scene_clips
    from camflow.world.stereo_clips import stereo_clip
    from camflow.world.stereo_write import write_dynamic_replica, write_folders
    from camflow.world.write import write_multicam
    shutil.copytree(ROOT/"servers", folder/"servers")
    table, port = folder/"servers/servers.toml", free_port(21)                          # servers of somebody's may be up on this machine
    table.write_text(re.sub(r"port = 187(\d\d)", lambda m: f"port = {port + int(m[1])}", table.read_text(encoding="utf-8")), encoding="utf-8")
    (folder/"data").mkdir()
    (folder/"data/tiny").symlink_to(ROOT/"data/tiny")
    views = scene_clips(7, 4).frames_NT3HW                                              # one scene, four cameras, [4,T,3,H,W]
    clip = lambda i: Frames(torch.as_tensor(np.asarray(views[i])), "byte", 8.0)
    for place in ("my_clips/a.mp4", "clips/a.mp4", "mine/clips/a.mp4", "videos/a.mp4", "results/a.mp4", "my_video.mp4", "clip.mp4"): write_video(folder/place, clip(int(place.startswith("results"))))
    for place in ("mine/clips/b.mp4", "clips/b.mp4", "clips/c.mp4"): write_video(folder/place, clip(1 + (place == "clips/c.mp4")))
    write_image(folder/"room.png", clip(0).data[0])
    rows = [json.loads(line) for page in PAGES for _, body in FENCE.findall(page.read_text(encoding="utf-8")) for line in body.splitlines() if line.startswith('{"video"')]
    (folder/"mine/metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows if "camera" not in r) + "\n")
    musubi = [{"video_path": "clips/a.mp4", "caption": f"Object: {rows[0]['text']}. ; Camera: {rows[0]['script']}"}]
    for name in ("X", "mine", "OmniCam-Sep"):
        (folder/f"{name}.toml").write_text('[general]\nresolution = [48, 32]\n[[datasets]]\nvideo_jsonl_file = "musubi.jsonl"\ncache_directory = "CACHE_DIRECTORY"\ntarget_frames = [9]\n')
    (folder/"OmniCam").mkdir()
    for place in (folder, folder/"OmniCam"):
        (place/"musubi.jsonl").write_text("\n".join(json.dumps(r) for r in musubi) + "\n")
    (folder/"OmniCam/clips").symlink_to(folder/"clips")
    (folder/"overlay.jsonl").write_text("")
    write_multicam(folder/"data/MultiCamVideo-Dataset", scenes=2, frames=9, cameras=2, size=(48, 80), val=False)
    shutil.copy(folder/"data/MultiCamVideo-Dataset/metadata.csv", folder/"metadata.csv")
    (folder/"parts").mkdir()
    for node in (0, 1): shutil.copy(folder/"metadata.csv", folder/f"parts/node{node}.csv")
    for i in (1, 2): write_video(folder/f"groups/face/face-{i}.mp4", clip(i))
    true = truth_clip("plain", 4, (68, 120))
    for place in ("DAVIS/JPEGImages/480p/bear", "PARENT/bear", "SEQ"): write_frames(folder/place, true.frames)
    for place in (".WebVID/videos/a.mp4", ".results/cam_type1/a.mp4", ".results/cam_type9/a.mp4"): write_video(folder/place, clip(int(place[1] == "r")))
    (folder/".WebVID/metadata.csv").write_text("file_name,text\na.mp4,a red room\n")
    write_presets(folder/".WebVID/cameras/camera_extrinsics.json", 9)
    write_folders(folder/"my_data", stereo_clip(3, frames=4, size=(64, 160)))
    write_dynamic_replica(folder/"dynamic_replica_data", [stereo_clip(i, frames=2, size=(64, 160)) for i in (3, 4)], "real", tracks=False)
    table, names = folder/"dynamic_replica_data/real/frame_annotations_real.jgz", {"world-3": "teddy_static", "world-4": "nikita_reading"}
    write_annotations(table, [row | {"sequence_name": names[row["sequence_name"]]} for row in read_annotations(table)[0]])
    for i in range(3):
        write_image(folder/f"pictures/{i}.png", clip(i).data[0])
        write_image(folder/f"depth/{i}.png", clip(i).data[0][:1])
