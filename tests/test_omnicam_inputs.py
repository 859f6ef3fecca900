"What strangers give OmniCam (malformed scripts are in test_script.py): pictures of all kinds, lenses, saved latents, the README's prompt, LoRAs of other models."
import json
import os
from pathlib import Path

import pytest
import torch

from camflow.data.omnicam_cache import OmniCamCache
from camflow.files import InputError
from camflow.geometry.camera import Cameras, focal_K, write_unreal_json
from camflow.geometry.script import Segment, parse, script_text
from camflow.geometry.trajectory import pose, preset
from camflow.wan import omnicam_cache, omnicam_generate
from camflow.wan.omnicam_generate import asked_camera, guided, make_guider, prompt_parts, read_latents
from camflow.wan.omnicam_train import starting_model
from camflow.wan.text import build_tiny_text
from camflow.wan.vae import tiny_vae

REAL = Path(os.environ.get("CAMFLOW_REAL", Path(__file__).resolve().parents[2]/"shared/real"))/"omnicam"
SCRIPT = script_text([Segment(0, 1, "high", "right", "stay")])
README = ("Object: A triangular piece of cake is placed on a white plate, and the white plate is on a black plate. ; Camera: <starttime>1</starttime> <endtime>2</endtime> <speed>high</speed> "
          "<direction>forward</direction> <rotate>stay</rotate> <sep> <starttime>2</starttime> <endtime>3</endtime> <speed>low</speed> <direction>right</direction> <rotate>stay</rotate> <sep> "
          "<starttime>3</starttime> <endtime>4</endtime> <speed>high</speed> <direction>leftdown30</direction> <rotate>stay</rotate> <sep>")


def test_the_readme_prompt_is_a_camera_as_it_stands():
    description, script = prompt_parts(README)
    assert description.startswith("A triangular piece") and [s.direction for s in parse(script)] == ["forward", "right", "leftdown30"]
    whole, part = (asked_camera(text, (48, 80), 33, 8.0)[0] for text in (README, script))
    assert torch.equal(whole.c2w, part.c2w)


def test_a_camera_in_few_words():
    "A text that is given as a camera need not say so."
    few, whole = (asked_camera(text, (48, 80), 9, 8.0) for text in ("slow pan left", "The camera pans slowly to the left."))
    assert torch.equal(few[0].c2w, whole[0].c2w) and few[1] == whole[1]
    for other in ("A cake.", "A man turns to the left.", "A man turns to the left. Dolly in."):   # what somebody else does is nothing for a camera
        with pytest.raises(InputError): asked_camera(other, (48, 80), 9, 8.0)
    with pytest.raises(InputError, match="no preset .zom_in."): asked_camera("zom_in", (48, 80), 9, 8.0)
    assert torch.equal(asked_camera("zoom-in", (48, 80), 9, 8.0)[0].c2w, asked_camera("zoom_in", (48, 80), 9, 8.0)[0].c2w)


def test_camera_files_of_other_sets(tmp_path):
    "RealEstate10K's with their lens, MultiCamVideo's where it holds one camera."
    size = (48, 80)
    clip = Cameras(pose((0, 50, 0), (9, 0, 0)) @ preset("arc_left", 9), focal_K(35, size), size)
    clip.to_realestate10k(tmp_path/"clip.txt")
    write_unreal_json(tmp_path/"clip.json", {"cam01": clip})
    write_unreal_json(tmp_path/"ten.json", {"cam01": clip, "cam02": clip})
    for end, focal in ((".txt", 35), (".json", 24)):
        found, script = asked_camera(str(tmp_path/f"clip{end}"), size, 9, 8.0)
        torch.testing.assert_close(found.c2w, clip.relative().c2w, atol=1e-5, rtol=0)
        assert script == "" and float(found.K[0, 0, 0]) == pytest.approx(float(focal_K(focal, size)[0, 0]), rel=1e-4)
    assert list(omnicam_generate.named_cameras([str(tmp_path/"clip.txt")])) == ["01_clip"]
    with pytest.raises(InputError, match="2 cameras .cam01, cam02."): asked_camera(str(tmp_path/"ten.json"), size, 9, 8.0)


