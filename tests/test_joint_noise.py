"""Joint diffusion's noise, schedules, sampling and pipelines: the reference's mistakes are not ours, and bad input is refused."""
import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import camflow.joint
from camflow.device import generator
from camflow.files import InputError
from camflow.joint import edm
from camflow.joint.adapter import JointAdapter
from camflow.joint.models import tiny_sd, tiny_svd
from camflow.joint.pipelines import JointImagePipeline, JointVideoPipeline
from camflow.joint.sample import pair_rows, rows, sample_joint, sd_model
from camflow.joint.schedule import Levels, coarse_schedule, given_schedule, joint_schedule, schedule
from camflow.joint.timesteps import LossGrid, TimestepSampler, add_noise, drop_prompts, joint_loss, min_snr_weights, null_prompts
from camflow.media.frames import Depth, Flow, Frames

GOLDENS = Path(__file__).parent / "goldens" / "joint"


def ddim(**changes):
    return DDIMScheduler(**dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1) | changes)


def randn(*key, shape=(1, 4, 8, 8)): return torch.randn(shape, generator=generator(*key))


@pytest.fixture
def pair(): return {"noise": {n: randn("noise", n) for n in "xy"}, "clean": {n: randn("clean", n) for n in "xy"}}


def linear(shown, times, guided, joint):
    "A smooth stand-in for a network; guided and unguided, joint and separate differ."
    out = 0.3 * shown + 0.01 * joint
    return (out - 0.1 if guided else None), out


# ---- parity

def test_goldens():
    from tests.parity.joint_noise import check
    results = check(GOLDENS)
    assert results and not {case: r for case, r in results.items() if r[3] is not True}


@pytest.mark.parametrize("case, tensor", [("edm", "input.model_pred"), ("loss", "input.target")])
def test_a_perturbed_input_fails(tmp_path, case, tensor):
    from tests.parity.joint_noise import check
    told = json.loads((GOLDENS / "cases.json").read_text())
    (tmp_path / "cases.json").write_text(json.dumps(told | {"cases": {case: told["cases"][case]}}))
    tensors = load_file(GOLDENS / f"{case}.safetensors")
    tensors[tensor].view(-1)[3] += 0.1
    save_file(tensors, tmp_path / f"{case}.safetensors")
    assert any(r[3] is False for r in check(tmp_path).values())


def test_a_wrong_table_fails(tmp_path):
    from tests.parity.joint_noise import check
    shutil.copy(GOLDENS / "cases.json", tmp_path / "cases.json")
    told = json.loads((tmp_path / "cases.json").read_text())
    (tmp_path / "cases.json").write_text(json.dumps(told | {"cases": {}}))
    tables = json.loads((GOLDENS / "schedules.json").read_text())
    tables[0]["output"]["rows"][1]["steps"][0] += 1
    (tmp_path / "schedules.json").write_text(json.dumps(tables))
    assert check(tmp_path)["schedules"][3] is False


# ---- the reference's mistakes (numbers of specs/joint.md 1.6)

def test_2_null_prompts_of_training_are_those_of_sampling():
    parts = tiny_sd()
    from camflow.joint.train import Encoders
    empty = Encoders(parts, "sd").text([""])
    trained = null_prompts(torch.ones(2, *empty.shape[1:]), torch.tensor([True, False]), empty)
    seen = []
    unet = parts["unet"]
    unet.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
    JointImagePipeline(**parts)("a ball", num_inference_steps=1)
    assert torch.equal(seen[0][0], trained[0]) and torch.equal(seen[0][1], trained[0])
    seen.clear()
    JointImagePipeline(**parts)("a ball", num_inference_steps=1, null="zeros")  # weights trained with zeros
    assert not seen[0][:2].any() and seen[0][2:].any()


