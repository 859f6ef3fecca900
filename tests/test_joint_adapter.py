"""The joint adapter: the original's numbers, PEFT's own per-row adapters as oracle, what trains, what is left alone, files in and out, and bad input."""
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel, WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from camflow.files import InputError
from camflow.joint.adapter import JointAdapter, target_gate
from camflow.joint.adapter_files import FileReport, load_adapter, read_unicon, save_adapter, unicon_state, write_unicon
from camflow.joint.branch import attend, prepare
from camflow.joint.layout import Layout, adapter_name, grouped, lora_masks
from camflow.wan.omnicam import tiny_omnicam
from camflow.wan.recam import tiny_recam
from tests.parity import joint_adapter as parity

GOLDENS = Path(__file__).parent / "goldens" / "joint"


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sd(seed=0, width=32):
    torch.manual_seed(seed)
    return UNet2DConditionModel(sample_size=8, layers_per_block=1, block_out_channels=(width, 2 * width), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8).eval()


def svd(seed=0):
    torch.manual_seed(seed)
    return UNetSpatioTemporalConditionModel(sample_size=8, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                                            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=(2, 4), layers_per_block=1,
                                            cross_attention_dim=32, addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=3).eval()


def draw(adapter, std=0.2, seed=0):
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()): p.copy_(std * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    return adapter


def image_batch(rows, size=8): return normal(rows, 4, size, size), torch.linspace(20, 900, rows).long(), normal(rows, 7, 32)
def video_batch(rows): return dict(sample=normal(rows, 3, 8, 8, 8), timestep=torch.linspace(-1, 1, rows), encoder_hidden_states=normal(rows, 1, 32), added_time_ids=torch.tensor([[6.0, 127, 0.02]] * rows))


# ---- the original's numbers

def test_replays_the_original():
    results = parity.check(GOLDENS)
    assert {case.split(".")[0] for case in results} >= {"block_conv_p1", "block_shared_row_two_models", "unet_conv", "unet_conv_fuse", "unet_skip_encoder", "unet_infer_two_models_cfg",
                                                        "svd_unet", "cfg_layout", "checkpoint_keys"}
    assert all(ok for *_, ok in results.values()), {case: result for case, result in results.items() if not result[3]}


@pytest.mark.parametrize("what", ["input", "weight", "pairs"])
def test_one_wrong_number_fails(tmp_path, what, monkeypatch):
    for name in ("cases.json", "shapes_unet.json", "shapes_trainables_conv.json", "block_conv_p1.safetensors"): shutil.copy(GOLDENS / name, tmp_path / name)
    cases = json.loads((tmp_path / "cases.json").read_text())
    (tmp_path / "cases.json").write_text(json.dumps(cases | {"cases": {"block_conv_p1": cases["cases"]["block_conv_p1"]}}))
    assert parity.check(tmp_path)["block_conv_p1"][3]
    tensors = load_file(tmp_path / "block_conv_p1.safetensors")
    if what == "weight":
        drawn, name = parity.drawn, "down_blocks.0.attentions.0.transformer_blocks.0.attn1n.to_k.lora_B.yx_lora.weight"
        monkeypatch.setattr(parity, "drawn", lambda table, prefix="": {k: v + 0.05 * (k == name) for k, v in drawn(table, prefix).items()})
    elif what == "input": tensors["input.hidden_states"][1, 3] += 0.05
    else: tensors["input.x_ids"], tensors["input.y_ids"] = tensors["input.y_ids"], tensors["input.x_ids"]
    save_file(tensors, tmp_path / "block_conv_p1.safetensors")
    assert not parity.check(tmp_path)["block_conv_p1"][3]


# ---- PEFT's own per-row adapters as oracle: full batches, gathered rows, names per row of every layer

def oracle(adapter, layout):
    "Takes the adapter's hooks off its model and puts the release's computation there, with PEFT's adapter_names."
    for hook in adapter.hooks: hook.remove()
    masks, pairs = lora_masks(layout, [m for m, s in adapter.models.items() if s.y_lora], adapter.state.side), layout.all_pairs

    def names(layer, rows):
        by_row = ["__base__"] * (len(next(iter(m[layer] for m in masks.values() if layer in m))))
        for name, layers in masks.items(): by_row = [name if on else old for on, old in zip(layers.get(layer, [0] * len(by_row)), by_row)]
        return [name for name in by_row for _ in range(rows // len(by_row))]

    def joint(block):
        def hook(attn, args, kwargs, out):
            h = args[0] if args else kwargs["hidden_states"]
            rotary, k = args[3] if len(args) > 3 else None, len(h) // layout.n
            rows = lambda ids: torch.cat([h[i * k:(i + 1) * k] for i in ids])
            twin, run = block.attn1n, lambda layer, x, name: layer(x, adapter_names=names(f"attn1n.{name}", len(x)))
            queries, sources = rows(layout.x_ids + layout.y_ids), rows(layout.y_ids + layout.x_ids)
            q, key, value = prepare(attn, run(twin.to_q, queries, "to_q"), run(twin.to_k, sources, "to_k"), run(twin.to_v, sources, "to_v"), rotary)
            o, out = run(twin.to_out[0], attend(attn, q, key, value), "to_out.0"), out.clone()
            o = o.unflatten(0, (2, len(pairs), k))
            for p, pair in enumerate(pairs):
                post = block.post1n[pair.model] if pair.model else block.conv1n
                both = post(torch.cat([o[0, p], o[1, p]], -1)).chunk(2, -1) if post.in_features == 2 * o.shape[-1] else (post(o[0, p]), post(o[1, p]))
                for row, weight, term in zip((pair.x, pair.y), (pair.x_weight, pair.y_weight), both): out[row * k:(row + 1) * k] += layout.scale * weight * term
            return out
        return hook

    for name, block in adapter.blocks.items():
        if name in adapter.branches: block.attn1.register_forward_hook(joint(block), with_kwargs=True)
        if not any(s.y_lora for s in adapter.models.values()): continue
        for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"):
            block.get_submodule(layer).register_forward_pre_hook(lambda m, a, kw, layer=layer: (a, {**kw, "adapter_names": names(layer, len(a[0]))}), with_kwargs=True)


LAYOUTS = {"training": grouped(2), "guidance": Layout([(0, 1, 0.5, 0.7)], 2, cfg=True, scale=0.6), "interleaved": Layout([(0, 1), (2, 3, 0.3, 1.0)], 4), "chain": Layout([(0, 1), (1, 2), (2, 3)], 4)}


def compare(make, call, layout, models=None, **settings):
    "Outputs and gradients of ours and of the oracle."
    found = []
    for way in ("ours", "oracle"):
        adapter = JointAdapter(make(), empty=True, **{k: settings[k] for k in ("lora_side", "attention") if k in settings})
        for name, post, y_lora in models or [("", settings.get("post", "conv_fuse"), True)]: adapter.add_model(name, post, 3, 6, y_lora, settings.get("skip", ()))
        draw(adapter)
        if way == "oracle":
            oracle(adapter, layout)
            out = call(adapter.model)
        else:
            with adapter.use(layout): out = call(adapter.model)
        (out * normal(*out.shape, seed=5)).sum().backward()
        found.append((out.detach(), {n: p.grad for n, p in adapter.parameters_by_name().items()}))
    (ours, grads), (theirs, wanted) = found
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max().clamp_min(1)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    largest = max(g.abs().max() for g in wanted.values())
    assert max((grads[n] - wanted[n]).abs().max() for n in wanted) < 1e-4 * largest


@pytest.mark.parametrize("side, post", [("token", "conv"), ("query", "conv_fuse")])
@pytest.mark.parametrize("layout", ["training", "guidance", "interleaved"])
def test_equals_peft_per_row(layout, side, post):
    x, t, text = image_batch(4, 16)                # 256 tokens at the finest level: the fused projections, too
    compare(sd, lambda net: net(x, t, text).sample, LAYOUTS[layout], lora_side=side, post=post)


def test_two_models_sharing_rows_equal_peft():
    x, t, text = image_batch(8)
    layout = Layout([(0, 1, 1.0, 0.5, "depth"), (0, 2, 0.7, 1.0, "look"), (2, 3, 0.5, 0.5, "look")], 4, cfg=True, scale=0.6)
    compare(sd, lambda net: net(x, t, text).sample, layout, models=[("depth", "conv_fuse", True), ("look", "conv", False)])


@pytest.mark.parametrize("attention", ["spatial", "temporal", "both"])
def test_video_unets_equal_peft(attention):
    batch = video_batch(2)
    compare(svd, lambda net: net(**batch).sample, Layout([(0, 1)], 2), attention=attention)


WAN = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2, ffn_dim=64, text_dim=16, freq_dim=32)


def wan_call(name):
    "(make, call) of a Wan transformer with 4 rows."
    t = torch.tensor([300.0, 800.0, 20.0, 999.0])
    if name == "diffusers": return lambda: torch.manual_seed(0) and WanTransformer3DModel(**WAN).eval(), lambda net: net(normal(4, 4, 2, 8, 8), t, normal(4, 5, 16), return_dict=False)[0]
    if name == "recam": return lambda: tiny_recam(num_layers=2).eval(), lambda net: net(normal(4, 16, 2, 4, 4), t, normal(4, 5, 64), normal(4, 16, 2, 4, 4, seed=1), normal(4, 2, 12))
    return lambda: tiny_omnicam(num_layers=2).eval(), lambda net: net(normal(4, 36, 2, 4, 4), t, normal(4, 5, 64), normal(4, 10, 32), return_dict=False)[0]


@pytest.mark.parametrize("name", ["diffusers", "recam", "omnicam"])
def test_wan_transformers_equal_peft(name):
    make, call = wan_call(name)
    compare(make, call, grouped(2))


@pytest.mark.parametrize("name", ["diffusers", "recam", "omnicam"])
def test_wan_starts_as_itself_and_reorders(name):
    make, call = wan_call(name)
    with torch.no_grad():
        plain = call(net := make())
        adapter = JointAdapter(net)
        with adapter.use(grouped(2)): assert torch.equal(call(net), plain)
        draw(adapter)
        with adapter.use(Layout([(0, 2), (1, 3)], 4)): together = call(net)
        with adapter.use(Layout([(0, 2)], 4)): half = call(net)
    assert (together - half).abs().amax((1, 2, 3, 4))[[1, 3]].min() > 1e-3 and torch.allclose(together[[0, 2]], half[[0, 2]], atol=1e-4)


# ---- what trains, what is left alone

def test_nothing_is_copied_and_only_the_adapter_trains():
    plain, net = sd(), sd()
    adapter = JointAdapter(net)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in plain.parameters()) + sum(p.numel() for p in adapter.parameters())   # no copy of attn1
    assert {n for n, p in net.named_parameters() if p.requires_grad} == set(adapter.parameters_by_name())
    assert set(net.state_dict()) - set(adapter.parameters_by_name()) == {n for n, _ in net.named_parameters()} - set(adapter.parameters_by_name())
    x, t, text = image_batch(4)
    with adapter.use(adapter.layout(2)): net(x, t, text).sample.square().mean().backward()
    moving = {n for n, p in adapter.parameters_by_name().items() if p.grad.abs().max() > 0}
    assert all("conv1n" in n or "lora_B.y_lora" in n for n in moving) and any("conv1n" in n for n in moving)      # zero post and zero B at the start
    assert all(p.grad is None for n, p in net.named_parameters() if n not in adapter.parameters_by_name())


def test_y_lora_does_not_follow_into_the_twin():
    adapter = JointAdapter(sd())
    assert not any("attn1n" in n and "y_lora" in n and "xy_lora" not in n for n in adapter.parameters_by_name())
    assert not any(".attn1." in n and ("xy_lora" in n or "yx_lora" in n) for n in adapter.parameters_by_name())


def test_skipped_encoder_keeps_y_lora():
    names = set(JointAdapter(sd(), skip="down_blocks").parameters_by_name())
    assert not any(n.startswith("down_blocks") and ("attn1n" in n or "conv1n" in n) for n in names)
    assert any(n.startswith("down_blocks") and "y_lora" in n for n in names) and any(n.startswith("mid_block") and "conv1n" in n for n in names)


def test_gradient_checkpointing_gives_the_same_gradients():
    x, t, text = image_batch(4)
    found = []
    for checkpointing in (False, True):
        adapter = draw(JointAdapter(sd()))
        if checkpointing: adapter.model.enable_gradient_checkpointing()
        adapter.model.train()
        with adapter.use(adapter.layout(2)): adapter.model(x, t, text).sample.square().mean().backward()
        found.append([p.grad for p in adapter.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_branch_off_scale_zero_and_everything_off():
    net, (x, t, text) = sd(), image_batch(4)
    with torch.no_grad():
        plain = net(x, t, text).sample
        adapter = draw(JointAdapter(net))
        call = lambda: net(x, t, text).sample
        with adapter.use(grouped(2, scale=0.0)): silent = call()
        with adapter.use(grouped(2)):
            on = call()
            with adapter.off(): off = call()
            with adapter.off(lora=True): assert torch.equal(call(), plain)
            assert torch.equal(call(), on)
        assert torch.equal(call(), plain)
    assert torch.allclose(off, silent, atol=1e-5) and torch.allclose(off[:2], plain[:2], atol=1e-5) and (off[2:] - plain[2:]).abs().max() > 1e-3


def test_gate_switches_loras_row_by_row():
    adapter, (x, t, text) = draw(JointAdapter(sd())), image_batch(4)
    call = lambda gate: adapter.model(x, t, text).sample if gate is None else gated(gate)
    def gated(gate):
        with adapter.use(grouped(2), gate=gate): return adapter.model(x, t, text).sample
    with torch.no_grad():
        with adapter.use(grouped(2)): on = adapter.model(x, t, text).sample
        assert torch.allclose(gated(torch.ones(4)), on, atol=1e-5)
        none = gated(torch.zeros(4))
        for n, p in adapter.parameters_by_name().items(): p.mul_(0.0 if "lora_B" in n else 1.0)
        with adapter.use(grouped(2)): assert torch.allclose(adapter.model(x, t, text).sample, none, atol=1e-5)
    assert target_gate(torch.tensor([0, 3, 0, 999])).tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match=r"expected \[4\]"): call(torch.ones(3))


def test_three_roles_of_two_samples_stay_apart():
    adapter, (x, t, text) = draw(JointAdapter(sd(), roles=("rgb", "depth", "flow"), post="conv")), image_batch(6)
    with torch.no_grad(), adapter.use(adapter.layout(2)):
        before = adapter.model(x, t, text).sample
        x[4] += 1                                            # the flow of sample 0
        changed = (adapter.model(x, t, text).sample - before).abs().amax((1, 2, 3)) > 1e-4
    assert changed.tolist() == [True, False] * 3


def test_hot_path_never_looks_at_values():
    "On the meta device anything that waits for a number, or builds a mask from one, raises."
    adapter = JointAdapter(sd())
    adapter.model.to("meta")
    layout = Layout([(0, 1, 0.5, 0.5)], 2, cfg=True)
    with adapter.use(layout, gate=torch.ones(4, device="meta")): out = adapter.model(*(v.to("meta") for v in image_batch(4))).sample
    assert out.shape == (4, 4, 8, 8) and out.device.type == "meta"


def test_sixteen_bit_networks_train_in_float32():
    x, t, text = image_batch(4)
    adapter = draw(JointAdapter(sd().to(torch.bfloat16)))
    with adapter.use(grouped(2), gate=torch.tensor([1.0, 0.0, 1.0, 1.0])): out = adapter.model(x.bfloat16(), t, text.bfloat16()).sample
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and {p.dtype for p in adapter.parameters()} == {torch.float32} and all(torch.isfinite(p.grad).all() for p in adapter.parameters())


def test_a_lora_of_somebody_else_stays_and_counts_as_network():
    net, (x, t, text) = sd(), image_batch(4)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=r".*attn1\.(to_q|to_v)", init_lora_weights=False), net, "flow")
    with torch.no_grad():
        plain = net(x, t, text).sample
        adapter = JointAdapter(net)
        assert {"flow", "xy_lora", "y_lora"} <= set(net.peft_config)
        with adapter.use(grouped(2)): assert torch.equal(net(x, t, text).sample, plain)
        draw(adapter)
        assert torch.equal(adapter.remove()(x, t, text).sample, plain) and set(net.peft_config) == {"flow"}


