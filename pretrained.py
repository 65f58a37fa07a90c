"""What only pretrained models have: names, a tokenizer, biases, RoPE that starts anew, latents without a norm."""

import json
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


class Tokenizer:
    """A tokenizer.json, with those methods of a tiktoken.Encoding that are used here.

    Text that looks like a special token is text. In front of every text stands what the model wants there, such as a
    token for the beginning; what it wants behind is left out, because generation goes on from there.
    json: its content; eot_token: what separates documents.
    """

    def __init__(self, json, eot_token):
        import tokenizers  # needed only here

        self.tokenizer = tokenizers.Tokenizer.from_str(json)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        around = self.tokenizer.encode("a")  # with special tokens on both sides
        self.front = around.ids[: around.special_tokens_mask.index(0)]
        self.eot_token, self.n_vocab = eot_token, max(self.tokenizer.get_vocab().values()) + 1

        parts = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer, self.tokenizer.decoder
        self.byte_level = any("ByteLevel" in str(part) for part in parts)
        letters = sorted(
            tokenizers.pre_tokenizers.ByteLevel.alphabet()
        )  # a byte that cannot be printed is a
        self.byte = dict(
            zip(letters, sorted(range(256), key=lambda byte: chr(byte) not in letters))
        )  # later letter
        pieces = {} if self.byte_level else self.tokenizer.get_vocab(with_added_tokens=False)
        added = self.tokenizer.get_added_tokens_decoder()
        self.verbatim = {
            token for token, text in added.items() if text.content not in pieces
        }  # a ▁ is one

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts, num_threads=None):
        texts = [
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts
        ]  # like tiktoken
        return [
            self.front + one.ids
            for one in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode_single_token_bytes(self, token):
        piece = self.tokenizer.id_to_token(token) or "?"  # some ids may have no token
        if token in self.verbatim:
            return piece.encode()
        if self.byte_level and all(letter in self.byte for letter in piece):
            return bytes(self.byte[letter] for letter in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()  # SentencePiece's sign for a space


def from_pieces(path, bos):
    """tokenizer.json for a list of SentencePiece's byte pairs in the order of their merges, as llama2.c has them."""
    from tokenizers import Tokenizer, models, normalizers, processors

    pieces = json.loads(path.read_text("utf-8"))
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (p[:k], p[k:]) for p in pieces for k in range(1, len(p)) if p[:k] in ids and p[k:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token=pieces[0]))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.post_processor = processors.TemplateProcessing(
        "bos $A", special_tokens=[("bos", bos)]
    )
    return tokenizer.to_str()


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