def test_4_a_clean_condition_is_exact_and_stays(pair):
    for levels in (Levels.of(ddim(), 6), ddim()):
        shown = []
        model = lambda x, t, guided, joint: (shown.append((x[1:].clone(), float(t[1]))), linear(x, t, guided, joint))[1]
        out = sample_joint(model, pair["noise"], given_schedule(given="y", steps=6), levels, pair["clean"])
        assert torch.equal(out["y"], pair["clean"]["y"])
        assert all(torch.equal(x, pair["clean"]["y"]) and t == 0 for x, t in shown)


def test_4_training_conditions_are_exact_too():
    draw = TimestepSampler(mode="role_mask", condition_probability=1.0)(8, generator(0))
    clean, noise, exact = randn(0, shape=(16, 4, 2, 2)), randn(1, shape=(16, 4, 2, 2)), draw.clean.flatten()
    noisy = add_noise(clean, noise, draw.timesteps().flatten(), ddim().alphas_cumprod, exact)
    assert torch.equal(noisy[exact], clean[exact]) and not (noisy[~exact] == clean[~exact]).any()
    loss, _ = joint_loss(noise + 1, noise, clean=exact)
    assert float(loss) == pytest.approx(1)  # a mean over the noisy rows, not over all


@pytest.mark.parametrize("scale", [None, 1.0, 7.5])
def test_5_signal_guidance_without_prompt_guidance(pair, scale):
    run = lambda g: sample_joint(linear, pair["noise"], joint_schedule(steps=3), Levels.of(ddim(), 3), guidance_scale=scale, signal_guidance=g)
    assert torch.isfinite(run(2.0)["x"]).all() and not torch.allclose(run(2.0)["x"], run(0.0)["x"])


def test_6_each_masked_input_is_renoised_at_its_own_level(pair):
    plan, levels, mask = coarse_schedule(strength={"y": 0.5}, steps=6), Levels.of(ddim(), 6), torch.zeros(1, 1, 8, 8)
    seen = []
    sample_joint(linear, pair["noise"], plan, levels, pair["clean"], {"x": mask, "y": mask}, callback=lambda k, x: seen.append(x))
    for k, now in enumerate(seen):
        for name, position in zip("xy", plan.positions[k + 1]):
            assert torch.equal(now[name], levels.noised(pair["clean"][name], pair["noise"][name], position))
    assert plan.positions[1][0] != plan.positions[1][1]


def test_6_with_the_copies_of_a_diffusers_scheduler(pair):
    plan, mask = coarse_schedule(strength={"y": 0.5}, steps=6, grid=True), torch.zeros(1, 1, 8, 8)
    scheduler, seen = ddim(), []
    scheduler.set_timesteps(6)
    sample_joint(linear, pair["noise"], plan, ddim(), pair["clean"], {"x": mask, "y": mask}, callback=lambda k, x: seen.append(x))
    for k, now in enumerate(seen[:-1]):
        for name, position in zip("xy", plan.positions[k + 1]):
            if position < 6: assert torch.equal(now[name], scheduler.add_noise(pair["clean"][name], pair["noise"][name], scheduler.timesteps[int(position)][None]))


def test_7_no_device_names():
    for file in ("timesteps", "edm", "schedule", "sample", "pipelines"):
        source = (Path(camflow.joint.__file__).parent / f"{file}.py").read_text()
        assert not re.search(r"\b(cuda|npu|autocast)\b", source), file


def test_9_every_call_moves_everything_that_has_a_way_to_go():
    for strength in (0.1, 0.3, 0.7, 0.95):
        plan = coarse_schedule(("x", "y"), {"y": strength}, 20)
        assert plan.calls == 20 and all(all(plan.moves(k)) for k in range(plan.calls))
        old = coarse_schedule(("x", "y"), {"y": strength}, 20, compat="unicon")
        assert strength > 0.9 or not all(all(old.moves(k)) for k in range(old.calls))
    both = coarse_schedule(("x", "y"), {"x": 0.5, "y": 0.2}, 20, grid=True)
    assert both.calls == 10 and all(any(both.moves(k)) for k in range(both.calls))


