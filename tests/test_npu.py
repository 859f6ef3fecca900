"Ready for an Ascend NPU on a machine without one: a pretended device, an audit of operations, launch lines, environment steps, hidden packages."
import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from safetensors.torch import load_file

from camflow.assets import list_profiles, list_runs, profile_path, run_notebook
from camflow.lab.audit import in_loop
from camflow.lab.launch import launch_lines

ROOT = Path(__file__).resolve().parents[1]


def python(code, *words, **env):
    "Output of a program in a process of its own: a plug-in device cannot be removed again."
    code = f"from camflow.processes import end_quickly; end_quickly()\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=900, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **{k: str(v) for k, v in env.items()}})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_no_complex_no_float64_no_waiting_in_loops():
    found = json.loads(python("from camflow.lab import audit; import sys; sys.exit(audit.main())").splitlines()[-1])
    assert [one for one in found["offences"] if in_loop(one)] == []
    assert {"rollout", "training", "update", "finetune", "encode", "decode"} <= found["regions"].keys()
    dtypes = {dtype for ops in found["regions"].values() for counts in ops.values() for key in counts for dtype in key.split()}
    assert "bfloat16" in dtypes and dtypes <= {"float32", "bfloat16", "int64", "int32", "bool"}
    assert sum(found["regions"]["rollout"]["addmm"].values()) > 50                    # it has seen the network


OFFENDER = """
import torch
from camflow.lab.audit import Audit, in_loop, report
from camflow.lab.pretend import install
install("npu")
x = torch.rand(4, 6).to("npu")
def turned(): torch.view_as_complex(x.view(4, 3, 2))
def exact(): x.double()
def asked(): x.sum().item()
def fetched_back(): x.cpu()
def masked(): x[x > 0.5]
def where(): torch.where(x > 0.5)
def fine(): (torch.nn.functional.softmax(x @ x.T, -1) @ x)[torch.tensor([0, 2])]
for one in (turned, exact, asked, fetched_back, masked, where, fine):
    with Audit() as audit, audit.region("rollout"): one()
    print(one.__name__, *sorted({o["kind"] for o in report(audit)["offences"] if in_loop(o)}))
"""


def test_the_audit_finds_each_kind():
    assert python(OFFENDER).split("\n")[:7] == ["turned complex", "exact float64", "asked waits", "fetched_back waits", "masked waits", "where waits", "fine"]


PLUGIN = """
import torch
from camflow.lab.pretend import install
npu = install("npu")
torch.distributed.Backend.register_backend("hccl", lambda *_: None, devices=["npu"])
"""

LAYER = """
import json, os, sys, tempfile, torch
from pathlib import Path
from camflow import device as dev
npu = torch.get_device_module("npu")
assert dev.torch_npu is not None and dev.ASCEND == "npu"                            # the plug-in comes with camflow.device, by its own name
assert dev.device() == torch.device("npu", 0) and dev.device("cpu").type == "cpu" and dev.device("npu:3").index == 3
assert len(dev.visible_devices()) == 8 and dev.launcher() == "accelerate" and dev.collective_backend() == "hccl"
os.environ["LOCAL_RANK"] = "5"; assert dev.device().index == 5; del os.environ["LOCAL_RANK"]
os.environ["CAMFLOW_DEVICE"] = "cpu"; assert dev.device().type == "cpu" and dev.launcher() == "torchrun"; del os.environ["CAMFLOW_DEVICE"]
try: dev.device("npu:8")
except ValueError as error: assert "8 visible" in str(error)
assert dev.compute_dtype() == torch.bfloat16
npu.is_bf16_supported, kept = (lambda: False), npu.is_bf16_supported
assert dev.compute_dtype() == torch.float32
npu.is_bf16_supported = kept
npu.calls.clear(); dev.synchronize(); assert "synchronize" in npu.calls
before = dev.memory_stats()
held = torch.zeros(2**20).to(dev.device())
after = dev.memory_stats()
assert after["kind"] == "device" and after["current_bytes"] - before["current_bytes"] == 2**22 and after["total_bytes"] == 64 * 2**30
del held
assert dev.memory_stats()["current_bytes"] == before["current_bytes"] and dev.memory_stats()["peak_bytes"] == after["peak_bytes"]
assert dev.reset_peak_memory() and dev.memory_stats()["peak_bytes"] == before["current_bytes"]
info = json.loads(json.dumps(dev.env_info()))
assert info["device"] == "npu:0" and info["device_name"] == "pretended" and info["versions"]["torch-npu"] == "2.13.0" and info["sdpa"] == {"native": True} and info["devices"] == 8
draws = torch.randn(4, generator=dev.generator(0, "noise", 1)).to(dev.device())     # the host's stream, moved
assert torch.equal(draws.cpu(), torch.randn(4, generator=dev.generator(0, "noise", 1)))

from accelerate import PartialState
from accelerate.utils import is_npu_available
os.environ.update(LOCAL_RANK="0"); assert PartialState._prepare_backend(PartialState.__new__(PartialState))[0] == "hccl"; del os.environ["LOCAL_RANK"]
assert is_npu_available()
from camflow.training.metric_writer import read_metrics
from tests import train_small
noise = train_small.item_noise
train_small.item_noise = lambda *key: noise(*key).to(dev.device())
train_small.DATA, folder = train_small.DATA.to(dev.device()), Path(tempfile.mkdtemp())
config = dict(steps=4, batch_size=4, lr=1e-2, ema_decay=0.9, checkpoint_every=2, seed=3)
for steps in (2, 4): result = train_small.main({**config, "steps": steps}, folder)   # with a checkpoint between
assert result.loop.accelerator.device.type == "npu" and result.resumed == 2
print(json.dumps(read_metrics(folder)["loss"].tolist()))
"""


