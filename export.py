"""
A trained model, at one head budget, as a folder that transformers opens.

    python export.py out/checkpoint.pt --heads 8 --out out/hf8
    python -c "import transformers as t; print(t.pipeline('text-generation', 'out/hf8')('import '))"

MLA, and MatMLA read by its first m heads, is a DeepSeek-V3 of m heads without experts. MHA and GQA
are Llamas; so are nested MHA and nested GQA at m heads. Weights only change their names and places.

    python export.py out/checkpoint.pt --heads 8 --for vllm --out out/vllm8

vLLM computes latents of DeepSeek-V3's width and of few others, and heads of few widths. For it, the
folder has zeros in the places that are free. It says the same, but its cache is as wide as
DeepSeek-V3's. tests/serve_vllm.py shows it at work, and what vLLM needs on a CPU.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken
import torch
import torch.nn.functional as F
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import TikTokenConverter

from common import Parser, UserError, heads_of, load, user_input
from pretrained import rename
from tokenizer import explained

LATENT = {"d_c": 512, "d_R": 64, "d_h": 128}  # DeepSeek-V3's: what vLLM computes of MLA
HEAD = 32, 64, 80, 96, 112, 128, 160, 192, 224, 256  # d_h that it computes of the others


def vllm_sizes(c):
    """Config c with the widths that vLLM computes. UserError if ours do not fit into any."""
    if "mla" in c.attention:
        if c.d_c > LATENT["d_c"] or LATENT["d_R"] % c.d_R or c.d_h > LATENT["d_h"]:
            raise UserError(
                f"vLLM has room for d_c 512, d_h 128 and a d_R that divides 64, but here d_c is "
                f"{c.d_c}, d_h {c.d_h} and d_R {c.d_R}"
            )
        return replace(c, **LATENT)
    widths = [width for width in HEAD if width % c.d_h == 0]
    if not widths:
        raise UserError(f"none of vLLM's head widths {HEAD} is a multiple of d_h = {c.d_h}")
    return replace(c, d_h=widths[0])


def fill_up(W, old, new):
    """W [n·old, ...] -> [n·new, ...]: zeros behind every `old` rows."""
    return F.pad(W.unflatten(0, (-1, old)), (0, 0, 0, new - old)).flatten(0, 1)


def widen(w, c, wide):
    """The weights w of an attention in Config c, for the larger widths of Config wide.

    Zeros fill up, and two things make up for what they change. The softmax scale is one over the
    root of the width, so queries grow by the root of what the width grows by. RoPE turns pair i of
    n numbers by base^(-2i/n): it becomes pair i·wide/n of the wider ones, which turns as fast.
    """
    latent = "mla" in c.attention
    head = c.d_h, wide.d_h
    pair = 2, 2 * (wide.d_R // c.d_R if latent else wide.d_h // c.d_h)
    wide_O = fill_up(w["W_O"].T, *head).T
    if not latent:
        return {
            "W_Q": (wide.d_h / c.d_h) ** 0.5 * fill_up(w["W_Q"], *pair),
            "W_K": fill_up(w["W_K"], *pair),
            "W_V": fill_up(w["W_V"], *head),
            "W_O": wide_O,
        }

    # The norm of the latent divides by the root of a mean, which zeros make smaller: its input
    # grows by as much, so that eps counts as before, and its weight shrinks.
    more = (0, wide.d_c - c.d_c)
    grow = (wide.d_c / c.d_c) ** 0.5
    scale = ((wide.d_h + wide.d_R) / (c.d_h + c.d_R)) ** 0.5
    return w | {
        "W_UQ": scale * fill_up(w["W_UQ"], *head),
        "W_QR": scale * fill_up(w["W_QR"], *pair),
        "W_DKV": grow * fill_up(w["W_DKV"], c.d_c, wide.d_c),
        "norm_KV": F.pad(w["norm_KV"] / grow, more),
        "W_KR": fill_up(w["W_KR"], *pair),
        "W_UK": F.pad(fill_up(w["W_UK"], *head), more),
        "W_UV": F.pad(fill_up(w["W_UV"], *head), more),
        "W_O": wide_O,
    }


def deepseek(w, c, m):
    """The first m heads of MLA with weights w as DeepSeek-V3 has them.

    It has one matrix for all that is made of one input.
    """

    def heads(*names):
        """Rows of the first head from each weight, then of the next."""
        return torch.cat([w[name].unflatten(0, (c.n_h, -1))[:m] for name in names], 1).flatten(0, 1)

    query_latent = {"q_a_proj": w["W_DQ"], "q_a_layernorm": w["norm_Q"]} if c.d_cq else {}
    return query_latent | {
        "q_b_proj" if c.d_cq else "q_proj": heads("W_UQ", "W_QR"),
        "kv_a_proj_with_mqa": torch.cat((w["W_DKV"], w["W_KR"])),
        "kv_a_layernorm": w["norm_KV"],
        "kv_b_proj": heads("W_UK", "W_UV"),
        "o_proj": w["W_O"][:, : m * c.d_h],
    }


def llama(w, c, m):
    """The first m heads of the other attentions with weights w as Llama has them."""
    n = m * c.d_h  # GQA's W_K and W_V have fewer rows: all of them stay
    W_Q, W_K, W_V, W_O = w["W_Q"][:n], w["W_K"][:n], w["W_V"][:n], w["W_O"][:, :n]
    if c.attention == "nested_gqa":  # of whose heads every n_kv-th shares a key; here neighbours do
        W_Q = W_Q.unflatten(0, (-1, c.n_kv, c.d_h)).transpose(0, 1).flatten(0, 2)
        W_O = W_O.unflatten(1, (-1, c.n_kv, c.d_h)).transpose(1, 2).flatten(1, 3)

    def halves(W):
        """RoPE turns neighbours here, and there x_i with x_(i + d_h/2)."""
        return W.unflatten(0, (-1, c.d_h // 2, 2)).transpose(1, 2).flatten(0, 2)

    return {"q_proj": halves(W_Q), "k_proj": halves(W_K), "v_proj": W_V, "o_proj": W_O}


def to_transformers(model, heads=None, end=None, vllm=False):
    """A model of transformers that says what our model says.

    heads: a number, or a list with one for each layer; None: all. end: the token that ends a text,
    if any. vllm: in the widths that vLLM computes. UserError if the model does not work with these
    heads, or if neither architecture can be it.
    """
    c = model.config
    latent = c.attention in ("mla", "matmla")
    if not latent and c.attention not in ("mha", "nested_mha", "gqa", "nested_gqa"):
        raise UserError(
            f"cannot export {c.attention}: it has biases, frequencies or norms of its own; "
            "transmla.py --deepseek makes an ordinary MLA of a pretrained model"
        )
    with user_input():
        budgets = [m for (m,) in model.layer_heads(heads, 1)]
    most = max(budgets)
    wide = vllm_sizes(c) if vllm else c
    sizes = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.d,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer,
        num_attention_heads=most,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        max_position_embeddings=c.context,
        bos_token_id=None,
        eos_token_id=end,
    )
    if latent:
        if c.norm_eps != 1e-6:
            raise UserError(f"norms of latents have eps 1e-6 in transformers, here {c.norm_eps:g}")
        config = DeepseekV3Config(
            **sizes,
            num_key_value_heads=most,
            q_lora_rank=c.d_cq or None,
            kv_lora_rank=wide.d_c,
            qk_nope_head_dim=wide.d_h,
            qk_rope_head_dim=wide.d_R,
            v_head_dim=wide.d_h,
            rope_interleave=True,
            first_k_dense_replace=c.n_layer,
            num_mtp_layers=0,
            tie_word_embeddings=False,  # other programs look for an output embedding of its own
        )
        theirs, translate = DeepseekV3ForCausalLM(config), deepseek
    else:
        if c.d % most:
            raise UserError(f"a Llama's heads must divide its width: {most} do not divide {c.d}")
        config = LlamaConfig(
            **sizes,
            num_key_value_heads=c.n_kv if "gqa" in c.attention else most,
            head_dim=wide.d_h,
            tie_word_embeddings=c.tie,
        )
        theirs, translate = LlamaForCausalLM(config), llama
    theirs.config.rope_theta = c.rope_base  # where programs older than rope_parameters look

    # All but attention has other names, and nothing else.
    ours = model.state_dict()
    weights = {name: ours[rename(name)] for name in theirs.state_dict() if rename(name) in ours}
    for i, (block, m) in enumerate(zip(model.blocks, budgets)):
        w = {name.removesuffix(".weight"): W for name, W in block.attention.state_dict().items()}
        w["W_O"] = F.pad(w["W_O"][:, : m * c.d_h], (0, (c.n_h - m) * c.d_h))  # of idle heads: zeros
        for name, weight in translate(widen(w, c, wide), wide, most).items():
            weights[f"model.layers.{i}.self_attn.{name}.weight"] = weight
    theirs = theirs.to(model.embed.weight.dtype)
    theirs.load_state_dict(weights)
    return theirs.eval()


def to_tokenizer(encoding, context):
    """transformers' tokenizer with the tokens of a tiktoken.Encoding or a pretrained.Tokenizer."""
    if isinstance(encoding, tiktoken.Encoding):
        converter = TikTokenConverter(
            pattern=encoding._pat_str, extra_special_tokens=encoding._special_tokens
        )
        # The ranks are here already, in no file.
        converter.load_tiktoken_bpe = lambda path: encoding._mergeable_ranks
        tokenizer = converter.converted()
    else:
        tokenizer = encoding.tokenizer
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=tokenizer.id_to_token(encoding.eot_token),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # text that looks special is text
    )


def export(args):
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} exists, and is not an empty folder")
    transformers.utils.logging.disable_progress_bar()
    model, encoding = load(args.checkpoint, "cpu")
    heads = args.heads or str(model.config.n_h)
    theirs = to_transformers(model, heads_of(heads), encoding.eot_token, args.program == "vllm")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = to_tokenizer(encoding, model.config.context)
    with (
        explained(f"cannot write {args.out}"),  # safetensors has an error of its own for full disks
        TemporaryDirectory(dir=args.out.parent) as temporary,
    ):
        whole = Path(temporary, "whole")
        theirs.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.replace(args.out)  # there all at once, or not at all
    print(
        f"wrote {args.out}: a {model.config.attention} of {heads} heads, as {type(theirs).__name__}"
    )


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="written by train.py")
    parser.add_argument(
        "--heads", help="how many heads: 8, or one number for each layer, 12/12/8/4/4; else all"
    )
    parser.add_argument(
        "--for",
        dest="program",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what is to open the folder",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/hf"), help="folder to write; it must be new or empty"
    )
    parser.run(export, parser.parse_args())


if __name__ == "__main__":
    main()
