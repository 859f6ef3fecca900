"""Matching networks and formulas of the evaluation suite against recorded outputs: `check(folder)` replays RAFT, AMT-S, DKMv3, GIM and pose cases."""
import json
import math
import traceback
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from camflow.files import InputError
from camflow.metrics import amt, dkm, gim, pose, raft
from camflow.metrics.weights import load_strict
from tests.parity.seeded import seeded_state_dict

RELATIVE, DKM = 2e-4, 1e-3  # of a tensor's standard deviation: the pass lines of the goldens' README
FLOAT32, FLOAT64 = 1e-6, 1e-9


class Case:
    "One safetensors file: its inputs, outputs and configuration."
    def __init__(self, path):
        both = load_file(path)
        pick = lambda head: {k.removeprefix(head): v for k, v in both.items() if k.startswith(head)}
        self.x, self.want, self.folder = pick("input."), pick("output."), path.parent
        with safe_open(path, "pt") as file: self.config = json.loads((file.metadata() or {}).get("config", "{}"))

    def model(self, build, **options):
        "The network of a case under its seeded weights."
        state = seeded_state_dict(json.loads((self.folder / self.config["shapes"]).read_text()), self.config["gain"])
        return load_strict(build(**options), {k: torch.from_numpy(v) for k, v in state.items()}, build.__name__)


def summary(x, want) -> dict:
    "What the goldens keep of a big tensor: shape, head, every step-th value, mean, std, min and max."
    flat = x.detach().reshape(-1)
    out = {"shape": torch.tensor(x.shape), "head": flat[:len(want["head"])], "step": want["step"]}
    out["strided"] = flat[::int(want["step"])][:len(want["strided"])]
    out["stats"] = torch.stack([flat.mean(), flat.std(), flat.min(), flat.max()])
    return out


class Score:
    "Worst difference in units of the pass line `line`, over the tensors of a case."
    def __init__(self, line): self.line, self.worst = line, 0.0

    def add(self, got, want, scale=1.0):
        got, want = (torch.tensor(v, dtype=torch.float64) if isinstance(v, float) else torch.as_tensor(v).detach() for v in (got, want))
        if got.shape != want.shape: self.worst = math.inf; return self
        if not want.is_floating_point(): bad = not torch.equal(got.long(), want.long()); self.worst = max(self.worst, math.inf if bad else 0.0); return self
        got, want = got.double(), want.double()
        diff = torch.where(got.isnan() & want.isnan(), 0.0, (got - want).abs() / scale)
        self.worst = max(self.worst, math.inf if diff.isnan().any() else float(diff.max()) if diff.numel() else 0.0)
        return self

    def formula(self, got, want):
        "A number of a formula: relative above 1, absolute below."
        want = torch.tensor(want, dtype=torch.float64) if isinstance(want, float) else torch.as_tensor(want)
        return self.add(got, want, want.double().abs().clamp_min(1.0) if want.is_floating_point() else 1.0)

    @property
    def row(self): return (self.worst, self.line, self.line, self.worst <= self.line)


def networks(case: Case, ours: dict, line=RELATIVE):
    "Compares tensors, or their summaries, on the scale of each tensor's standard deviation."
    score, groups = Score(line), {}
    for name, value in case.want.items():
        head, _, part = name.rpartition(".")
        if part in ("shape", "head", "step", "strided", "stats"): groups.setdefault(head, {})[part] = value
        else: score.add(ours[name] if name in ours else math.inf, value, float(value.double().std()) or 1.0)
    for name, want in groups.items():
        if name not in ours: score.worst = math.inf; continue
        std = float(want["stats"][1]) or 1.0
        if list(ours[name].shape) != want["shape"].tolist(): score.worst = math.inf; continue
        for part, got in summary(ours[name], want).items(): score.add(got, want[part], std)
    return score.row


def raft_flow(path):
    case = Case(path)
    model, x = case.model(raft.RAFT), {k: v.float() for k, v in case.x.items()}
    pad = raft.Padder(x["image1"].shape[-2:])
    features, context = model.encode(torch.cat([pad(x["image1"]), pad(x["image2"])]))
    f1, f2, context = *features.chunk(2), context.chunk(2)[0]
    low, up = model.walk(f1, f2, context, case.config["iters"])
    grid = raft.cell_grid(*f1[:, 0].shape, f1) + torch.tensor([1.3, -0.6])[:, None, None]
    corr = raft.lookup(raft.correlation_pyramid(f1, f2), grid)
    return networks(case, {"flow_low": low, "flow_up": pad.undo(up), "flow_low_iter1": model.walk(f1, f2, context, 1)[0],
                           "fmap1": f1, "cnet": context, "corr_at_grid_plus_1p3_m0p6": corr})


