"""Qwen3-VL against its reference: `check(folder)` compares frames, sizes, patches, prompts and the model's answers of a folder of goldens."""
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from camflow.files import InputError
from camflow.vlm.prompt import expand, timestamps, tokenize
from camflow.vlm.video_inputs import (FAMILIES, NAMES, Clip, VideoSettings, VisionInputs, at_rate, pixel_limit, resize_bytes, sample_indices, smart_resize,
                                      target_size, video_inputs)
from tests.parity.seeded import seeded_state_dict

PIXELS, MODEL = 1e-6, 1e-4  # pass lines of the goldens' README; bytes, numbers of frames, tokens and positions are equal or not
NEVER = (float("nan"), 0.0, 0.0, None)


def character_tokenizer(vocab: list):
    "One token per character; words of the form <|...|> are special. Token numbers are places in the list."
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(vocab)}, unk_token=vocab[0]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in vocab if word.startswith("<|") and len(word) > 2])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=vocab[0])


class Folder:
    "A folder of goldens: cases, configurations, weights drawn by name; models are kept."
    def __init__(self, folder):
        self.path, self.models = Path(folder), {}
        read = lambda name: json.loads((self.path / name).read_text()) if (self.path / name).exists() else {}
        self.cases, vocab = read("cases.json"), read("vocab.json")
        self.tokenizer = character_tokenizer(vocab) if vocab else None

    def tensors(self, case):
        both = load_file(self.path / f"{case}.safetensors")
        pick = lambda head: {k.removeprefix(head): v for k, v in both.items() if k.startswith(head)}
        return pick("input."), pick("output.")

    def model(self, name):
        "The library's model of a configuration under its seeded weights."
        if name not in self.models:
            from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**json.loads((self.path / f"config_{name}.json").read_text())))
            weights = seeded_state_dict(json.loads((self.path / f"shapes_{name}.json").read_text()))
            model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=True)
            self.models[name] = model.eval()
        return self.models[name]


def settings(processor: dict, base: VideoSettings = FAMILIES["qwen3_vl"]) -> VideoSettings:
    "Our settings for the words that a case uses."
    size = processor.get("size", {})
    found = {ours: processor[theirs] for theirs, ours in NAMES.items() if theirs in processor}
    return replace(base, min_pixels=size.get("shortest_edge", base.min_pixels), max_pixels=size.get("longest_edge", base.max_pixels), **found)


def called(s: VideoSettings, call: dict) -> VideoSettings:
    "The settings of one call of the reference's processor, which fills in its own rate where none is mentioned."
    return at_rate(s, call.get("fps", s.fps), call.get("num_frames"))


def seen_by(params: dict, x: dict) -> tuple: # (VisionInputs, settings, clips)
    call, s = params["call"], settings(params["processor"])
    if call["do_sample_frames"]: s = called(s, {k: v for k, v in call.items() if k in ("fps", "num_frames")})
    videos = [x[f"video{k}"] for k in range(len(x))]
    rates = [m["fps"] for m in call.get("video_metadata", [{"fps": None}] * len(videos))]
    clips = [Clip(v.permute(0, 3, 1, 2).contiguous(), r) for v, r in zip(videos, rates)]
    return video_inputs(clips, s, sample=call["do_sample_frames"]), s, clips


def video(folder, case, x):
    seen, s, clips = seen_by(case["params"], x)
    out, groups = {"pixel_values_videos": seen.pixels_ND, "video_grid_thw": torch.tensor(seen.grids)}, {}
    for k, (clip, taken) in enumerate(zip(clips, seen.indices)):
        out[f"frames_indices{k}"] = torch.tensor(taken)
        groups.setdefault((len(taken), *clip.frames.shape), []).append(resize_bytes(clip.frames[taken], seen.sizes[k]))
    return out | {f"resized{k}": torch.stack(g) for k, g in enumerate(groups.values())}


def vision_pos(folder, case, x):
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids
    merge = case["params"].get("merge_size", 2)
    at, weights = get_vision_interpolation_indices_and_weights(x["grid"], case["params"]["side"], mode="bilinear", align_corners=True, spatial_merge_size=merge)
    return {"interp_indices": at, "interp_weights": weights, "rotary_position_ids": get_vision_position_ids(x["grid"], merge)}


def model(folder, case, x):
    net = folder.model(case["config"])
    positions, deltas = net.model.get_rope_index(x["input_ids"], x["mm_token_type_ids"], video_grid_thw=x["video_grid_thw"], attention_mask=x["attention_mask"])
    vision = net.model.get_video_features(x["pixel_values_videos"], x["video_grid_thw"], return_dict=True)
    logits = net(**x).logits
    out = {"position_ids": positions, "rope_deltas": deltas, "video_embeds": torch.cat(list(vision.pooler_output)),
           "vision_last_hidden": vision.last_hidden_state, "logits_last": logits[:, -1], "logits_stride7": logits[:, ::7]}
    out |= {f"deepstack{k}": d if torch.is_tensor(d) else torch.cat(list(d)) for k, d in enumerate(vision.deepstack_features)}
    if n := case["params"].get("generate"):
        net.generation_config.eos_token_id = None
        made = net.generate(**x, max_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_scores=True)
        scores = torch.stack(made.scores, 1)
        top = scores.topk(2, -1).values
        out |= {"greedy_ids": made.sequences[:, x["input_ids"].shape[1]:], "greedy_scores": scores, "greedy_margin": top[..., 0] - top[..., 1]}
    return out


def e2e(folder, case, x):
    params = case["params"]
    seen, s, _ = seen_by(params, x)
    text = expand(params["prompt"], seen, s, params["form"])
    if text != case["text"]: raise InputError(f"the prompt became {text!r}")
    inputs = tokenize(folder.tokenizer, [text]) | {"pixel_values_videos": seen.pixels_ND, "video_grid_thw": torch.tensor(seen.grids)}
    return inputs | model(folder, case, inputs)


