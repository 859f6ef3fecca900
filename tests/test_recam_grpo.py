"ReCam by GRPO: seeded adapters on every rank and at every start, checked settings, scenes held out, the model that comes out."
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camflow.files import InputError, write_json
from camflow.lab.launch import command, free_port
from camflow.lab.run import run
from camflow.media.video import probe
from camflow.processes import die_with_parent, end_quickly  # noqa: F401 (of the programs)
from camflow.rewards.combine import combine
from camflow.rl.faults import NonFiniteError
from camflow.rl.recam_data import open_data
from camflow.rl.recam_export import save_parts
from camflow.rl.recam_grpo import build, finetune_step, main, parse, same_judgement
from camflow.wan.generate import load_pipeline
from camflow.world.write import write_multicam
from tests.phone import phone_video, shown

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
TINY = {"model": "random", "groups": 2, "k": 2, "sampling_steps": 2, "loss": "awm", "levels": [0.8], "steps": 1, "micro_batch": 2, "eval_conditions": 1, "conditions": 2, "lr": 1e-3,
        "checkpoint_every": 1}


def brightness(samples): return torch.stack([sample.frames.unit().data.mean() for sample in samples])


RANKS = """
os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME="lo")
ranks = []
for rank in (0, 1):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    if (pid := os.fork()) == 0: die_with_parent(); break
    ranks.append(pid)
else: sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in ranks))
"""