def amt_frame(path):
    case = Case(path)
    model, x = case.model(amt.AMT), {k: v.float() / 255 for k, v in case.x.items()}
    pad = raft.Padder(x["img0"].shape[-2:], 16)
    out = model(pad(x["img0"]), pad(x["img1"]), case.config["t"])
    names = {"features": "ft_pred", "flow0": "flow0_pred", "flow1": "flow1_pred"}
    return networks(case, {"imgt_pred": pad.undo(out["image"])} | {f"{names[k]}.{i}": v for k in names for i, v in enumerate(out[k])})


def motion_smoothness(path):
    case, score = Case(path), Score(FLOAT64)
    for name in sorted({k.split(".")[0] for k in case.x}):
        frames, want = case.x[f"{name}.frames"].permute(0, 3, 1, 2), {k: case.want[f"{name}.{k}"] for k in ("pred_u8", "score", "diff")}
        predicted = amt.to_bytes(case.x[f"{name}.pred"])
        score.add(predicted, want["pred_u8"].permute(0, 3, 1, 2))
        value = amt.smoothness(frames[1:2 * len(predicted):2], predicted)
        score.formula(value, want["score"][0]).formula(255 * (1 - value), want["diff"][0])
    return score.row


def dkm_match(path):
    case = Case(path)
    c, x = case.config, {k: v.float() / 255 for k, v in case.x.items()}
    model = case.model(dkm.DKM, size=(c["h"], c["w"]), upsample_size=tuple(c["upsample_res"]))
    pyramids = model.features(x["image0"], x["image1"], model.size)
    ours = {f"encoder_s{s}": f for s, f in pyramids[0].items()}
    for s, (warp, logit) in model.decoder(*pyramids).items(): ours |= {f"stage1_flow_s{s}": warp, f"stage1_logit_s{s}": logit}
    warp, certainty = model(x["image0"], x["image1"])
    return networks(case, ours | {"warp": warp[0], "certainty": certainty[0]}, DKM)


def dynamic_flow(path):
    case, score = Case(path), Score(FLOAT32)
    for name in sorted({k.split(".")[0] for k in case.x}):
        score.formula(raft.top_motion(case.x[f"{name}.flow"][0]), case.want[f"{name}.top5_mean"][0])
    return score.row


def dynamic_decision(path):
    score = Score(0.0)
    for entry in json.loads(path.read_text()):
        x, want = entry["input"], entry["output"]
        keep, got = raft.kept_frames(x["n_frames"], x["fps"]), raft.dynamic_decision(x["scores"], (x["h"], x["w"]))
        same = keep == want["frame_indices"] and all(got[k] == want[k] for k in ("threshold", "count_needed", "dynamic"))
        score.worst = max(score.worst, 0.0 if same else math.inf)
    return score.row


def fit_sizes(path):
    score = Score(0.0)
    for entry in json.loads(path.read_text()):
        size, want = (entry["input"]["h"], entry["input"]["w"]), entry["output"]
        try: fit = gim.fit_size(size)
        except InputError: score.worst = max(score.worst, 0.0 if "error" in want else math.inf); continue
        got = {"resized_hw": list(fit.size), "scale_wh": list(fit.scale), "orig_w": fit.size[1], "orig_h": fit.size[0],
               "pad_left": fit.pad[0], "pad_right": fit.pad[1], "pad_top": fit.pad[2], "pad_bottom": fit.pad[3]}
        score.worst = max(score.worst, 0.0 if got == want else math.inf)
    return score.row


def keypoints(path):
    case, score = Case(path), Score(FLOAT32)
    x, want = case.x, case.want
    fit = gim.fit_size(tuple(x["frames_thwc"].shape[1:3]))
    score.add(torch.tensor([1, 3, *fit.padded]), want["padded_shape"])
    a, b, inside = gim.unpadded(x["sparse_matches"], fit, fit)
    for got, name in ((a[inside], "kpts0"), (b[inside], "kpts1"), (x["conf"][inside], "mconf")): score.formula(got, want[name])
    pairs, certainty = x["dense_matches"].reshape(-1, 4), x["dense_certainty"]
    score.formula(torch.where(certainty > 0.05, 1.0, certainty), want["thresholded_certainty"])
    density = dkm.kernel_density(pairs)
    score.formula(density, want["kde_density"]).formula(dkm.balance_weight(density), want["balance_weight"])
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    drawn = dkm.sample_matches(x["dense_matches"], certainty, len(want["torch_seed0_sample_matches"]))
    torch.random.set_rng_state(state)
    return score.formula(drawn[0], want["torch_seed0_sample_matches"]).formula(drawn[1], want["torch_seed0_sample_certainty"]).row