def test_device_layer_and_training_on_a_plugin(tmp_path):
    "The plug-in lies beside camflow, is found by its name, and trains to the numbers of the CPU."
    (tmp_path/"torch_npu").mkdir()
    (tmp_path/"torch_npu/__init__.py").write_text(PLUGIN)
    (tmp_path/"torch_npu-2.13.0.dist-info").mkdir()
    (tmp_path/"torch_npu-2.13.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n")
    losses = json.loads(python(LAYER, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}").splitlines()[-1])
    from camflow.training.metric_writer import read_metrics
    from tests import train_small
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_small.main(dict(steps=4, batch_size=4, lr=1e-2, ema_decay=0.9, checkpoint_every=2, seed=3), tmp_path/"cpu")
    torch.set_num_threads(threads)
    assert losses == read_metrics(tmp_path/"cpu")["loss"].tolist()


JUDGES = """
import numpy as np, torch
from camflow.lab.pretend import install
install("npu")
from camflow.device import device
from camflow.wan.evaluate import generate
from camflow.wan.omnicam import tiny_omnicam
from camflow.wan.omnicam_evaluate import ScriptClips, film
from camflow.wan.recam import tiny_recam
from camflow.wan.vae import tiny_vae
from camflow.wan.vae_train import vae_quality
clip, still = torch.full((1, 9, 3, 48, 80), 90, dtype=torch.uint8), np.eye(4)[None, None].repeat(9, 1)
class Bank:
    cameras = 1
    def __len__(self): return 1
    def images(self, scene, camera): return clip[0].numpy()
here, vae = device(), tiny_vae().to(device())
assert here.type == "npu" and abs(vae_quality(vae, Bank(), 1)["psnr"] - vae_quality(tiny_vae(), Bank(), 1)["psnr"]) < 1e-3
assert generate(tiny_recam().to(here), vae, clip, torch.zeros(1, 3, 12), torch.zeros(1, 4, 64), steps=1).device.type == "cpu"
clips = ScriptClips(clip[:, 0], clip, still, still, [[]], [""], [None])
for place in (here, "cpu"):                                             # a notebook's model may have stayed on the host
    model = tiny_omnicam(image_dim=None, added_kv_proj_dim=None).to(place)
    for camera in ("asked", "off"): assert film(model, vae, clips, torch.zeros(1, 4, 64), camera, steps=1).shape == clip.shape
from camflow.depth.flow_pose import flow_poses
seen, depth, K = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8), torch.full((48, 80), 3.0), torch.tensor([[60.0, 0, 40], [0, 60, 24], [0, 0, 1]])
assert torch.equal(flow_poses(seen.to(here), depth.to(here), K.to(here)), flow_poses(seen, depth, K))
print("judged")
"""


def test_held_out_judges_on_a_plugin(): assert "judged" in python(JUDGES)


TINY = {"model": "tiny", "groups": 1, "k": 2, "sampling_steps": 2, "window": 1, "steps": 1, "micro_batch": 2, "eval_conditions": 1, "conditions": 1, "lr": 1e-3, "checkpoint_every": 1}


def test_stable_video_diffusion_samples_on_a_plugin():
    "The scheduler's numbers stay on the host: set on the device, each of them would be fetched."
    python("""
import torch
from camflow.lab.pretend import install
install("npu")
from camflow.joint.edm import added_time_ids, svd_sample
from camflow.joint.models import tiny_svd
unet = tiny_svd(num_frames=3)["unet"].to("npu")
there = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("npu")
made = svd_sample(unet, there(1, 3, 3, 8, 8), there(1, 3, 8, 8), there(1, 1, 16), added_time_ids().to("npu"), steps=2)
assert made.device.type == "npu" and bool(made.cpu().isfinite().all())
""")


@pytest.mark.slow
def test_a_whole_post_training_on_a_plugin(tmp_path):
    "Rollout, decode, reward, update, judging and export; the numbers of the CPU to the rounding of another attention kernel."
    for where, start in {"cpu": [], "npu": ["camflow.lab.pretend"]}.items():
        (tmp_path/where).mkdir()
        (tmp_path/where/"config.json").write_text(json.dumps(TINY))
        code = "import sys\nsys.argv = sys.argv[1:]\n" + ("import torch\nfrom camflow.lab.pretend import install\ninstall('npu').is_bf16_supported = lambda: False\n" if start else "")
        python(code + "import runpy; runpy.run_module('camflow.rl.recam_grpo', run_name='__main__', alter_sys=True)", "x", "--config", tmp_path/where/"config.json")
        assert (tmp_path/where/"pipeline").is_dir()
    for name in ("before", "after"):   # clips in bytes, made without the update and with it
        cpu, npu = (load_file(tmp_path/where/f"{name}.safetensors")["videos"].int() for where in ("cpu", "npu"))
        away = (cpu - npu).abs()
        assert away.max() <= 1 and (away > 0).float().mean() < 1e-3, name
    cpu, npu = (json.loads((tmp_path/where/"result.json").read_text())["held_out"]["camera"]["before"] for where in ("cpu", "npu"))
    assert npu == pytest.approx(cpu, abs=0.03)   # optical flow makes more of a single byte


MANY = [(name, profile) for name in list_runs() for profile in list_profiles(name) if re.search(r"^(num_processes|nodes):", profile_path(name, profile).read_text(), re.M)]
PARSE = """
import json, sys
from camflow.lab.pretend import install
install("npu")
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
for line in sys.argv[1:]:
    words = line.split()
    assert words[:3] == ["python", "-m", "accelerate.commands.launch"]
    args = _validate_launch_command(launch_command_parser().parse_args(words[3:]))[0]
    prepare_multi_gpu_env(args)
    print(json.dumps([args.multi_gpu, args.module, args.training_script, args.training_script_args, *(str(getattr(args, k, None)) for k in ("nnodes", "nproc_per_node", "node_rank", "rdzv_endpoint"))]))
"""


def test_launch_lines_of_the_shipped_profiles():
    "Every profile for several devices, and 1, 8 and 4 x 8: the lines are read back by accelerate itself, on a device that seems to be there."
    assert {("recam_grpo", "npu8"), ("recam_grpo", "npu32"), ("recam_finetune", "npu8"), ("recam_finetune", "npu32")} <= set(MANY)
    asked = {"1 x 8": ("camflow.rl.recam_grpo", 1, 8), "4 x 8": ("camflow.rl.recam_grpo", 4, 8)}
    for name, profile in MANY:
        values, text = yaml.safe_load(profile_path(name, profile).read_text()), run_notebook(name).read_text()
        assert (module := re.search(r"launch\(\\?[\"']([\w.]+)", text)[1]) and __import__("importlib.util").util.find_spec(module)
        asked[f"{name} {profile}"] = (module, values.get("nodes", 1), values.get("num_processes", 1))
    lines = {what: launch_lines("RUN/config.json", nodes, devices, module) for what, (module, nodes, devices) in asked.items()}
    assert launch_lines("RUN/config.json", 1, 1, "camflow.rl.recam_grpo") == ["python -m camflow.rl.recam_grpo --config RUN/config.json"]
    parsed = iter(map(json.loads, python(PARSE, *[line for each in lines.values() for line in each]).splitlines()))
    for what, (module, nodes, devices) in asked.items():
        assert len(lines[what]) == nodes
        for node in range(nodes):
            multi, as_module, script, words, *place = next(parsed)
            assert multi and as_module and script == module and words == ["--config", "RUN/config.json"], what
            assert place[:3] == [str(nodes), str(devices), str(node)] if nodes > 1 else place[1] == str(devices), (what, place)
            assert nodes == 1 or place[3] == "NODE0:29500", place


def text_of(notebook): return "\n".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells)


