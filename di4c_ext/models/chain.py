"""A hidden Markov chain between a network's states and its head: a mixture whose likelihood is known exactly.

What positions unmasked in one step owe to each other is mostly owed to their neighbours. One latent for all of them has
to spell all of that out at once; the hidden state of a chain, z_d in {1..R}, has to agree with z_{d-1} only:

    p(x | x_t) = sum_z  prod_d p(z_d | z_{d-1}, x_t) p^d(x^d | x_t, z_d)

a mixture of products with R^D components, all of one forward pass of the network: the component z adds a correction to
the network's state at each position before the head. Given D uniform numbers, lambda, a path is drawn by inversion,
z_d the first state whose cumulative probability exceeds lambda_d, so this is a student like every other,
p^d(. | x_t; lambda), to the samplers and the losses. But the sum over z is known too, by the forward recursion: no
draw of lambda is needed to be trained by likelihood, or to be measured. (The chain as the last layer of a network that
says all positions at once is that of directed acyclic transformers, arXiv 2205.07459; the mixture that of Di4C.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from di4c_ext import ops
from di4c_ext.models.unet_blocks import ZeroLinear, wide


class Chain(nn.Module):
    """The chain's states and steps, all read from the network's states h (N, D, H).

    A new one steps to any state alike; its states differ a little from the start, for the likelihood has no slope that
    would part them.
    """

    def __init__(self, width: int, num_states: int, inner: int) -> None:
        super().__init__()
        self.num_states = num_states
        self.told = nn.Linear(width, inner)
        self.kind = nn.Parameter(torch.randn(num_states, inner))
        self.out = nn.Linear(inner, width, bias=False)
        self.pair = nn.Linear(2 * width, inner)
        self.transition = ZeroLinear(inner, num_states * num_states)

    def transitions(self, h: Tensor) -> Tensor:
        """log p(z_d | z_{d-1}), (N, D, R, R), z_{d-1} first; all rows of the first position's are its own law's."""
        before = functional.pad(h, (0, 0, 1, 0))[:, :-1]
        told = functional.gelu(self.pair(torch.cat([before, h], -1)))
        scores = self.transition(told).unflatten(-1, (self.num_states, self.num_states))
        steps: Tensor = scores.to(wide(scores.dtype)).log_softmax(-1)
        return torch.cat([steps[:, :1, :1].expand(-1, -1, self.num_states, -1), steps[:, 1:]], 1)

    def path(self, h: Tensor, latents: Tensor) -> Tensor:
        """z (N, L, D) int64 of uniform numbers latents (N, L, D), L paths to each row of h (N, D, H)."""
        reached = self.transitions(h).exp().cumsum(-1)
        z = torch.zeros_like(latents[..., 0], dtype=torch.int64)
        found = []
        for d in range(h.shape[1]):
            rows = reached[:, d].gather(1, z[..., None].expand(-1, -1, self.num_states))
            z = (latents[..., d, None] >= rows[..., :-1]).sum(-1)
            found.append(z)
        return torch.stack(found, -1)

    def chosen(self, h: Tensor, z: Tensor) -> Tensor:
        """The network's states with the correction of z: h (N, D, H), z (N, L, D) -> (N, L, D, H)."""
        states: Tensor = h[:, None] + self.out(functional.gelu(self.told(h)[:, None] + self.kind[z]))
        return states

    def log_marginals(self, h: Tensor, head: ops.Hidden) -> Tensor:
        """log of each position's own law, all paths summed over: (N, D, S) of h (N, D, H) and the head.

        One of the R states is laid on the others at a time, so that two tensors of this size live at once.
        """
        steps = self.transitions(h).exp()
        reached = [steps[:, 0, 0]]
        for d in range(1, h.shape[1]):
            reached.append((reached[-1][:, None] @ steps[:, d])[:, 0])
        weight = torch.stack(reached, 1).log()
        total: Tensor | None = None
        for z in range(self.num_states):
            states = self.chosen(h, torch.full_like(weight[:, None, :, 0], z, dtype=torch.int64))[:, 0]
            logits = head._replace(states=states.to(head.weight.dtype)).logits()
            log_p = weight[..., z, None] + logits.to(wide(logits.dtype)).log_softmax(-1)
            total = log_p if total is None else torch.logaddexp(total, log_p)
        assert total is not None  # there is a state
        return total

    def log_prob(self, h: Tensor, tokens: Tensor, place: tuple[Tensor, Tensor], head: ops.Hidden) -> Tensor:
        """log p of the tokens at some positions, the others summed over: (N,) nats, with a graph.

        h (N, D, H); place: rows and positions (n,) each, tokens (n,) there; head: the tokens' weight and bias.
        """
        at = h[place]
        each = at[:, None] + self.out(functional.gelu(self.told(at)[:, None] + self.kind))  # (n, R, H)
        rows = head._replace(states=each.flatten(0, 1)[:, None, None].to(head.weight.dtype))
        said, _ = ops.mixture_log_prob(rows, tokens.repeat_interleave(self.num_states)[:, None, None])
        emission = said.new_zeros(*h.shape[:2], self.num_states).index_put(place, said.view(-1, self.num_states))
        steps = self.transitions(h)
        forward = steps[:, 0, 0] + emission[:, 0]
        for d in range(1, h.shape[1]):
            forward = torch.logsumexp(forward[..., None] + steps[:, d], 1) + emission[:, d]
        return forward.logsumexp(-1)
