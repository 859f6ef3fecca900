"""Does the video follow the camera that the script asks for? Held-out scenes and scripts, and the controls that a camera must beat"""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..device import generator
from ..files import InputError
from ..geometry.script import Segment, path_state, script_path, script_text
from ..geometry.trajectory import SUBJECT
from ..world.clips import DETAIL, FPS, HELD_OUT
from ..world.render import default_K, render_clips
from ..world.scene import random_scene
from .evaluate import camera_error, frame_psnr, signed, to_bytes
from .omnicam import camera_rays
from .omnicam_train import encode_first, lens, sample
from .vae import decode_latents

# Shapes: M clips, T frames, n read frames, 3HW image, 44 pose.


DIRECTIONS = ("left", "right", "up", "down", "forward", "backward", *(f"{side}{height}{angle}" for angle in (30, 45, 60) for height in ("up", "down") for side in ("left", "right")))
TURNS = ("pan right 20", "pan left 20", "tilt up 15", "tilt down 15")
REPORTED = HELD_OUT + 600_000 # scenes of final reports; settings are chosen on those before it


def script_cases(count: int,           # scripts
                 seed: int = 0,        # of the draw
                 seconds: float = 1.0): # length of the clip
    "Scripts in turn over all directions, one instruction or two of half the time, high or low speed; every fifth instruction is a turn on the spot."
    cases, k = [], 0
    for i in range(count):
        cuts, segments = [0.0, seconds] if i % 2 else [0.0, seconds / 2, seconds], []
        for start, end in zip(cuts, cuts[1:]):
            fast = bool(torch.rand((), generator=generator(seed, "script speed", k)) < 0.5)
            turn = k % 5 == 4
            direction, rotate = ("stay", TURNS[(k // 5) % 4]) if turn else (DIRECTIONS[(7 * (k - (k + 1) // 5)) % 18], "stay")
            segments.append(Segment(start, end, "high" if fast or turn else "low", direction, rotate))
            k += 1
        cases.append(segments)
    return cases


@dataclass
class ScriptClips:
    "First frames, scripts, asked and wrong paths, and what a camera on the asked path sees."
    image_M3HW: torch.Tensor      # uint8
    truth_MT3HW: torch.Tensor     # uint8
    c2w_MT44: np.ndarray          # asked, relative to the first frame, metres
    wrong_MT44: np.ndarray        # of the next clip's script
    scripts: list                 # Segments of each clip
    captions: list
    scenes: list = field(repr=False)
    fps: float = FPS

    def __len__(self): return len(self.scripts)


def scripted(scripts,             # Segments of each clip
             first: int = HELD_OUT, # first scene seed
             frames: int = 9, fps: float = FPS, size=(48, 80)):
    "Renders held-out scenes along scripts."
    if first < HELD_OUT: raise InputError(f"scene seed {first}; scripted; it belongs to training, held-out seeds start at {HELD_OUT}")
    paths = np.stack([script_path(segments, frames, fps, SUBJECT).numpy() for segments in scripts])
    scenes = [random_scene(first + i, detail=DETAIL) for i in range(len(scripts))]
    K, times = default_K(size), np.arange(frames) / fps
    videos = torch.from_numpy(np.stack([render_clips(scene, [(scene.start @ path, K)], times, size=size)[0] for scene, path in zip(scenes, paths)]))
    return ScriptClips(videos[:, 0], videos, paths, np.roll(paths, -1, 0), list(scripts), [scene.caption() for scene in scenes], scenes, fps)


@torch.no_grad()
def film(model, vae,               # OmniCamTransformer3DModel and AutoencoderKLWan, in eval mode
         clips: ScriptClips,
         context_MLD,              # text
         camera: str = "asked",    # "asked", "wrong", "off"
         steps: int = 12, shift: float = 3.0, camera_guidance: float = 1.0, seed: int = 0, # as for `sample`
         batch: int = 16):         # clips at a time
    "Videos from the first frames, uint8 [M,T,3,H,W]."
    if camera not in ("asked", "wrong", "off"): raise InputError(f"camera {camera!r}; film; one of asked, wrong, off")
    frames, videos = clips.truth_MT3HW.shape[1], []
    paths, size = clips.wrong_MT44 if camera == "wrong" else clips.c2w_MT44, clips.image_M3HW.shape[-2:]
    for start in range(0, len(clips), batch):
        rows = slice(start, start + batch)
        image = encode_first(vae, signed(clips.image_M3HW[rows, None])[:, :, 0], frames)
        grid = tuple(n // p for n, p in zip(image.shape[-2:], model.config.patch_size[1:]))
        rays = None if camera == "off" else camera_rays(torch.as_tensor(paths[rows]), lens(size).expand(len(image), 4), grid)
        videos.append(to_bytes(decode_latents(vae, sample(model, image, rays, context_MLD[rows], steps, shift, camera_guidance, seed + start))))
    return torch.cat(videos)


def read_rows(clips: ScriptClips):
    "Frames whose camera is read: ends of instructions, and every second frame, which helps to read those."
    T = clips.truth_MT3HW.shape[1]
    ends = {round(t * clips.fps) for segments in clips.scripts for one in segments for t in (one.start, one.end)}
    return sorted({*range(0, T, 2), T - 1, *(k for k in ends if k < T)})


def read_cameras(videos_MT3HW, clips: ScriptClips):
    "Poses read off the videos by rendering the known scenes, relative to the first frame: [M,n,4,4] of `read_rows`, NaN where reading failed. Only what the first frame showed counts."
    from ..metrics.photometric import photometric_pose
    rows, poses = read_rows(clips), []
    for video, scene, asked in zip(videos_MT3HW, clips.scenes, clips.c2w_MT44):
        K, times = default_K(video.shape[-2:]), np.asarray(rows) / clips.fps
        found = photometric_pose(video[rows].float() / 255, scene, times, scene.start @ asked[rows], K, source=(scene.start[None], [0.0]))
        poses.append(np.linalg.inv(scene.start) @ found.c2w)
    return np.stack(poses)


COMPONENTS = ("right around", "down around", "outwards", "pan right", "tilt up", "roll clockwise")
SPANS = np.array([20, 15, 0.2, 20, 15, 20]) # what a second at full speed changes: degrees, and distances to the scene's centre


def segment_motion(c2w_n44, rows, segments, fps: float): # poses of frames `rows` relative to frame 0
    "Change of the six numbers of `path_state` over each instruction [segments, 6], NaN where a pose is missing."
    state = np.full((len(rows), 6), np.nan)
    fine = np.isfinite(c2w_n44).all((1, 2))
    if fine.any():
        poses = np.concatenate([np.eye(4)[None], c2w_n44[fine]])
        state[fine] = path_state(poses, SUBJECT)[1:]
    state[rows.index(0)] = 0
    at = lambda seconds: state[rows.index(round(seconds * fps))]
    return np.stack([at(one.end) - at(one.start) for one in segments])


def segment_signs(clips: ScriptClips, measured_Mn44): # of `read_cameras`
    "DataFrame with a row per instruction: its dominant component, asked and measured change of it, and whether the signs agree; an unread pose does not agree."
    import pandas as pd
    rows, table = read_rows(clips), []
    for i, segments in enumerate(clips.scripts):
        asked, got = (segment_motion(path, rows, segments, clips.fps) for path in (clips.c2w_MT44[i][rows], measured_Mn44[i]))
        for n, one in enumerate(segments):
            k = int(np.abs(asked[n] / SPANS).argmax())
            table.append({"clip": i, "segment": n + 1, "script": script_text([one]), "component": COMPONENTS[k], "asked": asked[n, k], "measured": got[n, k],
                          "read": bool(np.isfinite(got[n, k])), "agrees": bool(np.isfinite(got[n, k]) and asked[n, k] * got[n, k] > 0)})
    return pd.DataFrame(table)


def judge(videos_MT3HW, clips: ScriptClips, measured_Mn44=None): # None: read here
    "(numbers, table per instruction, poses read) of one set of videos."
    measured = read_cameras(videos_MT3HW, clips) if measured_Mn44 is None else measured_Mn44
    rows = read_rows(clips)
    rotation, translation = camera_error(clips.c2w_MT44[:, rows][:, 1:], measured[:, 1:])
    table = segment_signs(clips, measured)
    fine = np.isfinite(rotation) & np.isfinite(translation)
    mean = lambda x: float(x[fine].mean()) if fine.any() else float("nan")
    return {"psnr_db": float(frame_psnr(videos_MT3HW, clips.truth_MT3HW).mean()), "rotation_deg": mean(rotation), "translation_m": mean(translation),
            "sign_agreement": float(table.agrees.mean()), "clips_read": float(fine.mean()), "segments": len(table)}, table, measured