def test_pins_of_the_document_are_the_packages():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT/"settings.ini")
    package = settings["DEFAULT"]
    document = set(re.findall(r"\b(torch(?:-npu)?)==([\d.]+)", text_of(ROOT/"nbs/tutorials/ascend.ipynb")))
    pinned = set(re.findall(r"\b(torch(?:-npu)?)==([\d.]+)", " ".join([package["requirements"], package["npu_requirements"], (ROOT/"constraints.txt").read_text()])))
    assert document == pinned and {name for name, _ in pinned} == {"torch", "torch-npu"}
    assert len({number for _, number in pinned}) == 1                               # the plug-in requires exactly its own PyTorch
    for wheel in ("decord", "pycolmap"): assert re.search(rf"{wheel}[^ ]*;platform_machine=='x86_64'", package["requirements"])
    assert f"Python {package['min_python']}" in text_of(ROOT/"nbs/tutorials/ascend.ipynb")


HIDE = """
import hashlib, importlib, json, pkgutil, sys
hidden = ("decord", "pycolmap") if sys.argv[2] == "hide" else ()
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
from camflow.media.video import has_decord, probe, read_video
count = probe(sys.argv[1]).frames
shown = [hashlib.sha256(read_video(sys.argv[1], picks).data.numpy().tobytes()).hexdigest() for picks in (None, [0], [count - 1, 3, 3, 17], list(range(0, count, 4)))]
if hidden:
    import camflow
    for module in pkgutil.walk_packages(camflow.__path__, "camflow."): importlib.import_module(module.name)
print(json.dumps([has_decord(), count, shown]))
"""


