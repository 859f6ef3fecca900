"Training a stereo network: it learns, it continues exactly, it refuses what it cannot do."
import json
import math
import shutil

import pytest
import torch

from camflow.files import InputError
from camflow.stereo import train
from camflow.stereo.network import load_stereo

torch.set_num_threads(1)
SMALL = dict(model=dict(dim=16, depth=1, head=16, cascade_sign=1.0, dead_weights=False, vertical=False), clips=4, held_out=2, render_size=[32, 64], render_frames=3, frames=2, size=[16, 48], iters=2,
             validate_iters=2, validate_every=0, log_every=1, temporal=0.5, ema_decay=0.5, prefetch=False)


@pytest.fixture(scope="module")
def bank(tmp_path_factory): return str(tmp_path_factory.mktemp("bank"))


def weights(run): return load_stereo(run/"model").state_dict()


def test_continues_exactly(tmp_path, bank):
    config = SMALL | {"bank": bank, "steps": 6, "checkpoint_every": 3, "frames": [2, 3]}
    assert {train.crop_length([2, 3], 0, step) for step in range(6)} == {2, 3}
    whole = train.main(config, tmp_path/"whole")
    assert whole.status == "done" and whole.metrics["held_epe"] > 0
    (tmp_path/"cut").mkdir()
    shutil.copytree(tmp_path/"whole"/"checkpoints", tmp_path/"cut"/"checkpoints")
    newest = sorted((tmp_path/"cut"/"checkpoints").iterdir())[-1]
    shutil.rmtree(newest)                                   # as if the run had been killed after the third step
    again = train.main(config, tmp_path/"cut")
    assert again.resumed == 3 and again.step == 6
    a, b = weights(tmp_path/"whole"), weights(tmp_path/"cut")
    assert all(torch.equal(a[k], b[k]) for k in a)
    exported = train.export(tmp_path/"whole", tmp_path/"again", config)
    assert all(torch.equal(a[k], v.half().float()) for k, v in exported.state_dict().items())
    assert "held_epe" in (tmp_path/"again"/"card.md").read_text()


def test_learns(tmp_path, bank):
    train.main(SMALL | {"bank": bank, "clips": 1, "steps": 40, "lr": 4e-3, "ema_decay": 0.0, "recolor": False, "size": [32, 64], "frames": 2, "temporal": 0.0}, tmp_path)
    epe = [row["epe"] for row in map(json.loads, (tmp_path/"metrics.jsonl").read_text().splitlines()) if "epe" in row]
    assert sum(epe[-8:]) < 0.6 * sum(epe[:8]), epe


@pytest.mark.parametrize("change, words", [({"widht": 3}, "widht"), ({"iters": 1}, "iters"), ({"frames": []}, "frames"), ({"frames": [2, 0]}, "frames"), ({"size": [64, 48]}, "smaller than the crop"), ({"model": "huge"}, "huge"), ({"data": [["Nothing", "x"]]}, "Nothing"),
                                           ({"data": [["Sintel", "absent"]]}, "absent"), ({"steps": 0}, "steps")])
def test_refusals(change, words, tmp_path, bank):
    with pytest.raises(InputError, match=words): train.main(SMALL | {"bank": bank, "steps": 1, **change}, tmp_path)


def test_a_batch_without_flow_names_the_same_numbers(bank):
    "Ranks average their numbers by position: one whose sets know no flow had a number less, and the run died in the reduction."
    config = train.DEFAULTS | SMALL | {"bank": bank}
    model, clip = train.start_model(config), train.clip_tensors(train.open_data(config, "")[1][0])
    batches = [train.stack([clip | change]) for change in ({}, {"flow": None, "visible": None})]
    (some, found), (none, without) = (train.step_loss(model, b, config) for b in batches)
    assert list(found) == list(without) and found["temporal"] > 0 and math.isnan(without["temporal"]) and some > none


@pytest.mark.slow
def test_a_run_on_sceneflow_alone_ends(tmp_path):
    "Its held-out clips have no flow, so no temporal error: the run failed after the training, for its headline named it."
    from camflow.lab.run import run
    from camflow.world.stereo_clips import stereo_clip
    from camflow.world.stereo_write import write_sceneflow
    sets, clip = tmp_path/"SceneFlow", stereo_clip(3, frames=6, size=(48, 96), both=True)
    for render in ("frames_cleanpass", "frames_finalpass"):
        for split in ("train", "test"): write_sceneflow(sets, [clip], split, render)
        for top, sequence in (("Monkaa", "rain"), ("Driving", "15mm/forwards/fast")):
            for kind in (render, "disparity"): shutil.copytree(sets/"FlyingThings3D"/kind/"TRAIN/A/0000", sets/top/kind/sequence, dirs_exist_ok=True)
    done = run("stereo_train", ["smoke", "sf"], {"root": str(tmp_path)}, root=tmp_path/"reports")
    result = json.loads((done.path/"result.json").read_text())
    assert done.status == "ok" and result["headline"] == ["epe", "epe_untrained", "step"] and "temporal" not in result
