"""DynamicStereo the plain way: every operation as the reference does it (3-D convolutions, grid_sample look-ups with a
fifth pyramid level that nobody reads and a check of the y grid at every level, mask head and upsampling at every
iteration, all predictions kept), written from the description of the network alone. It is what the fast path of
`camflow.stereo` is compared with, in numbers and in time; it imports nothing of it.

Widths come from the shapes of the tensors, so one class serves every configuration, also tiny ones."""
import math

import torch
import torch.nn.functional as F
from torch import nn

FULL = "self_stereo_temporal_update_time_update_space"


def interp(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class Shapes:
    "Names and shapes below one prefix of a state dict; makes layers that fit."
    def __init__(self, shapes, prefix=""): self.shapes, self.prefix = shapes, prefix
    def __getitem__(self, name): return self.shapes[self.prefix + name]
    def __contains__(self, name): return any(n.startswith(self.prefix + name) for n in self.shapes)
    def under(self, name): return Shapes(self.shapes, f"{self.prefix}{name}.")

    def conv(self, name, stride=1, padding=None):
        out, inn, *kernel = self[name + ".weight"]
        make = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
        return make(inn, out, tuple(kernel), stride=stride, padding=tuple(k // 2 for k in kernel) if padding is None else padding)

    def linear(self, name):
        out, inn = self[name + ".weight"]
        return nn.Linear(inn, out, bias=name + ".bias" in self)

    def norm(self, name): return nn.LayerNorm(self[name + ".weight"][0])
    def count(self, name): return len({n[len(self.prefix + name) + 1:].split(".")[0] for n in self.shapes if n.startswith(self.prefix + name + ".")})


# ---------------------------------------------------------------- features
class ResidualBlock(nn.Module):
    "conv, norm, ReLU twice (the second ReLU before the sum); the skip always has its 1x1 convolution and norm."
    def __init__(self, s, stride):
        super().__init__()
        self.conv1, self.conv2 = s.conv("conv1", stride), s.conv("conv2")
        self.downsample = nn.Sequential(s.conv("downsample.0", stride, 0))

    def forward(self, x):
        y = F.relu(F.instance_norm(self.conv1(x)))
        y = F.relu(F.instance_norm(self.conv2(y)))
        return F.relu(F.instance_norm(self.downsample(x)) + y)


class BasicEncoder(nn.Module):
    "Features at a quarter of the size."
    def __init__(self, s):
        super().__init__()
        self.conv1, self.conv2 = s.conv("conv1", 2), s.conv("conv2")
        for n, stride in ((1, 1), (2, 2), (3, 1)):
            setattr(self, f"layer{n}", nn.Sequential(ResidualBlock(s.under(f"layer{n}.0"), stride), ResidualBlock(s.under(f"layer{n}.1"), 1)))

    def forward(self, pair):
        n = pair[0].shape[0]
        x = F.relu(F.instance_norm(self.conv1(torch.cat(pair))))
        x = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return torch.split(x, [n, n])


# ---------------------------------------------------------------- attention
def position_encoding(dim, h, w):
    "LoFTR's sine table [1,dim,h,w]; positions count from 1."
    y = torch.ones(h, w).cumsum(0).float()[None]
    x = torch.ones(h, w).cumsum(1).float()[None]
    div = torch.exp(torch.arange(0, dim // 2, 2).float() * (-math.log(10000.0) / (dim // 2)))[:, None, None]
    table = torch.zeros(dim, h, w)
    table[0::4], table[1::4], table[2::4], table[3::4] = torch.sin(x * div), torch.cos(x * div), torch.sin(y * div), torch.cos(y * div)
    return table[None]


class EncoderLayer(nn.Module):
    "LoFTR's layer with linear attention."
    def __init__(self, s, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.merge = (s.linear(n) for n in ("q_proj", "k_proj", "v_proj", "merge"))
        self.mlp = nn.Sequential(s.linear("mlp.0"), nn.ReLU(), s.linear("mlp.2"))
        self.norm1, self.norm2 = s.norm("norm1"), s.norm("norm2")

    def forward(self, x, source):
        split = lambda t: t.view(t.shape[0], -1, self.heads, t.shape[-1] // self.heads)
        Q, K, v = F.elu(split(self.q_proj(x))) + 1, F.elu(split(self.k_proj(source))) + 1, split(self.v_proj(source))
        length = v.shape[1]
        v = v / length
        KV = torch.einsum("nshd,nshv->nhdv", K, v)
        Z = 1 / (torch.einsum("nlhd,nhd->nlh", Q, K.sum(dim=1)) + 1e-6)
        message = torch.einsum("nlhd,nhdv,nlh->nlhv", Q, KV, Z) * length
        message = self.norm1(self.merge(message.reshape(x.shape)))
        return x + self.norm2(self.mlp(torch.cat([x, message], dim=2)))


class PairAttention(nn.Module):
    "One self or cross layer for both views; cross is sequential: the right one sees the updated left one."
    def __init__(self, s, cross, heads):
        super().__init__()
        self.cross, self.layers = cross, nn.ModuleList([EncoderLayer(s.under("layers.0"), heads)])

    def forward(self, a, b):
        layer = self.layers[0]
        if not self.cross: return layer(a, a), layer(b, b)
        a = layer(a, b)
        return a, layer(b, a)


class Attention(nn.Module):
    "Softmax attention without projections of q, k, v (`qkv` is stored and never used)."
    def __init__(self, s, heads):
        super().__init__()
        self.heads, self.proj = heads, s.linear("proj")
        if "qkv." in s: self.qkv = s.linear("qkv")

    def forward(self, x):
        n, t, m = x.shape
        q = x.reshape(n, t, self.heads, m // self.heads).permute(0, 2, 1, 3)
        weights = ((q @ q.transpose(-2, -1)) * (m // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ q).transpose(1, 2).reshape(n, t, m))


class TimeAttention(nn.Module):
    def __init__(self, s, heads):
        super().__init__()
        self.temporal_attn, self.temporal_fc, self.temporal_norm1 = Attention(s.under("temporal_attn"), heads), s.linear("temporal_fc"), s.norm("temporal_norm1")

    def forward(self, x, T):
        n, c, h, w = x.shape
        y = x.view(n // T, T, c, h, w).permute(0, 3, 4, 1, 2).reshape(-1, T, c)
        y = y + self.temporal_fc(self.temporal_attn(self.temporal_norm1(y)))
        return y.view(n // T, h, w, T, c).permute(0, 3, 4, 1, 2).reshape(n, c, h, w)


class SpaceAttention(nn.Module):
    def __init__(self, s, heads):
        super().__init__()
        self.encoder_layer = EncoderLayer(s.under("encoder_layer"), heads)

    def forward(self, x, T):
        n, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        return self.encoder_layer(y, y).transpose(1, 2).reshape(n, c, h, w)


# ---------------------------------------------------------------- correlation
class CorrBlock1D:
    "All pairs along a row, pooled; five maps, of which the last is never read."
    def __init__(self, f1, f2, levels=4, radius=4):
        self.levels, self.radius = levels, radius
        n, d, h, w1 = f1.shape
        corr = torch.einsum("ndhx,ndhy->nhxy", f1, f2) / math.sqrt(d)
        corr = corr.reshape(n * h * w1, 1, 1, f2.shape[3])
        self.shape, self.pyramid = (n, h, w1), [corr]
        for _ in range(levels):
            corr = F.avg_pool2d(corr, [1, 2], stride=[1, 2])
            self.pyramid.append(corr)

    @staticmethod
    def sample(image, points):
        H, W = image.shape[-2:]
        xgrid, ygrid = points.split([1, 1], dim=-1)
        xgrid = 2 * xgrid / (W - 1) - 1
        assert torch.unique(ygrid).numel() == 1 and H == 1
        return F.grid_sample(image, torch.cat([xgrid, ygrid], dim=-1), align_corners=True)

    def __call__(self, flow):
        n, h, w = self.shape
        coords = (torch.arange(w, dtype=flow.dtype, device=flow.device) + flow[:, 0]).reshape(n * h * w, 1, 1, 1)
        out = []
        for level in range(self.levels):
            dx = torch.linspace(-self.radius, self.radius, 2 * self.radius + 1).view(2 * self.radius + 1, 1).to(flow.device)
            x0 = dx + coords / 2 ** level
            found = self.sample(self.pyramid[level], torch.cat([x0, torch.zeros_like(x0)], dim=-1))
            out.append(found.view(n, h, w, -1))
        return torch.cat(out, dim=-1).permute(0, 3, 1, 2).contiguous().float()


# ---------------------------------------------------------------- update
class MotionEncoder(nn.Module):
    def __init__(self, s):
        super().__init__()
        for n in ("convc1", "convc2", "convf1", "convf2", "conv"): setattr(self, n, s.conv(n))

    def forward(self, flow, corr):
        c = F.relu(self.convc2(F.relu(self.convc1(corr))))
        f = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([c, f], dim=1))), flow], dim=1)


class SepConvGRU(nn.Module):
    "Gated passes along W, H and, in 3-D, T."
    def __init__(self, s):
        super().__init__()
        self.passes = [p for p in "123" if f"convz{p}." in s]
        for p in self.passes:
            for gate in "zrq": setattr(self, f"conv{gate}{p}", s.conv(f"conv{gate}{p}"))

    def forward(self, h, x):
        for p in self.passes:
            hx = torch.cat([h, x], dim=1)
            z = torch.sigmoid(getattr(self, f"convz{p}")(hx))
            r = torch.sigmoid(getattr(self, f"convr{p}")(hx))
            q = torch.tanh(getattr(self, f"convq{p}")(torch.cat([r * h, x], dim=1)))
            h = (1 - z) * h + z * q
        return h


class FlowHead(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.conv1, self.conv2 = s.conv("conv1"), s.conv("conv2")

    def forward(self, x): return self.conv2(F.relu(self.conv1(x)))


class UpdateBlock(nn.Module):
    def __init__(self, s, heads):
        super().__init__()
        self.encoder, self.gru, self.flow_head = MotionEncoder(s.under("encoder")), SepConvGRU(s.under("gru")), FlowHead(s.under("flow_head"))
        self.mask = nn.Sequential(s.conv("mask.0"), nn.ReLU(), s.conv("mask.2"))
        if "time_attn." in s: self.time_attn = TimeAttention(s.under("time_attn"), heads)
        if "space_attn." in s: self.space_attn = SpaceAttention(s.under("space_attn"), heads)
        self.three = len(s["gru.convz1.weight"]) == 5

    def forward(self, net, inp, corr, flow, T):
        x = torch.cat([inp, self.encoder(flow, corr)], dim=1)
        if hasattr(self, "time_attn"): x = self.time_attn(x, T)
        if hasattr(self, "space_attn"): x = self.space_attn(x, T)
        if self.three:
            fold = lambda a: a.view(-1, T, *a.shape[1:]).transpose(1, 2)
            unfold = lambda a: a.transpose(1, 2).reshape(-1, a.shape[1], *a.shape[3:])
            net = self.gru(fold(net), fold(x))
            delta = unfold(self.flow_head(net))
            net = unfold(net)
        else:
            net = self.gru(net, x)
            delta = self.flow_head(net)
        return net, 0.25 * self.mask(net), delta


def convex_upsample(flow, mask, rate=4):
    n, c, h, w = flow.shape
    mask = torch.softmax(mask.view(n, 1, 9, rate, rate, h, w), dim=2)
    up = F.unfold(rate * flow, [3, 3], padding=1).view(n, c, 9, 1, 1, h, w)
    return torch.sum(mask * up, dim=2).permute(0, 1, 4, 2, 5, 3).reshape(n, c, rate * h, rate * w)


# ---------------------------------------------------------------- network
class DynamicStereo(nn.Module):
    "`shapes`: {tensor name: shape} of the weights it is to hold; then the reference's flags; `cascade_sign` and `vertical` are camflow's two switches, as published by default."
    def __init__(self, shapes, num_frames=5, attention_type=FULL, use_3d_update_block=True, different_update_blocks=True, cascade_sign=-1.0, vertical=True, heads=None):
        super().__init__()
        s, kind = Shapes({n: list(v) for n, v in shapes.items()}), attention_type or ""
        self.attention_type, self.different, self.cascade_sign, self.vertical, self.num_frames = kind, different_update_blocks, cascade_sign, vertical, num_frames
        heads = heads or max(1, s["fnet.conv2.weight"][0] // 32)  # eight of 32 channels in the published network
        if "temporal" in kind or "update_time" in kind: self.time_embed = nn.Parameter(torch.zeros(*s["time_embed"]))
        self.fnet = BasicEncoder(s.under("fnet"))
        self.dim = s["fnet.conv2.weight"][0]
        for name in ("update_block08", "update_block16", "update_block04") if different_update_blocks else ("update_block",):
            block = UpdateBlock(s.under(name), heads)
            if block.three != use_3d_update_block: raise ValueError("the weights and use_3d_update_block disagree")
            setattr(self, name, block)
        if "temporal" in kind:
            self.time_attn_blocks = nn.ModuleList(TimeAttention(s.under(f"time_attn_blocks.{i}"), heads) for i in range(s.count("time_attn_blocks")))
        if "self_stereo" in kind:
            self.self_attn_blocks = nn.ModuleList(PairAttention(s.under(f"self_attn_blocks.{i}"), False, heads) for i in range(s.count("self_attn_blocks")))
            self.cross_attn_blocks = nn.ModuleList(PairAttention(s.under(f"cross_attn_blocks.{i}"), True, heads) for i in range(s.count("cross_attn_blocks")))

    def block(self, level): return getattr(self, f"update_block{level}" if self.different else "update_block")

    def sst(self, a, b, T):
        "The block at a sixteenth: position and time encodings, then self, cross and time attention."
        n, c, h, w = a.shape
        position = position_encoding(c, h, w).to(a)
        a, b = a + position, b + position
        if hasattr(self, "time_embed"):
            embed = self.time_embed
            if T != embed.shape[1]: embed = F.interpolate(embed.transpose(1, 2), size=T, mode="nearest").transpose(1, 2)
            add = lambda x: (x.view(n // T, T, c, h, w) + embed[:, :, :, None, None]).view(n, c, h, w)
            a, b = add(a), add(b)
        tokens = lambda x: x.flatten(2).transpose(1, 2)
        grid = lambda x: x.transpose(1, 2).reshape(n, c, h, w)
        for i in range(len(getattr(self, "self_attn_blocks", getattr(self, "time_attn_blocks", [])))):
            if hasattr(self, "self_attn_blocks"):
                ta, tb = self.self_attn_blocks[i](tokens(a), tokens(b))
                ta, tb = self.cross_attn_blocks[i](ta, tb)
                a, b = grid(ta), grid(tb)
            if hasattr(self, "time_attn_blocks"): a, b = self.time_attn_blocks[i](a, T), self.time_attn_blocks[i](b, T)
        return a, b

    def context(self, f):
        net, inp = torch.split(f, [self.dim // 2, self.dim - self.dim // 2], dim=1)
        return torch.tanh(net), torch.relu(inp)

    def refine(self, level, f1, f2, net, inp, flow, iters, scale, predictions, T):
        "Iterations at one level; every one is upsampled and kept."
        corr, block, up = CorrBlock1D(f1, f2), self.block(level), None
        for _ in range(iters):
            flow = flow.detach()
            net, mask, delta = block(net, inp, corr(flow), flow, T)
            flow = flow + (delta if self.vertical else delta * torch.tensor([1.0, 0.0])[:, None, None])
            up = convex_upsample(flow, mask)
            full = up if scale == 1 else scale * interp(up, (scale * up.shape[2], scale * up.shape[3]))
            predictions.append(full[:, :1])
        return net, up

    def hand_over(self, flow, f):
        return self.cascade_sign * (f.shape[2] / flow.shape[2]) * interp(flow, f.shape[2:])

    def forward(self, left_BTCHW, right_BTCHW, iters=20, flow_init=None, every=False, trace=None):
        "Signed flow, x channel: [B,T,1,H,W], or every prediction [D,B,T,1,H,W]; `trace` is a dict to fill with intermediates."
        B, T = left_BTCHW.shape[:2]
        keep = trace if trace is not None else {}
        f1, f2 = self.fnet([(2 * (x / 255.0) - 1.0).flatten(0, 1).contiguous() for x in (left_BTCHW, right_BTCHW)])
        net, inp = self.context(f1)
        a1, a2 = self.sst(F.avg_pool2d(f1, 4, 4), F.avg_pool2d(f2, 4, 4), T)
        net16, inp16 = self.context(a1)
        half = lambda f, a: (F.avg_pool2d(f, 2, 2) + interp(a, (f.shape[2] // 2, f.shape[3] // 2))) / 2
        e1, e2 = half(f1, a1), half(f2, a2)
        net8, inp8 = self.context(e1)
        predictions = []
        if flow_init is None:
            flow = torch.zeros(a1.shape[0], 2, *a1.shape[2:], dtype=a1.dtype, device=a1.device)
            keep |= {"flow_init_16": flow, "net_init_16": net16}
            net16, up = self.refine("16", a1, a2, net16, inp16, flow, iters // 2, 4, predictions, T)
            keep |= {"net_final_16": net16, "flow_up_16": up}
            net8 = (net8 + interp(net16, (2 * net16.shape[2], 2 * net16.shape[3]))) / 2
            flow = self.hand_over(up, e1)
            keep |= {"flow_init_08": flow, "net_init_08": net8}
            net8, flow_init = self.refine("08", e1, e2, net8, inp8, flow, iters // 2, 2, predictions, T)
            keep |= {"flow_up_08": flow_init}
        net = (net + interp(net8, (2 * net8.shape[2], 2 * net8.shape[3]))) / 2
        flow = self.hand_over(flow_init, f1)
        keep |= {"flow_init_04": flow}
        _, up = self.refine("04", f1, f2, net, inp, flow, iters, 1, predictions, T)
        keep |= {"flow_up_04": up}
        stack = torch.stack(predictions)
        stack = stack.view(stack.shape[0], B, T, *stack.shape[2:])
        return stack if every else stack[-1]

    @torch.no_grad()
    def forward_batch_test(self, video_N2CHW, kernel_size=14, iters=20, record=None):
        "The reference's window schedule, faults included; |disparity| [N,1,H,W]. `record` collects the windows and what was kept of them."
        stride, out, record = kernel_size // 2, [], record if record is not None else []
        for start in range(0, len(video_N2CHW), stride):
            clip = video_N2CHW[start:start + kernel_size].float()
            h, w = clip.shape[-2:]
            top, left = (-h % 32) // 2, (-w % 32) // 2
            pad = lambda x: F.pad(x, (left, -w % 32 - left, top, -h % 32 - top), mode="replicate")[None]
            flow = self(pad(clip[:, 0]), pad(clip[:, 1]), iters, every=True)[-1, 0]  # the whole stack is held, as there
            flow = flow[:, :, top:top + h, left:left + w].abs()
            if start == 0: first, last = 0, len(range(len(flow))[:-stride // 2])
            elif len(clip) == kernel_size: first, last = stride // 2, len(range(len(flow))[:-stride // 2])
            elif len(clip) >= stride: first, last = stride // 2, len(flow)
            else: first, last = 0, 0
            record.append((start, len(clip), start + first, max(0, last - first)))
            if len(clip) >= stride or start == 0: out.append(flow[first:max(first, last)])
        return torch.cat(out)


def load(shapes, state, **flags):
    "The oracle for a {name: shape} table with its weights loaded strictly, in eval mode."
    model = DynamicStereo(shapes, **flags)
    model.load_state_dict({k: torch.as_tensor(v) for k, v in state.items()}, strict=True)
    return model.eval()