def matched_pixels(path):
    "Inlier counts; where a tenth of the pairs or more are outliers another OpenCV may differ by 3 %, and pure noise is not asserted."
    case, counts, worst = Case(path), {}, 0.0
    for name in sorted({k.split(".")[0] for k in case.x}):
        a, b, want = case.x[f"{name}.kpts0"], case.x[f"{name}.kpts1"], int(case.want[f"{name}.inliers"])
        counts[name] = int(gim.fundamental(a, b)[1].sum())
        if len(a) >= 8 and want < 0.5 * len(a): continue
        worst = max(worst, abs(counts[name] - want) / max(want, 1))
    total = gim.total_in_thousands([*counts.values(), None])
    score = Score(0.03)
    score.worst = worst
    score.add(total, float(case.want["video_score_thousands"]), max(total, 1e-9))
    return score.add(gim.total_in_thousands([None], "cameraflow"), float(case.want["video_score_no_valid_pair"])).row


def relative_pose(path):
    score = Score(FLOAT64)
    for entry in json.loads(path.read_text()):  # near 0 an arccos turns the last bit of a cosine into 1e-6 degrees
        want, got = entry["output"], pose.relative_pose_error(**{"true_0to1" if k == "T_0to1" else k: v for k, v in entry["input"].items()})
        for ours, theirs in (("rotation_deg", "R_err_deg"), ("translation_deg", "t_err_deg"), ("translation_gap", "t_err_scaled_norm")):
            score.add(got[ours], float(want[theirs]), 1.0 if want[theirs] > 1e-3 else 2e3)
    return score.row


def recall_areas(path):
    score = Score(FLOAT64)
    for entry in json.loads(path.read_text()):
        x, want = entry["input"], entry["output"]
        if not isinstance(x, dict) or "errors_deg" not in x: return (math.nan, 0.0, 0.0, None)  # another table of the same name
        areas, ratios = pose.recall_auc(x["errors_deg"], x["thresholds"]), pose.pass_ratio(x["errors_deg"], x["thresholds"])
        for i, T in enumerate(x["thresholds"]):
            score.formula(areas[T], float(want["auc_dkm_utils"][i])).formula(areas[T], float(want["auc_analysis_script"][f"AUC@ {float(T)}d"]))
            score.formula(ratios[T], float(want["pass_ratio_tools_metrics"][f"AUC@{T}"]))
    return score.row


def pair_auc(path):
    "Depth Anything 3's benchmark; a set given in float32 is compared at float32's accuracy of an arccos."
    case, worst = Case(path), 0.0
    for name in sorted({k.split(".")[0] for k in case.x}):
        single = case.x[f"{name}.gt_w2c"].dtype == torch.float32
        got = pose.pose_auc(case.x[f"{name}.gt_w2c"], case.x[f"{name}.pred_w2c"], (30, 15, 5, 3))
        score = Score(2e-2 if single else 2e-6)
        score.formula(torch.tensor(list(got["auc"].values()), dtype=torch.float64), case.want[f"{name}.auc_30_15_5_3"])
        for ours, theirs in (("rotation_deg", "rot_deg"), ("translation_deg", "trans_deg")):
            score.formula(got[ours], case.want[f"{name}.pair_{theirs}"].double())
        worst = max(worst, score.worst / score.line)
    return (worst * 2e-6, 2e-6, 2e-6, worst <= 1)


CASES = {"raft": raft_flow, "amt_s": amt_frame, "dkmv3": dkm_match, "gim_preprocess_padding": fit_sizes, "gim_keypoints_and_sampling": keypoints,
         "gim_matched_pixels": matched_pixels, "relative_pose_error": relative_pose, "pose_auc": recall_areas, "da3_pose_auc": pair_auc,
         "vbench_motion_smoothness": motion_smoothness,
         "vbench_dynamic_degree_flow": dynamic_flow, "vbench_dynamic_degree_decision": dynamic_decision}


def check(folder) -> dict:
    "{case: (worst difference in the case's unit, atol, rtol, ok)} of the cases that are replayed here."
    rows = {}
    with torch.inference_mode():
        for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".json", ".safetensors")):
            if (job := next((CASES[k] for k in sorted(CASES, key=len, reverse=True) if path.stem.startswith(k)), None)) is None: continue
            try: rows[path.stem] = job(path)
            except Exception:  # one broken case fails alone, with its traceback, and the table goes on
                traceback.print_exc()
                rows[path.stem] = (math.inf, 0.0, 0.0, False)
    return rows
