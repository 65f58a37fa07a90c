"""What only pretrained models have: names, biases, RoPE that starts anew, latents without a norm."""

import re
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from matmla import ATTENTION, GQA, MLA, MatMLA, rope, to_heads

OURS = {  # parts of a weight's name in transformers: ours
    "model.layers": "blocks",
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "lm_head": "unembed",
    "input_layernorm": "norm_attention",
    "post_attention_layernorm": "norm_feed_forward",
    "self_attn.q_proj": "attention.W_Q",
    "self_attn.k_proj": "attention.W_K",
    "self_attn.v_proj": "attention.W_V",
    "self_attn.o_proj": "attention.W_O",
    "mlp.gate_proj": "W_gate",
    "mlp.up_proj": "W_up",
    "mlp.down_proj": "W_down",
}


def rename(name):
    """Our name of a weight of transformers."""
    return re.sub("|".join(OURS), lambda found: OURS[found[0]], name)


def with_one(x):
    """x [..., d] -> [..., d + 8]: a 1 behind x, whose column in a matrix is the bias, and zeros, which a GPU likes."""
    return F.pad(F.pad(x, (0, 1), value=1.0), (0, 7))


class Biased:
    """In front of an attention: all that it makes of x has a bias. Queries come straight from x."""

    def __init__(self, c):
        super().__init__(replace(c, d=c.d + 8, d_cq=0))
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)

    def forward(self, x, heads=None, cache=None):
        return super().forward(with_one(x), heads, cache)


class PretrainedGQA(Biased, GQA):
    """Llama's, Mistral's and Qwen2's attention, but that RoPE turns neighbours."""


class PretrainedMLA(Biased, MLA):
    """What a GQA becomes. The latent has no norm; k_R is several keys, so RoPE starts anew after every d_h numbers."""

    def __init__(self, c):
        super().__init__(c)
        self.norm_KV = nn.Identity()

    def write(self, x, positions, m):
        k_R = to_heads(self.W_KR, x, self.d_R // self.d_h, self.d_h)  # [B,T,slots,d_h]
        return torch.cat((self.W_DKV(x), rope(k_R, positions, self.rope_base).flatten(2)), -1)

    def queries(self, x, positions, m):
        q_C = to_heads(self.W_UQ, x, m, self.d_h)  # [B,T,m,d_h]
        q_R = to_heads(self.W_QR, x, m * self.d_R // self.d_h, self.d_h)  # [B,T,m·slots,d_h]
        return q_C, rope(q_R, positions, self.rope_base).unflatten(2, (m, -1)).flatten(3)


class PretrainedMatMLA(PretrainedMLA, MatMLA):
    """The same, read by its first m heads."""


ATTENTION.update(
    pretrained_gqa=PretrainedGQA, pretrained_mla=PretrainedMLA, pretrained_matmla=PretrainedMatMLA
)