def python(code, *words, ranks=1):
    "Output of a program in a process of its own, or on two ranks, forked after the imports."
    code = "import sys, torch; torch.set_num_threads(1)\nsys.path.insert(0, 'tests')\nfrom test_recam_grpo import *\nend_quickly()\n" + (RANKS if ranks == 2 else "") + code
    file = Path(words[0])/"program.py"
    file.write_text(code)
    done = subprocess.run([sys.executable, str(file), *map(str, words)], capture_output=True, text=True, timeout=900, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


def test_adapters_resume_in_another_process(tmp_path):
    "What is random at the start comes from the seed, not from the process."
    config = TINY | {"lora_rank": 2}
    assert main(config, tmp_path, brightness)["step"] == 1
    code, log = python(f"result = main({config | {'steps': 2}}, sys.argv[1], brightness)\nprint('RESUMED', result['resumed'], result['step'])", tmp_path)
    assert code == 0 and "RESUMED 1 2" in log, log[-3000:]


def test_ranks_start_from_the_same_adapters_or_are_refused(tmp_path):
    "Two ranks: the seeded start is one model, a start that depends on the rank is refused on both."
    code, log = python(f"""
from camflow.rl import recam_grpo
config, folder = {TINY | {'lora_rank': 2}}, Path(sys.argv[1])
trainer, seeded = recam_grpo.build(config, folder, brightness)[0], recam_grpo.add_lora
recam_grpo.add_lora = lambda model, rank, seed: seeded(model, rank, seed + trainer.rank)
try: recam_grpo.build(config, folder, brightness)
except InputError as error: (folder/f"rank{{trainer.rank}}").write_text(str(error))
torch.distributed.barrier()
""", tmp_path, ranks=2)
    assert code == 0, log[-3000:]
    assert all((tmp_path/f"rank{n}").read_text().startswith("starting weights differ between rank 0 and ranks [1]; start all ranks") for n in (0, 1))


class Boom:
    "A reward that fails from call number `first` on."
    name = "boom"
    def __init__(self, first=0): self.first, self.calls = first, 0

    def __call__(self, samples):
        from camflow.rewards.protocol import Scores
        self.calls += 1
        if self.calls > self.first: raise ValueError("row 3 has no cameras")
        return Scores(brightness(samples), ["ok"] * len(samples))


REFUSED = [({"eval_conditions": 0}, "eval_conditions=0"), ({"checkpoint_every": 0}, "checkpoint_every=0"), ({"steps": 0}, "steps=0"), ({"micro_batch": 0}, "micro_batch=0"), ({"k": 1}, "k=1"),
           ({"lora_rank": -3}, "lora_rank=-3"), ({"size": [48, 80, 3]}, "size="), ({"size": [50, 80]}, "multiples of 8"), ({"frames": 10}, "4k"), ({"shift": -1}, "shift=-1"), ({"factor": float("nan")}, "factor=nan"),
           ({"groups": 2.5}, "whole number"), ({"train": "*to_q*"}, "list of patterns"), ({"lr": -1}, "lr=-1"), ({"lr": "1e-3"}, "lr='1e-3' is not"), ({"clip": -1}, "clip=-1"), ({"ema_decay": 2}, "ema_decay=2"),
           ({"levels": []}, "levels="), ({"levels": [1.5]}, "levels="), ({"loss": "ppo", "window": 9}, "window of 9"), ({"rewards": {}}, "no reward is configured"), ({"rewards": {"camra": 1}}, "unknown reward 'camra'"),
           ({"rewards": {"camflow.rewards.camera:Nope": 1}}, "Nope"), ({"rewards": {"no.such:X": 1}}, "cannot be imported"), ({"rewards": {"camera": "much"}}, "weight 'much'"),
           ({"reward_options": {"camera": {"limitt": 1}}}, "limitt.*it takes"), ({"reward_options": {"appearance": {}}}, "of the configured rewards camera")]


@pytest.mark.parametrize("change, words", REFUSED, ids=[f"{next(iter(change))} {n}" for n, (change, _) in enumerate(REFUSED)])
def test_settings_are_checked_when_they_are_made(change, words):
    with pytest.raises(InputError, match=words): parse(TINY | change)


def test_rewards_of_weight_0_watch_a_fine_tuning():
    "It learns from true videos; an arm that learns from rewards needs one that counts."
    watched = TINY | {"rewards": {"camera": 0.0}}
    assert parse(watched | {"arm": "finetune"})[0].rewards == {"camera": 0.0}
    for arm in ("grpo", "shuffled"):
        with pytest.raises(InputError, match=f"all 0, so nothing would be learned in the arm {arm}"): parse(watched | {"arm": arm})


def test_a_finetuning_that_did_nothing_has_no_loss(tmp_path):
    "Batches larger than a rollout's worth of compute: some rollouts pay for no step, and were logged with a loss of 0."
    trainer, s, *_ = build(TINY | {"arm": "finetune", "finetune_batch": 10}, tmp_path, brightness)
    rows = [finetune_step(trainer, s, trainer.cfg) for _ in range(2)]
    assert [row["updates"] for row in rows] == [0, 1]
    assert [math.isnan(row["loss"]) for row in rows] == [math.isnan(row["grad_norm"]) for row in rows] == [True, False]


def test_a_finetuning_whose_gradient_is_no_number_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("camflow.wan.finetune.flow_loss", lambda network, clean, *rest: math.nan * sum(p.sum() for p in network.parameters() if p.requires_grad) + clean.flatten(1).sum(1))
    trainer, s, *_ = build(TINY | {"arm": "finetune"}, tmp_path, brightness)
    with pytest.raises(NonFiniteError, match="after 0 rollouts.* finetune_lr"): finetune_step(trainer, s, trainer.cfg)


def test_the_last_judgement_is_as_the_first(tmp_path):
    "A resume with more requests ended in an error after the training, one with other sampling steps compared two different things."
    s = parse(TINY)[0]
    write_json(tmp_path/"judged.json", same_judgement(s, tmp_path))
    same_judgement(parse(TINY | {"steps": 9, "keep": 5})[0], tmp_path)
    with pytest.raises(InputError, match=r"eval_conditions 1 -> 2\).*new run folder"): main(TINY | {"eval_conditions": 2}, tmp_path, brightness)
    for changes in ({"sampling_steps": 3}, {"rewards": {"camera": 0.5}}, {"size": [64, 80]}):
        with pytest.raises(InputError, match=f"{next(iter(changes))} .* -> "): same_judgement(parse(TINY | changes)[0], tmp_path)


def test_a_reward_that_cannot_judge_the_start_ends_the_run_with_its_reason(tmp_path):
    with pytest.raises(InputError, match="could be judged; .*boom: ValueError: row 3 has no cameras; mend"): main(TINY, tmp_path, combine({"boom": Boom()}))
    assert not (tmp_path/"before.json").exists()


def test_a_reward_that_breaks_later_names_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match="three rollouts, last at step 3 .*row 3 has no cameras; check"): main(TINY | {"steps": 4}, tmp_path, combine({"boom": Boom(1)}))


