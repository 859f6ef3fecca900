"""One pass per dimension, as VBench does it with a folder of videos: the plain composition that `nbs/benchmarks/evaluation_cost.ipynb` measures the shared pass against.

Four dimensions load the whole video as float32, three read it frame by frame with OpenCV; every dimension decodes, resizes and computes by itself. The backbones are small
stand-ins behind the interfaces of the real ones, the same in both arms. Each arm runs in a process of its own: `python -m tests.oracles.vbench_plain ARM FOLDER` prints one
line of JSON with its numbers, CPU seconds and peak memory.
"""
import json
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig

from camflow.device import memory_stats, set_threads
from camflow.media.video import has_decord, read_video
from camflow.metrics.clip import AestheticHead, Clip
from camflow.metrics.dino import Dino
from camflow.metrics.raft import dynamic_decision, top_motion
from camflow.metrics.weights import random_weights

MEAN, STD = {"clip": (0.48145466, 0.4578275, 0.40821073), "dino": (0.485, 0.456, 0.406)}, {"clip": (0.26862954, 0.26130258, 0.27577711), "dino": (0.229, 0.224, 0.225)}


class TinyMusiq(nn.Module):
    "Images 0..1 to marks [N,1]."
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 32, 32), nn.Linear(8, 1)

    def forward(self, x): return 50 + self.head(self.patches(x).mean((2, 3)))


class TinyFlow(nn.Module):
    "RAFT's two steps: features of an image, and flow of two images' features."
    def __init__(self):
        super().__init__()
        self.features, self.motion = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 2, 1)

    def encode(self, images):
        x = self.features(F.avg_pool2d(images / 127.5 - 1, 8))
        return x, x

    def walk(self, f1, f2, context, iters=20):
        flow = 8 * self.motion(torch.cat([f1, f2], 1))
        return flow, F.interpolate(flow, scale_factor=8, mode="bilinear", align_corners=False)

    def forward(self, image1, image2, iters=20):
        (f1, context), (f2, _) = self.encode(image1), self.encode(image2)
        return self.walk(f1, f2, context, iters)


class TinyBetween(nn.Module):
    "AMT's answer: the frame between two."
    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, image0, image1, t=0.5): return {"image": torch.lerp(image0, image1, t)}


def networks() -> dict:
    "The stand-ins, always the same."
    side = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    config = lambda patch: CLIPConfig(vision_config=side | dict(image_size=224, patch_size=patch), text_config=side | dict(vocab_size=64, max_position_embeddings=77), projection_dim=16)
    return {"dino": random_weights(Dino("tiny")), "clip_b32": random_weights(Clip(config(32)), 1), "clip_l14": random_weights(Clip(config(28)), 2),
            "aesthetic": random_weights(AestheticHead(16)), "musiq": random_weights(TinyMusiq()), "raft": random_weights(TinyFlow()), "amt": random_weights(TinyBetween())}


def load_float(path) -> torch.Tensor: # [T,3,H,W] float32 0..255
    "All frames."
    if not has_decord(): return read_video(path, backend="pyav").data.float()
    import decord
    reader = decord.VideoReader(str(path), num_threads=1)
    return torch.Tensor(reader.get_batch(list(range(len(reader)))).asnumpy()).permute(0, 3, 1, 2)


def read_cv2(path): # list of BGR images, frames per second
    "All frames, one after the other."
    capture, frames = cv2.VideoCapture(str(path)), []
    fps = capture.get(cv2.CAP_PROP_FPS)
    while (got := capture.read())[0]: frames.append(got[1])
    capture.release()
    return frames, fps


def resized(x, side, mode):
    "Shorter side, no antialiasing."
    H, W = x.shape[-2:]
    return F.interpolate(x, size=(side, int(side * W / H)) if H <= W else (int(side * H / W), side), mode=mode, align_corners=False)


def standard(x, kind): return (x / 255 - torch.tensor(MEAN[kind])[:, None, None]) / torch.tensor(STD[kind])[:, None, None]


def clip_input(x):
    "Bicubic, centre crop."
    x = resized(x, 224, "bicubic")
    top, left = round((x.shape[-2] - 224) / 2), round((x.shape[-1] - 224) / 2)
    return standard(x[..., top:top + 224, left:left + 224], "clip")


def similarity(rows):
    "To the frame before and to the first one."
    f = F.normalize(rows.double(), dim=-1)
    return float(np.mean([(max(0.0, float(f[i] @ f[i - 1])) + max(0.0, float(f[i] @ f[0]))) / 2 for i in range(1, len(f))]))


def subject_consistency(path, nets):
    images = standard(resized(load_float(path), 224, "bilinear"), "dino")
    with torch.no_grad(): return similarity(torch.cat([nets["dino"](image[None]) for image in images]))


def background_consistency(path, nets):
    return similarity(nets["clip_b32"].image(clip_input(load_float(path))).detach())


def aesthetic_quality(path, nets):
    images = clip_input(load_float(path))
    with torch.no_grad(): rows = torch.cat([nets["clip_l14"].image(part) for part in images.split(32)])
    return float(nets["aesthetic"](F.normalize(rows, dim=-1)).double().mean() / 10)