def test_a_folder_of_pictures_is_its_pictures(tmp_path):
    for name in ("10.png", "2.jpg", "notes.txt"): (tmp_path/name).write_bytes(b"")
    (tmp_path/"none").mkdir()
    assert omnicam_generate.all_pictures(["a.png", str(tmp_path)]) == ["a.png", str(tmp_path/"2.jpg"), str(tmp_path/"10.png")]
    with pytest.raises(InputError, match="none holds no picture"): omnicam_generate.all_pictures([str(tmp_path/"none")])


# ---- generation

def generator_of(layers=2):
    return omnicam_generate.Generator(starting_model(start="nothing", num_layers=layers), tiny_vae(0), build_tiny_text(["a room with a box"]))


def test_uncond_skips_only_in_the_forward_without_text():
    "u_skip + s (c - u_skip) inside the window, u + s (c - u) outside, and no hook is left behind."
    model, ran = starting_model(start="nothing", num_layers=3).eval(), []
    for n, block in enumerate(model.blocks): block.register_forward_hook(lambda *a, n=n: ran.append(n))
    g = torch.Generator().manual_seed(0)
    x, context, negative = torch.randn(1, 36, 3, 6, 10, generator=g), torch.randn(1, 8, 64, generator=g), torch.randn(1, 8, 64, generator=g)
    run = lambda c: model(x, torch.tensor([500.]), c, return_dict=False)[0]
    with torch.no_grad():
        c, u = run(context), run(negative)
        call = lambda guider, step: guided(run, guider, model, context, negative, step, 4, torch.tensor(500.))
        guider = make_guider(3.0, [1], slg_start=0.0, slg_end=0.5, blocks=3, mode="uncond")
        inside, outside = call(guider, 1), call(guider, 2)
        kept = model.blocks[1].forward
        model.blocks[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
        u_skip = run(negative)
        model.blocks[1].forward = kept
        torch.testing.assert_close(inside, u_skip + 3 * (c - u_skip), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outside, u + 3 * (c - u), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(run(context), c)
    with pytest.raises(InputError, match="slg_mode 'both'"): make_guider(3.0, [1], blocks=3, mode="both")


def test_saved_latents_are_decoded(tmp_path):
    from PIL import Image
    from camflow.media.video import read_video
    from safetensors.torch import save_file
    Image.new("RGB", (80, 48), "red").save(tmp_path/"red.png")
    base = dict(size=[48, 80], frames=5, fps=8.0, steps=1, guidance=1.0)
    parts = generator_of(1)
    omnicam_generate.main(base | dict(images=[str(tmp_path/"red.png")], cameras=[SCRIPT, "zoom_in"], output="both"), tmp_path/"run", parts)
    saved = sorted((tmp_path/"run/results/red").glob("*.safetensors"))
    assert omnicam_generate.main(base | dict(latents=list(map(str, saved))), tmp_path/"again", parts)["decoded"] == 2
    for path in saved: assert torch.equal(read_video(tmp_path/"again/results/decoded"/f"{path.stem}.mp4").data, read_video(path.with_suffix(".mp4")).data)
    save_file({"x": torch.zeros(2)}, tmp_path/"other.safetensors")
    save_file({"latents": torch.zeros(3, 2, 2, 2)}, tmp_path/"thin.safetensors")
    (tmp_path/"cut.safetensors").write_bytes(saved[0].read_bytes()[:200])
    for name, words in (("none", "no latents at"), ("other", "but x"), ("thin", r"decodes finite \[16"), ("cut", "truncated")):
        with pytest.raises(InputError, match=words): read_latents(tmp_path/f"{name}.safetensors")
    with pytest.raises(InputError, match="only decoded"): omnicam_generate.main(base | dict(latents=[str(saved[0])], cameras=["zoom_in"]), tmp_path/"bad", parts)


def test_the_lens_is_as_told_then_as_given_then_as_estimated(tmp_path):
    from PIL import Image
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 50
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path/"plain.png")
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path/"told.jpg", exif=exif)
    base, parts = dict(size=[48, 48], frames=5, fps=8.0, steps=1, guidance=1.0, cameras=[SCRIPT]), generator_of(1)
    def K(name, **change):
        run = tmp_path/("run" + name + "".join(map(str, change.values())))
        omnicam_generate.main(base | dict(images=[str(tmp_path/name)]) | change, run, parts)
        return torch.tensor(json.loads((run/"results/cameras.json").read_text())[f"{Path(name).stem}/01_script"]["K"])
    told, given, seen, default = K("told.jpg", fov=90.0, focal_estimator="random"), K("plain.png", fov=90.0, focal_estimator="random"), K("plain.png", focal_estimator="random"), K("plain.png")
    half = lambda k: float(k[0, 0]) / 24
    assert abs(half(told) - 50 / 43.267 * 2 ** 0.5 * 48 / 24) < 0.02 and abs(half(given) - 1) < 1e-4
    assert all(k[0, 0] == k[1, 1] for k in (told, given, seen, default)) and len({round(half(k), 3) for k in (told, given, seen, default)}) == 4


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here (CAMFLOW_REAL)")
def test_two_real_first_frames_with_the_readme_script(tmp_path):
    "And the real camera file, several cameras in one run; sizes keep the pictures' aspects."
    names = ["cake.png", "8bd5cb1a874d6fb2.png"]
    config = dict(images=[str(REAL/n) for n in names], texts={"cake.png": README}, cameras=[README, str(REAL/"extrinsics_intrinsics.safetensors"), "From 0 to 1 seconds the camera moves quickly to the left."],
                  size=[48, 80], frames=9, fps=8.0, source_fps=23.976, steps=1, guidance=1.0, batch=3)
    assert omnicam_generate.main(config, tmp_path, generator_of(1))["written"] == 6
    record = json.loads((tmp_path/"results/cameras.json").read_text())
    assert record["cake/01_script"]["text"].startswith("A triangular") and len(list((tmp_path/"results").rglob("*.mp4"))) == 6
    # a picture is resized to whole pixels, so its two focal lengths may differ by half a pixel in its 48 rows
    assert all(one["K"][0][0] == pytest.approx(one["K"][1][1], rel=0.5/48) for one in record.values())


