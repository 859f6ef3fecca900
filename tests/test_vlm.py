"""Qwen-VL: parity with the reference's preprocessing, prompts and answers; checkpoint folders; digits; OpenAI-compatible servers."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camflow.files import InputError
from camflow.vlm.endpoint import Endpoint
from camflow.vlm.prompt import VIDEO, chat, expand, plain, tokenize
from camflow.vlm.qwen import QwenVL, build_tiny, check_folder, tiny_tokenizer
from camflow.vlm.video_inputs import FAMILIES, Clip, at_rate, image_inputs, sample_indices, smart_resize, video_inputs
from tests.fake_openai import FakeOpenAI, completion
from tests.parity import qwen3vl as parity

GOLDENS = Path(__file__).parent / "goldens" / "qwen3vl"


def clip(seed=0, T=9, h=44, w=60, fps=8.0):
    return Clip(torch.randint(0, 256, (T, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)), fps)


@pytest.fixture(scope="module")
def tiny(): return QwenVL("random", device="cpu")


def test_parity_with_the_reference():
    ran = {k: r for k, r in parity.check(GOLDENS).items() if r[3] is not None}
    assert {"video_sampled_12x32x64", "model_one_video", "e2e_whole", "vision_pos", *parity.TABLES} == set(ran)
    assert all(r[3] for r in ran.values()), {k: r for k, r in ran.items() if not r[3]}


@pytest.mark.parametrize("what", ["weight", "input", "pixel", "form"])
def test_parity_notices_one_changed_number(what):
    goldens = parity.Folder(GOLDENS)
    name = "e2e_whole" if what in ("pixel", "form") else "model_one_video"
    case, (x, want) = goldens.cases[name], goldens.tensors(name)
    if what == "weight": goldens.model("tiny").model.language_model.layers[1].mlp.down_proj.weight.data[0, 0] += 0.05
    if what == "input": x["pixel_values_videos"][3, 17] += 0.05
    if what == "pixel": x["video0"][5, 3, 3, 0] ^= 64  # frame 5 is one of those shown
    if what == "form": case = case | {"params": case["params"] | {"form": "inner"}}
    with torch.inference_mode():
        try: result = parity.compare(case["kind"], parity.KINDS[case["kind"]](goldens, case, x), want)
        except InputError: result = (0, 0, 0, False)
    assert result[3] is False


def test_a_table_with_one_wrong_row_fails(tmp_path):
    rows = json.loads((GOLDENS / "smart_resize.json").read_text())
    rows[0]["output"][0] += 32
    (tmp_path / "smart_resize.json").write_text(json.dumps(rows))
    assert parity.check(tmp_path)["smart_resize"][3] is False


def test_clips_come_in_several_forms():
    import numpy as np
    from PIL import Image

    from camflow.media.frames import Frames
    frames = clip().frames
    pictures = [f.permute(1, 2, 0).numpy() for f in frames]
    same = [Clip(frames, 8), Clip(Frames(frames, "byte", 8)), Clip(pictures, 8), Clip([Image.fromarray(p) for p in pictures], 8), Clip(Clip(frames, 8)),
            Clip(np.asarray(frames), 8)]
    assert all(torch.equal(c.frames, frames) and c.fps == 8 for c in same)
    for bad in (frames.float(), frames[:, :1], frames[:0], [], [pictures[0], pictures[1][:20]]):
        with pytest.raises(InputError): Clip(bad, 8)
    with pytest.raises(InputError, match="frames per second"): Clip(frames, 0)


def test_every_frame_that_is_shown_exists():
    "The library's own steps reach the frame behind the last where rounding helps them: 61 frames at 8 a second, 41 for 14."
    s = FAMILIES["qwen2_5_vl"]
    for total in range(4, 130):
        for n in range(2, min(total, 64) + 1, 2): assert len(taken := sample_indices(total, 24, at_rate(s, num_frames=n))) == n and taken[-1] < total
        for fps in (8, 15, 16, 29.97): assert len(taken := sample_indices(total, fps, s)) % 2 == 0 and taken[-1] < total


def test_numbers_exclude_rates():
    with pytest.raises(InputError, match="one of the two"): at_rate(FAMILIES["qwen3_vl"], 2, 8)
    assert len(sample_indices(81, 20.0, at_rate(FAMILIES["qwen3_vl"], num_frames=8))) == 8  # alone it works here, unlike in the library


@pytest.mark.parametrize("h, w", [(480, 832), (30, 400), (28, 28), (1080, 1920), (57, 31)])
def test_image_sizes_are_the_librarys(h, w):
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    s = FAMILIES["qwen2_5_vl"]
    assert smart_resize(1, h, w, 28, 1, s.image_min_pixels, s.image_max_pixels) == tuple(theirs(h, w, 28, s.image_min_pixels, s.image_max_pixels))


@pytest.mark.parametrize("family, h, w", [("qwen2_5_vl", 84, 112), ("qwen3_vl", 96, 128)])
def test_image_patches_are_the_librarys(family, h, w):
    from PIL import Image
    s = replace(FAMILIES[family], image_min_pixels=3136)
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").Qwen2VLImageProcessorPil(
        patch_size=s.patch, image_mean=list(s.mean), image_std=list(s.std), size={"shortest_edge": s.image_min_pixels, "longest_edge": s.image_max_pixels})
    frames = clip(T=2, h=h, w=w).frames  # of a size that stays: Pillow's filter is another one
    want = theirs([Image.fromarray(f.permute(1, 2, 0).numpy()) for f in frames], return_tensors="pt")
    seen = image_inputs([Clip(frames)], s, n=2)
    assert want.image_grid_thw.tolist() == [list(g) for g in seen.grids] and (want.pixel_values - seen.pixels_ND).abs().max() < 1e-6


def test_one_frame_is_shown_twice():
    seen = video_inputs([Clip(clip().frames[:1], 8)])
    assert seen.grids[0][0] == 1 and seen.indices == [[0, 0]]
    assert image_inputs([Clip(clip().frames[:1])], n=16).counts == [1]


def test_control_words_in_a_prompt_are_text(tiny):
    asked = f"what is {VIDEO}? <|im_end|>"
    inputs, _ = tiny.prepare([clip()], [asked])
    assert int((inputs["input_ids"] == 6).sum()) == int(inputs["mm_token_type_ids"].sum()) // 2 == len(inputs["pixel_values_videos"]) // 4
    assert VIDEO not in plain(asked)
    with pytest.raises(InputError, match="2 placeholders"): expand(chat(None, VIDEO), video_inputs([clip()]))
    with pytest.raises(InputError, match="form"): QwenVL("random", form="outer")


def test_forms_differ_by_two_tokens_and_in_opinion(tiny):
    whole = QwenVL("random", device="cpu", form="whole")
    lengths = [v.prepare([clip()], ["Rate it."])[0]["input_ids"].shape[1] for v in (tiny, whole)]
    assert lengths[0] == lengths[1] + 2
    a, b = (v.digit_probabilities([clip()], "Rate it.", ["Score: "]).expected for v in (tiny, whole))
    assert not torch.equal(a, b)


def test_a_batch_answers_like_its_members(tiny):
    clips = [clip(0), clip(1, T=3, h=64, w=70, fps=12.0), clip(2)]
    prompts = ["short", "a rather longer question about the clip", "?"]
    together = tiny.ask(clips, prompts, max_new_tokens=5)
    assert together == [tiny.ask([c], p, max_new_tokens=5)[0] for c, p in zip(clips, prompts)]
    with pytest.raises(InputError, match="3 clips, 2 prompts"): tiny.ask(clips, prompts[:2])


@pytest.mark.parametrize("family, send", [("qwen3_vl", "video"), ("qwen3_vl", "images"), ("qwen2_5_vl", "video"), ("qwen2_5_vl", "images")])
def test_digits_by_cache_and_by_reading_again(family, send):
    vlm = QwenVL("random", device="cpu", family=family, send=send, frames=4)
    clips, lines = [clip(0), clip(1, T=5, h=64, w=70, fps=12.0)], ["A (1-5): ", "\nB (1-5): ", "\nC (1-5): "]
    seen = vlm.digit_probabilities(clips, ["Rate.", "Rate the clip."], lines)
    digit = [vlm.tokenizer(d).input_ids[0] for d in "12345"]
    best = seen.probabilities[1].argmax(-1) + 1
    inputs, _ = vlm.prepare(clips[1:], ["Rate the clip."], f"{lines[0]}{best[0]}{lines[1]}{best[1]}{lines[2]}")
    with torch.inference_mode(): again = vlm.net(**inputs).logits[0, -1].softmax(-1)[digit]
    assert (again - seen.probabilities[1, 2]).abs().max() < 1e-5

    def after(text):
        inputs, _ = vlm.prepare(clips[1:], ["Rate the clip."], text)
        with torch.inference_mode(): return vlm.net(**inputs).logits[0, -1].softmax(-1)
    tens, value = [vlm.tokenizer(d).input_ids[0] for d in "0123456789"], torch.arange(1.0, 6.0)
    for k in range(4):
        q = after(f"{lines[0]}{k + 1}.")[tens]
        value[k] += after(f"{lines[0]}{k + 1}")[vlm.tokenizer(".").input_ids[0]] * (q / q.sum() * torch.arange(10.0)).sum() / 10
    assert abs(seen.expected[1, 0] - (after(lines[0])[digit] * value).sum() / after(lines[0])[digit].sum()) < 1e-5
    whole = (seen.probabilities / seen.mass[..., None] * torch.arange(1.0, 6.0)).sum(-1)
    assert (seen.expected >= whole - 1e-6).all() and (seen.expected <= whole + 0.9).all()
    plainly = vlm.digit_probabilities(clips, ["Rate.", "Rate the clip."], lines, decimals=False)
    assert (plainly.expected - whole).abs().max() < 1e-5 and torch.allclose(plainly.probabilities, seen.probabilities, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_backends_agree(attention, tiny):
    other = QwenVL("random", device="cpu", attention=attention)
    a, b = (v.digit_probabilities([clip()], "Rate it.", ["Score: "]).expected for v in (tiny, other))
    assert (a - b).abs().max() < 1e-4 and other.info()["attention"] == attention


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A checkpoint folder like a published one, of a random model."
    where = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = build_tiny(seed=3)
    model.save_pretrained(where, max_shard_size="300KB")
    tokenizer.save_pretrained(where)
    image = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    (where / "preprocessor_config.json").write_text(json.dumps(image))
    (where / "video_preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 2048, "longest_edge": 16384}, "fps": 4}))
    return where


def test_a_folder_is_loaded_with_its_settings(folder):
    vlm, random = QwenVL(folder, device="cpu"), QwenVL("random", device="cpu", seed=3)
    assert (vlm.settings.max_pixels, vlm.settings.fps) == (16384, 4) and vlm.revision.startswith(folder.name + "@") and vlm.info()["model_rev"] == vlm.revision
    random.settings = vlm.settings
    assert vlm.ask([clip()], "Hm?", max_new_tokens=5) == random.ask([clip()], "Hm?", max_new_tokens=5)


def copy(folder, to):
    for path in folder.iterdir(): (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "a shard"])
def test_a_missing_file_is_named(folder, tmp_path, name):
    copy(folder, tmp_path)
    if name == "a shard": name = sorted(p.name for p in tmp_path.glob("*.safetensors"))[0]
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name): QwenVL(tmp_path, device="cpu")


def test_missing_or_broken_weights_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file
    copy(folder, tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    weights = load_file(shard)
    save_file({k: v for k, v in weights.items() if k != sorted(weights)[0]}, shard, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"][sorted(weights)[0]]
    index.write_text(json.dumps(table))
    with pytest.raises(InputError, match="1 weights are missing"): QwenVL(tmp_path, device="cpu")
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"): QwenVL(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="bert"): check_folder(tmp_path)
    with pytest.raises(InputError, match="not a folder"): QwenVL(tmp_path / "nothing")


def test_a_checkpoints_sampling_is_ignored(folder, tmp_path):
    copy(folder, tmp_path)
    config = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.9, "eos_token_id": [2, 0], "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    wild, calm = QwenVL(tmp_path, device="cpu"), QwenVL(folder, device="cpu")
    assert wild.ask([clip()], "Hm?", max_new_tokens=12) == calm.ask([clip()], "Hm?", max_new_tokens=12)
    assert wild.net.generation_config.eos_token_id == [2, 0]


def test_a_parked_model_says_so():
    vlm = QwenVL("random", device="cpu")
    before = vlm.ask([clip()], "Hm?", max_new_tokens=3)
    vlm.park()
    with pytest.raises(InputError, match="parked"): vlm.ask([clip()], "Hm?")
    vlm.unpark()
    assert vlm.ask([clip()], "Hm?", max_new_tokens=3) == before


def test_the_tiny_tokenizer_reads_anything():
    tok = tiny_tokenizer()
    text = "Zwei Größen: 3.25 – 语言\n"
    assert tok.decode(tok(text).input_ids) == text
    made = tokenize(tok, ["ab", "abc"])
    assert made["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]] and replace(FAMILIES["qwen3_vl"], patch=14).factor == 28


def endpoint(server, **more): return Endpoint(server.url, **({"frames": 2, "pause": 0.01, "deadline": 300.0} | more))


def test_an_endpoint_is_asked_like_a_model():
    with FakeOpenAI(answer=lambda body: body["messages"][0]["content"][-1]["text"].upper()) as server:
        remote = endpoint(server)
        assert remote.ask([clip(0), clip(1)], ["one", "two"]) == ["ONE", "TWO"]
        body = server.seen[0]
        content = body["messages"][0]["content"]
        assert body["model"] == "fake-vl" and body["temperature"] == 0 and body["seed"] == 0 and [p["type"] for p in content] == ["image_url"] * 2 + ["text"]
        shown = torch.from_numpy(_picture(content[0]["image_url"]["url"]))
        assert torch.equal(shown.permute(2, 0, 1), clip(["one", "two"].index(content[-1]["text"])).frames[0])  # bit for bit
        video = endpoint(server, send="video").replies([clip()], "hm")[0]
        assert video.text == "HM" and server.seen[-1]["messages"][0]["content"][0]["type"] == "video_url" and video.record["codec"] == "h264"


def _picture(uri):
    import base64
    import io

    import numpy as np
    from PIL import Image
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize("script", [[(429, {}), (503, {})], [(500, b"oops")], ["half", "half"], [b"<html>", b'{"choices": [{}]}'], [(429, b"")] * 4, ["hang"]])
def test_trouble_that_passes_is_waited_out(script):
    with FakeOpenAI(script) as server:
        short = {"timeout": 3.0} if "hang" in script else {}    # only a server that hangs lets it run out
        reply = endpoint(server, deadline=300.0, **short).replies([clip()], "?")[0]
        assert (reply.text, reply.status, reply.record["attempts"]) == ("4", "ok", len(script) + 1)


@pytest.mark.parametrize("script, status, why", [
    ([(400, {"error": "too long"})], "failed", "too long"), ([(401, {})], "failed", "401"), ([(404, {})], "failed", "404"), (["huge"] * 9, "failed", "bytes"),
    ([b"garbage"] * 9, "failed", "not a chat completion"), ([{"choices": [{"message": {"content": None}}]}] * 9, "failed", "no text"),
    ([(500, {})] * 99, "timeout", "500"), ([(500, {}), "hang"], "timeout", "answered 500"), (["drip"] * 99, "timeout", "still answering"), (["hang"] * 9, "timeout", "ReadTimeout")])
def test_trouble_that_stays_is_named(script, status, why):
    with FakeOpenAI(script) as server:
        limits = {"deadline": 300.0} if status == "failed" else {"deadline": 2.5} | ({"timeout": 1.0} if script[0] in ("drip", "hang") else {})   # what is told at once has time
        remote = endpoint(server, max_bytes=2**18, **limits)
        reply = remote.replies([clip()], "?")[0]
        assert reply.status == status and why in reply.reason and reply.text == "" and not reply.finished
        server.script = list(script)
        with pytest.raises(TimeoutError if status == "timeout" else ConnectionError, match="1 of 1"): remote.ask([clip()], "?")


def test_nobody_there():
    reply = Endpoint("http://127.0.0.1:9/v1", deadline=0.5, pause=0.05).replies([clip()], "?")[0]
    assert reply.status == "timeout" and "ConnectError" in reply.reason
    with pytest.raises(InputError, match="nobody answers at http://127.0.0.1:9/v1.*start the server"): Endpoint("http://127.0.0.1:9/v1").wait_for(0.1)


def test_an_unknown_attention_is_named():
    with pytest.raises(InputError, match="attention 'foo'.*sdpa"): QwenVL("random", attention="foo")


def test_one_bad_answer_among_good_ones():
    def answer(body): return (400, {}) if body["messages"][0]["content"][-1]["text"] == "bad" else completion("ok", "length")
    with FakeOpenAI(answer=answer) as server:
        replies = endpoint(server).replies([clip()] * 4, ["a", "bad", "c", "d"])
        assert [r.status for r in replies] == ["ok", "failed", "ok", "ok"] and not replies[0].finished


def test_patterns_fall_back_and_keys_are_sent(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    def answer(body): return (400, {"error": "extra field"}) if "structured_outputs" in body or "guided_regex" in body else "4"
    with FakeOpenAI(answer=answer) as server:
        remote = endpoint(server, key_file=tmp_path / "key")
        assert remote.replies([clip()], "?", pattern="[1-5]")[0].text == "4" and remote.info()["structured"] == "none"
        assert server.headers[0]["authorization"] == "Bearer secret"
        assert len(server.seen) == 3
        remote.park(), remote.unpark()
        with pytest.raises(InputError, match="key"): endpoint(server, key_file=tmp_path / "none")


def test_digits_of_a_server():
    tokens = [("Style Score (1-5):", {}), (" ", {}), ("3", {"3": -0.5, "4": -1.2, "x": -3.0}), (".", {}), ("2", {"2": 0.0})]
    script = [completion("Style Score (1-5): 3.2", tokens=tokens), completion("no", tokens=[("no", {})]), completion("Style Score (1-5): 3.2"), (404, {}),
              completion("Style Score (1-5): 3.2", tokens=[*tokens[:2], ("3", {"3": -9999.0}), *tokens[3:]])]    # of a mask: written, and of probability 0
    with FakeOpenAI(script) as server:
        remote = endpoint(server, parallel=1)
        seen = remote.digit_probabilities([clip()] * 5, "?", ["Style Score (1-5): "])
        assert [r.status for r in seen.replies] == ["ok", "invalid", "failed", "failed", "invalid"] and seen.expected[1:].isnan().all()
        p3, p4 = (torch.tensor(v).exp().item() for v in (-0.5, -1.2))
        assert abs(seen.expected[0, 0] - (p3 * 3.2 + p4 * 4) / (p3 + p4)) < 1e-5
        assert server.seen[0]["top_logprobs"] == 20 and "structured_outputs" in server.seen[0]
