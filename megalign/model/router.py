"""Which experts a token passes and with what weights, as transformers computes it for each family.

Megatron's own router knows some of these ways only: it always divides sigmoid scores by their sum, scores groups
by topk / group_topk of their experts, and moves the selection bias while it trains.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megalign.conversion.architecture import MixtureOfExperts


class TokenRouter(TopKRouter):
    """Top-k routing without dropping: what a token gets does not depend on the microbatch it is in."""

    def __init__(
        self, config: TransformerConfig, pg_collection: Any = None, *, experts: MixtureOfExperts, **rest: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **rest)
        self._experts = experts
        if experts.selection_bias:
            del self.expert_bias  # Megatron's None, in the way of the buffer
            bias = torch.zeros(experts.num_experts, dtype=torch.float32, device=torch.cuda.current_device())
            self.register_buffer("expert_bias", bias)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[tokens, 1, experts] -> each expert's weight, 0 where it is not chosen, and which are: [tokens, experts]."""
        experts = self._experts
        logits = logits.view(-1, experts.num_experts).float()
        scores = logits.softmax(-1) if experts.score == "softmax" else logits.sigmoid()
        chosen = choose(scores if self.expert_bias is None else scores + self.expert_bias, experts)
        weights = scores.gather(1, chosen)
        if experts.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = torch.zeros_like(scores).scatter(1, chosen, weights * experts.scaling)
        if self.config.moe_aux_loss_coeff and self.training and torch.is_grad_enabled():
            weights = self._with_load_balancing(weights, scores, padding_mask)
        return weights, torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)

    def _with_load_balancing(self, weights: Tensor, scores: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The weights, whose backward also adds the auxiliary loss's gradient; see router_aux_loss_coef.

        The pipeline divides all gradients by the step's tokens, pads left out, so the loss of this microbatch is
        multiplied by its own, of all tensor and context ranks (Megatron 0.16.1's router takes one rank's).
        """
        num_experts = self._experts.num_experts
        assert padding_mask is not None, "what fills a batch up to its layout's size must not count"
        real = ~padding_mask.reshape(-1)  # [tokens]
        # Its best experts by score alone, and for sigmoids the scores' shares: as transformers and Megatron have it.
        chosen = scores.topk(self._experts.top_k, dim=-1).indices
        counted = real.to(scores.dtype)[:, None]
        loads = scores.new_zeros(num_experts).index_add(0, chosen.flatten(), counted.expand_as(chosen).flatten())
        totals = torch.cat([loads, counted.sum()[None]]).detach()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(totals, group=self.tp_cp_group)
        loads, num_tokens = totals[:-1], totals[-1].clamp(min=1)
        # This rank's part of a sum over tokens.
        shares = (scores / (scores.sum(-1, keepdim=True) + 1e-20) * counted).sum(0)
        loss = num_experts * (loads / num_tokens * shares / num_tokens).sum()
        return MoEAuxLossAutoScaler.apply(weights, self.config.moe_aux_loss_coeff * loss * num_tokens)


def choose(scores: Tensor, experts: MixtureOfExperts) -> Tensor:
    """[tokens, experts] -> [tokens, top_k], the best experts in the best groups."""
    if experts.num_groups > 1:
        groups = scores.view(len(scores), experts.num_groups, -1)
        best = groups.topk(experts.group_score_experts, dim=-1).values.sum(-1).topk(experts.top_groups, dim=-1).indices
        open_groups = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
        scores = groups.masked_fill(~open_groups[..., None], float("-inf")).view_as(scores)
    return scores.topk(experts.top_k, dim=-1).indices