def imaging_quality(path, nets):
    x = load_float(path)
    H, W = x.shape[-2:]
    if max(H, W) > 512: x = F.interpolate(x, size=(int(H * 512 / max(H, W)), int(W * 512 / max(H, W))), mode="bilinear", align_corners=False)
    return float(np.mean([float(nets["musiq"](image[None])) for image in x / 255]))


def temporal_flickering(path, nets):
    frames, _ = read_cv2(path)
    return float((255 - np.mean([np.mean(cv2.absdiff(a, b)) for a, b in zip(frames[:-1], frames[1:])])) / 255)


def motion_smoothness(path, nets):
    frames = [cv2.cvtColor(f, cv2.COLOR_BGR2RGB) for f in read_cv2(path)[0]]
    even = [torch.from_numpy(f).permute(2, 0, 1)[None].float() / 255 for f in frames[::2]]
    H, W = frames[0].shape[:2]
    pad = (-W % 16 // 2, -W % 16 - -W % 16 // 2, -H % 16 // 2, -H % 16 - -H % 16 // 2)
    values = []
    for a, b, true in zip(even[:-1], even[1:], frames[1::2]):
        with torch.no_grad(): image = nets["amt"](F.pad(a, pad, mode="replicate"), F.pad(b, pad, mode="replicate"))["image"]
        image = (image[0, :, pad[2]:pad[2] + H, pad[0]:pad[0] + W].permute(1, 2, 0) * 255).clamp(0, 255).numpy().astype(np.uint8)
        values.append(cv2.absdiff(true, image).mean())
    return float((255 - np.mean(values)) / 255)


def dynamic_degree(path, nets):
    frames, fps = read_cv2(path)
    H, W = frames[0].shape[:2]
    kept = [torch.from_numpy(cv2.cvtColor(f, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)[None].float() for f in frames][::max(1, round(fps / 8))]
    pad = (-W % 8 // 2, -W % 8 - -W % 8 // 2, -H % 8 // 2, -H % 8 - -H % 8 // 2)
    with torch.no_grad(): flows = [nets["raft"](F.pad(a, pad, mode="replicate"), F.pad(b, pad, mode="replicate"))[1][0] for a, b in zip(kept[:-1], kept[1:])]
    return float(dynamic_decision([top_motion(f[:, pad[2]:pad[2] + H, pad[0]:pad[0] + W]) for f in flows], (H, W))["dynamic"])


DIMENSIONS = [subject_consistency, background_consistency, temporal_flickering, motion_smoothness, dynamic_degree, aesthetic_quality, imaging_quality]


def shared(paths, out, cache, nets):
    "The same dimensions by the engine."
    from camflow.metrics.clips import Clip as Row
    from camflow.metrics.engine import evaluate
    from camflow.metrics.features import Between, FrameRows, TopMotion
    from camflow.metrics.suite import Aesthetic, Consistency, Dynamic, Flickering, Imaging, Smoothness
    metrics = [Consistency("subject_consistency", FrameRows("DINO", nets["dino"], "dino", 224)), Consistency("background_consistency", FrameRows("B/32", nets["clip_b32"], "clip", 224, "image")),
               Flickering(), Smoothness(Between(nets["amt"])), Dynamic(TopMotion(nets["raft"])), Aesthetic(FrameRows("L/14", nets["clip_l14"], "clip", 224, "image"), nets["aesthetic"]),
               Imaging(FrameRows("MUSIQ", nets["musiq"], "musiq", "longer"))]
    rows = evaluate([Row(p.stem, p) for p in paths], metrics, out, processes=0, cache=cache)
    if set(rows.status) - {"ok", "random_weights"}: raise RuntimeError(f"not every number could be had: {rows[['metric', 'status', 'reason']].to_string()}")
    return {m: dict(zip(rows["clip"][rows.metric == m], rows.value[rows.metric == m])) for m in rows.metric.unique()}


def main(arm: str, folder: str):
    "plain, or shared (an empty cache, then a second evaluation from it)."
    set_threads(1)
    cv2.setNumThreads(1)
    paths, nets, seconds = sorted(Path(folder).glob("*.mp4")), networks(), {}
    def timed(name, run):
        started = time.process_time()
        values = run()
        seconds[name] = time.process_time() - started
        return values
    with tempfile.TemporaryDirectory() as scratch:
        if arm == "plain": values = timed("plain", lambda: {d.__name__: {p.stem: d(p, nets) for p in paths} for d in DIMENSIONS})
        else:
            values = timed("shared", lambda: shared(paths, f"{scratch}/one", f"{scratch}/cache", nets))
        peak = memory_stats()["peak_bytes"]
        if arm != "plain" and timed("cached", lambda: shared(paths, f"{scratch}/two", f"{scratch}/cache", nets)) != values: raise RuntimeError("the cache gives other numbers")
    print(json.dumps({"values": values, "seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__": main(*sys.argv[1:])