def test_a_copy_of_the_model_is_independent():
    adapter = draw(JointAdapter(sd()))
    twin = copy.deepcopy(adapter.model)
    x, t, text = image_batch(4)
    with torch.no_grad():
        with adapter.use(grouped(2)): on, copied = adapter.model(x, t, text).sample, twin(x, t, text).sample
        assert torch.equal(copied, adapter.model(x, t, text).sample) and (on - copied).abs().max() > 1e-3
        with twin.joint_adapter.use(grouped(2)): assert torch.allclose(twin(x, t, text).sample, on, atol=1e-6)


# ---- files

def test_unicon_reads_what_it_wrote_and_what_is_left_over_is_listed(tmp_path):
    adapter = draw(JointAdapter(sd(), rank=3, alpha=6, post="conv", skip=("down_blocks",)))
    write_unicon(adapter, tmp_path)
    again, report = read_unicon(sd(), tmp_path)
    assert (report.rank, report.post, report.unmatched, report.missing, again.models[""].skip) == (3, "conv", [], [], ("down_blocks",))
    x, t, text = image_batch(4)
    with torch.no_grad(), adapter.use(grouped(2)), again.use(grouped(2)):
        assert torch.allclose(again.model(x, t, text).sample, adapter.model(x, t, text).sample, atol=1e-5)         # alpha 6 went into the up matrices
    file = tmp_path / "xy_lora/pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    gone, odd = next(k for k in tensors if "mid_block" in k and "to_q.lora.up" in k), "unet.mid_block.attentions.7.transformer_blocks.0.attn1n.to_q.lora"
    down = tensors[gone.replace("lora.up", "lora.down")]
    save_file({**tensors, f"{odd}.down.weight": down.clone(), f"{odd}.up.weight": tensors[gone].clone()}, file)
    with pytest.raises(InputError, match="2 keys fit nothing, first 'mid_block.attentions.7"): read_unicon(net := sd(), tmp_path)
    assert not hasattr(net, "joint_adapter")
    assert len(read_unicon(net, tmp_path, strict=False)[1].unmatched) == 2
    save_file({k: v for k, v in tensors.items() if "mid_block" not in k or "to_q" not in k}, file)
    with pytest.raises(InputError, match="2 parameters are not in the files"): read_unicon(sd(), tmp_path)