def trained_and_loaded(folder, config):
    "(trainer with the run's weights, generating pipeline) of a finished run."
    result = main(config, folder, brightness)
    trainer = build(config, folder, brightness)[0]
    assert trainer.restore(folder/"checkpoints")
    return trainer, load_pipeline(folder/result["pipeline"])


@pytest.mark.parametrize("rank", [0, 2])
def test_the_trained_model_is_a_pipeline(tmp_path, rank):
    "Averaged weights, adapters merged: the pipeline's transformer answers as the trained policy does, not as the start does."
    trainer, pipe = trained_and_loaded(tmp_path, TINY | {"lora_rank": rank, "lr": 1e-1, "ema_decay": 0.0})
    cond = trainer.conditions(0)
    call = lambda model: model(torch.randn(1, *cond["source"].shape, generator=torch.Generator().manual_seed(1)), torch.tensor([500.0]), cond["context"][None], source=cond["source"][None], camera=cond["camera"][None])
    with torch.no_grad():
        made, start = call(pipe.transformer), call(build(TINY, tmp_path, brightness)[0].network)
        with trainer.ema.applied(trainer.params): asked = call(trainer.network)
    assert (made - asked).abs().max() < 1e-4 * asked.abs().max() < 0.1 * (made - start).abs().max()
    clip = pipe(cond["clip"].source, cond["camera"][None], "a room", num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).frames[0]
    assert len(clip) == 9 and clip.size == (48, 80) and torch.isfinite(clip.data).all()


def test_large_parts_are_linked_small_ones_copied(tmp_path):
    "The shipped model: a folder that can be moved; from a pipeline of large parts: links that lead there."
    model = tmp_path/"weights"
    for name in ("vae", "text_encoder", "tokenizer"):
        (model/name).mkdir(parents=True)
        (model/name/"config.json").write_text("{}")
    (model/"latents.json").write_text('{"tiles": [[34, 34], [18, 16]]}')
    s = parse(TINY | {"model": str(model)})[0]
    for name, size in (("copied", 100), ("linked", 1)):
        folder = tmp_path/"run"/name
        folder.mkdir(parents=True)
        save_parts(s, None, None, folder, folder, size)
        assert all((folder/part/"config.json").read_text() == "{}" and (folder/part).is_symlink() == (name == "linked") for part in ("vae", "text_encoder", "tokenizer"))
        assert (folder/"latents.json").read_text() == '{"tiles": [[34, 34], [18, 16]]}'      # or sources would be encoded whole
        assert not (folder/"vae").is_symlink() or not os.path.isabs(os.readlink(folder/"vae"))


@pytest.fixture(scope="module")
def multicam(tmp_path_factory):
    "Three scenes of three cameras: 18 pairs."
    root = tmp_path_factory.mktemp("multicam")
    write_multicam(root, scenes=3, frames=9, cameras=3, val=False, size=(48, 80))
    return root


def test_held_out_requests_come_from_whole_scenes(multicam, tmp_path):
    "Six pairs per scene: up to six requests hold out one scene, seven two; training never draws from them; too few pairs are refused."
    s = parse(TINY | {"data": "multicam", "root": str(multicam), "cameras": "paired", "conditions": 6, "eval_conditions": 7})[0]
    load, held = open_data(s, 0, tmp_path)
    scenes = lambda clips, n: {clips(i).id.split("/")[0] for i in range(n)}
    assert len(scenes(held, 7)) == 2 and scenes(load, 6).isdisjoint(scenes(held, 7)) and len({held(i).id for i in range(7)}) == 7
    for change, words in [({"conditions": 7}, "at most 6"), ({"eval_conditions": 13}, "eval_conditions lower or add scenes"), ({"conditions": 100, "eval_conditions": 1}, "at most 12")]:
        with pytest.raises(InputError, match=words): open_data(parse({**config_of(s), **change})[0], 0, tmp_path)


def test_a_video_of_variable_rate_is_spread_over_its_time(tmp_path):
    "Each frame is what was on screen at its share of the video's length, rounded to a tick; the last tick may lie up to one before the last frame."
    times = phone_video(tmp_path/"phone.mp4")
    for frames in (9, 33):
        s = parse(TINY | {"data": "videos", "root": str(tmp_path), "frames": frames})[0]
        seen, tick = open_data(s, 0, tmp_path)[0](0).source.data[:, 0, 0, 0].tolist(), 1 / probe(tmp_path/"phone.mp4").fps
        asked = [k * times[-1] / (frames - 1) for k in range(frames)]
        assert len(seen) == frames and all(shown(times, max(0, t - 1.5 * tick)) <= value <= shown(times, t + 0.5 * tick) for t, value in zip(asked, seen))