def test_a_whole_prompt_is_camera_and_text(tmp_path, capsys):
    "OmniCam-Wan's --prompt as it stands, of both forms: what it says is seen reaches the text encoder, and a text that is given is stronger."
    from PIL import Image
    from safetensors.torch import save_file
    Image.new("RGB", (80, 48), "red").save(tmp_path/"red.png")
    Image.new("RGB", (80, 48), "blue").save(tmp_path/"blue.png")
    file = tmp_path/"path.safetensors"
    save_file({"extrinsics": torch.eye(4, dtype=torch.float64).repeat(20, 1, 1), "intrinsics": torch.tensor([0.5, 0.9, 0.5, 0.5])}, file)
    cameras = {"script": f"Object: A slice of cake; on a plate. ; Camera: {SCRIPT}", "file": f"Object: A room. ; Caption: The camera moves according to the #trajectory:{{{file}}}.",
               "plain": SCRIPT, "late": "<starttime>1</starttime> <endtime>2</endtime> <speed>high</speed> <direction>right</direction> <rotate>stay</rotate>"}
    config = dict(images=[str(tmp_path/"red.png"), str(tmp_path/"blue.png")], texts={"blue.png": "A blue wall."}, cameras=cameras, size=[48, 80], frames=5, fps=8.0, steps=1, guidance=1.0)
    assert omnicam_generate.main(config, tmp_path/"run", generator_of(1))["written"] == 8
    record = json.loads((tmp_path/"run/results/cameras.json").read_text())
    assert {name: one["text"] for name, one in record.items()} == {"red/script": "A slice of cake; on a plate.", "red/file": "A room.", "red/plain": "", "red/late": "",
                                                                  **{f"blue/{name}": "A blue wall." for name in cameras}}
    assert record["red/script"]["c2w"] == record["red/plain"]["c2w"] and record["red/late"]["c2w"][-1] == torch.eye(4).tolist()
    said = capsys.readouterr().out
    assert "late: the script begins at 1 s, the video ends at 0.5 s: the camera stands still" in said and "plain: the script" not in said


