"""
What only pretrained models need, beside matmla.py: their names of weights, biases, RoPE at other
frequencies, QK-norm (Qwen3), experts (Mixtral), and, once converted, keys for all groups at once.
"""

import re
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from matmla import ATTENTION, GPT, GQA, MLA, Config, MatMLA, RMSNorm, to_heads

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
    "self_attn.q_norm": "attention.norm_q",
    "self_attn.k_norm": "attention.norm_k",
    "mlp.gate_proj": "W_gate",
    "mlp.up_proj": "W_up",
    "mlp.down_proj": "W_down",
    "mlp.gate.": "W_up.router.",
    "mlp.experts.": "experts.",
}


def rename(name):
    """Our name of a weight of transformers."""
    return re.sub("|".join(OURS), lambda found: OURS[found[0]], name)


def with_one(x):
    """x [..., d] -> [..., d + 8]: a 1 behind x, whose column in a matrix is the bias; then zeros.

    The zeros are there because a GPU multiplies widths that are multiples of 8 faster.
    """
    return F.pad(F.pad(x, (0, 1), value=1.0), (0, 7))


def rope(x, positions, frequencies):
    """RoPE of matmla.py at any frequencies: pair i of token t turns by positions[t]·frequencies[i].

    x [B, T, h, n], positions [T], frequencies [n/2].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    angle = positions[:, None, None] * frequencies.to(dtype)  # [T,1,n/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x0, x1 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2)


class Pretrained:
    """In front of an attention: whatever it makes of x has a bias, and RoPE has its frequencies.

    The frequencies are saved with the weights, since Llama 3 divides some of them by a number of
    its own. With QK-norm, a query or key is y / √(mean(y²) + eps) · weight before RoPE turns it.
    """

    Norm = nn.Identity  # of queries and keys; RMSNorm is QK-norm

    def __init__(self, c):
        super().__init__(replace(c, d=c.d + 8, d_cq=0))  # queries come straight from x
        self.W_O = nn.Linear(c.n_h * c.d_h, c.d, bias=False)
        frequencies = c.rope_base ** (-torch.arange(0, c.d_h, 2) / c.d_h)
        self.register_buffer("frequencies", frequencies)  # [d_h/2]
        self.norm_k = self.Norm(c.d_h, eps=c.norm_eps)

    def _apply(self, *arguments):
        """What `to` and `bfloat16` do. In bfloat16 frequencies would be others: they stay."""
        frequencies = self.frequencies
        super()._apply(*arguments)
        self.frequencies = frequencies.to(self.frequencies.device)
        return self

    def forward(self, x, heads=None, cache=None):
        return super().forward(with_one(x), heads, cache)


class PretrainedGQA(Pretrained, GQA):
    """The attention of Llama, Mistral, Mixtral and Qwen2, but that RoPE turns neighbours."""

    def __init__(self, c):
        super().__init__(c)
        self.norm_q = self.Norm(c.d_h, eps=c.norm_eps)

    def write(self, x, positions, m):
        k = self.norm_k(to_heads(self.W_K, x, self.n_kv, self.d_h))  # [B,T,n_kv,d_h]
        v = to_heads(self.W_V, x, self.n_kv, self.d_h)
        return torch.cat((rope(k, positions, self.frequencies), v), -1).flatten(2)

    def read(self, x, rows, positions, m):
        q = self.norm_q(to_heads(self.W_Q, x, m, self.d_h))  # [B,T,n_h,d_h]
        q = rope(q, positions, self.frequencies)
        k, v = rows.unflatten(-1, (-1, 2 * self.d_h)).chunk(2, -1)  # [B,S,n_kv,d_h] each
        o = self.attend(q, k, v, positions, self.d_h**-0.5)
        return self.W_O(o.flatten(2))


class PretrainedMLA(Pretrained, MLA):
    """What a GQA becomes: k_R is several keys side by side, called slots, and c_KV has no norm.

    So the frequencies start anew after every d_h numbers. With QK-norm each slot, which is one key
    of the GQA, is normed by itself. A query is normed over all slots, of which all but one are zero
    at first: its mean square is that of GQA's divided by their number, and so is eps.
    """

    def __init__(self, c):
        super().__init__(c)
        self.norm_KV = nn.Identity()
        self.norm_q_C = self.Norm(c.d_h, eps=c.norm_eps)
        self.norm_q_R = self.Norm(c.d_R, eps=c.norm_eps * c.d_h / c.d_R)

    def write(self, x, positions, m):
        k_R = self.norm_k(to_heads(self.W_KR, x, self.d_R // self.d_h, self.d_h))  # [B,T,slots,d_h]
        k_R = rope(k_R, positions, self.frequencies).flatten(2)
        return torch.cat((self.W_DKV(x), k_R), -1)

    def queries(self, x, positions, m):
        q_C = self.norm_q_C(to_heads(self.W_UQ, x, m, self.d_h))  # [B,T,m,d_h]
        q_R = self.norm_q_R(to_heads(self.W_QR, x, m, self.d_R))  # [B,T,m,d_R]
        q_R = q_R.unflatten(3, (-1, self.d_h)).flatten(2, 3)  # [B,T,m·slots,d_h]
        return q_C, rope(q_R, positions, self.frequencies).unflatten(2, (m, -1)).flatten(3)


class PretrainedMatMLA(PretrainedMLA, MatMLA):
    """The same, read by its first m heads."""


class QKNormGQA(PretrainedGQA):
    """The attention of Qwen3."""

    Norm = RMSNorm


class QKNormMLA(PretrainedMLA):
    """What Qwen3's attention becomes. Its keys are cached after norm and RoPE, so it is exact.

    They must stay in k_R, all of them. A latent is a linear map of x, and a key divided by its own
    norm is not. If the norm came later, when W_UK makes the key of c_KV, its size would have to be
    known for each cached token and head: nothing could be absorbed. Nor can keys of several groups
    be mixed, so that few of them would do (RoRoPE in transmla.py): each is divided by another norm.
    """

    Norm = RMSNorm


class QKNormMatMLA(QKNormMLA, MatMLA):
    """The same, read by its first m heads."""


ATTENTION.update(
    pretrained_gqa=PretrainedGQA,
    pretrained_mla=PretrainedMLA,
    pretrained_matmla=PretrainedMatMLA,
    pretrained_qk_norm_gqa=QKNormGQA,
    pretrained_qk_norm_mla=QKNormMLA,
    pretrained_qk_norm_matmla=QKNormMatMLA,
)


class RoutedLinear(nn.Linear):
    """W_up of a mixture of experts: what leads to an expert is multiplied by its weight for y.

    A router chooses two experts for each token; their weights are a softmax over the two, all
    others are zero. W_gate, W_up and W_down are those of all experts, side by side. That computes
    experts which nobody chose, E / 2 times as much as needed, but in shapes that do not depend on
    the tokens, so that it can be compiled. y [B, T, d] -> [B, T, E·d_ff]. arXiv:2401.04088
    """

    def __init__(self, d, d_ff, experts):
        super().__init__(d, d_ff, bias=False)
        self.router = nn.Linear(d, experts, bias=False)

    def forward(self, y):
        logits = self.router(y)  # [B,T,E]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best, chosen = logits.topk(2, -1)
        p = torch.zeros_like(logits).scatter(-1, chosen, best.softmax(-1))
        up = super().forward(y)
        return (up.unflatten(-1, (p.shape[-1], -1)) * p.to(up.dtype)[..., None]).flatten(-2)


def make_model(config, weights):
    """GPT(config), with experts if the weights, those of a checkpoint, have any."""
    model = GPT(config)
    for i, block in enumerate(model.blocks):
        router = weights.get(f"blocks.{i}.W_up.router.weight")
        if router is not None:
            block.W_up = RoutedLinear(config.d, config.d_ff, len(router))
    return model


def to_gqa(theirs):
    """(config, weights) of our GQA from a model of transformers.

    The sizes of the config are those of the MLA with the same cache, too.
    """
    c = theirs.config
    weights = {rename(name): W for name, W in theirs.state_dict().items()}
    d_h = len(weights["blocks.0.attention.W_Q.weight"]) // c.num_attention_heads
    for i in range(c.num_hidden_layers):
        block_to_gqa(weights, f"blocks.{i}.", d_h)
        weights[f"blocks.{i}.attention.frequencies"] = theirs.model.rotary_emb.inv_freq
    qk_norm = "blocks.0.attention.norm_q.weight" in weights
    config = Config(
        attention="pretrained_qk_norm_gqa" if qk_norm else "pretrained_gqa",
        vocab_size=c.vocab_size,
        context=c.max_position_embeddings,
        n_layer=c.num_hidden_layers,
        d=c.hidden_size,
        n_h=c.num_attention_heads,
        n_kv=c.num_key_value_heads,
        d_h=d_h,
        d_c=c.num_key_value_heads * d_h,
        d_cq=0,
        d_R=c.num_key_value_heads * d_h,
        d_ff=len(weights["blocks.0.W_up.weight"]),
        budgets=(c.num_attention_heads,),
        rope_base=c.rope_parameters["rope_theta"],
        norm_eps=c.rms_norm_eps,
        tie=torch.equal(weights["embed.weight"], weights["unembed.weight"]),
    )
    return config, weights


def block_to_gqa(weights, block, d_h):
    """Bring the weights of one block into our form. block: what their names begin with."""
    attention = f"{block}attention."

    # A bias becomes the column of the 1 in with_one(x).
    for name in ("W_Q", "W_K", "W_V"):
        W = weights[f"{attention}{name}.weight"]
        bias = weights.pop(f"{attention}{name}.bias", torch.zeros(len(W)))
        weights[f"{attention}{name}.weight"] = F.pad(torch.cat((W, bias[:, None]), 1), (0, 7))

    # RoPE turns the numbers i and i + d_h/2 of a head. Here they become neighbours.
    for name in ("W_Q", "W_K", "norm_q", "norm_k"):
        W = weights.get(f"{attention}{name}.weight")
        if W is not None:
            W = W.unflatten(0, (-1, 2, d_h // 2)).transpose(1, 2).flatten(0, 2)
            weights[f"{attention}{name}.weight"] = W

    # The hidden numbers of all experts become one vector, those of the first in front.
    if f"{block}experts.down_proj" in weights:
        gate, up = weights.pop(f"{block}experts.gate_up_proj").chunk(2, 1)  # [E,d_ff,d] each
        down = weights.pop(f"{block}experts.down_proj")  # [E,d,d_ff]
        weights[f"{block}W_gate.weight"] = gate.flatten(0, 1)
        weights[f"{block}W_up.weight"] = up.flatten(0, 1)
        weights[f"{block}W_down.weight"] = down.transpose(0, 1).flatten(1)
