"""What is wrong in the published joint diffusion code (UniCon), and the test that holds us to the right behaviour.

| no | defect there | here, and its test |
|---|---|---|
| 1 | gradient clipping sees an exhausted iterator | clips: test_joint_train::test_clipping_works |
| 2 | null prompt is zeros in training, the encoded empty prompt in sampling | one null: test_joint_noise::test_2_null_prompts_of_training_are_those_of_sampling |
| 3 | aspect ratio is drawn in the main process and frozen in forked workers | drawn per step from (seed, step): test_joint_defects::test_3_shapes_change_from_step_to_step |
| 4 | "clean" conditions are noised and sampled | exact: test_joint_noise::test_4_a_clean_condition_is_exact_and_stays, test_joint_noise::test_4_training_conditions_are_exact_too |
| 5 | signal guidance without prompt guidance is undefined | works: test_joint_noise::test_5_signal_guidance_without_prompt_guidance |
| 6 | masked inputs are noised by the last input's scheduler | own level: test_joint_noise::test_6_each_masked_input_is_renoised_at_its_own_level, test_joint_noise::test_6_with_the_copies_of_a_diffusers_scheduler |
| 7 | device and half precision are in the code, masks are lists rebuilt in each forward | test_joint_noise::test_7_no_device_names, test_joint_adapter::test_hot_path_never_looks_at_values |
| 8 | depth is lossy JPEG, min-max per image in 8 bits, 0 / 0 on constant maps | test_joint_defects::test_8_depth_has_more_than_8_bits, test_joint_defects::test_8_one_scale_for_all_pictures, test_joint_defects::test_8_constant_depth_trains, test_joint_data::test_coded_files_are_lossless_to_16_bits |
| 9 | calls of the network in which an input stands still | test_joint_noise::test_9_every_call_moves_everything_that_has_a_way_to_go |
"""
import math
import re
from pathlib import Path

import pytest
import torch

from camflow.joint import train
from camflow.joint.codecs import DepthCodec, load_coded, save_coded
from camflow.joint.data import Source, draw_size, read_depth, shape_items
from camflow.media.frames import Depth, Frames
from camflow.training.config import configuration

SMALL = dict(batch_size=2, items=64, held_out=0, sample_steps=2, warmup=0, size=[32, 32], aspect=2.0, schedule="constant")


def test_every_test_of_the_table_exists():
    named = re.findall(r"(test_\w+)::(test_\w+)", __doc__)
    rows = set(re.findall(r"^\| (\d) \|", __doc__, re.M))
    assert rows == set("123456789") and len(named) >= 12
    for file, name in named: assert f"def {name}(" in (Path(__file__).parent/f"{file}.py").read_text(encoding="utf-8"), (file, name)


# ---- 3: the shape of a batch