# ---- levels and schedulers

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_levels_are_the_schedulers_loop(pair, kind):
    for make in (ddim, lambda **c: EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1, **c)):
        scheduler = make(prediction_type=kind)
        a = sample_joint(linear, pair["noise"], joint_schedule(steps=8), scheduler, guidance_scale=None)
        if isinstance(scheduler, DDIMScheduler):
            b = sample_joint(linear, pair["noise"], joint_schedule(steps=8), Levels.of(scheduler, 8), guidance_scale=None)
            torch.testing.assert_close(a["x"], b["x"], atol=2e-3, rtol=1e-3)
        assert scheduler.num_inference_steps is None  # the caller's scheduler is untouched


def test_a_step_in_two_halves_is_the_step_for_a_network_that_knows(pair):
    levels, x0 = Levels.of(ddim(), 10), pair["clean"]["x"]
    x = levels.noised(x0, pair["noise"]["x"], 3)
    whole = levels.step(pair["noise"]["x"], x, 3, 5)
    half = levels.step(pair["noise"]["x"], levels.step(pair["noise"]["x"], x, 3, 4.2), 4.2, 5)
    torch.testing.assert_close(whole, half, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, levels.noised(x0, pair["noise"]["x"], 5), atol=1e-5, rtol=1e-5)


def test_stochastic_schedulers_use_the_generator(pair):
    run = lambda seed: sample_joint(linear, pair["noise"], joint_schedule(steps=3), EulerAncestralDiscreteScheduler(), generator=generator(seed))["x"]
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_several_conditions_share_the_first_row():
    parts = tiny_sd()
    adapter = JointAdapter(parts["unet"], empty=True)
    for name in ("depth", "edge"): adapter.add_model(name, "conv")
    pipe = JointImagePipeline(**parts, adapter=adapter, names=("image", "depth", "edge"))
    assert pipe.pairs() == [(0, 1, 1.0, 1.0, "depth"), (0, 2, 1.0, 1.0, "edge")]
    edge = Frames(torch.rand(1, 3, 16, 16, generator=generator(0)), "unit")
    given = {"depth": Depth(torch.linspace(1, 3, 16).expand(1, 1, 16, 16), "metric"), "edge": edge}
    run = lambda: pipe("a ball", given, num_inference_steps=2, output_type="latent").modalities["image"]
    before = run()
    for n, p in adapter.parameters_by_name().items(): p.data += 0.1 if "edge" in n else 0.0
    assert not torch.allclose(before, run())  # the edge model reaches the picture


def test_pair_rows(): assert pair_rows([("x", "z", 0.5, 0.5, "m")], ("x", "y", "z"), 2) == [(0, 4, 0.5, 0.5, "m"), (1, 5, 0.5, 0.5, "m")]


# ---- draws

def test_draws_come_from_the_generator_alone():
    for mode in ("independent", "shared", "unbalanced", "role_mask"):
        sampler = TimestepSampler(3, mode)
        state = torch.random.get_rng_state()
        a, b = sampler(16, generator(1)), sampler(16, generator(1))
        assert torch.equal(a.u, b.u) and torch.equal(a.clean, b.clean) and torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(drop_prompts(8, 0.3, generator(0), 3), drop_prompts(8, 0.3, generator(0), 3))


def test_levels_cover_the_range():
    u = TimestepSampler(mode="independent")(20000, generator(0))
    assert int(u.timesteps().min()) == 0 and int(u.timesteps().max()) == 999
    assert abs(torch.corrcoef(u.u)[0, 1]) < 0.03
    for kind in ("lognormal", "cosine"):
        sigma = edm.draw_sigmas(torch.tensor([0.0, 0.3, 0.6, 1.0]), kind)
        assert (sigma.diff() > 0).all() and sigma[0] >= edm.SIGMA_MIN and sigma[-1] <= edm.SIGMA_MAX