def test_files_of_other_networks_ranks_and_trainings_are_refused(tmp_path):
    write_unicon(draw(JointAdapter(sd(), rank=3)), tmp_path / "a")
    write_unicon(draw(JointAdapter(sd(), rank=5)), tmp_path / "b")
    with pytest.raises(InputError, match="give a checkpoint of this network"): read_unicon(sd(width=40), tmp_path / "a")
    with pytest.raises(InputError, match="fits this model.*of another network"): read_unicon(wan_call("diffusers")[0](), tmp_path / "a")
    with pytest.raises(InputError, match="LoRAs of rank 5, asked for is rank 3"): read_unicon(sd(), tmp_path / "b", rank=3)
    with pytest.raises(InputError, match="read it under another name"): read_unicon(JointAdapter(sd(), rank=4), tmp_path / "b", name="")
    shutil.copy(tmp_path / "a/xy_lora/pytorch_lora_weights.safetensors", tmp_path / "b/xy_lora/pytorch_lora_weights.safetensors")
    with pytest.raises(InputError, match=r"ranks \[3, 5\] in one checkpoint"): read_unicon(sd(), tmp_path / "b")
    with pytest.raises(InputError, match="no model.pth"): read_unicon(sd(), tmp_path)
    with pytest.raises(InputError, match="neither beside it nor here"):
        (tmp_path / "c.json").write_text(json.dumps({"checkpoint_path": "nowhere"}))
        read_unicon(sd(), tmp_path / "c.json")


