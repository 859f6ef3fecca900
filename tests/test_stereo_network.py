"The stereo network's promises: complete loading or none, any size and length, fast forms equal to plain ones, exact windows, bounded memory."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from camflow.files import InputError
from camflow.media.frames import Frames
from camflow.stereo import features, update, windows
from camflow.stereo.network import CONFIGS, DynamicStereo, StereoConfig, load_state, load_stereo, read_state, save_stereo

SHAPES = Path(__file__).parent/"goldens"/"stereo"/"shapes.json"
SMALL = StereoConfig(dim=32, depth=1)
torch.set_num_threads(1)


def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def clip(T=3, H=32, W=48, seed=0): return torch.randint(0, 256, (2, 1, T, 3, H, W), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def busy(config, scale=1.0):
    "A network whose attention and heads all matter (fresh ones begin at zero)."
    model, g = DynamicStereo(config), torch.Generator().manual_seed(1)
    for p in model.parameters(): p.data = torch.randn(p.shape, generator=g) * (scale / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1)
    return model.eval()


# ------------------------------------------------------------------ weights
def test_published_names_and_sizes():
    model = DynamicStereo(CONFIGS["published"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == json.loads(SHAPES.read_text())
    assert sum(p.numel() for n, p in model.named_parameters() if "qkv" not in n) == 20_488_944


def test_tiny_fits_its_budget(tmp_path):
    tiny = DynamicStereo(CONFIGS["tiny"])
    save_stereo(tiny, tmp_path)
    assert 0.7e6 < sum(p.numel() for p in tiny.parameters()) < 1e6 and (tmp_path/"model.safetensors").stat().st_size <= 2_000_000
    assert CONFIGS["tiny"].cascade_sign == 1 and not any("qkv" in k for k in tiny.state_dict())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "total_steps": 3}, lambda s: {"state_dict": s}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_forms_load_completely(tmp_path, wrap, suffix):
    model = busy(SMALL)
    state = wrap(model.state_dict())
    if suffix == ".pth": torch.save(state, tmp_path/"w.pth")
    else:
        from safetensors.torch import save_file
        save_file(next((v for v in state.values() if isinstance(v, dict)), state), tmp_path/"w.safetensors")
    again = load_stereo(tmp_path/f"w{suffix}")
    assert again.config == SMALL and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_partial_or_foreign_weights_are_refused(tmp_path):
    model = busy(SMALL)
    state, before = model.state_dict(), model.fnet.conv1.weight.clone()
    for bad, word in (({k: v for k, v in state.items() if "mask" not in k}, "missing: update_block"), (state | {"nobody": torch.zeros(1)}, "unexpected: nobody"),
                      (state | {"fnet.conv1.bias": torch.zeros(3)}, r"fnet.conv1.bias \(3,\) instead of \(8,\)"), ({"module.a": torch.zeros(1)}, "missing"), ({}, "no state dict"), ({"model": {"a": 3}}, "no state dict")):
        with pytest.raises(InputError, match=word): load_state(model, bad)
    assert torch.equal(model.fnet.conv1.weight, before)
    (tmp_path/"broken.pth").write_bytes(b"not a checkpoint")
    for path, word in ((tmp_path/"broken.pth", "cannot|safely"), (tmp_path/"absent.pth", "does not exist")):
        with pytest.raises(InputError, match=word): read_state(path)
    torch.save({"a": torch.zeros(2)}, tmp_path/"other.pth")
    with pytest.raises(InputError, match="no DynamicStereo"): load_stereo(tmp_path/"other.pth")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return (Path(tmp_path/"ran").touch, ())
    torch.save({"model": Evil()}, tmp_path/"evil.pth")
    with pytest.raises(InputError, match="safely"): read_state(tmp_path/"evil.pth")
    assert not (tmp_path/"ran").exists()


# ------------------------------------------------------------------ network
@pytest.mark.parametrize("T,H,W", [(1, 16, 16), (1, 17, 23), (2, 33, 50), (7, 16, 40)])
def test_any_size_and_length(T, H, W):
    left, right = clip(T, H, W)
    with torch.no_grad(): flow = busy(SMALL)(left, right, iters=1)
    assert flow.shape == (1, T, 1, H, W) and flow.isfinite().all()


def test_windows_of_a_batch_do_not_mix():
    model, (a, b), (c, d) = busy(SMALL), clip(), clip(seed=3)
    with torch.no_grad():
        both = model(torch.cat([a, c]), torch.cat([b, d]), iters=2)
        assert torch.allclose(both[:1], model(a, b, iters=2), atol=1e-4) and torch.allclose(both[1:], model(c, d, iters=2), atol=1e-4)


def test_frames_see_each_other():
    model, (left, right) = busy(SMALL), clip()
    with torch.no_grad(): together, alone = model(left, right, iters=2), model(left[:, :1], right[:, :1], iters=2)
    assert not torch.allclose(together[:, :1], alone, atol=1e-3)


def test_sign_of_the_hand_over():
    state = busy(SMALL).state_dict()
    flows = {}
    for sign in (-1.0, 1.0):
        trace = {}
        with torch.no_grad(): load_state(DynamicStereo(replace(SMALL, cascade_sign=sign)).eval(), state)(*clip(), iters=2, trace=trace)
        flows[sign] = trace["flow_init_08"], trace["flow_up_16"]
    assert torch.allclose(flows[1.0][0], -flows[-1.0][0], atol=1e-5)
    assert torch.allclose(flows[1.0][0], features.interp(flows[1.0][1], flows[1.0][0].shape[-2:]) * 0.5, atol=1e-5)


def test_vertical_flow_can_be_left_out():
    trace = {}
    with torch.no_grad(): busy(replace(SMALL, vertical=False))(*clip(), iters=2, trace=trace)
    assert (trace["flow_up_04"][:, 1] == 0).all() and (trace["flow_up_04"][:, 0] != 0).any()


def test_every_live_tensor_learns():
    model = busy(SMALL).train()
    model(*clip(T=2), iters=2, every=True).abs().mean().backward()
    still = {n for n, p in model.named_parameters() if p.grad is None}
    assert still == {n for n, _ in model.named_parameters() if "qkv" in n}
    new = busy(replace(SMALL, dead_weights=False))
    new(*clip(T=2), iters=2, every=True).sum().backward()
    assert all(p.grad is not None for p in new.parameters())


def test_gradients_or_none_the_same_numbers(monkeypatch):
    model, (left, right) = busy(replace(SMALL, dim=192)), clip(T=2, H=64, W=256)    # wide enough that the fast forms without gradients are taken
    taken, original = [], features.conv_by_points
    counted = lambda x, weight, *a: (taken.append(weight.dim()), original(x, weight, *a))[1]
    for module in (features, update): monkeypatch.setattr(module, "conv_by_points", counted)
    with torch.no_grad(): fast = model(left, right, iters=1)
    count = len(taken)
    slow = model(left, right, iters=1).detach()
    assert {4, 5} <= set(taken) and len(taken) == count and (fast - slow).abs().max() < 1e-4 * max(1, slow.abs().max())


def test_lower_precision_runs_and_learns():
    model, (left, right) = busy(SMALL), clip(T=2)
    with torch.no_grad(): exact = model(left, right, iters=2)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(): coarse = model(left, right, iters=2)
        loss = model.train()(left, right, iters=2, every=True).float().abs().mean()
    loss.backward()
    assert (coarse.float() - exact).abs().mean() < 0.1 * exact.abs().mean() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_bad_input_is_refused_early():
    model, (left, right) = busy(SMALL), clip()
    for args, word in (((left, right[:, :2]), "differ"), ((left[0], right[0]), "left clip"), ((left[:, :, :1], right[:, :, :1]), "RGB"), ((left[:, :0], right[:, :0]), "left clip")):
        with pytest.raises(InputError, match=word): model(*args)
    for iters in (0, (1, 0, 2), (1, 2)):
        with pytest.raises(InputError, match="iters"): model(left, right, iters=iters)
    with pytest.raises(InputError, match="dim 40"): DynamicStereo(StereoConfig(dim=40))


# ------------------------------------------------------------------ fast forms
@pytest.mark.parametrize("T,h,w,axis", [(1, 16, 32, 0), (3, 8, 36, 0), (4, 8, 64, 1), (6, 16, 20, 1)])
def test_fewer_multiplications_same_sums(T, h, w, axis):
    x = noise(T, 96, h, w).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv3d(96, 24, 3, padding=1) if axis else nn.Conv2d(96, 24, 3, padding=1)
    frames = lambda t: t.unflatten(0, (-1, T)).transpose(1, 2)
    with torch.no_grad():
        exact = F.conv3d(frames(x).double(), conv.weight.double(), conv.bias.double(), padding=1).transpose(1, 2).flatten(0, 1) if axis else F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        fast = features.conv_by_points(x, conv.weight, conv.bias, T)
    assert fast.is_contiguous(memory_format=torch.channels_last) and (fast - exact).abs().max() < 2e-5


def test_lookup_equals_interpolation_far_outside_and_odd():
    for w in (1, 2, 5, 17, 40):
        f1, f2, flow = noise(2, 16, 3, w), noise(2, 16, 3, w, seed=1), noise(2, 2, 3, w, seed=2) * 30
        flow[0, 0, 0, 0], flow[1, 0, 2, -1] = 1e6, -1e9
        got = update.Correlation(f1, f2)(flow)
        row = torch.einsum("nchw,nchv->nhwv", f1, f2) / 4
        for level in range(4):
            for k in range(-4, 5):
                at = (torch.arange(w) + flow[:, 0]).double() / 2 ** level + k
                value = torch.zeros(2, 3, w, dtype=torch.float64)
                for side, share in ((at.floor(), 1 - (at - at.floor())), (at.floor() + 1, at - at.floor())):
                    inside = (side >= 0) & (side < row.shape[-1])
                    if row.shape[-1]: value += torch.where(inside, row.double().gather(-1, side.clamp(0, row.shape[-1] - 1).long()[..., None])[..., 0] * share, 0.0)
                assert torch.allclose(got[:, level * 9 + k + 4].double(), value, atol=2e-5), (w, level, k)
            row = row[..., :row.shape[-1] // 2 * 2].unflatten(-1, (-1, 2)).mean(-1) if row.shape[-1] > 1 else row[..., :0]


# ------------------------------------------------------------------ windows
def test_every_frame_once_for_any_length_and_window():
    number = lambda frames: torch.tensor(frames, dtype=torch.float64)[:, None]
    for n in (*range(1, 14), 15, 20, 23, 33):
        for k in (*range(1, 9), 14, 20):
            for plan in (windows.linear_plan(k), windows.linear_plan(k, k - 1), windows.linear_plan(k, 0), windows.reference_plan(k)):
                w, spans, ran = windows.weights(plan, n), windows.schedule(plan, n), []
                out = list(windows.run_plan(lambda f: (ran.append((f[0], f[-1] + 1)), number(f))[1], range(n), plan))
                assert [i for i, _ in out] == list(range(n)) and torch.allclose(torch.cat([v for _, v in out]), torch.arange(n, dtype=torch.float64))
                assert ran == spans and torch.allclose(w.sum(0), torch.ones_like(w[0])) and (w.amax(1) > 0).all() and max(b - a for a, b in spans) <= k


def test_running_mixes_as_the_weights_say():
    for plan in (windows.linear_plan(7, 3), windows.linear_plan(6, 5), windows.reference_plan(8), windows.reference_plan(5)):
        for n in (1, 6, 9, 23):
            ran = []
            out = windows.run_plan(lambda f: (ran.append(f), torch.full((len(f), 1), float(len(ran)) ** 2, dtype=torch.float64))[1], range(n), plan)
            expected = (windows.weights(plan, n) * (torch.arange(len(windows.schedule(plan, n))) + 1.0)[:, None] ** 2).sum(0)
            assert torch.allclose(torch.cat([v for _, v in out]), expected)


def test_no_more_than_a_window_is_held():
    alive, most = [0], [0]
    class Frame:
        def __init__(self): alive[0] += 1; most[0] = max(most[0], alive[0])
        def __del__(self): alive[0] -= 1
    for plan in (windows.linear_plan(6, 2), windows.reference_plan(6)):
        done = sum(1 for _ in windows.run_plan(lambda f: torch.zeros(len(f), 1), (Frame() for _ in range(200)), plan))
        assert done == 200 and most[0] <= 7
    assert sum(1 for _ in windows.run_causal(lambda f: torch.zeros(len(f), 1), (Frame() for _ in range(50)), window=4, every=2)) == 50 and most[0] <= 7


def test_causal_never_looks_ahead_and_answers_at_once():
    read = []
    def source():
        for i in range(9): read.append(i); yield i
    for index, value in windows.run_causal(lambda f: torch.tensor(f), source(), window=4, every=1): assert len(read) == index + 1 and value == index
    model, (left, right) = busy(SMALL), clip(T=5, H=16, W=32)
    full = windows.stereo_video(model, left[0], right[0], window=3, iters=1, causal=1)
    cut = windows.stereo_video(model, left[0, :3], right[0, :3], window=3, iters=1, causal=1)
    assert torch.equal(full[:3], cut)


def test_video_forms_agree():
    model, (left, right) = busy(replace(SMALL, cascade_sign=1.0)), clip(T=9, H=20, W=36)
    options = dict(window=4, overlap=2, iters=1)
    tensor = windows.stereo_video(model, left[0], right[0], **options)
    frames = windows.stereo_video(model, Frames(left[0], "byte"), Frames(right[0], "byte"), **options)
    unit = windows.stereo_video(model, Frames(left[0].float() / 255, "unit"), Frames(right[0].float() / 255, "unit"), **options)
    streamed = windows.stereo_video(model, iter(left[0]), iter(right[0]), **options)
    assert torch.equal(tensor, frames) and torch.allclose(tensor, unit, atol=1e-3) and torch.equal(tensor, torch.stack([d for _, d in streamed])) and (tensor >= 0).all()
    assert torch.is_grad_enabled()


def test_video_refusals_name_the_frame():
    model, (left, right) = busy(SMALL), clip(T=4)
    run = lambda *a, **k: list(windows.stereo_video(model, *a, iters=1, **k))
    for args, kw, word in (((left[0], right[0, :3]), {}, "4 left and 3 right"), ((iter(left[0]), iter(right[0, :3])), dict(window=8), "ends after 3"), ((iter(left[0, :3]), iter(right[0])), dict(window=8), "more frames"),
                           (([left[0, 0], left[0, 1, :, :9]], iter(right[0])), {}, "left frame 1"), ((left[0], right[0]), dict(window=0), "window 0"), ((left[0], right[0]), dict(window=4, overlap=4), "overlap 4"),
                           ((left[0], right[0]), dict(compat="upstream"), "compat"), ((left[0], right[0]), dict(window=2, causal=3), "every 3")):
        with pytest.raises(InputError, match=word): run(*args, **kw)


@pytest.mark.parametrize("size", [(192, 320), (37, 111)])
def test_norm_of_a_large_map_is_exact(size):
    "Sums over 60 000 pixels in float32: the routine for channels-last maps adds them one by one and is off by 3e-5 there."
    from camflow.stereo.features import norm
    x = (torch.randn(1, 64, *size, generator=torch.Generator().manual_seed(0)) * 3 + 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(): found = norm(x)
    assert found.is_contiguous(memory_format=torch.channels_last) and (found.double() - torch.nn.functional.instance_norm(x.double())).abs().max() < 1e-5