KINDS = {f.__name__: f for f in (video, vision_pos, model, e2e)}


def compare(kind, ours, theirs):
    "(worst difference, atol, rtol, ok); differences of pixels are scaled so that `atol` is the pass line of every tensor."
    line, worst = PIXELS if kind == "video" else MODEL, 0.0
    for name, want in theirs.items():
        if name not in ours or ours[name].shape != want.shape: return (float("inf"), line, 0.0, False)
        got = ours[name].detach()
        if not want.is_floating_point(): worst = max(worst, 0.0 if got.dtype == want.dtype and torch.equal(got, want) else float("inf"))
        elif not torch.isfinite(got).all(): return (float("inf"), line, 0.0, False)
        else: worst = max(worst, (got.double() - want.double()).abs().max().item() * (line / PIXELS if name == "pixel_values_videos" else 1.0))
    return (worst, line, 0.0, worst <= line)


def _frames(i):
    if i.get("call"):
        s = called(settings({"size": {"shortest_edge": i["shortest_edge"]}}), i["kwargs"])
        clip = Clip(torch.zeros(i["total_num_frames"], 3, i["height"], i["width"], dtype=torch.uint8), i["video_fps"])
        seen = video_inputs([clip], s)
        return {"indices": seen.indices[0], "grid_thw": [list(g) for g in seen.grids]}
    s = at_rate(replace(FAMILIES["qwen3_vl"], min_frames=i["min_frames"], max_frames=i["max_frames"]), i["fps"], i["num_frames"])
    found = sample_indices(i["total_num_frames"], i["video_fps"], s)
    return {"n": len(found), "metadata_fps_after": i["video_fps"] or 24, "indices": found, "first8": found[:8], "last8": found[-8:], "sum": sum(found)}


def _size(i): return list(smart_resize(i["num_frames"], i["height"], i["width"], i["factor"], i["temporal_factor"], i["min_pixels"], i["max_pixels"]))


def _cap(i):
    s = settings({"size": i["size"], "cap_pixels_per_frame": True, "max_video_tokens": i["max_video_tokens"]})
    found = {"max_pixels": pixel_limit(i["num_frames"], s), "height_width": None, "num_patches": None}  # the limit is defined even for a size that is refused
    try: h, w = target_size(i["num_frames"], i["height"], i["width"], s)
    except InputError: return found
    return found | {"height_width": [h, w], "num_patches": math.ceil(i["num_frames"] / s.pair) * (h // s.patch) * (w // s.patch)}


def _times(i):
    found = timestamps(i["frames_indices"], i["video_fps"], i["temporal_patch_size"])
    return {"timestamps": found, "text": [f"<{t:.1f} seconds>" for t in found]}


def _prompt(i):
    s, seen = called(settings({"size": i["size"]}), i["kwargs"]), VisionInputs(torch.empty(0), [])
    for v in i["videos"]:
        taken = sample_indices(v["frames"], v["fps"], s)
        h, w = target_size(len(taken), v["height"], v["width"], s)
        seen.grids.append((math.ceil(len(taken) / s.pair), h // s.patch, w // s.patch))
        for name, value in (("counts", 1), ("indices", taken), ("rates", v["fps"])): getattr(seen, name).append(value)
    out = {"grid_thw": [list(g) for g in seen.grids], "frames_indices": seen.indices}
    for form in ("inner", "whole"):
        text, pads = expand(i["text"], seen, s, form), "<|video_pad|>"
        for n in sorted({text.count(pads)} | {g[1] * g[2] // s.merge**2 for g in seen.grids}, reverse=True): text = text.replace(pads * n, f"{{PAD*{n}}}")
        out[form] = text
    return out


TABLES = {"sample_frames": _frames, "smart_resize": _size, "pixel_cap": _cap, "timestamps": _times, "prompt": _prompt}


def table(path) -> tuple:
    "Every row equal to the recorded one, or refused where the reference refuses."
    worst = 0.0
    for row in json.loads(path.read_text()):
        want = row["output"]
        try: got = TABLES[path.stem](row["input"])
        except InputError: got = {"error": True}
        if isinstance(want, dict) and "error" in want: same = got == {"error": True}
        elif isinstance(want, list): same = got == want
        else: same = all(k in got and _same(got[k], v) for k, v in want.items())
        worst = max(worst, 0.0 if same else float("inf"))
    return (worst, 0.0, 0.0, worst == 0.0)


def _same(got, want) -> bool:
    if isinstance(want, dict): return all(k in got and _same(got[k], v) for k, v in want.items()) if isinstance(got, dict) else _same(_short(got), want)
    return got == want


def _short(found): return {"first8": found[:8], "last8": found[-8:], "sum": sum(found), "n": len(found)}


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)}; ok is None for kinds that nothing here covers."
    goldens, out = Folder(folder), {}
    with torch.inference_mode():
        for name, case in goldens.cases.items():
            if case["kind"] not in KINDS or not (goldens.path / f"{name}.safetensors").exists(): out[name] = NEVER
            else:
                x, want = goldens.tensors(name)
                try: out[name] = compare(case["kind"], KINDS[case["kind"]](goldens, case, x), want)
                except InputError: out[name] = (float("inf"), 0.0, 0.0, False)
    for path in sorted(goldens.path.glob("*.json")):
        if path.stem in TABLES: out[path.stem] = table(path)
        elif path.stem not in ("cases", "vocab") and not path.stem.startswith(("config_", "shapes_")): out[path.stem] = NEVER
    return out
