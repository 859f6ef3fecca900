"""Muon whose orthogonalisation runs in float32, for hosts that have no fast bfloat16 products"""

import torch
from torch.optim import Muon


def orthogonal(update_NRC: torch.Tensor, # equally shaped matrices
               coefficients=(3.4445, -4.7750, 2.0315), # of the quintic iteration, torch's
               steps: int = 5,
               eps: float = 1e-7):       # smallest norm
    "Newton-Schulz iteration towards the nearest orthogonal matrices, [N,R,C]."
    a, b, c = coefficients
    wide = update_NRC.shape[1] <= update_NRC.shape[2]
    x = update_NRC if wide else update_NRC.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class HostMuon(Muon):
    "torch's Muon with float32 products, matrices of one shape together; same state, so checkpoints of either continue with the other."
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None: shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, several in shapes.items(): self._together(several, group, max(shape))

    def _together(self, params, group, longest):
        updates = []
        for p in params:
            state = self.state[p]
            if not state: state["momentum_buffer"] = torch.zeros_like(p.grad)
            momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
        moves = orthogonal(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
        for p, move in zip(params, moves):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-group["lr"] * 0.2 * longest ** 0.5) # adjust_lr_fn="match_rms_adamw"