def config_of(s): return {name: getattr(s, name) for name in ("data", "root", "cameras", "conditions", "eval_conditions", "model", "groups", "k", "micro_batch")}


def test_bad_input_is_found_before_training(multicam, tmp_path):
    "A truncated video of a set or of a folder, a missing focal folder, clips that are too short: refused in `build`, or left out and listed."
    shutil.copytree(multicam, tmp_path/"set")
    video = tmp_path/"set/train/f24_aperture5/scene2/videos/cam02.mp4"
    shutil.copytree(video.parent, tmp_path/"videos")
    for file in (video, tmp_path/"videos/cam02.mp4"): file.write_bytes(file.read_bytes()[:200])
    config = TINY | {"data": "multicam", "root": str(tmp_path/"set"), "conditions": 4}
    for change, words in [({}, "scene2/videos/cam02.mp4"), ({"focal": "f99"}, "no folder 'f99'"), ({"skip_bad": True, "frames": 81}, "9 there"), ({"data": "videos", "root": str(tmp_path/"videos")}, "1 of 3 videos.*cam02.mp4"),
                          ({"data": "videos", "root": str(tmp_path/"videos"), "skip_bad": True, "frames": 81}, "no video")]:
        with pytest.raises(InputError, match=words): build(config | change, tmp_path/"run", brightness)
    for name, change in (("set", {}), ("videos", {"data": "videos", "root": str(tmp_path/"videos")})):
        trainer, s, held, _ = build(config | change | {"skip_bad": True}, tmp_path/f"run_{name}", brightness)
        assert "cam02" in (tmp_path/f"run_{name}/skipped.json").read_text()
        names = lambda conditions, n: {conditions(i)["clip"].id.split("/")[0] for i in range(n)}
        assert names(held, 1).isdisjoint(names(trainer.conditions, 4))


def test_several_machines_without_an_address_get_lines_and_nothing_is_trained(tmp_path):
    "The run says so, and the written configuration is what the lines name."
    done = run("recam_grpo", "smoke", {"arms": ["grpo"], "nodes": 2, "num_processes": 2}, root=tmp_path)
    assert done.status == "ok" and done.result["status"] == "launch lines" and done.result["headline"] == ["status"]
    lines = done.result["lines"]["grpo"]
    assert len(lines) == 2 and all(f"--machine_rank {node} --main_process_ip NODE0" in line and "--num_processes 4" in line for node, line in enumerate(lines))
    config = json.loads(Path(lines[0].split("--config ")[1]).read_text())
    assert parse(config)[0].arm == "grpo" and not list(done.path.rglob("metrics.jsonl"))


