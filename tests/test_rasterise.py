"""The rasteriser's backends against a dense reference in float64: pictures, all gradients, the rules of the contract, and what is not an ordinary scene."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from camflow.device import generator
from camflow.files import InputError
from camflow.geometry.rigid import se3_exp
from camflow.gflow.gaussians import SHAPES, Gaussians, ball, check_gaussians, join, load_gaussians, save_gaussians
from camflow.gflow.projection import BlendRules, blend_dense, project
from camflow.gflow.rasterise import rasterise
from camflow.gflow.splat import shares
from camflow.gflow.tiles import blend_tiles

ROOT, SIZE = Path(__file__).resolve().parents[1], (23, 31)
K = torch.tensor([[30., 0, 15], [0, 28, 12], [0, 0, 1]], dtype=torch.float64)
W2C = se3_exp(torch.tensor([0.05, -0.1, 0.2, 0.05, 0.1, -0.03], dtype=torch.float64))
BACKENDS = ("splat", "tiles")


def cloud(n, seed=0, spread=1.5):
    "Gaussians of all sizes in front of, beside and behind the camera, float64."
    draw = lambda *shape: torch.rand(*shape, generator=generator(seed, "cloud", len(shape), shape[-1]), dtype=torch.float64)
    means = (draw(n, 3) - 0.5) * 2 * spread * torch.tensor([1., 1, 1.5]) + torch.tensor([0., 0, 2.0])
    return Gaussians(means, 0.02 + 0.4 * draw(n, 3) ** 3, draw(n, 4) - 0.5, 0.05 + 0.95 * draw(n), draw(n, 3))


def loss_of(r):
    "A weighted sum of all that is rendered, so that no gradient is the sum of ones."
    y, x = torch.meshgrid(torch.linspace(0, 3, SIZE[0]), torch.linspace(0, 3, SIZE[1]), indexing="ij")
    return ((r.colour_3HW * torch.stack([x.sin(), y.cos(), x * y])).sum() + (r.alpha_HW * x.cos()).sum()
            + (r.channels_DHW * (x + y).sin()).sum() + (torch.nan_to_num(r.depth_HW) * 0.1 * y).sum())


def everything(backend, g, channels, w2c, K):
    inputs = [x.clone().requires_grad_() for x in (g.means, g.scales, g.quats, g.opacities, g.colours, channels, w2c, K)]
    r = rasterise(Gaussians(*inputs[:5]), inputs[6], inputs[7], SIZE, background=(0.1, 0.7, 0.3), channels_ND=inputs[5], backend=backend)
    return r, torch.autograd.grad(loss_of(r), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_picture_and_every_gradient_equal_the_dense_reference(backend, seed):
    g = cloud(80, seed)
    channels = g.means.flip(1)[:, :2].contiguous()
    expected, expected_grads = everything("dense", g, channels, W2C, K)
    found, grads = everything(backend, g, channels, W2C, K)
    for name in ("colour_3HW", "alpha_HW", "depth_HW", "channels_DHW"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9, equal_nan=True), name
    for name, mine, dense in zip(("means", "scales", "quats", "opacities", "colours", "channels", "w2c", "K"), grads, expected_grads):
        assert float(dense.abs().max()) > 1e-3, f"{name}: a gradient of zero proves nothing"
        assert torch.allclose(mine, dense, rtol=1e-6, atol=1e-8 * float(dense.abs().max())), name


@pytest.mark.parametrize("backend", ("dense", *BACKENDS))
def test_gradcheck(backend):
    "Against finite differences. Without the cut at alpha_min and the full pixel, which are steps."
    g, rules = cloud(4, 3, spread=0.5), BlendRules(alpha_min=1e-9, alpha_max=0.9999, t_min=0.)
    g = replace(g, opacities=0.2 + 0.5 * g.opacities, scales=g.scales + 0.05)
    def picture(means, scales, quats, opacities, colours, twist, focal):
        intrinsics = torch.cat([torch.stack([focal[0], K[0, 1], K[0, 2] / 5])[None], torch.stack([K[1, 0], focal[1], K[1, 2] / 5])[None], K[2:]])
        r = rasterise(Gaussians(means, scales, quats, opacities, colours), se3_exp(twist), intrinsics, (5, 6), backend=backend, rules=rules)
        return r.colour_3HW, r.alpha_HW, r.depth_HW.nan_to_num()
    inputs = (g.means + torch.tensor([0., 0, 1]), g.scales, g.quats, g.opacities, g.colours, torch.tensor([0.01, 0.02, -0.03, 0.04, 0.02, 0.01], dtype=torch.float64),
              torch.tensor([6., 5.5], dtype=torch.float64))
    assert torch.autograd.gradcheck(picture, [x.detach().clone().requires_grad_() for x in inputs], eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_stays_close(backend):
    g = cloud(300, 5)
    expected = rasterise(g, W2C, K, SIZE, backend="dense")
    found = rasterise(g.to(torch.float32), W2C.float(), K.float(), SIZE, backend=backend)
    assert (found.colour_3HW - expected.colour_3HW).abs().max() < 5e-3 and (found.colour_3HW - expected.colour_3HW).abs().median() < 1e-5


def one(z=2., scale=0.1, opacity=0.8, x=0., colour=(1., 0.5, 0.25)):
    return Gaussians(torch.tensor([[x, 0., z]]), torch.full((1, 3), scale), torch.tensor([[1., 0, 0, 0]]), torch.tensor([opacity]), torch.tensor([colour]))


@pytest.mark.parametrize("backend", ("dense", *BACKENDS))
def test_rules(backend):
    draw = lambda g, **options: rasterise(g, torch.eye(4), K.float(), SIZE, backend=backend, **options)
    drawn = draw(one()).alpha_HW
    assert float(drawn[drawn > 0].min()) >= 1 / 255 - 1e-7 and bool((drawn == 0).any())                     # nothing below alpha_min, and it is used
    assert abs(float(draw(one(opacity=1., scale=1.)).alpha_HW.max()) - 0.99) < 1e-6                          # alpha_max
    stack = join(*(one(z=2 + 0.1 * i, scale=1., opacity=0.95, colour=(float(i == 3),) * 3) for i in range(5)))
    middle = draw(stack)
    assert abs(float(middle.alpha_HW[12, 15]) - (1 - 0.05 ** 3)) < 1e-3 and float(middle.colour_3HW[0, 12, 15]) == 0 # the 4th would leave 6e-6: not drawn, nor what follows
    assert torch.equal(draw(join(one(z=3), one(z=2, colour=(0., 0, 1)))).colour_3HW, draw(join(one(z=2, colour=(0., 0, 1)), one(z=3))).colour_3HW) # order is depth


@pytest.mark.parametrize("backend", ("dense", *BACKENDS))
@pytest.mark.parametrize("what", ["none", "behind", "beside", "transparent", "nan"])
def test_nothing_to_see(backend, what):
    g = dict(none=one()[:0], behind=one(z=-2.), beside=one(x=500.), transparent=one(opacity=0.003), nan=one(x=float("nan")))[what]
    inputs = [getattr(g, name).clone().requires_grad_() for name in list(SHAPES)[:5]]
    pose = torch.eye(4).requires_grad_()
    r = rasterise(Gaussians(*inputs), pose, K.float(), SIZE, background=(0.25, 0.5, 0.75), backend=backend)
    assert torch.equal(r.colour_3HW, torch.tensor([0.25, 0.5, 0.75])[:, None, None].expand(3, *SIZE)) and bool(r.depth_HW.isnan().all())
    r.colour_3HW.sum().backward()
    if what != "nan": assert all(x.grad is None or bool((x.grad == 0).all()) for x in (*inputs, pose))


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_and_tiny_splats(backend):
    "One that fills the picture from just in front of the camera, one thinner than a pixel, one enormous far away: as the reference, and finite gradients."
    g = join(one(z=0.02, scale=5., opacity=0.5), one(z=2., scale=1e-6), one(z=1e4, scale=1e5, opacity=0.6, x=3e4), one(z=3., scale=1e3, opacity=0.3))
    g = g.to(torch.float64)
    expected, found = (everything(name, g, g.means[:, :1], torch.eye(4, dtype=torch.float64), K) for name in ("dense", backend))
    assert torch.allclose(found[0].colour_3HW, expected[0].colour_3HW, atol=1e-6)
    for mine, dense in zip(found[1], expected[1]): assert bool(mine.isfinite().all()) and torch.allclose(mine, dense, rtol=1e-4, atol=1e-9 + 1e-4 * float(dense.abs().max()))


def test_threads_do_not_change_the_picture():
    "Bands of rows on several threads: the same picture bit for bit, gradients to the rounding of their sum, the same again on the next call."
    code = """