def sizes_of(tmp_path, monkeypatch, **changes) -> dict: # step -> size of its batch
    seen, plain = {}, train.Pairs.batch
    def batch(self, where, size=None):
        out = plain(self, where, size)
        seen[min(where) // 2] = (tuple(size), tuple(out[0].shape[-2:]))
        return out
    monkeypatch.setattr(train.Pairs, "batch", batch)
    train.main(SMALL | changes, tmp_path)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("prefetch", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_3_shapes_change_from_step_to_step(tmp_path, monkeypatch, prefetch):
    "Six steps are far less than an epoch of 32; whatever prepares the batches, their shapes differ within it, and are those of (seed, step)."
    seen = sizes_of(tmp_path/"whole", monkeypatch, steps=6, prefetch=prefetch)
    assert all(asked == got for asked, got in seen.values())                        # both modalities of every item, at the size of their step
    drawn = [draw_size(32 * 32, train.generator(0, "size", step), 2.0, 8) for step in range(6)]
    assert [seen[step][0] for step in range(6)] == drawn and len(set(drawn)) >= 3


@pytest.mark.slow
def test_3_shapes_are_the_same_after_a_break(tmp_path, monkeypatch):
    whole = sizes_of(tmp_path/"whole", monkeypatch, steps=4, prefetch=False)
    first = sizes_of(tmp_path/"part", monkeypatch, steps=4, prefetch=False, checkpoint_every=2, max_seconds=1e-6)
    rest = sizes_of(tmp_path/"part", monkeypatch, steps=4, prefetch=False, checkpoint_every=2)
    assert first and rest and min(rest) > min(first) and first | rest == whole


# ---- 8: depth

def ramp(low, high, width=2048): return Depth(1 / torch.linspace(low, high, width).reshape(1, 1, 1, -1).expand(1, 1, 4, -1), "metric")


def test_8_depth_has_more_than_8_bits(tmp_path):
    "A ramp of 2048 depths: 8 bits would leave 256 of them, the codec and its files keep them apart."
    depth = ramp(0.2, 0.9)
    codec = DepthCodec(0.0, 1.0, "metric")
    picture = codec.encode(depth).data
    assert len(picture[0, 0, 0].unique()) == 2048 and len(codec.encode(depth).byte().data[0, 0, 0].unique()) < 256
    save_coded(tmp_path, codec, depth)
    back = load_coded(tmp_path)
    assert len(back.data[0, 0, 0].unique()) == 2048
    assert float(((back.data - depth.data) / depth.data).abs().max()) < 2 * 0.5 / 65535 / 0.2            # half a step of 16 bits, where it weighs most


def test_8_metric_files_are_exact_to_their_step(tmp_path):
    import cv2
    millimetres = torch.arange(1, 4097).reshape(64, 64).numpy().astype("uint16")
    cv2.imwrite(str(tmp_path/"depth.png"), millimetres)
    depth = read_depth(tmp_path/"depth.png")
    assert depth.kind == "metric" and torch.equal((depth.data * 1000).round()[0, 0].int(), torch.from_numpy(millimetres.astype("int32")))


def test_8_one_scale_for_all_pictures():
    "The same metre has the same grey in two pictures of different range; min and max of each picture would move it."
    near, far = Depth(torch.tensor([[[[1.5, 2.0, 4.0]]]]), "metric"), Depth(torch.tensor([[[[2.0, 4.0, 40.0]]]]), "metric")
    codec = train.codecs_of(configuration(dict(family="sd", data="world", depth_low=0.0, depth_high=1.0), train.DEFAULTS))["depth"]
    a, b = (codec.encode(d).data[0, 0, 0] for d in (near, far))
    assert a[1:].tolist() == b[:2].tolist() and codec.decode(codec.encode(far)).kind == "metric"
    assert torch.allclose(codec.decode(codec.encode(far)).data, far.data, rtol=1e-4)
    a, b = (DepthCodec().encode(d).data[0, 0, 0] for d in (near, far))
    assert not torch.allclose(a[1:], b[:2], atol=0.1)                                # what a scale per picture does


def test_8_constant_depth_trains(tmp_path, monkeypatch):
    "A wall seen from the front, as every second item: the batch and the loss stay finite."
    plain = shape_items(range(4), (16, 16))
    wall = Depth(torch.full((1, 1, 16, 16), 3.0), "metric")
    source = Source(list(range(4)), lambda i: plain[i] | ({"depth": wall} if i % 2 else {}))
    monkeypatch.setattr(train, "open_items", lambda config, held_out=False: source)
    monkeypatch.setattr(train, "codecs_of", lambda config: {"image": train.RGBCodec(), "depth": DepthCodec()})
    config = configuration(dict(family="sd"), train.DEFAULTS)
    pixels, _ = train.Pairs(source, config, train.codecs_of(config)).batch([0, 1])
    assert torch.isfinite(pixels).all() and float(pixels[3].abs().max()) == 0        # grey, and neither NaN nor black
    result = train.main(dict(steps=2, batch_size=2, items=4, held_out=0, warmup=0, prefetch=False), tmp_path)
    losses = [float(line.split('"loss":')[1].split(",")[0].rstrip("}\n")) for line in (tmp_path/"metrics.jsonl").read_text().splitlines() if '"loss":' in line]
    assert result.step == 2 and losses and all(math.isfinite(x) for x in losses)
    assert isinstance(DepthCodec().encode(wall), Frames)
