"""GMFlow the plain way: the order of operations of the published code, written from the description of the network alone. It is what
`camflow.flow.gmflow` is compared with, in numbers, in time and in memory; it imports nothing of it.

What it does that the result does not need, or need once:
- maps lie channels first; windows are cut out and put back, rolled and rolled back, in every attention;
- grids are made anew at every call; position codes and masks at every forward pass;
- a look-up samples the second image's features 81 times per cell before it multiplies them (B x C x hw x 81 numbers);
- the gated unit works on state, context and motion in every iteration although its state starts again from the same projection;
- the weights of the upsampling are computed in every iteration and used in the last."""
import math

import torch
import torch.nn.functional as F

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainGMFlow:
    "GMFlow as functions on a state dict of published names; `train` returns all predictions."
    def __init__(self, state, splits=None, corr_radius=None, prop_radius=None, refinements=6):
        self.w = state
        self.scales = 2 if "backbone.trident_conv.weight" in state else 1
        self.splits, self.corr, self.prop = splits or (2, 8)[:self.scales], corr_radius or (-1, 4)[:self.scales], prop_radius or (-1, 1)[:self.scales]
        self.refinements, self.factor = refinements if "refine_proj.weight" in state else 0, 8 // self.scales
        self.layers = len({n.split(".")[2] for n in state if n.startswith("transformer.layers.")})

    # ------------------------------------------------------------ layers by name
    def conv(self, x, name, stride=1):
        weight = self.w[name + ".weight"]
        return F.conv2d(x, weight, self.w.get(name + ".bias"), stride, tuple(k // 2 for k in weight.shape[2:]))

    def linear(self, x, name): return F.linear(x, self.w[name + ".weight"], self.w.get(name + ".bias"))
    def norm(self, x, name): return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"])

    # ------------------------------------------------------------ encoder
    def block(self, x, name, stride):
        y = F.relu(F.instance_norm(self.conv(x, name + ".conv1", stride)))
        y = F.relu(F.instance_norm(self.conv(y, name + ".conv2")))
        if name + ".downsample.0.weight" in self.w: x = F.instance_norm(self.conv(x, name + ".downsample.0", stride))
        return F.relu(x + y)

    def backbone(self, x):
        x = F.relu(F.instance_norm(self.conv(x, "backbone.conv1", 2)))
        for stage, stride in ((1, 1), (2, 2), (3, 2 if self.scales == 1 else 1)):
            for i in range(2): x = self.block(x, f"backbone.layer{stage}.{i}", stride if i == 0 else 1)
        x = self.conv(x, "backbone.conv2")
        return [x] if self.scales == 1 else [self.conv(x, "backbone.trident_conv", s) for s in (1, 2)]

    # ------------------------------------------------------------ attention
    def position(self, x, splits):
        B, C, h, w = x.shape
        ones = torch.ones(B, h // splits, w // splits)
        y, col = ones.cumsum(1), ones.cumsum(2)
        y, col = y / (y[:, -1:] + 1e-6) * 2 * math.pi, col / (col[:, :, -1:] + 1e-6) * 2 * math.pi
        rate = 10000 ** (2 * (torch.arange(C // 2, dtype=torch.float32) // 2) / (C // 2))
        waves = lambda a: torch.stack(((a / rate)[..., 0::2].sin(), (a / rate)[..., 1::2].cos()), 4).flatten(3)
        code = torch.cat((waves(y[..., None]), waves(col[..., None])), 3).permute(0, 3, 1, 2)
        return x + code.repeat(1, 1, splits, splits)

    def cut(self, x, K): # [N,h,w,C] -> [N*K*K,h/K,w/K,C]
        N, h, w, C = x.shape
        return x.view(N, K, h // K, K, w // K, C).permute(0, 1, 3, 2, 4, 5).reshape(N * K * K, h // K, w // K, C)

    def join(self, x, K):
        N, h, w, C = x.shape
        return x.view(N // K // K, K, K, h, w, C).permute(0, 1, 3, 2, 4, 5).reshape(N // K // K, K * h, K * w, C)

    def mask(self, h, w, K):
        number, count = torch.zeros(1, h, w, 1), 0
        a, b = h // K, w // K
        for rows in (slice(0, -a), slice(-a, -(a // 2)), slice(-(a // 2), None)):
            for columns in (slice(0, -b), slice(-b, -(b // 2)), slice(-(b // 2), None)):
                number[:, rows, columns] = count
                count += 1
        number = self.cut(number, K).view(-1, a * b)
        apart = number[:, None] - number[:, :, None]
        return apart.masked_fill(apart != 0, -100.0)

    def attend(self, q, k, v, K, shifted, size, mask):
        N, _, C = q.shape
        h, w = size
        if K == 1: return (q @ k.transpose(1, 2) / C ** 0.5).softmax(-1) @ v
        q, k, v = (x.view(N, h, w, C) for x in (q, k, v))
        shift = (h // K // 2, w // K // 2)
        if shifted: q, k, v = (torch.roll(x, (-shift[0], -shift[1]), (1, 2)) for x in (q, k, v))
        q, k, v = (self.cut(x, K).view(N * K * K, -1, C) for x in (q, k, v))
        score = q @ k.transpose(1, 2) / C ** 0.5
        if shifted: score = score + mask.repeat(N, 1, 1)
        out = self.join((score.softmax(-1) @ v).view(N * K * K, h // K, w // K, C), K)
        if shifted: out = torch.roll(out, shift, (1, 2))
        return out.reshape(N, h * w, C)

    def layer(self, x, source, name, K, shifted, size, mask):
        message = self.attend(self.linear(x, name + ".q_proj"), self.linear(source, name + ".k_proj"), self.linear(source, name + ".v_proj"), K, shifted, size, mask)
        message = self.norm(self.linear(message, name + ".merge"), name + ".norm1")
        if name + ".mlp.0.weight" in self.w:
            message = self.linear(F.gelu(self.linear(torch.cat([x, message], -1), name + ".mlp.0")), name + ".mlp.2")
            message = self.norm(message, name + ".norm2")
        return x + message

    def transformer(self, f0, f1, K):
        N, C, h, w = f0.shape
        f0, f1 = (f.flatten(-2).permute(0, 2, 1) for f in (f0, f1))
        mask = self.mask(h, w, K) if K > 1 else None
        x, other = torch.cat((f0, f1)), torch.cat((f1, f0))
        for i in range(self.layers):
            shifted = K > 1 and i % 2 == 1
            x = self.layer(x, x, f"transformer.layers.{i}.self_attn", K, shifted, (h, w), mask)
            x = self.layer(x, other, f"transformer.layers.{i}.cross_attn_ffn", K, shifted, (h, w), mask)
            other = torch.cat(x.chunk(2)[::-1])
        return [f.view(N, h, w, C).permute(0, 3, 1, 2).contiguous() for f in x.chunk(2)]

    # ------------------------------------------------------------ matching
    def grid(self, B, h, w):
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        return torch.stack([x, y]).float()[None].repeat(B, 1, 1, 1)

    def sample(self, x, places): # places [B,2,H,W] in cells
        h, w = x.shape[-2:]
        at = torch.stack([2 * places[:, 0] / (w - 1) - 1, 2 * places[:, 1] / (h - 1) - 1], -1)
        return F.grid_sample(x, at, mode="bilinear", padding_mode="zeros", align_corners=True)

    def global_match(self, f0, f1, both):
        B, C, h, w = f0.shape
        score = f0.view(B, C, -1).permute(0, 2, 1) @ f1.view(B, C, -1) / C ** 0.5
        if both: score, B = torch.cat((score, score.permute(0, 2, 1))), 2 * B
        grid = self.grid(B, h, w)
        place = score.softmax(-1) @ grid.view(B, 2, -1).permute(0, 2, 1)
        return place.view(B, h, w, 2).permute(0, 3, 1, 2) - grid

    def around(self, f0, f1, flow, r): # score [B,hw,R], places [B,hw,R,2]
        B, C, h, w = f0.shape
        centre = (self.grid(B, h, w) + flow).view(B, 2, -1).permute(0, 2, 1)
        steps = (self.grid(B, 2 * r + 1, 2 * r + 1) - r).reshape(B, 2, -1).permute(0, 2, 1)
        places = centre[:, :, None] + steps[:, None]
        window = self.sample(f1, places.permute(0, 3, 1, 2)).permute(0, 2, 1, 3)           # [B,hw,C,R]
        score = (f0.permute(0, 2, 3, 1).reshape(B, h * w, 1, C) @ window).view(B, h * w, -1) / C ** 0.5
        return score, places

    def local_match(self, f0, f1, r):
        B, C, h, w = f0.shape
        score, places = self.around(f0, f1, 0, r)
        valid = (places[..., 0] >= 0) & (places[..., 0] < w) & (places[..., 1] >= 0) & (places[..., 1] < h)
        probability = score.masked_fill(~valid, -1e9).softmax(-1)
        place = (probability.unsqueeze(-2) @ places).squeeze(-2).view(B, h, w, 2).permute(0, 3, 1, 2)
        return place - self.grid(B, h, w)

    def correlation(self, f0, f1, flow, r):
        B, _, h, w = f0.shape
        return self.around(f0, f1, flow, r)[0].view(B, h, w, -1).permute(0, 3, 1, 2).contiguous()

    def propagate(self, f, flow, r):
        B, C, h, w = f.shape
        tokens = f.view(B, C, -1).permute(0, 2, 1)
        query = self.linear(tokens, "feature_flow_attn.q_proj")
        if r < 0:
            key = self.linear(query, "feature_flow_attn.k_proj")
            out = (query @ key.permute(0, 2, 1) / C ** 0.5).softmax(-1) @ flow.reshape(B, 2, -1).permute(0, 2, 1)
            return out.view(B, h, w, 2).permute(0, 3, 1, 2)
        key = self.linear(tokens, "feature_flow_attn.k_proj").permute(0, 2, 1).reshape(B, C, h, w)
        windows = lambda x: F.unfold(x, 2 * r + 1, padding=r).view(B, x.shape[1], -1, h, w).permute(0, 3, 4, 1, 2).reshape(B * h * w, x.shape[1], -1)
        score = query.reshape(B * h * w, 1, C) @ windows(key) / C ** 0.5
        out = score.softmax(-1) @ windows(flow).permute(0, 2, 1)
        return out.view(B, h, w, 2).permute(0, 3, 1, 2).contiguous()

    # ------------------------------------------------------------ refinement
    def refine(self, state, context, corr, flow):
        n = "refine.encoder."
        matched = F.relu(self.conv(F.relu(self.conv(corr, n + "convc1")), n + "convc2"))
        moved = F.relu(self.conv(F.relu(self.conv(flow, n + "convf1")), n + "convf2"))
        motion = torch.cat([F.relu(self.conv(torch.cat([matched, moved], 1), n + "conv")), flow], 1)
        x = torch.cat([context, motion], 1)
        for i in "12":
            both = torch.cat([state, x], 1)
            z, r = self.conv(both, f"refine.gru.convz{i}").sigmoid(), self.conv(both, f"refine.gru.convr{i}").sigmoid()
            q = self.conv(torch.cat([r * state, x], 1), f"refine.gru.convq{i}").tanh()
            state = (1 - z) * state + z * q
        delta = self.conv(F.relu(self.conv(state, "refine.flow_head.conv1")), "refine.flow_head.conv2")
        return state, self.conv(F.relu(self.conv(state, "refine.mask.0")), "refine.mask.2"), delta

    def convex(self, flow, mask, s):
        B, _, h, w = flow.shape
        mask = mask.view(B, 1, 9, s, s, h, w).softmax(2)
        near = F.unfold(s * flow, 3, padding=1).view(B, 2, 9, 1, 1, h, w)
        return (mask * near).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(B, 2, s * h, s * w)

    def bilinear(self, flow, s): return F.interpolate(flow, scale_factor=s, mode="bilinear", align_corners=True) * s

    # ------------------------------------------------------------ all of it
    def __call__(self, image0, image1, bidirectional=False, train=False):
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
        images = torch.cat([(x / 255 - mean) / deviation for x in (image0, image1)])
        flow, out = None, []
        for scale, both in enumerate(self.backbone(images)[::-1]):
            f0, f1 = both.chunk(2)
            if bidirectional and scale: f0, f1 = torch.cat((f0, f1)), torch.cat((f1, f0))
            first0, first1, factor = f0, f1, self.factor * 2 ** (self.scales - 1 - scale)
            if scale:
                flow = self.bilinear(flow, 2).detach()
                f1 = self.sample(f1, self.grid(*[f1.shape[i] for i in (0, 2, 3)]) + flow)
            K, corr, prop = self.splits[scale], self.corr[scale], self.prop[scale]
            f0, f1 = self.transformer(self.position(f0, K), self.position(f1, K), K)
            found = self.global_match(f0, f1, bidirectional) if corr < 0 else self.local_match(f0, f1, corr)
            flow = found if flow is None else flow + found
            if train: out.append(self.bilinear(flow, factor))
            if bidirectional and scale == 0: f0, f1 = torch.cat((f0, f1)), torch.cat((f1, f0))
            flow = self.propagate(f0, flow.detach(), prop)
            if train and (scale < self.scales - 1 or self.refinements): out.append(self.bilinear(flow, factor))
        if not self.refinements:
            mask = self.conv(F.relu(self.conv(torch.cat([flow, f0], 1), "upsampler.0")), "upsampler.2")
            return [*out, self.convex(flow, mask, self.factor)] if train else self.convex(flow, mask, self.factor)
        for i in range(self.refinements):
            flow = flow.detach()
            score = self.correlation(first0, first1, flow, 4)
            state, context = self.conv(f0, "refine_proj").chunk(2, 1)
            state, mask, delta = self.refine(state.tanh(), context.relu(), score, flow)
            flow = flow + delta
            if train or i == self.refinements - 1: out.append(self.convex(flow, mask, self.factor))
        return out if train else out[-1]