def test_without_decord_and_pycolmap(tmp_path):
    "As on aarch64: every module imports, and the same frames are read."
    from camflow.media.frames import Frames
    from camflow.media.video import write_video
    frames = torch.rand(24, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path/"a.mp4", Frames(torch.nn.functional.interpolate(frames, (48, 80)), "unit", fps=8))
    with_it, without = (json.loads(python(HIDE, tmp_path/"a.mp4", how).splitlines()[-1]) for how in ("keep", "hide"))
    assert without[0] is False and without[1:] == with_it[1:] and without[1] == 24


SHARDED = """
import sys, torch
from pathlib import Path
from camflow.training.loop import TrainConfig, fit, item_noise, positions
from camflow.training.metric_writer import read_metrics
from camflow.wan.finetune import flow_loss, prepare_trained
from camflow.wan.recam import cast, tiny_recam
torch.set_num_threads(1)
def batch_fn(step, rank, world, micro):
    items = positions(step, rank, world, micro, 1)
    return [item_noise(shape, 0, items, name) for name, shape in {"target": (16, 2, 4, 4), "source": (16, 2, 4, 4), "camera": (2, 12), "text": (6, 64), "noise": (16, 2, 4, 4)}.items()]
def step_fn(model, batch, noise):
    sigma = torch.full((1,), 0.5)
    return flow_loss(model, *batch, sigma, torch.ones(1)).mean(), {}
for trained in ("recam", "lora"):
    found = {}
    for shard in (True, False):
        model, folder = cast(tiny_recam(0, num_layers=2), torch.bfloat16), Path(sys.argv[1])/f"{trained}{shard}"
        chosen = prepare_trained(model, trained, 4)
        fit(folder, model, step_fn, batch_fn, TrainConfig(steps=4, batch_size=1, lr=1e-3, bf16=True, ema_decay=0.9, gradient_checkpointing=True, shard=shard, checkpoint_every=0), trainable=chosen)
        found[shard] = read_metrics(folder)[["loss", "grad_norm"]]
    if torch.distributed.get_rank() == 0: print(trained, float((found[True] - found[False]).abs().max().max()), found[True]["loss"].tolist())
"""


@pytest.mark.slow
def test_recam_is_sharded_over_two_gloo_ranks(tmp_path):
    "The transformer with a frozen part in bfloat16, bfloat16 compute and recomputed blocks, by attention weights and by adapters: FSDP2 has the curve of DDP."
    (tmp_path/"sharded.py").write_text(SHARDED)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path/"sharded.py"), str(tmp_path)], capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith(("recam", "lora"))]
    assert len(rows) == 2 and max(float(gap) for _, gap, _ in rows) < 1e-3, done.stdout
