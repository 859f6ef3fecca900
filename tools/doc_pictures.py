"""Pictures of the systems' pages, made with the tiny weights or taken from the gallery: `python -m tools.doc_pictures omnicam stereo`, all without a name; written to docs/pictures."""
import argparse
import base64
import io
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence

ROOT = Path(__file__).resolve().parents[1]
INK, PAPER, GAP = "#222222", "#ffffff", 4


def pixels(image) -> np.ndarray: # uint8 [3,H,W] tensor
    return image.permute(1, 2, 0).cpu().numpy()


def sheet(rows: list,            # of rows of uint8 [3,H,W]; None leaves a place empty
          heads: list,           # above the columns
          sides: list = (),      # left of the rows
          zoom: int = 1,         # pixels of the sheet per pixel
          scale: float = 1.0,    # the same, by interpolation
          font: int = 17) -> Image.Image:
    "Pictures in a table with words above and beside it."
    letters = ImageFont.load_default(font)
    h, w = (round(zoom * scale * n) for n in next(p for row in rows for p in row if p is not None).shape[1:])
    left = max((int(letters.getlength(line)) for side in sides for line in side.split("\n")), default=0) + (10 if sides else 0)
    top = (font + 4) * max(head.count("\n") + 1 for head in heads) + 4
    out = Image.new("RGB", (left + len(heads) * (w + GAP) - GAP, top + len(rows) * (h + GAP) - GAP), PAPER)
    draw = ImageDraw.Draw(out)
    for x, head in enumerate(heads): draw.text((left + x * (w + GAP), 2), head, INK, letters)
    for y, row in enumerate(rows):
        if sides: draw.text((0, top + y * (h + GAP) + h // 2), sides[y], INK, letters, anchor="lm")
        for x, picture in enumerate(row):
            if picture is not None: out.paste(Image.fromarray(pixels(picture)).resize((w, h), Image.Resampling.NEAREST if zoom > 2 else Image.Resampling.BICUBIC), (left + x * (w + GAP), top + y * (h + GAP)))
    return out


def recam() -> Image.Image:
    "One held-out scene per kind of move, the last of nine frames."
    from camflow.wan.evaluate import REPORTED, generate, held_out
    from camflow.wan.generate import load_pipeline
    kinds = ["pan_right", "tilt_up", "zoom_in", "translate_up", "arc_left"]
    scenes, pipe = held_out(len(kinds), kinds, first=REPORTED), load_pipeline()
    made = generate(pipe.transformer, pipe.vae, scenes.source_MT3HW, scenes.camera(), pipe.text.encode(scenes.captions), steps=8)
    off = generate(pipe.transformer, pipe.vae, scenes.source_MT3HW, scenes.camera(wrong=True), pipe.text.encode(scenes.captions), steps=8)
    last = lambda clips: [clip[-1] for clip in clips]
    return sheet([last(scenes.source_MT3HW), last(made), last(scenes.truth_MT3HW), last(off)], [k.replace("_", " ") for k in kinds], ["source", "generated for\nthis camera", "truth", "generated for\nanother one"], zoom=2)


def omnicam() -> Image.Image:
    "One first frame and five scripts: the last of nine frames, with the truth below."
    from camflow.geometry.script import parse
    from camflow.training.loop import configuration
    from camflow.wan.omnicam_evaluate import REPORTED, film, scripted
    from camflow.wan.omnicam_train import DEFAULTS, depth_net, parts
    from camflow.assets import tiny_path
    config = configuration({"transformer": str(tiny_path("omnicam")), "depth": str(tiny_path("omnicam")/"depth")}, DEFAULTS)
    model, vae, text, _ = parts(config)
    words = {"right": ("high", "right", "stay"), "left, up 30": ("high", "leftup30", "stay"), "forward": ("high", "forward", "stay"), "pan left 20": ("high", "stay", "pan left 20"), "tilt up 15": ("high", "stay", "tilt up 15")}
    rows = []
    for k in (0, 3):
        clips = [scripted([parse(f"<starttime>0</starttime> <endtime>1</endtime> <speed>{speed}</speed> <direction>{direction}</direction> <rotate>{rotate}</rotate>")], REPORTED + k) for speed, direction, rotate in words.values()]
        made = [film(model.eval(), vae, clip, text.encode(clip.captions), depth=depth_net(config, model), steps=12, shift=5.0, camera_guidance=1.5, warp_start=0.75, detail=0.16)[0, -1] for clip in clips]
        rows += [[clips[0].image_M3HW[0], *made], [None, *(clip.truth_MT3HW[0, -1] for clip in clips)]]
    return sheet(rows, ["first frame", *words], ["generated", "truth"] * 2, zoom=2)


def page_clips(page: str) -> list: # HTML of a report
    "Its clips in their order, uint8 [T,3,H,W] each: small ones are animated pictures, larger ones mp4."
    from camflow.media.video import read_video
    def decoded(kind, data):
        if kind == "image/webp":
            clip = Image.open(io.BytesIO(data))
            return torch.stack([torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1) for frame in ImageSequence.Iterator(clip)])
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(data), file.flush()
            return read_video(file.name).data
    return [decoded(kind, base64.b64decode(data)) for kind, data in re.findall(r"data:(image/webp|video/mp4);base64,([A-Za-z0-9+/=]+)", page)]


def gflow() -> Image.Image:
    "Frames 0, 6 and 11 of the clips in the gallery's report of `camflow run gflow_fit -f tiny`."
    clips = page_clips((ROOT/"reports/gallery/gflow_fit.html").read_text(encoding="utf-8"))
    if len(clips) != 5: raise SystemExit(f"gflow: {len(clips)} clips in reports/gallery/gflow_fit.html where five were expected (video, drawn, depth, moves, trajectories)")
    size = clips[0].shape[:1:-1] # columns, rows
    def frame(clip, t): return torch.from_numpy(np.array(Image.fromarray(pixels(clip[min(t, len(clip) - 1)])).resize(size))).permute(2, 0, 1)
    return sheet([[frame(clip, t) for clip in clips] for t in (0, 6, 11)], ["video", "drawn", "depth", "what moves", "points followed"], ["frame 0", "6", "11"], scale=200 / size[0])


def joint() -> Image.Image:
    "Held-out drawn shapes: eight pairs of picture and depth, and four clips whose flow was given (first, middle and last frame)."
    import camflow.joint.train as train
    from camflow.assets import tiny_path
    from camflow.files import read_json
    from camflow.joint import conditions
    bytes_of = lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    def samples(tiny, mode, count, steps, **more):
        folder = tiny_path("joint")/tiny
        told, pipe = read_json(folder/"joint.json"), conditions.open_pipeline(folder)
        own = {key: told[key] for key in ("size", "frames", "fps", "motion_bucket", "noise_aug", "condition", "flow_bucket", "fast") if key in told}
        config = train.configuration(dict(family=told["family"], data="shapes", **own), train.DEFAULTS)
        names = tuple(told["names"])
        given, captions = train.Pairs(conditions.open_conditions(config, names, count), config, pipe.codecs).batch(list(range(count)))
        given = dict(zip(names, given.chunk(2)))
        extra = {} if told["family"] == "sd" else dict(fps=told["fps"], motion_bucket_id=told["motion_bucket"], noise_aug_strength=told["noise_aug"])
        made = conditions.sample_set(pipe, given, captions, conditions.choose(names, mode), steps, **more, **extra)
        return [{name: bytes_of(part) for name, part in one.items()} for one in (given, made)]
    given, by_depth = samples("image_depth", "first_given_second", 8, 16, signal_guidance=1.0)
    _, by_image = samples("image_depth", "second_given_first", 8, 16, signal_guidance=1.0)
    _, both = samples("image_depth", "joint", 8, 16, signal_guidance=1.0)
    first = lambda parts, name: list(parts[name][:, 0])
    rows = [first(given, "image"), first(given, "depth"), first(by_depth, "image"), first(by_image, "depth"), first(both, "image"), first(both, "depth")]
    return sheet(rows, [f"pair {k + 1}" for k in range(8)], ["a drawn picture", "its depth", "picture made for this depth", "depth made for this picture", "both made together:\nthe picture", "its depth"], zoom=5)


def stereo() -> Image.Image:
    "A held-out clip: the network against semi-global matching, frames 0 and 15."
    from camflow.assets import tiny_path
    from camflow.stereo.baselines import sgbm
    from camflow.stereo.network import load_stereo
    from camflow.stereo.show import Scale, colours, fit_scale
    from camflow.stereo.windows import stereo_video
    from camflow.world.clips import HELD_OUT
    from camflow.world.stereo_clips import stereo_clip
    clip = stereo_clip(HELD_OUT + 3, "small", frames=16)
    found = stereo_video(load_stereo(tiny_path("stereo")).eval(), clip.left, clip.right)
    truth, matched, scale = clip.disparity, sgbm(clip.left, clip.right)[0], fit_scale(clip.disparity.numpy())
    error = lambda maps, t: colours((maps[t] - truth[t]).abs(), Scale(0.0, 4.0, "px"), "magma")
    shown = [[clip.left[t], colours(truth[t], scale), colours(found[t], scale), colours(matched[t], scale), error(found, t), error(matched, t)] for t in (0, 15)]
    return sheet([list(column) for column in zip(*shown)], ["frame 0", "frame 15"], ["left view", "disparity, truth", "network", "semi-global\nmatching", "error of the network\n(white: 4 pixels)", "error of the\nmatching"], zoom=1, scale=1.4)


def save_jpeg(picture: Image.Image, path: Path, most: int = 60_000): # bytes
    "As good as the size allows."
    for quality in range(86, 40, -4):
        picture.save(path, quality=quality, optimize=True)
        if path.stat().st_size < most: return


SQUARES = ("joint",) # large pixels, for which PNG is smaller
DRAWN = {f.__name__: f for f in (recam, omnicam, gflow, joint, stereo)}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.doc_pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(DRAWN)}; all when left out")
    parser.add_argument("--out", type=Path, default=ROOT/"docs/pictures")
    given = parser.parse_args(argv)
    if unknown := set(given.names) - DRAWN.keys(): parser.error(f"no picture is called {', '.join(sorted(unknown))}; there are {', '.join(DRAWN)}")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or DRAWN:
        picture, path = DRAWN[name](), given.out/f"{name}.{'png' if name in SQUARES else 'jpg'}"
        if path.suffix == ".png": picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        else: save_jpeg(picture, path)
        print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__": main()