import torch, sys
sys.path.insert(0, sys.argv[1])
from tests.test_rasterise import cloud, W2C, K
from camflow.gflow.rasterise import rasterise
def run(threads):
    torch.set_num_threads(threads)
    g = cloud(500, 4).to(torch.float32)
    means = g.means.clone().requires_grad_()
    g.means = means
    r = rasterise(g, W2C.float(), K.float() * torch.tensor([[3.], [3.], [1.]]), (96, 90))
    r.colour_3HW.square().sum().backward()
    return r.colour_3HW.detach(), means.grad
(a, ga), (b, gb), (c, gc) = run(1), run(2), run(2)
assert torch.equal(a, b) and torch.equal(b, c) and torch.equal(gb, gc) and torch.allclose(ga, gb, rtol=1e-4, atol=1e-4), (ga - gb).abs().max()
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_tiles_within_their_memory_and_any_tile():
    g = cloud(400, 6)
    p = project(g.means, g.scales, g.quats, W2C, K, SIZE)
    expected = blend_dense(p, g.opacities, g.colours, SIZE)
    for tile, limit in ((4, 1 << 10), (8, 1 << 12), (16, 1 << 22), (64, 1 << 22)):
        for by_hand in (True, False):
            found = blend_tiles(p, g.opacities, g.colours, SIZE, tile=tile, limit=limit, by_hand=by_hand)
            assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, expected)), (tile, limit, by_hand)