def test_two_machines_train_one_model(tmp_path):
    "With an address this machine starts its share and waits for the other, which is started by the printed line (here: a second launcher on this machine)."
    wait = ("import glob, os, sys, time\nroot, line = sys.argv[1], sys.argv[2:]\nwhile not (found := glob.glob(root + '/**/grpo/config.json', recursive=True)): time.sleep(.2)\n"
            "os.execv(line[0], [found[0] if word == 'CONFIG' else word for word in line])")
    port = free_port()
    line = [str(word) for word in command("camflow.rl.recam_grpo", "CONFIG", 1, "torchrun", 2, 1, "127.0.0.1", port)]
    other = subprocess.Popen([sys.executable, "-c", wait, str(tmp_path), *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
                             env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # before the run, which ends what was started during it
    try:
        done = run("recam_grpo", "smoke", {"arms": ["grpo"], "nodes": 2, "address": "127.0.0.1", "port": port, "micro_batch": 2, "model": "random", "photometric": False, "lora_rank": 2, "eval_conditions": 1}, root=tmp_path, timeout=900)
        codes = [other.wait(600)]
    finally: other.kill()
    assert codes == [0] and done.status == "ok" and (done.result["status"], done.result["pipeline"]) == ("trained", "grpo/pipeline")
    assert load_pipeline(done.path/"grpo/pipeline").transformer.config.num_layers == 4


def test_a_run_can_keep_its_rollouts_and_clip_in_units_of_velocity(tmp_path):
    "The second trainer of the same folder takes its samples from the disk and learns the same; the clip range reaches the loss."
    config = TINY | {"loss": "ppo", "window": 1, "cache": True, "clip_unit": "velocity", "clip": 0.01}
    steps, folder = [], tmp_path/"rollouts"
    for _ in range(2):
        trainer = build(config, tmp_path, brightness)[0]
        steps.append(trainer.step())
    assert trainer.cache.hits == len(list(folder.iterdir())) == 2 and steps[0]["policy_loss"] == steps[1]["policy_loss"] and steps[0]["grad_norm"] == steps[1]["grad_norm"] > 0
    other = build(config | {"seed": 1}, tmp_path, brightness)[0]
    other.step()
    assert other.cache.hits == 0 and trainer.cfg.clip_unit == "velocity"


def test_kept_rollouts_are_of_one_guidance(tmp_path):
    for guidance in (3.0, 5.0):
        trainer = build(TINY | {"cache": True, "guidance": guidance}, tmp_path, brightness)[0]
        trainer.step()
        assert trainer.cache.hits == 0


def test_exploring_cameras_are_larger_and_smaller_alike():
    "The factors' mean is 1, rotation and translation are drawn apart, the first pose stays, and the draw is the generator's."
    from camflow.device import generator
    from camflow.geometry.rigid import so3_log
    from camflow.geometry.trajectory import preset
    from camflow.rl.recam_grpo import explore_cameras, parse
    asked = {"camera": preset("arc_right", 9)[None, ::4, :3].flatten(2).float().expand(400, -1, -1)}
    draw = lambda: explore_cameras(0.25)(asked, [generator("test", n) for n in range(400)])["camera"].unflatten(-1, (3, 4))
    drawn, path = draw(), asked["camera"][:1].unflatten(-1, (3, 4))
    turn = so3_log(drawn[:, -1, :, :3].double()).norm(dim=-1) / so3_log(path[:, -1, :, :3].double()).norm(dim=-1)
    move = drawn[:, -1, :, 3].norm(dim=-1).double() / path[:, -1, :, 3].norm(dim=-1).double()
    for factor in (turn, move): assert abs(factor.mean() - 1) < 0.05 and 0.2 < factor.std() < 0.3
    assert abs(torch.corrcoef(torch.stack([turn, move]))[0, 1]) < 0.15
    assert torch.equal(drawn[:, 0], path[:, 0].expand(400, 3, 4)) and torch.equal(drawn, draw())
    with pytest.raises(InputError, match="explore=0.9"): parse({"explore": 0.9})
    with pytest.raises(InputError, match="set explore=0, or loss='awm'"): parse({"explore": 0.2, "loss": "ppo"})


def test_a_collapsed_run_stops_with_its_reason_and_its_checkpoint(tmp_path, monkeypatch):
    from camflow.rl import recam_grpo
    seen = []
    def rule(history):
        seen.append(len(history))
        return "the pictures froze" if len(history) == 2 else ""
    monkeypatch.setattr(recam_grpo, "collapse", rule)
    brightness = lambda samples: torch.stack([sample.frames.unit().data.mean() for sample in samples])
    config = {"model": "random", "groups": 2, "k": 2, "sampling_steps": 4, "window_high": 3, "steps": 4, "micro_batch": 2, "eval_conditions": 1, "conditions": 3, "stop_on_collapse": True}
    result = recam_grpo.main(config, tmp_path, brightness)
    assert (result["status"], result["step"], result["reason"]) == ("collapsed", 2, "the pictures froze") and "held_out" in result and seen == [1, 2]
    again = recam_grpo.main(config | {"stop_on_collapse": False}, tmp_path, brightness)
    assert (again["status"], again["resumed"], again["step"]) == ("done", 2, 4)


def test_large_clips_are_not_all_kept():
    "The tiny family keeps its conditions, 81 frames of 480x832 keep 16 of 30,000: 1.5 GiB a rank, not 24."
    from camflow.rl.estimate import remembered
    assert remembered(60, 9, (48, 80)) == 60 and remembered(4000, 9, (48, 80)) == 256 and remembered(30_000, 81, (480, 832)) == 16
