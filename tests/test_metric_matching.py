"""Flow, frame interpolation and dense matching: parity, what happens without weights, odd sizes, and known truths."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from camflow.device import generator
from camflow.files import InputError
from camflow.media.frames import Frames
from camflow.metrics import amt, dkm, gim, raft
from camflow.metrics.interface import measure
from camflow.metrics.weights import NoWeights, random_weights
from tests.parity import metrics_matching as parity

GOLDENS = Path(__file__).parent / "goldens" / "metrics"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "goldens" / "metrics"
SMALL = {"raft_124x131_it4", "amt_s_t0p5", "gim_matched_pixels", "gim_preprocess_padding", "gim_keypoints_and_sampling", "vbench_motion_smoothness",
         "vbench_dynamic_degree_flow", "vbench_dynamic_degree_decision", "relative_pose_error", "pose_auc", "da3_pose_auc"}


def shared(case):
    if not (SHARED / case).exists(): pytest.skip(f"{case} is not copied into the repository (size); it lies in ../shared/goldens/metrics")
    return SHARED / case


def noise(*shape, seed=0): return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_parity_with_the_references():
    "The final images of RAFT and AMT are stored here as head, strides and statistics; in ../shared whole."
    results = parity.check(GOLDENS)
    assert set(results) == SMALL
    assert all(r[3] for r in results.values()), {k: r for k, r in results.items() if not r[3]}


def test_parity_of_dkm():
    with torch.inference_mode(): result = parity.dkm_match(shared("dkmv3_96x128.safetensors"))
    assert result[3], result


@pytest.mark.parametrize("case, replay, name", [("raft_124x131_it4", parity.raft_flow, "update_block.gru.convq2.weight"),
                                                ("amt_s_t0p5", parity.amt_frame, "update2.gru.0.weight"),
                                                ("dkmv3_96x128", parity.dkm_match, "decoder.conv_refiner.8.out_conv.weight")])
def test_parity_notices_one_changed_weight(case, replay, name, monkeypatch):
    built = parity.Case.model

    def spoiled(self, *args, **options):
        model = built(self, *args, **options)
        dict(model.named_parameters())[name].data[2, 5, 0, 0] += 0.05
        return model

    monkeypatch.setattr(parity.Case, "model", spoiled)
    path = GOLDENS / f"{case}.safetensors"
    with torch.inference_mode(): assert replay(path if path.exists() else shared(path.name))[3] is False


@pytest.mark.parametrize("build, shapes", [(raft.RAFT, "shapes_raft.json"), (amt.AMT, "shapes_amt_s.json"), (dkm.DKM, "shapes_dkmv3.json")])
def test_names_and_shapes_are_the_checkpoints(build, shapes):
    path = GOLDENS / shapes if (GOLDENS / shapes).exists() else shared(shapes)
    with torch.device("meta"): ours = build().state_dict()
    assert {k: list(v.shape) for k, v in ours.items()} == json.loads(path.read_text())


def test_checkpoints_load_under_their_wrappings(tmp_path):
    state = random_weights(raft.RAFT(), seed=1).state_dict()
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "raft-things.pth")  # as published, from DataParallel
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "raft.safetensors")
    for name in ("raft-things.pth", "raft.safetensors"):
        loaded = raft.load_raft(tmp_path / name).cpu().state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in state.items() if "norm3" not in k), name
    torch.save({"epoch": 3, "state_dict": (state := random_weights(amt.AMT(), seed=1).state_dict())}, tmp_path / "amt-s.pth")
    assert torch.equal(amt.load_amt(tmp_path / "amt-s.pth").cpu().comb_block[1].weight, state["comb_block.1.weight"])
    with pytest.raises(InputError, match="do not fit RAFT"): raft.load_raft(tmp_path / "amt-s.pth")


def test_the_stored_classifier_of_the_encoder_is_dropped(monkeypatch):
    "gim_dkm_100h.ckpt is 280 MB: its names stand for it."
    with torch.device("meta"): state = dkm.DKM().state_dict()
    file = {f"model.{k}": v for k, v in state.items()} | {"model.encoder.net.fc.weight": torch.zeros(1000, 2048)}
    monkeypatch.setattr(dkm, "read_weights", lambda path, what, prefix: {k.removeprefix(prefix): v for k, v in file.items()})
    monkeypatch.setattr(dkm, "load_strict", lambda net, given, what, ignore, source: (seen.append((net, given, ignore)), net)[1])
    monkeypatch.setattr(dkm, "device", lambda: torch.device("meta"))
    seen = []
    with torch.device("meta"): dkm.load_dkm("gim_dkm_100h.ckpt")
    net, given, ignore = seen[0]
    left = {k for k in given if not any(re.fullmatch(p, k) for p in ignore)}
    assert left == set(net.state_dict())


@pytest.mark.parametrize("metric, sample", [(raft.DynamicDegree, {"frames"}), (amt.MotionSmoothness, {"frames"}), (gim.MatchedPixels, {"frames", "source"})])
def test_without_weights_the_status_says_so(metric, sample, tmp_path):
    clip = Frames(noise(3, 3, 64, 64), "byte", fps=8)
    result = measure(metric(), **{k: clip for k in sample})
    assert result.status == "no_weights" and math.isnan(result.value) and "load_" in result.reason
    for load in (raft.load_raft, amt.load_amt, dkm.load_dkm):
        with pytest.raises(NoWeights, match="absent.pth"): load(tmp_path / "absent.pth")


@pytest.mark.parametrize("size", [(64, 96), (40, 200), (96, 64)])
def test_small_and_portrait_images_give_finite_flow_of_their_own_size(size):
    "The original is all NaN below 128 pixels."
    model = random_weights(raft.RAFT(), gain=0.9)
    flow = raft.clip_flow(model, Frames(noise(2, 3, *size), "byte"), iters=2)
    assert flow.data.shape == (1, 2, *size) and flow.data.isfinite().all()
    with pytest.raises(InputError, match="at least 128"): model(torch.zeros(1, 3, 64, 96), torch.zeros(1, 3, 64, 96))


def test_flow_of_a_clip_does_not_depend_on_batches_or_neighbours():
    model, clip = random_weights(raft.RAFT(), gain=0.9), Frames(noise(4, 3, 128, 136), "byte")
    one = raft.clip_flow(model, clip, iters=2).data
    assert torch.allclose(raft.clip_flow(model, clip, iters=2, batch=3).data, one, atol=1e-3)
    assert torch.allclose(raft.clip_flow(model, clip[[2, 3]], iters=2).data[0], one[2], atol=1e-3)


def test_clips_that_are_too_short_or_have_no_rate():
    clip, net = Frames(noise(2, 3, 64, 64), "byte", fps=30), raft.RAFT()
    assert measure(raft.DynamicDegree(net), frames=clip).status == "invalid"
    assert measure(raft.DynamicDegree(net), frames=Frames(clip.data, "byte")).status == "failed"
    assert measure(amt.MotionSmoothness(amt.AMT()), frames=clip).status == "invalid"
    with pytest.raises(InputError, match="t = 1"): amt.AMT()(torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 1)


def test_the_opposite_pyramid_is_that_of_swapped_images():
    f1, f2 = torch.randn(2, 1, 8, 16, 18, generator=torch.Generator().manual_seed(0))
    there, back = raft.correlation_pyramid(f1, f2), raft.correlation_pyramid(f2, f1)
    for a, b in zip(raft.transposed_pyramid(there, (16, 18)), back): assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("r", [1, 3])
def test_local_correlation_is_plain_sampling(r, monkeypatch):
    "Radius 1 gathers in pieces, radius 3 takes all pairs of so small a map."
    monkeypatch.setattr(dkm, "BUDGET", 5 * 16 * 100)
    draw = torch.Generator().manual_seed(0)
    f1, f2 = torch.randn(2, 2, 5, 24, 26, generator=draw)
    warp = dkm.pixel_centres(2, 24, 26, f1) + torch.randn(2, 2, 24, 26, generator=draw)  # far outside as well
    y, x = torch.meshgrid(torch.linspace(-2 * r / 24, 2 * r / 24, 2 * r + 1), torch.linspace(-2 * r / 26, 2 * r / 26, 2 * r + 1), indexing="ij")
    points = warp.permute(0, 2, 3, 1)[:, :, :, None] + torch.stack([x, y], -1).reshape(-1, 2)
    seen = torch.nn.functional.grid_sample(f2, points.flatten(2, 3), align_corners=False).reshape(2, 5, 24, 26, -1)
    assert torch.allclose(dkm.local_correlation(f1, f2, warp, r), torch.einsum("bchw,bchwk->bkhw", f1, seen) / 5 ** 0.5, atol=1e-5)


class Shift(nn.Module):
    "Stands for a perfect matcher: image 1 shows what image 0 shows, `dx` pixels to the right; noise of `sigma` pixels on a share of them."
    def __init__(self, dx=0.0, sigma=0.0, certainty=1.0, wrong=0.0, size=(96, 128)):
        super().__init__()
        self.size, self.dx, self.sigma, self.sure, self.wrong, self.weight = size, dx, sigma, certainty, wrong, nn.Parameter(torch.zeros(1))

    def forward(self, image0, image1):
        h, w = image0.shape[-2:]
        draw = torch.Generator().manual_seed(3)
        own = dkm.pixel_centres(1, h, w, image0).permute(0, 2, 3, 1)
        step = torch.tensor([2 / w, 2 / h])
        there = own + step * torch.tensor([self.dx, 0.0]) + step * self.sigma * torch.randn(own.shape, generator=draw)
        lost = torch.rand(own.shape[:3], generator=draw) < self.wrong
        there[lost] = 2 * torch.rand(int(lost.sum()), 2, generator=draw) - 1
        inside = (there.abs() <= 1).all(-1)
        return torch.cat([torch.cat([own, there.clamp(-1, 1)], -1)] * 2, 2), torch.cat([self.sure * inside.float()] * 2, 2)


def pair(**options): return gim.match_pair(Shift(**options), torch.rand(3, 96, 128), torch.rand(3, 96, 128), generator(0, "test"), count=1000)


def test_a_perfect_match_fills_count_and_density():
    found = pair()
    assert found.count == found.sampled > 900 and found.density > 0.99
    assert pair(dx=32).density == pytest.approx(0.75, abs=0.02)      # a quarter has left the picture


def test_density_falls_where_the_count_is_saturated():
    exact, blurred, lost = pair(dx=2), pair(dx=2, sigma=2), pair(dx=2, wrong=0.3)
    assert exact.count - blurred.count < 0.05 * exact.count          # 2 pixels are far below the 8 of the count
    assert blurred.density < 0.7 * exact.density
    assert lost.density == pytest.approx(0.7 * exact.density, rel=0.1)
    assert pair(certainty=0.1).density == 0.0 < pair(certainty=0.1).count


def test_padding_does_not_dilute_the_density():
    wide = gim.match_pair(Shift(), torch.rand(3, 64, 128), torch.rand(3, 64, 128), generator(0, "test"), count=1000)
    assert wide.density > 0.99 and wide.points0[:, 1].max() <= 63


def test_pairs_that_cannot_be_matched_are_named_not_dropped():
    tiny = Frames(noise(2, 3, 7, 9), "byte")
    result = measure(gim.MatchedPixels(Shift()), frames=tiny, source=tiny)
    assert result.status == "failed" and math.isnan(result.value) and "at least 8" in result.reason
    good = measure(gim.MatchedPixels(Shift(), frames=3, count=100), frames=Frames(noise(5, 3, 96, 128), "byte"), source=Frames(noise(4, 3, 96, 128), "byte"))
    assert good.status == "ok" and good.details["frames"] == [0, 1, 3]
    assert good.value == pytest.approx(sum(good.details["counts"]) / 1000) and good.details["density"] > 0.99


def test_the_sampler_spreads_over_the_image():
    "Certain pairs crowded in one corner do not take all the samples."
    draw = torch.Generator().manual_seed(0)
    crowd, spread = 0.05 * torch.rand(3000, 4, generator=draw) - 1, 2 * torch.rand(3000, 4, generator=draw) - 1
    spread[:, 2:] = spread[:, :2]  # a consistent match
    pairs, _ = dkm.sample_matches(torch.cat([crowd, spread]), torch.ones(6000), 1500, torch.Generator().manual_seed(1))
    assert (pairs[:, 0] < -0.95).float().mean() < 0.1