def test_the_condition_image_has_noise_of_its_own():
    g = generator(3)
    diffusion = torch.randn(1, 3, 8, 8, generator=g)
    added = edm.augment(torch.zeros(1, 3, 8, 8), 1.0, g)
    assert abs(torch.corrcoef(torch.stack([diffusion.flatten(), added.flatten()]))[0, 1]) < 0.3


def test_loss_grid_merges_and_restores():
    a, b = LossGrid(), LossGrid()
    u = torch.tensor([[0.05, 0.95], [0.0, 0.5]])
    a.add(u, torch.tensor([[1.0, 3], [9, 5]]), torch.tensor([[False, False], [True, False]]))
    b.add(u, torch.tensor([[3.0, 3], [9, 5]]))
    both = a.merge(b)
    assert both.mean(0)[0, 0] == 2 and both.mean(1)[0, 0] == 9 and torch.isnan(a.mean(1)[0, 0]) and both.counts.sum() == 7
    other = LossGrid()
    other.load_state_dict(copy.deepcopy(both.state_dict()))
    assert torch.equal(other.counts, both.counts)


# ---- bad input

@pytest.mark.parametrize("segments, message", [
    ([], "no segment"), ([[(0, 0.9), (0, 1)]], "not covered"), ([[(0, 1), (0.5, 0.2)]], "goes back"), ([[(0, 1), (-0.1, 1)]], "0 \\(noise\\) to 1"), ([[(0, 1), (0, 1.2)]], "0 \\(noise\\) to 1"),
    ([[(1, 1), (1, 1)]], "nothing moves"), ([[(0, 0.5), (0, 0.4)], [(0.5, 1), (0.6, 1)]], "let segments join"), ([[(0, 1), (0, 1)], [(0, 1)]], "ranges for"), ([[(0, 1), (0, 1), 2]], "only 0 is known")])
@pytest.mark.parametrize("compat", [None, "unicon"])
def test_schedules_that_do_not_arrive(segments, message, compat):
    with pytest.raises(InputError, match=message): schedule(segments, 10, ("x", "y"), compat=compat)


@pytest.mark.parametrize("call, message", [
    (lambda: schedule([[(0, 1)] * 2], 0), "at least 1"), (lambda: schedule([[(0, 1)] * 2], 10, compat="release"), "None or 'unicon'"), (lambda: coarse_schedule(strength={"y": 1.5}), "0 \\(held clean\\)"),
    (lambda: given_schedule(given=("depth",)), "the modalities are"), (lambda: schedule([[(0, 1)] * 2], 5, ("x", "x")), "own name"),
    (lambda: TimestepSampler(1, "role_mask"), "no partner"), (lambda: TimestepSampler(condition_probability=2), "0..1"), (lambda: min_snr_weights(torch.ones(1), 5.0, "sample"), "epsilon or v_prediction"),
    (lambda: min_snr_weights(torch.ones(1), -1.0), "positive"), (lambda: joint_loss(torch.zeros(2, 3), torch.zeros(4, 3)), "one shape"), (lambda: drop_prompts(2, 0.5, generator(0), 2, "instructpix2pix"), "1/3"),
    (lambda: null_prompts(torch.zeros(1, 2, 2), torch.tensor([True]), "empty"), "zeros"), (lambda: edm.draw_sigmas(torch.rand(2), "uniform"), "lognormal or cosine"),
    (lambda: edm.added_time_ids(fps=0.5), "at least 1"), (lambda: edm.added_time_ids([7, 8], batch=3), "one per sample"), (lambda: edm.augment(torch.rand(1, 3, 4, 4) * 255, 0.02, generator(0)), "-1..1"),
    (lambda: rows({"x": torch.zeros(2, 4, 8, 8), "y": torch.zeros(1, 4, 8, 8)}, ("x", "y")), "mismatched"), (lambda: rows({"x": torch.zeros(2, 4, 8, 8)}, ("x", "y")), "nothing for y"),
    (lambda: pair_rows([("x", "x")], ("x", "y"), 1), "two different"), (lambda: Levels.of(ddim(prediction_type="sample"), 5), "epsilon or v_prediction")])
