"""Cameras and pose metrics of the goldens: camera_* and re10k_* and pose_metrics_* (recam), camera_embedding, pose_error, pose_payload (rl),
pose_align_* and pose_auc (da3). Names, sizes and settings come from the folder, so any folder of the same form can be replayed."""
import json
import math
import traceback
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from camflow.geometry import align, plucker
from camflow.geometry.camera import UNREAL_WORLD, Cameras, parse_unreal, read_realestate10k
from camflow.metrics import pose

REPO = Path(__file__).resolve().parents[2]


class Score:
    "Worst difference of a case against |a - b| <= atol + rtol |b|."

    def __init__(self, atol: float, rtol: float):
        self.atol, self.rtol, self.worst, self.ok = atol, rtol, 0.0, True

    def add(self, ours, reference, atol=None, rtol=None):
        ours, reference = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, reference))
        if ours.shape != reference.shape:
            self.worst, self.ok = math.inf, False
            return
        limit = (self.atol if atol is None else atol) + (self.rtol if rtol is None else rtol) * reference.abs()
        difference = (ours - reference).abs()
        self.ok &= bool((difference <= limit).all()) and bool(torch.isfinite(reference).all())
        self.worst = max(self.worst, float(torch.nan_to_num(difference, nan=math.inf).max()) if difference.numel() else 0.0)

    @property
    def row(self): return self.worst, self.atol, self.rtol, self.ok


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def find(name: str, folder: Path, root=None):
    "An input named relative to the folder, or to the shared folder when it starts with real/; None when it is nowhere."
    places = [folder / name, folder / Path(name).name]
    if name.startswith("real/"):
        places += [base / name for base in (root and Path(root), folder.parent.parent, REPO.parent / "shared") if base]
        places += [REPO / "tests" / "goldens" / "real" / Path(name).name]
    return next((place for place in places if place.exists()), None)


# %% recam
def camera_file(folder, name, case, root):
    path, want = find(case["json_input"], folder, root), load_file(folder / f"{name}.safetensors")
    if path is None: return None
    score, data, ids = Score(1e-6, 0), read(path), case["config"]["cameras"]
    cameras = [Cameras.from_unreal_json(data, i) for i in ids]
    n = want["output.inference"].shape[1]
    latent = range(0, 4 * n, 4)
    score.add(torch.stack([UNREAL_WORLD.mT @ one.c2w for one in cameras]), want["output.c2w"])  # the file's own left-handed world
    inference = torch.stack([one.embedding(frames=latent) for one in cameras])
    score.add(inference, want["output.inference"])
    # One float32 rounding can tip a bfloat16 rounding: half an ulp of bfloat16 is 2^-9 relative, so allow one step there.
    score.add(inference.bfloat16().double(), want["output.inference_bf16"], rtol=2**-7)
    if "output.train" in want:
        score.add(torch.stack([torch.stack([b.embedding(a.c2w[0], latent) for b in cameras]) for a in cameras]), want["output.train"])
    return score.row


def realestate(folder, name, case, root):
    path, want, config = find(case["text_input"], folder, root), load_file(folder / f"{name}.safetensors"), case["config"]
    if path is None: return None
    score, n = Score(1e-6, 1e-6), len(want["output.w2c"])
    _, fractions, w2c = read_realestate10k(path)
    cameras = Cameras.from_realestate10k(path, config["size"], config["original_size"], frames=range(n), compat="cameractrl")
    score.add(fractions[:n], want["output.intrinsics_normalised"])
    score.add(w2c[:n], want["output.w2c"])
    score.add(cameras.c2w, want["output.c2w"])
    score.add(torch.stack([cameras.K[:, 0, 0], cameras.K[:, 1, 1], cameras.K[:, 0, 2], cameras.K[:, 1, 2]], 1), want["output.K_pixels"])
    local = plucker.relative_cameractrl(cameras, config["zero_t_first_frame"])
    score.add(local.c2w, want["output.c2w_relative"])
    score.add(plucker.plucker(local, want["input.flip"]), want["output.plucker"], atol=1e-5, rtol=1e-5)
    return score.row


def parse_matrix(path):
    score = Score(0, 0)
    for entry in read(path): score.add(parse_unreal(entry["input"]), entry["output"])
    return score.row


def cami2v(path):
    score = Score(1e-9, 1e-6)
    for entry in read(path):
        ours, want = pose.cami2v_errors(entry["input"]["gt_c2w"], entry["input"]["est_c2w"]), dict(entry["output"])
        per_frame = want.pop("per_frame", {})
        # arccos is ill-conditioned near 0 and pi: rotations 1e-6 absolute per frame, as the goldens' README asks
        for key, value in want.items(): score.add(ours[key], value, atol=1e-6 * len(entry["input"]["gt_c2w"]) if key == "RotErr" else None)
        for key, value in per_frame.items(): score.add(ours["per_frame"][key], value, atol=1e-6 if key == "RotErr" else None)
    return score.row