def test_shares_are_the_weights():
    "The share of a Gaussian is the gradient of the picture's sum by its own brightness; the owner of a pixel is the one with the largest."
    g = cloud(60, 7)
    p = project(g.means, g.scales, g.quats, W2C, K, SIZE)
    own = torch.eye(60, dtype=torch.float64)
    weights = blend_dense(p, g.opacities, own, SIZE)[0]
    part, owner = shares(p, g.opacities, SIZE)
    assert torch.allclose(part.double(), weights.sum((0, 1)), atol=1e-4)
    assert torch.equal(torch.where(weights.amax(-1) > 0, weights.argmax(-1), -1), owner)


def test_refusals():
    g = one()
    with pytest.raises(InputError, match="backend 'cuda'"): rasterise(g, torch.eye(4), K.float(), SIZE, backend="cuda")
    with pytest.raises(InputError, match="where it cannot run"): rasterise(g, torch.eye(4), K.float(), SIZE, backend="gsplat")
    with pytest.raises(InputError, match="at least one pixel"): rasterise(g, torch.eye(4), K.float(), (0, 5))
    with pytest.raises(InputError, match="channels of shape"): rasterise(g, torch.eye(4), K.float(), SIZE, channels_ND=torch.zeros(2, 3))
    with pytest.raises(InputError, match="scales has shape"): Gaussians(g.means, g.scales[:, :2], g.quats, g.opacities, g.colours)
    for change, words in ((dict(scales=-g.scales), "size of 0 or less"), (dict(means=g.means * torch.nan), "not finite"), (dict(quats=0 * g.quats), "rotation 0"),
                          (dict(opacities=g.opacities + 1), "opacity outside"), (dict(colours=g.colours + 1), "colour outside")):
        with pytest.raises(InputError, match=words): check_gaussians(replace(g, **change))


def test_files_of_others_and_damaged_files(tmp_path):
    g = ball(20)
    path = save_gaussians(tmp_path/"a.ply", g)
    data = path.read_bytes()
    head, body = data.split(b"end_header\n", 1)
    rows = np.frombuffer(body, "<f4").reshape(20, -1)
    # as 3DGS writes it: harmonics in between, no label
    names = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2".split() + [f"f_rest_{i}" for i in range(9)] + "opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
    published = np.concatenate([rows[:, :9], np.zeros((20, 9), "f4"), rows[:, 9:17]], 1).astype("<f4")
    text = "ply\nformat binary_little_endian 1.0\nelement vertex 20\n" + "".join(f"property float {n}\n" for n in names) + "end_header\n"
    (tmp_path/"b.ply").write_bytes(text.encode() + published.tobytes())
    again = load_gaussians(tmp_path/"b.ply")
    assert torch.allclose(again.means, g.means) and torch.allclose(again.scales, g.scales, rtol=1e-5) and torch.allclose(again.opacities, g.opacities, atol=1e-6)
    published[:, 10] = 0.3
    (tmp_path/"c.ply").write_bytes(text.encode() + published.tobytes())
    with pytest.raises(InputError, match="depend on the direction"): load_gaussians(tmp_path/"c.ply")
    assert len(load_gaussians(tmp_path/"c.ply", drop_harmonics=True)) == 20
    for name, broken, words in (("d.ply", data[:-5], "cut off"), ("e.ply", b"hello", "no PLY file"), ("f.ply", data.replace(b"opacity", b"opaaity"), "lacks opacity"),
                                ("g.ply", data.replace(b"binary_little_endian", b"ascii"), "little-endian"), ("h.npz", b"PK", "cannot be read"),
                                ("i.safetensors", b"12", "cannot be read"), ("j.obj", b"", "unknown ending")):
        (tmp_path/name).write_bytes(broken)
        with pytest.raises(InputError, match=words): load_gaussians(tmp_path/name)
    with pytest.raises(InputError, match="does not exist"): load_gaussians(tmp_path/"none.ply")
    with pytest.raises(InputError, match="unknown ending"): save_gaussians(tmp_path/"a.obj", g)
