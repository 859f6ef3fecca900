"""Supervised training of OmniCam: image to video along a camera, flow matching from cached latents"""

import functools
import math
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from ..assets import tiny_path
from ..data.cache import LatentCache, fill
from ..device import compute_dtype, device, generator
from ..files import InputError, read_json
from ..geometry.trajectory import SUBJECT, chain, compose, dolly, orbit, pan, roll, static, tilt
from ..training.checkpoint import fingerprint, from_folder, load_checkpoint, load_strict
from ..training.loop import TrainConfig, at_least, configuration, fit, item_noise, positions, run_main, shuffled
from ..world.clips import DETAIL, HELD_OUT, random_move, scene_clips
from ..world.render import default_K
from ..world.scene import random_scene
from .finetune import _shares, cached_texts, clip_psnr, seed_adapters
from .omnicam import OmniCamTransformer3DModel, camera_rays, is_camera, tiny_omnicam
from .sampling import add_noise, euler_sample, recam_sigmas
from .text import TextEncoder
from .vae import decode_latents, encode_video

# shape suffixes: B batch, S scenes, N cameras, C channels, T video frames, f latent frames, h w latent rows and columns, L tokens, D width


RATES = {"sideways": 20.0, "lift": 15.0, "dolly": 0.2, "turn": 20.0}  # degrees per second, distances to the subject per second

def random_segment(generator: torch.Generator,  # source of all randomness
                   steps: int,                  # frames of the segment after its first
                   fps: float = 8.0,
                   depth: float = SUBJECT):     # distance of the subject, metres
    "One instruction of a camera script with a direction, a speed and sometimes a turn: its path [steps + 1,4,4], and the distance of the subject after it."
    kind, bend, speed, extra, amount = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    seconds, speed = steps / fps, 0.4 + 0.9 * speed
    if kind < 0.06: path = static(steps + 1)
    elif kind < 0.24:
        metres = RATES["dolly"] * SUBJECT * speed * seconds * (1 if kind < 0.15 else -1)
        path, depth = dolly(metres, steps + 1), depth - metres
    else:
        angle = {0: 0.0, 1: 90.0}.get(int(bend * 4), [30.0, 45.0, 60.0][int(extra * 997) % 3]) # from the vertical
        lift = RATES["lift"] * math.cos(math.radians(angle)) * (1 if int(amount * 991) % 2 else -min(1.0, 1 / speed)) # not through the floor
        side = RATES["sideways"] * math.sin(math.radians(angle)) * (1 if int(amount * 983) % 2 else -1)
        path = orbit(side * speed * seconds, depth, steps + 1, elevation=lift * speed * seconds)
    if extra < 0.25:
        turn = (pan, tilt, roll)[int(extra * 12)]
        path = compose(path, turn((2 * amount - 1) * RATES["turn"] * seconds, steps + 1))
    return path, depth


def random_script(generator: torch.Generator,  # source of all randomness
                  frames: int = 9, fps: float = 8.0):
    "One or two instructions one after the other, [frames,4,4]."
    count, cut = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    if count < 0.4 or frames < 5: return random_segment(generator, frames - 1, fps)[0]
    first = (frames - 1) // 2 if cut < 0.6 else 2 + int((cut - 0.6) / 0.4 * (frames - 4))
    path, depth = random_segment(generator, first, fps)
    return chain(path, random_segment(generator, frames - 1 - first, fps, depth)[0])


def training_paths(seed: int,        # of the scene
                   cameras: int = 4, # N
                   frames: int = 9,
                   scripted: float = 0.65): # share of script-like paths; the others are `random_move`
    "Camera paths of a scene, [(path [frames,4,4], kind)]."
    source, moves = generator(int(seed), "omnicam paths"), []
    for _ in range(cameras):
        if float(torch.rand((), generator=source)) < scripted: moves.append((random_script(source, frames), "script"))
        else: moves.append(random_move(source, frames))
    return moves

@dataclass
class ImageClips:
    "Scenes as latents: what each camera saw, the first frame that they share, and the cameras' paths."
    latents: torch.Tensor   # [S,N,C,f,h,w]
    image: torch.Tensor     # [S,C,f,h,w], first frame followed by grey
    c2w: torch.Tensor       # float64 [S,N,T,4,4] relative to frame 0
    K_4: torch.Tensor       # fx/W, fy/H, cx/W, cy/H
    text_SLD: torch.Tensor
    captions: list

    def __len__(self): return self.latents.shape[0] * self.latents.shape[1]

    def batch(self, items, grid): # numbers of clips; rows and columns of tokens -> target, image, rays, context
        "Tensors of clips."
        scene, camera = torch.tensor(items) // self.latents.shape[1], torch.tensor(items) % self.latents.shape[1]
        rays = camera_rays(self.c2w[scene, camera], self.K_4.expand(len(items), 4), grid)
        return self.latents[scene, camera].float(), self.image[scene].float(), rays, self.text_SLD[scene].float()


