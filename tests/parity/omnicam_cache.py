"Musubi-tuner's cache files, clip windows and buckets (musubi_cache, buckets) against camflow.data.buckets and camflow.data.musubi."
import math
import tempfile
import traceback
from pathlib import Path

import torch
from safetensors import safe_open

from camflow.data.buckets import bucket_sizes, nearest_bucket, round_frames, select_bucket, windows
from camflow.data.musubi import batch_key, cached_items, camera_name, latent_name, read_cache_file, with_mask, write_camera, write_latents, write_text

from .cameras import read


def written(given, folder):
    "The file that ours writes for an entry."
    kind = given["kind"]
    if kind.startswith("camera"):
        stem = given["text_cache_file"].removesuffix("_wan_te.safetensors")
        return write_camera(folder, stem, "a cake", torch.eye(4).expand(5, 4, 4), torch.ones(4))
    name = Path(given["item_key"])
    if kind == "text": return write_text(folder, name.stem, given["caption"], torch.zeros(given["tokens"], 4096, dtype=getattr(torch, given["dtype"])))
    frames = given["frames"] or 1
    latents = torch.zeros(16, (frames + 3) // 4, *(n // 8 for n in given["content_hw"]), dtype=getattr(torch, given["vae_dtype"]))
    stem, first = name.stem, None
    if kind == "video latent": stem, first = name.stem.rsplit("_", 1)[0], int(name.stem.rsplit("_", 1)[1].split("-")[0])
    return write_latents(folder, stem, given["original_size"], latents, with_mask(latents) if given["i2v"] else None, torch.zeros(257, 1280) if given["clip"] else None, first, given["frames"])


def file_agrees(entry, folder):
    given, want = entry["input"], entry["output"]
    path = written(given, folder)
    with safe_open(path, "pt") as file:
        tensors = {name: (list(file.get_tensor(name).shape), str(file.get_tensor(name).dtype).removeprefix("torch.")) for name in file.keys()}
        metadata = file.metadata()
    read_cache_file(path)
    if given["kind"].startswith("camera"):
        stem = given["text_cache_file"].removesuffix("_wan_te.safetensors")
        free = {name: ([None if isinstance(n, str) else n for n in spec["shape"]], spec["dtype"]) for name, spec in want["tensors"].items()}
        same = all(dtype == free[name][1] and all(w is None or w == n for w, n in zip(free[name][0], shape)) and len(shape) == len(free[name][0]) for name, (shape, dtype) in tensors.items())
        return (same and set(tensors) == set(free) and sorted(metadata) == sorted(want["metadata_keys"]) and path.name == want["file_the_training_loader_looks_for"]
                and camera_name(stem, written=True) == want["file"])
    return path.name == want["file"] and metadata == want["metadata"] and tensors == {name: (spec["shape"], spec["dtype"]) for name, spec in want["tensors"].items()}


def files(data):
    for entry in data["files"]:
        with tempfile.TemporaryDirectory() as folder: yield file_agrees(entry, folder)


def crop_windows(data):
    for entry in data["crop_windows"]:
        given, want = entry["input"], entry["output"]
        found = windows(given["video_frames"], given["target_frames"], given["frame_extraction"], given.get("frame_stride", 1), given.get("frame_sample", 1), given.get("max_frames", 129))
        bucket = select_bucket(given["size"], given["resolution"])
        ours = [{"batch_key": [*bucket, n], "first_frame": first, "n_frames": n, "file": latent_name(Path(given["video"]).stem, given["size"], first, n), "frame_count": n} for first, n in found]
        yield ours == want["items"] and sorted({round_frames(f) for f in given["target_frames"]}) == want["effective_target_frames"]


def training_listing(data):
    for entry in data["training_listing"]:
        given = entry["input"]
        found = cached_items([*given["latent_files"], *given["text_files_present"]], given["resolution"], given["enable_bucket"], given.get("bucket_no_upscale", False))
        ours = [[list(bucket), sorted([stem, frames, list(at)] for stem, frames, at in items), len(items) * given["num_repeats"]] for bucket, items in found.items()]
        yield ours == [[bucket, sorted(items), count] for bucket, items, count in entry["output"]]


def keys(data):
    for entry in data["tensor_key_to_batch_key"]: yield batch_key(entry["input"]) == (entry["output"]["batch_key"], entry["output"]["stacked"])


def bucket_lists(data):
    for entry in data["bucket_lists"]: yield [list(pair) for pair in bucket_sizes(entry["input"]["resolution"])] == entry["output"]["buckets"]


def select(data):
    for entry in data["select"]: yield list(select_bucket(**entry["input"])) == entry["output"]


def resolution(data):
    for entry in data["calculate_bucket_resolution"]:
        given = entry["input"]
        yield list(nearest_bucket(given["image_size"], bucket_sizes(given["resolution"], given["reso_steps"]))) == entry["output"]


REPLAY = {"musubi_cache": {"files": files, "crop_windows": crop_windows, "training_listing": training_listing, "tensor_key_to_batch_key": keys},
          "buckets": {"bucket_lists": bucket_lists, "select": select, "calculate_bucket_resolution": resolution}}


def check(folder) -> dict:
    "{case.part: (share of entries that differ, 0, 0, ok)}; exact."
    results = {}
    for case, parts in REPLAY.items():
        path = Path(folder)/f"{case}.json"
        if not path.is_file(): continue
        data = read(path)
        for name in (name for name in data if not name.startswith("note")):
            if name not in parts: results[f"{case}.{name}"] = (math.nan, 0.0, 0.0, None)
            else:
                try: agree = list(parts[name](data))
                except Exception:
                    traceback.print_exc()
                    agree = [False]
                results[f"{case}.{name}"] = (agree.count(False) / max(1, len(agree)), 0.0, 0.0, bool(agree) and all(agree))
    return results
