"""Light matchers and what is made of tracks: loading, drawn weights, the library's own preparation, bad input."""
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from camflow.files import InputError
from camflow.geometry.camera import Cameras
from camflow.metrics.consistency import Consistency, windows
from camflow.metrics.dkm import DKM
from camflow.metrics.ego_motion import EgoMotion
from camflow.metrics.interface import measure
from camflow.metrics.matching import GIM, LightGlue, LoFTR, SourceMatches, fine_pairs, grey_pair, load_matcher, random_matcher
from camflow.metrics.weights import NoWeights, random_weights
from camflow.world.render import default_K


def noise(*shape, seed=0): return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(params=["loftr", "lightglue"])
def folder(request, tmp_path):
    random_matcher(request.param).network.save_pretrained(tmp_path / "weights")
    return request.param, tmp_path / "weights"


def test_a_folder_in_transformers_layout_is_loaded_and_named(folder):
    kind, path = folder
    loaded, drawn = load_matcher(kind, path, size=(96, 128)), random_matcher(kind)
    assert loaded.network.weights_id.startswith("weights:") and not loaded.network.training
    pair = [x.float() / 255 for x in noise(2, 3, 96, 128)]
    for a, b in zip(loaded(*pair), drawn(*pair)): assert np.array_equal(a, b)
    results = SourceMatches(loaded, frames=1)(video=noise(1, 3, 96, 128), source=noise(1, 3, 96, 128))
    assert [r.status for r in results] == ["ok", "ok"] and results[0].details["weights"] == loaded.network.weights_id
    assert {r.status for r in SourceMatches(drawn, frames=1)(video=noise(1, 3, 96, 128), source=noise(1, 3, 96, 128))} == {"random_weights"}


def test_weights_that_do_not_fit_are_refused(folder):
    kind, path = folder
    state = load_file(path / "model.safetensors")
    name = sorted(k for k in state if k.endswith("weight"))[3]
    save_file({k: v for k, v in state.items() if k != name}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"1 missing, first {name}"): load_matcher(kind, path)
    save_file(state | {"stray.weight": torch.zeros(2)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="1 unexpected, first stray"): load_matcher(kind, path)
    (path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read"): load_matcher(kind, path)


@pytest.mark.parametrize("where", [None, "nowhere"])
def test_without_weights_it_says_so(where):
    with pytest.raises(NoWeights, match="has no weights"): load_matcher("loftr", where)
    with pytest.raises(InputError, match="one of sift"): load_matcher("superglue")
    for matcher in (LoFTR(None), LightGlue(None), GIM(None)):
        assert {r.status for r in SourceMatches(matcher)(video=noise(1, 3, 32, 32), source=noise(1, 3, 32, 32))} == {"no_weights"}


def test_the_picture_is_prepared_as_the_library_does():
    from transformers.models.efficientloftr.image_processing_pil_efficientloftr import EfficientLoFTRImageProcessorPil
    images = torch.nn.functional.interpolate(noise(2, 3, 30, 45).float(), (240, 360), mode="bicubic").clamp(0, 255).byte()
    theirs = EfficientLoFTRImageProcessorPil()(list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"][0]
    ours = grey_pair(*(images / 255))
    assert theirs.shape == ours.shape == (2, 3, 480, 640)
    assert (ours - theirs).abs().max() < 1.5 / 255 and (ours.flip(0) - theirs).abs().max() > 0.1


def test_the_place_inside_a_cell_is_found():
    "A window whose pixel (5, 2) has the features of pixel (3, 6) of the other one."
    draw = torch.Generator().manual_seed(0)
    features = 8 * torch.nn.functional.normalize(torch.randn(1, 64 + 100, 64, generator=draw), dim=2)
    a, b = features[:, :64], features[:, 64:].clone()
    b[:, (6 + 1) * 10 + 3 + 1] = a[:, 2 * 8 + 5]
    first, second = fine_pairs(4 * a, 4 * b, 8, 8, 10.0)
    assert first[0].tolist() == [5, 2] and (second[0] - torch.tensor([3, 6])).abs().max() < 0.5


def test_gim_counts_as_the_original_metric_does():
    from camflow.media.frames import Frames
    from camflow.metrics.gim import MatchedPixels
    network, (video, source) = random_weights(DKM((96, 128), (96, 128)), gain=1.07), noise(2, 2, 3, 60, 80)
    new = SourceMatches(GIM(network, 200), frames=2)(video=video, source=source, seed=3)
    old = MatchedPixels(network, 2, 200, seed=3)(Frames(video, "byte"), Frames(source, "byte"))
    assert (new[0].value, new[1].value, new[0].status) == (old.value, old.details["density"], "random_weights")


def test_bad_input_has_a_status_and_a_reason():
    video, path = noise(9, 3, 64, 96), Cameras(torch.eye(4).repeat(5, 1, 1), default_K((64, 96)), (64, 96))
    assert "5 poses for 9 frames" in measure(Consistency(), video=video, cameras=path).reason
    assert "5 poses for 9 frames" in measure(EgoMotion(use_cameras=True), video=video, cameras=path).reason
    assert "at least 3" in measure(Consistency(), video=video[:2]).reason
    assert "give bytes" in measure(Consistency(), video=video.float()).reason
    with pytest.raises(InputError, match="frame rate of 0"): EgoMotion().indices(9, 0)
    assert windows(10) == [(0, 9)] and windows(11) == [(0, 8), (8, 10)] and windows(3) == [(0, 2)]
    lost = EgoMotion()(video=noise(4, 3, 144, 256))                                        # noise has no flow
    assert {r.status for r in lost} == {"failed"} and "can be believed" in lost[0].reason and len(lost[0].details["failed"]) == 3
    assert {r.status for r in SourceMatches()(video=video)} == {"skipped"}


def test_portrait_and_mixed_sizes():
    tall = torch.nn.functional.interpolate(noise(4, 3, 24, 16).float(), (192, 128), mode="bicubic").clamp(0, 255).byte()
    wide = torch.nn.functional.interpolate(tall.float(), (96, 64), mode="area").byte()
    count, density = SourceMatches(frames=2)(video=tall, source=wide)
    assert density.value > 0.1 and count.details["size"] == [192, 128]
    assert [r.status for r in Consistency()(video=tall[:1].expand(4, -1, -1, -1))][:2] == ["ok", "ok"]