def test_a_lora_of_another_model_is_refused(tmp_path):
    from camflow.wan.lora import load_lora
    from safetensors.torch import save_file
    save_file({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 8), "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(8, 4)}, tmp_path/"sd.safetensors")
    save_file({"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(4, 999), "lora_unet_blocks_0_self_attn_q.lora_up.weight": torch.zeros(999, 4)}, tmp_path/"wide.safetensors")
    for name in ("sd", "wide"):
        with pytest.raises(InputError): load_lora(starting_model(start="nothing", num_layers=1), tmp_path/f"{name}.safetensors")


# ---- the cache

def test_picture_sets_and_lenses_in_the_cache(tmp_path):
    "Pictures with alpha, CMYK, rotation flag; a video whose lens is estimated once, and one that no lens of square pixels fits."
    from PIL import Image
    from camflow.media.frames import Frames
    from camflow.media.video import write_video
    torch.set_num_threads(1)
    (tmp_path/"pictures").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (64, 64), (0, 0, 255, 0)).save(tmp_path/"pictures/clear.png")
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path/"pictures/ink.jpg")
    Image.new("RGB", (96, 64), "red").save(tmp_path/"pictures/phone.jpg", exif=exif)
    (tmp_path/"pictures/broken.png").write_bytes(b"\x89PNG nothing")
    for name in ("clear", "ink", "phone", "broken"): (tmp_path/f"pictures/{name}.txt").write_text("A colour.")
    g = torch.Generator().manual_seed(0)
    for name, size in (("square", (64, 64)), ("wide", (48, 96))): write_video(tmp_path/f"{name}.mp4", Frames(torch.randint(0, 256, (9, 3, *size), dtype=torch.uint8, generator=g), "byte"), 8)
    (tmp_path/"metadata.jsonl").write_text("\n".join(json.dumps({"video_path": f"{n}.mp4", "caption": f"Object: Noise. ; Camera: {SCRIPT}"}) for n in ("square", "wide")))
    (tmp_path/"set.toml").write_text('[general]\nresolution = [64, 64]\nenable_bucket = true\n[[datasets]]\nimage_directory = "pictures"\ncaption_extension = ".txt"\ncache_directory = "a"\n'
                                     '[[datasets]]\nvideo_jsonl_file = "metadata.jsonl"\ncache_directory = "b"\ntarget_frames = [9]\n')
    config = dict(toml=str(tmp_path/"set.toml"), cache_folder=str(tmp_path/"cache"), camera_required=False, focal_estimator="random", workers=0, skip_bad=True)
    first = omnicam_cache.main(config, tmp_path/"first")
    assert first["reasons"] == {"unreadable": 1, "no_focal": 1} and first["clips"] == 4, first
    cache = OmniCamCache(tmp_path/"cache")
    rows = {Path(row["name"]).stem: n for n, row in enumerate(cache.rows)}
    assert cache.rows[rows["phone"]]["source_size"] == [64, 96] and cache.rows[rows["phone"]]["bucket"][1] > cache.rows[rows["phone"]]["bucket"][0]
    assert not torch.equal(cache[rows["clear"]]["latents"], cache[rows["ink"]]["latents"]) and "square pixels" not in [row["reason"] for row in cache.all_rows if row["status"] == "no_focal"][0][:3]
    fx, fy = cache[rows["square"]]["intrinsics"][:2]
    assert fx == fy and 0.2 < fx < 5
    assert omnicam_cache.main(config, tmp_path/"second")["opened"] == 0
    given = omnicam_cache.main(config | dict(fov=90.0), tmp_path/"third")
    assert given["reasons"] == {"unreadable": 1} and OmniCamCache(tmp_path/"cache")[rows["square"]]["intrinsics"][0] == pytest.approx(0.5)
