"""
Muon, the optimizer of the matrices inside the blocks (kellerjordan.github.io/posts/muon; as scaled
in arXiv:2502.16982).

Plain momentum moves a matrix mostly along a few directions, those of the largest gradients. Muon
replaces the momentum G = U S Vᵀ by about U Vᵀ = (G Gᵀ)^(-1/2) G, so that all directions move alike.
An odd polynomial, a·G + b·(G Gᵀ) G + c·(G Gᵀ)² G, takes each singular value closer to 1 and needs
products of matrices only; five times are enough (a Newton-Schulz iteration). Each step is then
scaled to the size of an AdamW step, so that the two share their learning rates and weight decay.
"""

import torch


class Muon(torch.optim.Muon):
    """torch's Muon, but all matrices of one shape take each operation together: fewer kernels."""

    @torch.no_grad()
    def directions(self):
        """[(matrices, the direction of each, [n, rows, columns]), ...], a pair for every shape.

        Also updates the momenta with the gradients.
        """
        group = self.param_groups[0]
        pairs = []
        for shape in sorted({p.shape for p in group["params"]}):
            matrices = [p for p in group["params"] if p.shape == shape]
            for p in matrices:
                if not self.state[p]:
                    self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            grads = [p.grad for p in matrices]
            momenta = [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
            pairs.append((matrices, orthogonalized(torch.stack(nesterov), group)))
        return pairs

    @torch.no_grad()
    def step(self):
        """One step, with weight decay. Every parameter must have a gradient."""
        group = self.param_groups[0]
        for matrices, direction in self.directions():
            # As in an AdamW step, whose root mean square is about 0.2
            size = 0.2 * max(matrices[0].shape) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(direction), alpha=-group["lr"] * size)


def orthogonalized(G, group):
    """G [n, rows, columns] -> about (G Gᵀ)^(-1/2) G, for each of the n matrices."""
    a, b, c = group["ns_coefficients"]
    dtype, tall = G.dtype, G.shape[1] > G.shape[2]
    G = G.mT if tall else G  # G Gᵀ is the smaller product of the two
    G = G.bfloat16() if G.is_cuda else G  # enough for a direction
    G = G / G.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        A = G @ G.mT
        G = torch.baddbmm(G, torch.baddbmm(A, A, A, beta=b, alpha=c), G, beta=a)
    G = G.mT if tall else G
    return G.to(dtype, memory_format=torch.contiguous_format)  # laid out as the weights: faster