def test_a_pickle_with_code_is_not_run(tmp_path):
    write_unicon(JointAdapter(sd()), tmp_path)
    torch.save({"mid_block.conv1n.weight": Path("x")}, tmp_path / "model.pth")           # an object, not a tensor
    with pytest.raises(Exception, match="[Ww]eights"): read_unicon(sd(), tmp_path)


def test_own_folder_is_strict_and_peft_opens_it(tmp_path):
    from peft import set_peft_model_state_dict
    adapter = draw(JointAdapter(svd(), attention="both", alpha=8))
    save_adapter(adapter, tmp_path)
    back = load_adapter(svd(), tmp_path)
    assert back.attention == "both" and all(torch.equal(a, b) for a, b in zip(back.parameters(), adapter.parameters(), strict=True))
    plain = JointAdapter(svd(), attention="both", alpha=8)
    loaded = set_peft_model_state_dict(plain.model, {k.removeprefix("base_model.model."): v for k, v in load_file(tmp_path / "y_lora/adapter_model.safetensors").items()}, adapter_name="y_lora")
    assert not loaded.unexpected_keys
    assert all(torch.equal(p, adapter.parameters_by_name()[n]) for n, p in plain.parameters_by_name().items() if ".y_lora." in n)
    with pytest.raises(InputError, match="adapter of a UNetSpatio"): load_adapter(sd(), tmp_path)
    save_file({k: v + 1 for k, v in load_file(tmp_path / "post.safetensors").items()}, tmp_path / "post.safetensors")
    with pytest.raises(InputError, match="not the file that joint.json was written with"): load_adapter(svd(), tmp_path)
    (tmp_path / "y_lora/adapter_model.safetensors").unlink()
    (tmp_path / "post.safetensors").unlink()
    with pytest.raises(InputError, match="lacks"): load_adapter(svd(), tmp_path)


