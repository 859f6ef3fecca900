"""Depth Anything 3 the plain way: the composition that the reference runs for every request, written from the description
of the network alone and operation by operation. It is what `camflow.depth.da3` is compared with, in numbers and in
time; it imports nothing of it.

What it does that depth, confidence and cameras do not need, or need once:
- the position table is resized bicubically at every call;
- every block from alt_start on works out its rotary angles (positions, frequencies, cosines, sines) for itself and
  turns q and k half by half;
- all four out layers are normalised and concatenated for both halves, the views put back in order;
- the dense head works in chunks of 8 views and always runs both fusion chains: depth and rays. The position embeddings
  of its maps are made anew for each map and chunk, and the five ray convolutions of all four levels are computed though
  only the last level's are read;
- layer scale, bias and activation are operations of their own; float32; autograd off.
Attention is torch's scaled_dot_product_attention; attention="explicit" is softmax(q k^T / sqrt(d)) v instead."""
import torch
import torch.nn.functional as F

ROPE_BASE, CHUNK = 100.0, 8


class PlainDA3:
    "Depth Anything 3 as functions on a state dict of published names (without the prefix `model.`)."
    def __init__(self, state, heads, out_layers, attention="sdpa"):
        self.w, self.heads, self.out_layers, self.attention = state, heads, tuple(out_layers), attention
        self.depth = 1 + max(int(n.split(".")[3]) for n in state if n.startswith("backbone.pretrained.blocks."))
        self.start = min(int(n.split(".")[3]) for n in state if n.endswith("attn.q_norm.weight") and n.startswith("backbone"))

    # ------------------------------------------------------------ layers by name
    def linear(self, x, name): return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])
    def norm(self, x, name, eps=1e-5): return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"], eps)
    def conv(self, x, name, **how): return F.conv2d(x, self.w[name + ".weight"], self.w.get(name + ".bias"), **how)
    def conv3(self, x, name, stride=1): return self.conv(x, name, stride=stride, padding=1)

    # ------------------------------------------------------------ backbone
    def positions(self, h, w):
        table = self.w["backbone.pretrained.pos_embed"]
        n = int((table.shape[1] - 1) ** 0.5)
        if h == w == n: return table
        patches = table[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, scale_factor=((h + 0.1) / n, (w + 0.1) / n), mode="bicubic")
        return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).reshape(1, h * w, -1)], 1)

    def turn(self, x, position):
        "Rotary positions of one half: x [..,N,m], position [N]."
        m = x.shape[-1]
        frequency = 1.0 / (ROPE_BASE ** (torch.arange(0, m, 2).float() / m))
        angle = position[:, None].float() * frequency
        angle = torch.cat([angle, angle], -1)
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def rope(self, x, h, w, views, local):
        rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        patches = torch.stack([rows, cols], -1).reshape(-1, 2) + 1 if local else torch.ones(h * w, 2, dtype=torch.long)
        place = torch.cat([torch.zeros(1, 2, dtype=torch.long), patches]).repeat(views, 1)
        vertical, horizontal = x.chunk(2, -1)
        return torch.cat([self.turn(vertical, place[:, 0]), self.turn(horizontal, place[:, 1])], -1)

    def attend(self, x, name, grid=None):
        B, N, C = x.shape
        q, k, v = self.linear(x, f"{name}.qkv").reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if grid is not None:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
            q, k = self.rope(q, *grid), self.rope(k, *grid)
        if self.attention == "explicit": y = torch.softmax(q * (C // self.heads) ** -0.5 @ k.transpose(-2, -1), -1) @ v
        else: y = F.scaled_dot_product_attention(q, k, v)
        return self.linear(y.transpose(1, 2).reshape(B, N, C), f"{name}.proj")

    def block(self, x, name, grid):
        y = self.attend(self.norm(x, f"{name}.norm1", 1e-6), f"{name}.attn", grid)
        x = x + y * self.w[f"{name}.ls1.gamma"]
        y = self.norm(x, f"{name}.norm2", 1e-6)
        if f"{name}.mlp.w12.weight" in self.w:
            gate, value = self.linear(y, f"{name}.mlp.w12").chunk(2, -1)
            y = self.linear(F.silu(gate) * value, f"{name}.mlp.w3")
        else: y = self.linear(F.gelu(self.linear(y, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        return x + y * self.w[f"{name}.ls2.gamma"]

    def reference(self, x, strategy):
        "View to move to the front, by the class tokens [B,S,C]."
        B, S, _ = x.shape
        if strategy == "first": return torch.zeros(B, dtype=torch.long)
        if strategy == "middle": return torch.full((B,), S // 2)
        u = x / x.norm(dim=-1, keepdim=True)
        found = [((u @ u.transpose(1, 2)).sum(2) - 1) / (S - 1), x.norm(dim=-1), u.var(-1)]
        scaled = [(a - a.amin(1, True)) / (a.amax(1, True) - a.amin(1, True) + 1e-8) for a in found]
        return sum((a - 0.5).abs() for a in scaled).argmin(1)

    def backbone(self, images, strategy):
        "Four patch maps [B,S,h*w,2C] and the last camera feature [B,S,2C]."
        p, (B, S, _, H, W) = "backbone.pretrained.", images.shape
        h, w = H // 14, W // 14
        x = self.conv(images.flatten(0, 1), p + "patch_embed.proj", stride=14).flatten(2).transpose(1, 2)
        x = torch.cat([self.w[p + "cls_token"].expand(B * S, 1, -1), x], 1) + self.positions(h, w)
        x = x.reshape(B, S, 1 + h * w, -1)
        N, C = x.shape[2:]
        maps, token, order, local = [], None, None, x
        for i in range(self.depth):
            if i == self.start - 1 and S >= 3:
                first = self.reference(x[:, :, 0], strategy)
                order = torch.stack([torch.cat([f[None], torch.tensor([s for s in range(S) if s != f])]) for f in first])
                x = torch.stack([one[o] for one, o in zip(x, order)])
            if i == self.start:
                camera = self.w[p + "camera_token"]
                camera = torch.cat([camera[:, :1].expand(B, -1, -1), camera[:, 1:].expand(B, S - 1, -1)], 1)
                x = torch.cat([camera[:, :, None], x[:, :, 1:]], 2)
            joint = i >= self.start and i % 2 == 1
            grid = None if i < self.start else (h, w, S if joint else 1, not joint)
            flat = x.reshape(B, S * N, C) if joint else x.reshape(B * S, N, C)
            x = self.block(flat, f"{p}blocks.{i}", grid).reshape(B, S, N, C)
            if not joint: local = x
            if i in self.out_layers:
                both = torch.cat([local, x], -1)
                if order is not None: both = torch.stack([one[o.argsort()] for one, o in zip(both, order)])
                token = both[:, :, 0]
                maps.append(torch.cat([both[:, :, 1:, :C], self.norm(both[:, :, 1:, C:], p + "norm")], -1))
        return maps, token

    # ------------------------------------------------------------ dense head
    def embed(self, y, size):
        "y [V,c,p,q] with its position embedding, which is made here."
        c, p, q = y.shape[1:]
        a = size[1] / size[0]
        s_x, s_y = a / (a * a + 1) ** 0.5, 1 / (a * a + 1) ** 0.5
        u = torch.linspace(-s_x * (q - 1) / q, s_x * (q - 1) / q, q, dtype=torch.float64)[None].expand(p, q).reshape(-1)
        v = torch.linspace(-s_y * (p - 1) / p, s_y * (p - 1) / p, p, dtype=torch.float64)[:, None].expand(p, q).reshape(-1)
        omega = 100.0 ** (-torch.arange(c // 4, dtype=torch.float64) / (c / 4))
        angle_u, angle_v = u[:, None] * omega, v[:, None] * omega
        table = torch.cat([angle_u.sin(), angle_u.cos(), angle_v.sin(), angle_v.cos()], 1).float()
        return y + 0.1 * table.reshape(p, q, c).permute(2, 0, 1)

    def residual(self, x, name): return x + self.conv3(F.relu(self.conv3(F.relu(x), f"{name}.conv1")), f"{name}.conv2")

    def fuse(self, levels, suffix):
        y = None
        for k in (4, 3, 2, 1):
            name, x = f"head.scratch.refinenet{k}{suffix}", levels[k - 1]
            y = x if y is None else y + self.residual(x, f"{name}.resConfUnit1")
            y = self.residual(y, f"{name}.resConfUnit2")
            size = levels[k - 2].shape[2:] if k > 1 else (2 * x.shape[2], 2 * x.shape[3])
            y = self.conv(F.interpolate(y, size=size, mode="bilinear", align_corners=True), f"{name}.out_conv")
        return y

    def head(self, maps, size):
        "Of one chunk: four maps [V,h*w,2C] -> depth, confidence [V,H,W], rays [V,8h,8w,6], their confidence."
        h, w = size[0] // 14, size[1] // 14
        levels = []
        for k, x in enumerate(maps):
            x = self.norm(x, "head.norm").permute(0, 2, 1).reshape(len(x), -1, h, w)
            x = self.embed(self.conv(x, f"head.projects.{k}"), size)
            name = f"head.resize_layers.{k}"
            if k < 2: x = F.conv_transpose2d(x, self.w[name + ".weight"], self.w[name + ".bias"], stride=(4, 2)[k])
            if k == 3: x = self.conv3(x, name, stride=2)
            levels.append(self.conv3(x, f"head.scratch.layer{k + 1}_rn"))
        y = self.conv3(self.fuse(levels, ""), "head.scratch.output_conv1")
        y = self.embed(F.interpolate(y, size=size, mode="bilinear", align_corners=True), size)
        y = self.conv(F.relu(self.conv3(y, "head.scratch.output_conv2.0")), "head.scratch.output_conv2.2")
        fused, rays = self.fuse(levels, "_aux"), []
        for level in range(4):
            z = fused
            for n in range(5): z = self.conv3(z, f"head.scratch.output_conv1_aux.{level}.{n}")
            rays.append(z)
        name = "head.scratch.output_conv2_aux.3"
        z = self.conv3(self.embed(rays[3], size), f"{name}.0").permute(0, 2, 3, 1)
        z = self.conv(F.relu(self.norm(z, f"{name}.2")).permute(0, 3, 1, 2), f"{name}.5").permute(0, 2, 3, 1)
        return y[:, 0].exp(), y[:, 1].exp() + 1, z[..., :6], z[..., 6].exp() + 1

    # ------------------------------------------------------------ camera
    def cameras(self, g, size):
        (H, W), n = size, "cam_dec."
        y = F.relu(self.linear(F.relu(self.linear(g, n + "backbone.0")), n + "backbone.2"))
        t, q, fov = self.linear(y, n + "fc_t"), self.linear(y, n + "fc_qvec"), F.relu(self.linear(y, n + "fc_fov.0"))
        x, y, z, w = q.unbind(-1)
        s = 2 / q.square().sum(-1)
        R = torch.stack([1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w), s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
                         s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)], -1).reshape(*q.shape[:-1], 3, 3)
        w2c = torch.cat([R.mT, -R.mT @ t[..., None]], -1)
        K = torch.zeros_like(R)
        K[..., 0, 0], K[..., 1, 1] = (W / 2) / torch.tan(fov[..., 1] / 2).clamp(min=1e-6), (H / 2) / torch.tan(fov[..., 0] / 2).clamp(min=1e-6)
        K[..., 0, 2], K[..., 1, 2], K[..., 2, 2] = W / 2, H / 2, 1
        return {"extrinsics": w2c, "intrinsics": K}

    @torch.no_grad()
    def __call__(self, images, strategy="saddle_balanced"):
        "Normalised images [B,S,3,H,W] -> depth, depth_conf, ray, ray_conf, extrinsics (w2c), intrinsics."
        B, S, size = *images.shape[:2], tuple(images.shape[-2:])
        maps, token = self.backbone(images, strategy)
        flat = [m.flatten(0, 1) for m in maps]
        chunks = [self.head([m[n:n + CHUNK] for m in flat], size) for n in range(0, B * S, CHUNK)]
        dense = {name: torch.cat(parts).unflatten(0, (B, S)) for name, parts in zip(("depth", "depth_conf", "ray", "ray_conf"), zip(*chunks))}
        return dense | self.cameras(token, size)


def load(state, config, attention="sdpa"):  # state dict of camflow's module (or the published names without "model."), its configuration
    "The plain network under the same tensors."
    return PlainDA3({k: v.float() for k, v in state.items()}, config.num_heads, config.out_layers, attention)