def lens(size) -> torch.Tensor: # (H, W)
    "fx/W, fy/H, cx/W, cy/H of the world's camera."
    K = default_K(size)
    return torch.tensor([K[0, 0] / size[1], K[1, 1] / size[0], 0.5, 0.5])


def encode_first(vae, image_B3HW, frames: int): # signed; T of the video
    "Latents [B,C,f,h,w] of the first frame followed by grey."
    grey = image_B3HW.new_zeros(*image_B3HW.shape[:2], frames - 1, *image_B3HW.shape[2:])
    return encode_video(vae, torch.cat([image_B3HW[:, :, None], grey], 2))


def image_condition(image_BCfhw): # latents of the first frame and grey
    "Mask and image latents [B,4+C,f,h,w], in Wan's order."
    mask = torch.zeros_like(image_BCfhw[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, image_BCfhw], 1)


def world_clips(seed: int, cameras: int = 4, frames: int = 9, size=(48, 80)): # of the scene
    "One scene along its training paths."
    return scene_clips(seed, training_paths(seed, cameras, frames), size=size)


def fill_scenes(folder, vae, first: int = 0, scenes: int = 3000, cameras: int = 4, frames: int = 9, size=(48, 80), # cache folder; as in `world_clips`
                rank: int = 0, world: int = 1):
    "Renders and encodes what the cache lacks; pictures are not kept."
    encoder = {name: p for name, p in vae.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
    identity = {"vae": fingerprint(encoder), "stats": [vae.config.latents_mean, vae.config.latents_std], "size": list(size), "frames": frames, "cameras": cameras, "paths": "v1"}
    def load(key):
        clips = world_clips(int(key), cameras, frames, size)
        return torch.from_numpy(clips.frames_NT3HW).float().div_(127.5).sub_(1).transpose(1, 2), torch.from_numpy(clips.c2w_NT44)
    @torch.no_grad()
    def encode(batch):
        to = lambda x: x.to(device(), vae.dtype)
        return [{"latents": encode_video(vae, to(video)).half().cpu(), "image": encode_first(vae, to(video[:1, :, 0]), frames)[0].half().cpu(), "c2w": c2w} for video, c2w in batch]
    cache = LatentCache(folder, identity)
    fill(cache, [str(first + s) for s in range(scenes)], load, encode, batch=4, shard=100, rank=rank, world=world)
    return cache


def world_latents(folder, vae, text: TextEncoder, first=0, scenes=3000, cameras=4, frames=9, size=(48, 80)): # cache folder, encoders; as in `fill_scenes`
    "ImageClips of the procedural world."
    rank, world, wait = _shares()
    if rank == 0: fill_scenes(folder/"latents", vae, first, 0, cameras, frames, size)
    wait()
    fill_scenes(folder/"latents", vae, first, scenes, cameras, frames, size, rank, world)
    wait()
    cache, keys = LatentCache(folder/"latents"), [str(first + s) for s in range(scenes)]
    captions = [random_scene(int(key), detail=DETAIL).caption() for key in keys]
    return ImageClips(*(cache.stack(keys, name) for name in ("latents", "image", "c2w")), lens(size), cached_texts(folder/"text", text, captions), captions)


# ---- levels

def levels(seed: int, items, buckets: int = 16, shift: float = 3.0, scale: float = 1.6): # of the run, positions; parts of the range that every so many items visit once each; S and s of the sampler
    "Noise levels [B] of training items: t' = sigmoid(s n), t = S t' / (1 + (S - 1) t')."
    def uniform(i):
        source = generator(seed, "level", i // buckets)
        return ((torch.randperm(buckets, generator=source) + torch.rand(buckets, generator=source)) / buckets)[i % buckets]
    u = torch.stack([uniform(i) for i in items]).clamp(1e-6, 1 - 1e-6)
    t = torch.sigmoid(scale * math.sqrt(2) * torch.erfinv(2 * u - 1))
    return shift * t / (1 + (shift - 1) * t)


def hidden(seed: int, items, text: float, camera: float): # of the run, positions, shares
    "(no text [B], no camera [B]) of training items."
    draw = lambda purpose: torch.stack([torch.rand((), generator=generator(seed, purpose, i)) for i in items])
    return draw("no text") < text, draw("no camera") < camera


def image_velocity(model, x, level, image, rays, context): # OmniCamTransformer3DModel; noisy latents, noise level [B] on the host, image latents, rays or a CameraMemory, text
    "What the model predicts."
    return model(torch.cat([x, image_condition(image).to(x)], 1), 1000 * level, context, camera=rays, return_dict=False)[0].float()


def flow_loss(model, target, image, rays, context, noise, level):
    "Squared error of the velocity, a number per item [B]."
    return (image_velocity(model, add_noise(target, noise, level), level, image, rays, context) - (noise - target)).square().flatten(1).mean(1)


# ---- starts

@torch.no_grad()
def open_camera(model, gate: float = 0.3, seed: int = 0):
    "For training from nothing: the input term and the gates start open."
    model.camera_input.weight.copy_(torch.randn(model.camera_input.weight.shape, generator=generator(seed, "camera input")) / model.config.camera_dim ** 0.5)
    for block in model.blocks: block.camera_gate.fill_(gate)


@torch.no_grad()
def from_recam(model, recam, image: float = 0.5): # of the same width; ReCamTransformer3DModel; factor of the weights that look at the image
    "Takes over what a ReCam transformer knows: blocks, time and text; its projectors go into the attention's output."
    source, own = dict(recam.state_dict()), model.state_dict()
    for n in range(recam.config.num_layers):
        project, bias = (source[f"blocks.{n}.projector.{k}"] for k in ("weight", "bias"))
        out = f"blocks.{n}.attn1.to_out.0."
        source[out + "bias"], source[out + "weight"] = project @ source[out + "bias"] + bias, project @ source[out + "weight"]
    patch = source.pop("patch_embedding.weight")
    own["patch_embedding.weight"].zero_()[:, :16].copy_(patch)
    own["patch_embedding.weight"][:, 20:].copy_(image * patch)
    taken = [name for name in own if name in source and source[name].shape == own[name].shape]
    for name in taken: own[name].copy_(source[name])
    return taken


# ---- sampling

@torch.no_grad()
def sample(model, image, rays, context,        # batched; rays None: no camera
           steps: int = 8, shift: float = 3.0, # of the sampler
           camera_guidance: float = 1.0,       # 1: none; needs a model trained with camera_dropout
           seed: int = 0):                     # of the noise
    "Latents [B,C,f,h,w], without guidance by text."
    noise = item_noise(image.shape[1:], seed, range(len(image)), "sample").to(image.device)
    camera = None if rays is None else model.remember(rays, tuple(n // p for n, p in zip(image.shape[2:], model.config.patch_size)), len(image))
    def velocity(x, level):
        level = torch.full((len(x),), level)
        v = image_velocity(model, x, level, image, camera, context)
        if camera is None or camera_guidance == 1: return v
        free = image_velocity(model, x, level, image, None, context)
        return free + camera_guidance * (v - free)
    return euler_sample(velocity, noise, recam_sigmas(steps, shift))


def signed_truth(seed: int, camera: int, cameras=4, frames=9, size=(48, 80)): # of the scene
    "Clip of a scene along one of its training paths, signed [3,T,H,W]."
    return torch.from_numpy(world_clips(seed, cameras, frames, size).frames_NT3HW[camera]).float().div_(127.5).sub_(1).transpose(0, 1)


@torch.no_grad()
def compare(model, clips: ImageClips, vae, truth, # in eval mode; held-out clips; truth [M,3,T,H,W] of the first M scenes' camera 0
            steps: int = 8, shift: float = 3.0):  # of the sampler
    "Mean PSNR of the sample and of what it must beat: the same model with no camera, with another clip's camera, and the still first frame."
    where, N = next(model.parameters()).device, clips.latents.shape[1]
    patch = model.config.patch_size[1:]
    grid = tuple(n // p for n, p in zip(clips.latents.shape[-2:], patch))
    target, image, rays, context = (part.to(where) for part in clips.batch([s * N for s in range(len(truth))], grid))
    decode = lambda z: decode_latents(vae, z.to(next(vae.parameters()).device)).float().cpu()
    run = lambda camera: decode(sample(model, image, camera, context, steps, shift))
    made = {"sample": run(rays), "camera_off": run(None), "wrong_camera": run(rays.roll(1, 0)), "still": truth[:, :, :1].expand_as(truth), "reconstruction": decode(target)}
    scores = {name: clip_psnr(video, truth) for name, video in made.items()}
    beats = {f"beats_{name}": float((scores["sample"] > scores[name]).float().mean()) for name in ("camera_off", "wrong_camera", "still")}
    return {f"psnr_{name}": float(v.mean()) for name, v in scores.items()} | beats


# ---- the run

MATRICES = ["blocks.*.attn?.to_[qkv].weight", "blocks.*.attn?.to_out.0.weight", "blocks.*.ffn.*.weight", "blocks.*.camera_attn.to_*.weight"]
TINY = dict(ffn_dim=512, image_dim=None, added_kv_proj_dim=None)  # changes of `tiny_omnicam_config`: no CLIP tokens, the room goes to the feed-forward layers
DEFAULTS = dict(steps=2400, batch_size=16, lr=3e-3, betas=(0.9, 0.99), muon=MATRICES, warmup=60, schedule="cosine", final_lr=0.02, ema_decay=0.995, checkpoint_every=0, checkpoint_seconds=180., log_every=10,
                validate_every=200, frames=9, size=[48, 80], scenes=3000, cameras=4, held_out=24, cache_folder=None, vae=None, transformer=None, text_encoder=None, model={}, start="recam",
                trainable_modules=["*"], lora_rank=0, timestep_buckets=16, shift=3.0, sigmoid_scale=1.6, text_dropout=0.1, camera_dropout=0.1, sample_steps=8, sample_shift=3.0, validation_clips=16, export=None)


def parts(config: dict): # full configuration
    "(transformer, vae, text encoder) of a run: loaded where a folder is given, tiny otherwise."
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel
    vae = from_folder(AutoencoderKLWan, config["vae"] or tiny_path("vae"), torch_dtype=torch.float32).eval().requires_grad_(False).to(device())
    if config["transformer"]: model = from_folder(OmniCamTransformer3DModel, config["transformer"], torch_dtype=torch.float32)
    else:
        model = tiny_omnicam(config.get("seed", 0), **TINY | config["model"])
        open_camera(model, seed=config.get("seed", 0))
        if config["start"] == "recam":
            from .recam import ReCamTransformer3DModel
            from_recam(model, from_folder(ReCamTransformer3DModel, tiny_path("recam")/"transformer", torch_dtype=torch.float32))
    root = Path(config["text_encoder"] or tiny_path("recam"))
    encoder = from_folder(UMT5EncoderModel, root/"text_encoder", dtype=torch.float32).eval().to(device())
    return model, vae, TextEncoder(AutoTokenizer.from_pretrained(root/"tokenizer", local_files_only=True), encoder)


def prepare_trained(model, patterns, rank: int = 0, seed: int = 0):
    "Predicate of trained parameter names."
    return lambda name: any(fnmatch(name, pattern) for pattern in patterns)


def datasets(config: dict, run_dir): # full configuration, folder of the run
    "(model, vae, training clips, held-out clips, truth)."
    cache = Path(config["cache_folder"] or Path(run_dir)/"cache")
    model, vae, text = parts(config)
    shape = dict(cameras=config["cameras"], frames=config["frames"], size=tuple(config["size"]))
    train = world_latents(cache, vae, text, 0, config["scenes"], **shape)
    held = world_latents(cache, vae, text, HELD_OUT, config["held_out"], **shape)
    truth = torch.stack([signed_truth(HELD_OUT + s, 0, **shape) for s in range(min(config["held_out"], config["validation_clips"]))])
    return model, vae, train, held, truth


def main(config: dict, # overrides of `DEFAULTS` and the fields of TrainConfig
         run_dir):     # folder of the run
    "Trains OmniCam from cached latents."
    config = configuration(config, DEFAULTS)
    cfg = TrainConfig.pick(config)
    model, vae, train, held, truth = datasets(config, run_dir)
    grid = tuple(n // p for n, p in zip(train.latents.shape[-2:], model.config.patch_size[1:]))

    def batch_fn(step, rank, world, micro):
        items = positions(step, rank, world, micro, cfg.batch_size, cfg.accumulation)
        target, image, rays, context = train.batch([shuffled(i, len(train), cfg.seed) for i in items], grid)
        no_text, no_camera = hidden(cfg.seed, items, config["text_dropout"], config["camera_dropout"])
        context, rays = context * ~no_text[:, None, None], rays * ~no_camera[:, None, None, None, None]
        return target, image, rays, context, item_noise(target.shape[1:], cfg.seed, items), levels(cfg.seed, items, config["timestep_buckets"], config["shift"], config["sigmoid_scale"])

    def step_fn(model, batch, noise):
        *inputs, level = batch                  # levels stay on the host
        return flow_loss(model, *(part.to(device()) for part in inputs), level).mean(), {}

    def validate(model, step): return compare(model, held, vae, truth, config["sample_steps"], config["sample_shift"])

    return fit(run_dir, model, step_fn, batch_fn, cfg, validate=validate, trainable=prepare_trained(model, config["trainable_modules"], config["lora_rank"], cfg.seed))


if __name__ == "__main__": run_main(main)