# %% rl
def subcases(tensors):
    "{c0: {input: {name: tensor}, output: {...}}} of keys input.c0.name."
    out = {}
    for key, value in tensors.items():
        side, number, name = key.split(".", 2)
        out.setdefault(number, {"input": {}, "output": {}})[side][name] = value
    return out


def embedding(folder, config, root):
    score = Score(5e-7, 5e-7)
    for number, case in subcases(load_file(folder / "camera_embedding.safetensors")).items():
        settings, want = config[number], case["output"]
        name = "synthetic_camera_extrinsics.json" if settings["source"] == "synthetic" else "real/recammaster/cameras/camera_extrinsics.json"
        path = find(name, folder, root)
        if path is None: return None
        data, n = read(path), want["camera_f32"].shape[1]
        load = lambda i, data=data, n=n: Cameras.from_unreal_json(data, i, frames=range(0, 4 * n, 4))
        ours = torch.stack([load(target).embedding(load(condition).c2w[0]) for condition, target in want["cond_target"].tolist()])
        score.add(ours, want["camera_f32"])
        score.add(ours.bfloat16().double(), want["camera_bf16"].double(), rtol=2**-7)
    return score.row


def server_error(folder):
    score = Score(1e-9, 1e-6)
    for case in subcases(load_file(folder / "pose_error.safetensors")).values():
        camera, want = case["input"]["camera"], case["output"]
        rot, trans = pose.cameraflow_errors(camera, case["input"]["pred_extrinsics"])
        score.add(pose.parse_payload(pose.pose_payload(camera)), want["gt_parsed"])
        score.add(rot, want["rot_err"], atol=1e-6)
        score.add(trans, want["trans_err"])
        score.add(torch.stack([rot.mean(), trans.mean()]), want["means"], atol=1e-6)
    return score.row


def payload(path):
    score = Score(0, 0)
    for entry in read(path):
        ours = pose.pose_payload(entry["input"]["camera"])
        score.add(float(ours == entry["output"]["gt_json_data"]), 1.0)  # the text must agree letter by letter
        score.add(pose.parse_payload(ours)[0], torch.as_tensor(entry["output"]["frame0_parsed"], dtype=torch.float64)[:3])
    return score.row


# %% da3
def similarity(folder, name, case, root):
    x, score = load_file(folder / f"{name}.safetensors"), Score(1e-9, 1e-9)
    aligned, R, t, s = align.align_poses(x["input.ref"], x["input.est"], case["params"]["ransac"], case["params"]["random_state"])
    for ours, key in ((aligned, "aligned"), (R, "rot"), (t, "trans"), (s, "scale")): score.add(ours, x[f"output.{key}"])
    return score.row


def auc(path):
    score = Score(1e-9, 1e-9)
    for entry in read(path):
        want = entry["output"]
        ours = pose.pose_auc(entry["input"]["gt_w2c"], entry["input"]["pred_w2c"], [int(key.removeprefix("auc")) for key in want["auc"]])
        for key, value in want["auc"].items(): score.add(ours["auc"][key], value)
        for key in ("pair_index", "rotation_deg", "translation_deg"): score.add(ours[key], want[key])
    return score.row


def check(folder, root=None) -> dict:
    "{case: (max_abs_diff, atol, rtol, ok)} of the camera cases in `folder`; `root` is where real/... inputs lie; ok None = its input is absent."
    folder = Path(folder)
    cases = read(folder / "cases.json") if (folder / "cases.json").exists() else {}
    config = read(folder / "configs.json") if (folder / "configs.json").exists() else {}
    kinds = {"cam": camera_file, "re10k": realestate, "pose_align": similarity}
    jobs = {name: partial(kinds[case["kind"]], folder, name, case, root) for name, case in cases.items()
            if case.get("kind") in kinds and (folder / f"{name}.safetensors").exists()}
    for pattern, replay in (("camera_parse_matrix*.json", parse_matrix), ("pose_metrics_cami2v*.json", cami2v), ("pose_payload*.json", payload), ("pose_auc*.json", auc)):
        jobs |= {path.stem: partial(replay, path) for path in folder.glob(pattern)}
    if (folder / "camera_embedding.safetensors").exists(): jobs["camera_embedding"] = partial(embedding, folder, config["camera_embedding"], root)
    if (folder / "pose_error.safetensors").exists(): jobs["pose_error"] = partial(server_error, folder)
    rows = {}
    for name, job in jobs.items():
        try: rows[name] = job() or (math.nan, 0.0, 0.0, None)
        except Exception:  # one broken case fails alone, with its traceback, and the table goes on
            traceback.print_exc()
            rows[name] = (math.inf, 0.0, 0.0, False)
    return rows