def test_refusals(call, message):
    with pytest.raises(InputError, match=message): call()


def test_refusals_of_the_loop(pair):
    run = lambda plan=None, levels=None, model=linear, **more: sample_joint(model, pair["noise"], plan or joint_schedule(steps=4), levels or Levels.of(ddim(), 4), **more)
    bad = [(dict(plan=given_schedule(given="y", steps=4)), "starts clean"), (dict(levels=Levels.of(ddim(), 5)), "one number of steps"), (dict(mask={"x": torch.ones(1, 1, 8, 8)}), "nothing to keep"),
           (dict(mask={"x": torch.ones(1, 1, 16, 16)}, clean=pair["clean"]), "resize it"), (dict(clean={"x": torch.zeros(1, 4, 4, 4)}), "one shape"), (dict(clean={"z": pair["clean"]["x"]}), "the modalities are"),
           (dict(plan=coarse_schedule(strength={"y": 0.3}, steps=4), levels=ddim(), clean=pair["clean"]), "grid=True"), (dict(model=sd_model(None, None, torch.zeros(2, 7, 8), None)), "stands for no prompt"),
           (dict(model=sd_model(None, None, torch.zeros(3, 7, 8), torch.zeros(1, 7, 8))), "3 prompts for 2 rows")]
    for arguments, message in bad:
        with pytest.raises(InputError, match=message): run(**arguments)


# ---- pipelines

@pytest.fixture(scope="module")
def picture_pipe():
    parts = tiny_sd()
    return JointImagePipeline(**parts, adapter=JointAdapter(parts["unet"]))


def test_ranges_are_never_guessed(picture_pipe):
    "The same bright picture in three ranges gives the same result; as a bare tensor it is refused."
    bright = torch.rand(1, 3, 16, 16, generator=generator(0)) * 0.4 + 0.6
    run = lambda value: picture_pipe("a ball", {"image": value}, num_inference_steps=2, output_type="latent").modalities["depth"]
    unit, signed = run(Frames(bright, "unit")), run(Frames(bright * 2 - 1, "signed"))
    torch.testing.assert_close(unit, signed, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(Frames((bright * 255).round().to(torch.uint8), "byte")), unit, atol=0.1, rtol=0.05)
    with pytest.raises(InputError, match="do not say their range"): run(bright)
    with pytest.raises(InputError, match="outside range"): Frames(bright * 255, "signed")


def test_modes_and_compat(picture_pipe):
    depth = {"depth": Depth(torch.linspace(1, 3, 16).expand(1, 1, 16, 16), "metric")}
    assert picture_pipe("a", depth, mode="given", num_inference_steps=2).schedule.inits == ("noise", "clean")
    old = picture_pipe("a", depth, num_inference_steps=4, compat="unicon")
    assert old.schedule.positions[0] == (0, 3) and old.modalities["depth"] is not depth["depth"]
    images = picture_pipe("a", depth, num_inference_steps=2, output_type="pil").modalities
    assert images["image"][0].size == (16, 16) and len(images["depth"]) == 1
    with pytest.raises(InputError, match="no value|no.*mask|give conditions"): picture_pipe("a", masks={"image": torch.ones(1, 1, 16, 16)})
    with pytest.raises(InputError, match="output_type"): picture_pipe("a", output_type="tensor")
    with pytest.raises(InputError, match="another network"): JointImagePipeline(**tiny_sd(1), adapter=picture_pipe.adapter)


