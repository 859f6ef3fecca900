"Wan's CLIP file (open_clip names) as transformers' vision model: against a plain forward in the file's own terms."
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from camflow.files import InputError
from camflow.lab.published import PUBLISHED
from camflow.media.frames import Frames
from camflow.wan.convert import read_weights
from camflow.wan.i2v_condition import ImageEncoder, clip_from_reference, clip_pixels, clip_to_transformers


def shapes(width, layers, patch, side, out=24):
    layer = {"norm1.weight": [width], "norm1.bias": [width], "attn.to_qkv.weight": [3 * width, width], "attn.to_qkv.bias": [3 * width], "attn.proj.weight": [width, width], "attn.proj.bias": [width],
             "norm2.weight": [width], "norm2.bias": [width], "mlp.0.weight": [4 * width, width], "mlp.0.bias": [4 * width], "mlp.2.weight": [width, 4 * width], "mlp.2.bias": [width]}
    return {"patch_embedding.weight": [width, 3, patch, patch], "cls_embedding": [1, 1, width], "pos_embedding": [1, (side // patch)**2 + 1, width], "pre_norm.weight": [width], "pre_norm.bias": [width],
            **{f"transformer.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}, "post_norm.weight": [width], "post_norm.bias": [width], "head": [width, out]}


def drawn(width=160, layers=3, patch=14, side=42):
    g = torch.Generator().manual_seed(0)
    tower = {f"visual.{name}": torch.randn(shape, generator=g) * 0.15 for name, shape in shapes(width, layers, patch, side).items()}
    return tower | {"log_scale": torch.zeros([]), "textual.token_embedding.weight": torch.ones(8, 4)}


def plain(state, pixels, heads):
    "The tokens that Wan takes: every block but the last, no norm behind them."
    w = lambda name: state[f"visual.{name}"]
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w(f"{name}.weight"), w(f"{name}.bias"), 1e-5)
    linear = lambda x, name: x @ w(f"{name}.weight").T + w(f"{name}.bias")
    x = F.conv2d(pixels, w("patch_embedding.weight"), stride=w("patch_embedding.weight").shape[-1]).flatten(2).mT
    x = norm(torch.cat([w("cls_embedding").expand(len(x), -1, -1), x], 1) + w("pos_embedding"), "pre_norm")
    layers = 1 + max(int(m[1]) for name in state if (m := re.match(r"visual\.transformer\.(\d+)\.", name)))
    for n in range(layers - 1):
        at = f"transformer.{n}"
        q, k, v = linear(norm(x, f"{at}.norm1"), f"{at}.attn.to_qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / q.shape[-1]**0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{at}.attn.proj")
        h = linear(norm(x, f"{at}.norm2"), f"{at}.mlp.0")
        x = x + linear(0.5 * h * (1 + torch.erf(h / 2**0.5)), f"{at}.mlp.2")
    return x


@pytest.mark.parametrize("heads", [None, 4])
def test_tokens_are_those_of_the_file(heads):
    state = drawn()
    encoder = ImageEncoder(clip_from_reference(state, heads))
    picture = Frames(torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(1)), "unit")
    expected = plain(state, clip_pixels(picture, 42), heads or 2)
    torch.testing.assert_close(encoder.encode(picture), expected, atol=2e-5, rtol=2e-5)
    for name in ("transformer.1.attn.to_qkv.weight", "transformer.0.mlp.0.bias", "pos_embedding"):
        other = {key: value.clone() for key, value in state.items()}
        other[f"visual.{name}"].view(-1)[-7] += 0.5
        assert (ImageEncoder(clip_from_reference(other, heads)).encode(picture) - expected).abs().max() > 1e-3


def test_the_published_size_fits():
    from transformers import CLIPVisionConfig, CLIPVisionModel
    with torch.device("meta"):
        state = {f"visual.{name}": torch.empty(shape, dtype=torch.float16) for name, shape in shapes(1280, 32, 14, 224, 1024).items()}
        model = CLIPVisionModel(CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224, patch_size=14, hidden_act="gelu"))
    found = {name: tuple(tensor.shape) for name, tensor in clip_to_transformers(state).items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 630_766_080


def test_the_conversion_that_camflow_weights_prints(tmp_path):
    "The half-precision file becomes the folder that omnicam_generate loads, by the printed line."
    from transformers import CLIPVisionModel
    file, state = tmp_path/"clip.pth", {name: tensor.half() for name, tensor in drawn().items()}
    torch.save(state, file)
    line = PUBLISHED["wan-clip"].conversion
    target = re.search(r"save_pretrained\('(.*?)'\)", line)[1]
    subprocess.run([sys.executable, "-c", line.replace("FILE", repr(str(file))).replace(target, str(tmp_path/"image_encoder"))], check=True)
    loaded = ImageEncoder(CLIPVisionModel.from_pretrained(tmp_path/"image_encoder", dtype=torch.float32).eval())
    picture = Frames(torch.rand(1, 3, 30, 50, generator=torch.Generator().manual_seed(1)), "unit")
    assert torch.equal(loaded.encode(picture), ImageEncoder(clip_from_reference(read_weights(file))).encode(picture))


def test_other_files_are_refused():
    state = drawn()
    with pytest.raises(InputError, match="not the open_clip file"): clip_from_reference({"vision_model.x": torch.zeros(1)})
    with pytest.raises(InputError, match="pass num_heads"): clip_from_reference(drawn(width=72))
    with pytest.raises(InputError, match="1 missing"): clip_from_reference({name: tensor for name, tensor in state.items() if name != "visual.post_norm.bias"})
    with pytest.raises(InputError, match="do not belong"): clip_from_reference(state | {"visual.transformer.0.gate": torch.ones(1)})