def test_named_models_are_written_without_their_name():
    adapter = JointAdapter(sd(), empty=True)
    adapter.add_model("depth", "conv_fuse", 2).add_model("look", "conv", 3, y_lora=False)
    files = unicon_state(adapter, "look")
    assert set(files) == {"model.pth", "xy_lora", "yx_lora"} and not any("look" in k or "depth" in k for keys in files.values() for k in keys)
    assert next(v for k, v in files["xy_lora"].items() if k.endswith("down.weight")).shape[0] == 3
    assert isinstance(str(FileReport("", "conv", 3, 4, ["k"], [])), str) and adapter_name("look", "xy") in str(list(adapter.parameters_by_name()))


def test_the_order_of_models_with_and_without_encoder_does_not_matter():
    "A model without branches in the encoder has its y_lora there; a branch that comes later must not read it."
    def made(*models):
        adapter = JointAdapter(sd(), roles=("x", "y", "z"), empty=True)
        for name, roles, skip in models: adapter.add_model(name, "conv", 2, skip=skip, roles=roles)
        for name, p in adapter.parameters_by_name().items(): p.data = 0.1 * normal(*p.shape, seed=sum(map(ord, name)))
        with torch.no_grad(), adapter.use(Layout([(0, 1, 1., 1., "a"), (1, 2, 1., 1., "b")], 3)): return adapter.model(normal(3, 4, 8, 8), torch.tensor([5, 5, 5]), normal(3, 5, 32)).sample
    a, b = ("a", ("x", "y"), ("down_blocks",)), ("b", ("y", "z"), ())
    torch.testing.assert_close(made(a, b), made(b, a), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skip, again", [(("down_blocks",), False), ((), True)])
def test_a_removed_model_takes_its_hooks_and_no_other(skip, again):
    "What a later model keeps of a projection outlives the LoRA that wrapped it; a model that comes again acts once."
    def answer(adapter):
        for name, p in adapter.parameters_by_name().items(): p.data = 0.1 * normal(*p.shape, seed=sum(map(ord, name)))
        with torch.no_grad(), adapter.use(adapter.layout(1)): return adapter.model(normal(2, 4, 8, 8), torch.tensor([5, 5]), normal(2, 5, 32)).sample
    removed, fresh = (JointAdapter(sd(), empty=True) for _ in range(2))
    removed.add_model("a", "conv", 2, skip=skip).add_model("b", "conv", 2, y_lora=again)
    removed.remove_model("a")
    fresh.add_model("b", "conv", 2, y_lora=again)
    for adapter in (removed, fresh) if again else (): adapter.add_model("a", "conv", 2, skip=skip)
    torch.testing.assert_close(answer(removed), answer(fresh), rtol=1e-5, atol=1e-6)
    plain = removed.remove()
    assert torch.equal(plain(normal(2, 4, 8, 8), 5, normal(2, 5, 32)).sample, sd()(normal(2, 4, 8, 8), 5, normal(2, 5, 32)).sample)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


# ---- bad input

def test_a_refused_adapter_leaves_the_model_plain():
    unet = sd()
    before = unet(normal(1, 4, 8, 8), 5, normal(1, 5, 32)).sample
    with pytest.raises(InputError, match="rank=0"): JointAdapter(unet, rank=0)
    assert JointAdapter(unet, rank=2).remove() is unet and torch.equal(unet(normal(1, 4, 8, 8), 5, normal(1, 5, 32)).sample, before)


@pytest.mark.parametrize("make, says", [
    (lambda: JointAdapter(sd(), post="dense"), "post='dense'"),
    (lambda: JointAdapter(sd(), attention="temporal"), "no block with temporal"),
    (lambda: JointAdapter(sd(), lora_side="both"), "'token' or 'query'"),
    (lambda: JointAdapter(sd(), roles=("x",)), "two or more"),
    (lambda: JointAdapter(sd(), rank=0), "rank=0"),
    (lambda: JointAdapter(sd(), skip=("down_blocks", "mid_block", "up_blocks")), "leaves no block"),
    (lambda: JointAdapter(torch.nn.Linear(2, 2)), "no block with spatial"),
    (lambda: Layout([(0, 1), (0, 1)], 2), "listed twice"),
    (lambda: grouped(2, roles=2, pairs=[(0, 2)]), "roles go from 0 to 1"),
])
def test_refusals(make, says):
    with pytest.raises(InputError, match=says): make()


def test_weights_of_another_rank_are_refused():
    mine, state = JointAdapter(sd(), rank=4), JointAdapter(sd(), rank=3).state_dict()
    before = {name: p.clone() for name, p in mine.state_dict().items()}
    with pytest.raises(InputError, match="same rank"): mine.load_state_dict(state)
    with pytest.raises(InputError, match=f"1 parameters are only in .* first '{next(iter(before))}'"): mine.load_state_dict({name: p for name, p in before.items() if name != next(iter(before))})
    assert all(torch.equal(p, before[name]) for name, p in mine.state_dict().items())


def test_a_batch_that_is_not_the_layouts_is_refused():
    adapter = JointAdapter(sd())
    with adapter.use(grouped(2)), pytest.raises(InputError, match="3 rows, the layout in use has 4"): adapter.model(*image_batch(3))
    with pytest.raises(InputError, match="'depth'"): adapter.use(Layout([(0, 1, 1.0, 1.0, "depth")], 2))


def test_rows_of_an_unknown_object_are_not_reordered_silently():
    adapter, (x, t, text) = JointAdapter(sd()), image_batch(4)
    with adapter.use(Layout([(0, 1), (2, 3)], 4)), pytest.raises(InputError, match="cannot be reordered"): adapter.model(x, t, text, cross_attention_kwargs={"memory": object()})