def test_pictures_that_do_not_fit(picture_pipe):
    picture, depth = Frames(torch.rand(1, 3, 16, 16, generator=generator(0)), "unit"), lambda *size: Depth(torch.linspace(1, 3, size[-1]).expand(1, 1, *size), "metric")
    bad = [(dict(conditions={"image": Frames(torch.zeros(1, 3, 15, 16), "unit")}), "multiples of"), (dict(conditions={"image": picture}, height=15), "multiples of"),
           (dict(conditions={"image": picture, "depth": depth(8, 8)}, strength={"image": 0.5, "depth": 0.5}), "the others 16 x 16"), (dict(conditions={"depth": depth(16, 16)}, prompt=["a", "b"]), "1 pictures of depth for 2 prompts"),
           (dict(conditions={"edge": picture}), "its modalities are image, depth"), (dict(conditions={"depth": depth(16, 16)}, strength={"depth": 1.5}), r"0 \(exact\)"), (dict(mode="given"), "say 'joint'")]
    for options, message in bad:
        with pytest.raises(InputError, match=message): picture_pipe(**dict(prompt="a", num_inference_steps=2) | options)
    wall = picture_pipe("a", {"depth": Depth(torch.full((1, 1, 16, 16), 4.0), "metric")}, num_inference_steps=1).modalities   # constant depth is a picture like any other
    assert torch.isfinite(wall["image"].data).all() and (wall["depth"].data == 4).all()


def test_clips_that_do_not_fit():
    parts = tiny_svd()
    pipe = JointVideoPipeline(**parts, adapter=JointAdapter(parts["unet"], attention="temporal"))
    clip, flow = Frames(torch.rand(4, 3, 16, 16, generator=generator(0)), "unit"), lambda n, size=(16, 16): Flow(torch.zeros(n, 2, *size), "forward")
    bad = [(dict(conditions={"video": clip[:1]}), "at least two"), (dict(conditions={"video": clip, "flow": flow(4)}, strength={"video": 0.5}), "flow has 5 frames, asked for are 4"), (dict(image=clip), "4 pictures"),
           (dict(conditions={"video": clip, "flow": flow(3, (8, 8))}, strength={"video": 0.5}), "the others 16 x 16"), (dict(), "starts from a picture"),
           (dict(image=clip[:1], conditions={"flow": Flow(torch.zeros(3, 2, 16, 16), "backward")}), "backward")]
    for options, message in bad:
        with pytest.raises(InputError, match=message): pipe(num_inference_steps=2, **options)


def test_video_masks_and_folder(tmp_path):
    parts = tiny_svd()
    pipe = JointVideoPipeline(**parts, adapter=JointAdapter(parts["unet"], attention="temporal"))
    clip = Frames(torch.rand(6, 3, 16, 16, generator=generator(0)), "unit")
    mask = torch.zeros(1, 1, 16, 16)
    out = pipe(conditions={"video": clip}, masks={"video": mask}, num_inference_steps=2)
    torch.testing.assert_close(out.modalities["video"].data, clip.signed().data, atol=1e-2, rtol=0)
    assert isinstance(out.modalities["flow"], Flow) and len(out.modalities["flow"]) == 5
    run = lambda p: p(clip[:1], num_inference_steps=2, output_type="latent").modalities["flow"]
    before = run(pipe)
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(run(JointVideoPipeline.from_pretrained(tmp_path)), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="other joint pipeline"): JointImagePipeline.from_pretrained(tmp_path)


def test_video_without_picture(tmp_path):
    "A model that was trained without condition takes no picture, and its folder says so."
    parts = tiny_svd()
    pipe = JointVideoPipeline(**parts, adapter=JointAdapter(parts["unet"], attention="temporal"), condition="none", flow_bucket=255)
    options = dict(num_inference_steps=1, num_frames=2, height=8, width=8, min_guidance_scale=1, max_guidance_scale=1, output_type="latent")
    before = pipe(**options).modalities["video"]
    assert before.shape == (1, 2, 3, 8, 8)
    with pytest.raises(InputError, match="without a condition picture"): pipe(Frames(torch.rand(1, 3, 8, 8), "unit"), **options)
    pipe.save_pretrained(tmp_path)
    again = JointVideoPipeline.from_pretrained(tmp_path)
    assert again.condition == "none" and again.flow_bucket == 255
    torch.testing.assert_close(again(**options).modalities["video"], before, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="first or none"): JointVideoPipeline(**tiny_svd(), condition="second")
