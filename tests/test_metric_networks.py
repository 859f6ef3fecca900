"""Evaluators' networks and formulas: parity with the originals, strict loading, CLIP's key map, set distances on known distributions."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from camflow.files import InputError
from camflow.metrics import clip, dino, frechet, i3d, inception, lpips, musiq, vbench
from camflow.metrics.interface import measure
from camflow.metrics.weights import NoWeights, is_script, load_strict, random_weights, read_weights
from tests.parity import metrics_networks as parity

GOLDENS = Path(__file__).parent / "goldens" / "metrics"
SHARED = Path(__file__).parents[2] / "shared" / "goldens" / "metrics"
COVERED = {"i3d_16x224", "inception_fid_resize", "lpips_vgg_48x56", "musiq_spaq_64x96", "dino_tiny_112x200", "clip_t_f_v", "fvd_v_seed", "frechet_distance",
           "frame_sampling",
           "vbench_imaging_aggregate", "vbench_imaging_resize_sizes", "vbench_quality_score", "vbench_subject_consistency", "vbench_background_consistency",
           "vbench_temporal_flickering"}
LARGE = ("inception_fid_299", "lpips_alex_64x72", "dino_vitb16_96x160", "fvd_preprocess", "vbench_aesthetic", "vbench_transforms")
torch.set_num_threads(1)


def draw(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
def video(T=4, H=40, W=52, seed=0): return (draw(T, 3, H, W, seed=seed) * 255).byte()


# parity

def test_small_goldens():
    results = parity.check(GOLDENS)
    assert COVERED <= {k for k, r in results.items() if r[3] is not None}
    assert all(r[3] for r in results.values() if r[3] is not None), {k: r for k, r in results.items() if r[3] is False}


def test_large_goldens():
    if not SHARED.exists(): pytest.skip(f"no folder {SHARED}: {len(LARGE)} cases too large for the repository were not replayed")
    with torch.inference_mode(): results = {n: parity.run(SHARED / f"{n}.safetensors") for n in LARGE}
    assert all(r[3] for r in results.values()), {k: r for k, r in results.items() if not r[3]}


@pytest.mark.parametrize("what", ["weight", "input", "nothing"])
def test_parity_notices_one_changed_number(what):
    x, want, config = parity.tensors(GOLDENS / "dino_tiny_112x200.safetensors")
    w = parity.weights(GOLDENS, config)
    if what == "weight": w["blocks.1.attn.qkv.weight"][100, 7] += 0.05
    if what == "input": x["frame"][0, 1, 3, 5] ^= 64
    with torch.inference_mode(): worst = parity.against(parity.dino_case(x, w, config, want), want)
    assert (worst <= parity.NETWORK) is (what == "nothing"), worst


NETWORKS = {"inception_fid": inception.InceptionFID, "i3d": i3d.I3D, "musiq": musiq.MUSIQ, "lpips_vgg": lambda: lpips.LPIPS("vgg"),
            "dino_tiny": lambda: dino.Dino("tiny")}


@pytest.mark.parametrize("case, network", NETWORKS.items(), ids=NETWORKS)
def test_every_published_name_and_shape(case, network):
    import json
    theirs = json.loads((GOLDENS / f"shapes_{case}.json").read_text())
    with torch.device("meta"): ours = network().state_dict()
    assert {k: list(v.shape) for k, v in ours.items()} == theirs


# CLIP: an independent forward in OpenAI's names

def openai_state(width=64, layers=2, text=64, words=50, length=9, patch=8, side=32, out=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape, scale=None: torch.randn(shape, generator=g) * (scale or shape[-1] ** -0.5)
    near = lambda n: 1 + 0.1 * torch.randn(n, generator=g)
    s = {"visual.conv1.weight": new(width, 3, patch, patch, scale=0.07), "visual.class_embedding": new(width),
         "visual.positional_embedding": new((side // patch) ** 2 + 1, width),
         "visual.proj": new(width, out), "token_embedding.weight": new(words, text), "positional_embedding": new(length, text),
         "text_projection": new(text, out),
         "logit_scale": torch.tensor(2.6)}
    for name, n in (("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text)): s |= {f"{name}.weight": near(n), f"{name}.bias": new(n)}
    for head, d in (("visual.", width), ("", text)):
        for i in range(layers):
            b = f"{head}transformer.resblocks.{i}."
            for ln in ("ln_1", "ln_2"): s |= {f"{b}{ln}.weight": near(d), f"{b}{ln}.bias": new(d)}
            for name, rows, cols in (("attn.in_proj_", 3 * d, d), ("attn.out_proj.", d, d), ("mlp.c_fc.", 4 * d, d), ("mlp.c_proj.", d, 4 * d)):
                s |= {f"{b}{name}weight": new(rows, cols), f"{b}{name}bias": new(rows)}
    return s


def openai_blocks(s, head, x, heads, mask, act):
    "Residual attention blocks as the paper has them, from packed weights; x [L,N,D]."
    i, d = 0, x.shape[-1]
    while (b := f"{head}transformer.resblocks.{i}.") + "ln_1.weight" in s:
        norm = lambda y, n: F.layer_norm(y, (d,), s[f"{b}{n}.weight"], s[f"{b}{n}.bias"])
        y = norm(x, "ln_1")
        x = x + F.multi_head_attention_forward(y, y, y, d, heads, s[f"{b}attn.in_proj_weight"], s[f"{b}attn.in_proj_bias"], None, None, False, 0.0,
                                               s[f"{b}attn.out_proj.weight"], s[f"{b}attn.out_proj.bias"], False, need_weights=False, attn_mask=mask)[0]
        x = x + F.linear(act(F.linear(norm(x, "ln_2"), s[f"{b}mlp.c_fc.weight"], s[f"{b}mlp.c_fc.bias"])), s[f"{b}mlp.c_proj.weight"], s[f"{b}mlp.c_proj.bias"])
        i += 1
    return x


def openai_image(s, x, heads, act):
    p, d = s["visual.conv1.weight"].shape[-1], s["visual.class_embedding"].shape[0]
    x = F.conv2d(x, s["visual.conv1.weight"], stride=p).flatten(2).permute(2, 0, 1)
    x = torch.cat([s["visual.class_embedding"].expand(1, x.shape[1], d), x]) + s["visual.positional_embedding"][:, None]
    x = openai_blocks(s, "visual.", F.layer_norm(x, (d,), s["visual.ln_pre.weight"], s["visual.ln_pre.bias"]), heads, None, act)
    return F.layer_norm(x[0], (d,), s["visual.ln_post.weight"], s["visual.ln_post.bias"]) @ s["visual.proj"]


def openai_text(s, tokens, heads, act):
    d, L = s["token_embedding.weight"].shape[1], tokens.shape[1]
    x = (s["token_embedding.weight"][tokens] + s["positional_embedding"][:L]).transpose(0, 1)
    x = openai_blocks(s, "", x, heads, torch.full((L, L), -math.inf).triu(1), act).transpose(0, 1)
    x = F.layer_norm(x, (d,), s["ln_final.weight"], s["ln_final.bias"])
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ s["text_projection"]


QUICK = lambda x: x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("container", ["torch", "safetensors", "script"])
def test_clip_key_map(container, tmp_path):
    state, path = openai_state(), tmp_path / ("clip.safetensors" if container == "safetensors" else "clip.pt")
    extra = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(9), "vocab_size": torch.tensor(50)}  # OpenAI's archives carry these
    if container == "torch": torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif container == "safetensors": save_file({k: v.contiguous() for k, v in state.items()}, path)
    else: torch.jit.save(torch.jit.script(nested(state | extra)), path)
    assert is_script(path) is (container == "script")
    net = clip.load_clip(path)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[48, 3, 7, 49, 0, 0, 0, 0, 0], [48, 9, 8, 7, 6, 5, 4, 3, 49]])
    with torch.no_grad():
        assert torch.allclose(net.image(x), openai_image(state, x, 1, QUICK), atol=2e-5)
        assert torch.allclose(net.text(tokens), openai_text(state, tokens, 1, QUICK), atol=2e-5)
        exact = clip.load_clip(path, activation="gelu")
        assert torch.allclose(exact.image(x), openai_image(state, x, 1, F.gelu), atol=2e-5)
    assert not torch.allclose(exact.image(x), net.image(x), atol=1e-3)  # no tensor tells which of both it is
    assert net.weights_id.startswith("clip.")


def nested(state):
    "A scriptable module whose state dict has these dotted names, as an archive of OpenAI has."
    class Node(nn.Module):
        def forward(self): return 0
    root = Node()
    for name, value in state.items():
        *way, leaf = name.split(".")
        node = root
        for part in way:
            if not hasattr(node, part): setattr(node, part, Node())
            node = getattr(node, part)
        if value.is_floating_point(): setattr(node, leaf, nn.Parameter(value.clone()))
        else: node.register_buffer(leaf, value)
    return root


def test_clip_wide_heads_and_transformers_folder(tmp_path):
    state = clip.from_openai(openai_state(width=1280, layers=1, text=128))
    config = clip.clip_config(state, "gelu")
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 2)  # 80 channels a head, as LAION's ViT-H
    small = random_weights(clip.Clip(clip.clip_config(clip.from_openai(openai_state()))))
    small.model.save_pretrained(tmp_path)
    again = clip.load_clip(tmp_path)
    x = draw(1, 3, 32, 32)
    assert torch.equal(again.image(x), small.image(x)) and again.weights_id.startswith("model.safetensors:")
    with pytest.raises(InputError, match="no tensor"): clip.clip_config({k: v for k, v in state.items() if not k.startswith("text_model")})


# files

def test_loading_is_strict(tmp_path):
    net = random_weights(dino.Dino(dino.DinoConfig(64, 1, 1)))
    state, path = net.state_dict(), tmp_path / "dino.pth"
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()} | {"head.last_layer.weight": torch.ones(2)}}, path)
    assert torch.equal(dino.load_dino(path).pos_embed, net.pos_embed)
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, path)
    with pytest.raises(InputError, match=r"1 missing \(norm.bias\)"): dino.load_dino(path)
    torch.save(state | {"extra": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"1 unknown \(extra\)"): dino.load_dino(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"): dino.load_dino(path)
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match="cannot be read"): dino.load_dino(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="another shape"): load_strict(net, state | {"norm.bias": torch.ones(3)}, "DINO")
    with pytest.raises(NoWeights): read_weights(tmp_path / "none.pth", "DINO")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self): return (print, ("code ran",))
    torch.save({"state_dict": Bad()}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="cannot be read"): read_weights(tmp_path / "bad.pth", "a net")


def test_lpips_from_two_files_or_one(tmp_path):
    net = random_weights(lpips.LPIPS("alex"))
    state, (a, b) = net.state_dict(), draw(2, 1, 3, 64, 64)
    heads = {k: v for k, v in state.items() if k.startswith("lin")}
    trunk = {k: v for k, v in state.items() if k.startswith("features")}
    torch.save(heads, tmp_path / "alex.pth")
    torch.save(trunk | {"classifier.1.weight": torch.ones(4, 4)}, tmp_path / "alexnet.pth")
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    whole = {f"net.slice{slices[int(k.split('.')[1])]}.{k.removeprefix('features.')}": v for k, v in trunk.items()}
    aliases = {k.replace("lin", "lins.", 1): v for k, v in heads.items()}
    torch.save(whole | heads | aliases | {"scaling_layer.shift": torch.ones(1, 3, 1, 1)}, tmp_path / "whole.pth")
    for files in (("alex.pth", "alexnet.pth"), ("whole.pth",)):
        loaded = lpips.load_lpips(*(tmp_path / f for f in files))
        assert torch.equal(loaded(a, b), net(a, b))
    with pytest.raises(NoWeights, match="trunk"): lpips.load_lpips(tmp_path / "alex.pth")


def test_stylegan_v_archive(tmp_path):
    class Detector(nn.Module):
        def forward(self, x, rescale: bool, resize: bool, return_features: bool):
            return (x.mean((3, 4)) + (1000.0 if resize else 0.0)).flatten(1)
    torch.jit.save(torch.jit.script(Detector()), tmp_path / "i3d.pt")
    net = i3d.load_i3d(tmp_path / "i3d.pt", script=True)
    fvd = i3d.FVD(net, "stylegan-v", frames=4)
    videos = [video(seed=s) for s in range(6)]
    result, rows = fvd(videos, videos), fvd.features(videos)
    assert rows.min() > 1100 and i3d.FVD(net, "common-metrics", frames=4).features(videos).max() < 1  # bytes for the archive to resize; -1..1 else
    assert abs(result.value) < 1e-9 and result.details["n_fake"] == 6 and result.details["protocol"] == "stylegan-v"
    with pytest.raises(NoWeights): i3d.load_i3d(tmp_path / "none.pt", script=True)
    (tmp_path / "bad.pt").write_bytes(b"no archive")
    with pytest.raises(InputError, match="no TorchScript archive"): i3d.load_i3d(tmp_path / "bad.pt", script=True)


# set distances

def normal(n, d=8, shift=0.0, scale=1.0, seed=0): return np.random.default_rng(seed).standard_normal((n, d)) * scale + shift


def test_frechet_of_known_gaussians():
    n, d = 200000, 4
    found = frechet.frechet_distance(normal(n, d, seed=1), normal(n, d, 0.5, 2.0, seed=2))
    assert abs(found - d * (0.25 + 1.0)) < 0.03
    x, y = normal(6, 40, seed=3), normal(9, 40, seed=4)
    for rule in frechet.PROTOCOLS:  # fewer samples than features: the nuclear norm against the eigenvalue form
        a, b = (x, y[:6]) if rule == "camflow_seed" else (x, y)
        ddof = frechet.PROTOCOLS[rule]["ddof"]
        assert math.isclose(frechet.frechet_distance(x, y, rule), frechet.gaussian_distance(*frechet.moments(a, ddof), *frechet.moments(b, ddof)), rel_tol=1e-5)
    assert frechet.frechet_distance(x[:1], y[:1]) == pytest.approx(((x[0] - y[0]) ** 2).sum())


def test_bias_floor_and_infinity():
    spectrum = np.arange(1, 65) ** -0.5
    fake, real = (normal(400, 64, scale=spectrum, seed=s) for s in (1, 2))
    at_n, line, floor = frechet.frechet_distance(fake, real), frechet.fd_infinity(fake, real), frechet.real_floor(real, 200)
    assert at_n > 0.1 and abs(line["value"]) < at_n / 3  # equal distributions: the number is all bias, and the line finds that out
    assert floor["n"] == 200 and floor["mean"] > at_n    # fewer samples, larger floor
    assert abs(frechet.kernel_distance(fake, real)) < 0.01
    far = frechet.frechet_distance(normal(400, 64, 0.2, spectrum, 3), real)
    assert far > at_n
    with pytest.raises(InputError, match="at least 8"): frechet.fd_infinity(fake[:5], real)


def test_sources_are_drawn_whole():
    few = np.repeat(normal(20, 16, seed=1), 30, 0) + normal(600, 16, scale=0.01, seed=2)  # 600 frames of 20 videos
    sources = np.repeat(np.arange(20), 30)
    assert frechet.real_floor(few, 10, sources=sources)["mean"] > 5 * frechet.real_floor(few, 300)["mean"]  # frames as samples hide the bias
    result = frechet.SetDistance("fid", minimum=2)(few, few, sources, sources)
    assert (result.details["sources_fake"], result.details["n_fake"]) == (20, 600)


def test_set_metrics_say_what_is_missing():
    short = frechet.SetDistance("fid", minimum=50)(normal(20), normal(90))
    assert (short.status, short.ok) == ("skipped", False) and "20 generated and 90 real samples; fid needs 50" in short.reason
    bad = normal(20)
    bad[3, 2] = np.nan
    assert "first row 3" in measure(frechet.SetDistance(), fake=bad, real=normal(20)).reason
    assert measure(frechet.SetDistance(), fake=normal(20), real=normal(20, 9)).status == "failed"
    net = random_weights(i3d.I3D())
    assert "video 0 has 3 frames; fvd; 16 are needed" in measure(i3d.FVD(net), fake=[video(3)], real=[]).reason
    assert measure(i3d.FVD(), fake=[], real=[]).status == "no_weights"


def test_kid_is_unbiased_and_kvd_typed():
    mean, std = frechet.kid(normal(300, seed=1), normal(300, seed=2), subsets=20, size=100)
    assert abs(mean) < 3 * std
    assert frechet.kernel_distance(normal(300, seed=1), normal(300, shift=1.0, seed=2)) > 10 * std
    result = frechet.SetDistance("kvd", "kernel")(normal(50), normal(50, seed=1))
    assert result.status == "ok" and result.details["kind"] == "kernel"


# videos

def test_flicker_reads_what_was_put_in():
    still = video(1).repeat(6, 1, 1, 1).clamp(40, 200)
    values = []
    for level in (0, 2, 8, 32):
        flicker = still.clone()
        flicker[1::2] += level
        values.append(vbench.temporal_flickering(flicker))
        assert values[-1] == pytest.approx(1 - level / 255, abs=1e-12)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("size", [(32, 400), (500, 33), (31, 17)])
def test_musiq_takes_any_size(size):
    patches, place, scale, mask = musiq.multiscale_patches(draw(1, 3, *size) * 2 - 1)
    assert patches.shape[1] == 49 + 144 + math.ceil(size[0] / 32) * math.ceil(size[1] / 32) == len(place) == len(mask)
    assert place.max() < 100 and patches.isfinite().all() and not patches[0, mask == 0].any()


def test_musiq_padding_does_not_touch_the_mark():
    net, x = random_weights(musiq.MUSIQ(1), gain=1.0), draw(1, 3, 40, 64)
    patches, place, scale, mask = musiq.multiscale_patches(x * 2 - 1)
    real = mask.bool()
    with torch.no_grad():
        tokens = net.tokens(patches)
        padded = net.head(net.transformer_encoder(tokens, place, scale, mask)[:, 0])
        alone = net.head(net.transformer_encoder(tokens[:, real], place[real], scale[real], mask[real])[:, 0])
    assert torch.allclose(padded, alone, atol=1e-4)


def test_metrics_without_and_with_drawn_weights():
    clip_net = random_weights(clip.Clip(clip.clip_config(clip.from_openai(openai_state(out=768)))))
    head = random_weights(clip.AestheticHead())
    nets = {"subject_consistency": random_weights(dino.Dino("tiny")), "background_consistency": clip_net, "aesthetic_quality": clip_net,
            "imaging_quality": random_weights(musiq.MUSIQ(1), gain=1.0)}
    for name, net in nets.items():
        missing = measure(vbench.VBenchMetric(name), video=video(2))
        assert missing.status == "no_weights" and not missing.ok and name in missing.reason
        result = measure(vbench.VBenchMetric(name, net, head, batch=1), video=video(2))
        assert result.status == "random_weights" and not result.ok and result.value == result.value, result   # a number, but none to average
        whole = measure(vbench.VBenchMetric(name, net, head, batch=8), video=video(2))
        assert result.value == pytest.approx(whole.value, abs=1e-4)
    assert measure(vbench.VBenchMetric("aesthetic_quality", clip_net), video=video(2)).status == "no_weights"
    assert measure(vbench.VBenchMetric("subject_consistency", nets["subject_consistency"]), video=video(1)).status == "failed"  # one frame: typed, no number
    assert measure(vbench.VBenchMetric(), video=video(1)).status == "failed"
    assert measure(clip.ClipScore("clip_f", clip_net), video=video(1)).status == "failed"


def test_clip_t_uses_the_prompt():
    net = random_weights(clip.Clip(clip.clip_config(clip.from_openai(openai_state()))))
    tokenizer = lambda texts, **_: {"input_ids": torch.tensor([[48, *(ord(c) % 40 for c in t[:6]), 49, 0][:9] for t in texts])}
    a, b = (clip.ClipScore("clip_t", net, tokenizer)(video(3), prompt=p) for p in ("a house", "red dog"))
    assert a.status == "random_weights" and a.value != b.value and abs(a.value) <= 1
    assert clip.ClipScore("clip_t", net)(video(2)).status == "skipped"
    assert measure(clip.ClipScore("clip_t", net), video=video(2), prompt="a").status == "no_weights"


def test_vbench_files(tmp_path):
    rows = {"temporal_flickering": [dict(video_path="a.mp4", value=0.9, frames=5),
                                    dict(video_path="b.mp4", value=math.nan, status="timeout")], "imaging_quality": []}
    results = vbench.eval_results(rows)
    vbench.write_vbench(tmp_path, "run", vbench.full_info(["a.mp4", "b.mp4"], ["p", "q"]), results)
    assert results["temporal_flickering"] == [0.9, [dict(video_path="a.mp4", video_results=0.9),
                                                    dict(video_path="b.mp4", video_results=None, status="timeout")]]
    assert results["imaging_quality"] == [None, []] and {p.name for p in tmp_path.iterdir()} == {"run_full_info.json", "run_eval_results.json"}
    with pytest.raises(InputError, match="colon"): vbench.write_vbench(tmp_path, "a:b", [], {})
