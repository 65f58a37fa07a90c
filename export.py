"""
A trained model, at one head budget, as a folder that transformers opens.

    python export.py out/checkpoint.pt --heads 8 --out out/hf8
    python -c "import transformers as t; print(t.pipeline('text-generation', 'out/hf8')('import ', max_length=99))"

MLA, and MatMLA read by its first m heads, is a DeepSeek-V3 of m heads without experts. MHA and GQA are Llamas; nested
MHA, written and read by its first m heads, is a Llama of m heads. Weights only change their names and places.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken
import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import TikTokenConverter

from common import Parser, load, positive  # the first of ours: it decides which file is matmla
from pretrained import rename


def deepseek(w, c, m):
    """The first m heads of MLA with weights w as DeepSeek-V3 has them: one matrix for all that is made of one input."""

    def heads(*names):  # rows of one head from each weight, then of the next
        return torch.cat([w[name].unflatten(0, (c.n_h, -1))[:m] for name in names], 1).flatten(0, 1)

    a = (
        1e-6 / max(c.norm_eps, 1e-20)
    ) ** 0.5  # norms of latents have eps 1e-6 there; of a·x that is ours of x
    query_latent = {"q_a_proj": a * w["W_DQ"], "q_a_layernorm": w["norm_Q"]} if c.d_cq else {}
    return query_latent | {
        "q_b_proj" if c.d_cq else "q_proj": heads("W_UQ", "W_QR"),
        "kv_a_proj_with_mqa": torch.cat((a * w["W_DKV"], w["W_KR"])),
        "kv_a_layernorm": w["norm_KV"],
        "kv_b_proj": heads("W_UK", "W_UV"),
        "o_proj": w["W_O"][:, : m * c.d_h],
    }


def llama(w, c, m):
    """The first m heads of MHA or GQA as Llama has them. Its RoPE turns x_i with x_(i+d_h/2), ours neighbours."""
    n = m * c.d_h  # GQA's W_K and W_V have fewer rows: all of them stay
    W_Q, W_K = (
        w[name][:n].unflatten(0, (-1, c.d_h // 2, 2)).transpose(1, 2).flatten(0, 2)
        for name in ("W_Q", "W_K")
    )
    return {"q_proj": W_Q, "k_proj": W_K, "v_proj": w["W_V"][:n], "o_proj": w["W_O"][:, :n]}


def to_transformers(model, m, end=None):
    """A model of transformers that says what our model says with m heads. end: the token that ends a text, if any.

    ValueError if the model does not work with m heads, or if none of the two architectures can be it.
    """
    c = model.config
    if c.attention not in ("mha", "nested_mha", "gqa", "mla", "matmla"):
        raise ValueError(
            f"cannot export {c.attention}: DeepSeek-V3 norms latents, a converted model does not"
        )
    model.layer_heads(m, 1)
    sizes = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.d,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer,
        num_attention_heads=m,
        num_key_value_heads=c.n_kv if c.attention == "gqa" else m,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        max_position_embeddings=c.context,
        tie_word_embeddings=c.tie,
        bos_token_id=None,
        eos_token_id=end,
    )
    if "mla" in c.attention:
        translate, theirs = (
            deepseek,
            DeepseekV3ForCausalLM(
                DeepseekV3Config(
                    **sizes,
                    q_lora_rank=c.d_cq or None,
                    kv_lora_rank=c.d_c,
                    qk_nope_head_dim=c.d_h,
                    qk_rope_head_dim=c.d_R,
                    v_head_dim=c.d_h,
                    rope_interleave=True,
                    first_k_dense_replace=c.n_layer,
                    num_mtp_layers=0,
                )
            ),
        )
    elif c.d % m:
        raise ValueError(
            f"a Llama's heads must divide its width, and {m} heads do not divide {c.d}"
        )
    else:
        translate, theirs = llama, LlamaForCausalLM(LlamaConfig(**sizes, head_dim=c.d_h))
    ours = model.state_dict()
    weights = {
        name: ours[rename(name)] for name in theirs.state_dict() if rename(name) in ours
    }  # and attention's:
    for i, block in enumerate(model.blocks):
        own = {
            name.removesuffix(".weight"): weight
            for name, weight in block.attention.state_dict().items()
        }
        weights |= {
            f"model.layers.{i}.self_attn.{name}.weight": W
            for name, W in translate(own, c, m).items()
        }
    theirs = theirs.to(model.embed.weight.dtype)
    theirs.load_state_dict(weights)
    return theirs.eval()


def to_tokenizer(encoding, context):
    """transformers' tokenizer with the tokens of a tiktoken.Encoding, or of a Tokenizer in pretrained.py."""
    if isinstance(encoding, tiktoken.Encoding):
        converter = TikTokenConverter(
            pattern=encoding._pat_str, extra_special_tokens=encoding._special_tokens
        )
        converter.load_tiktoken_bpe = lambda path: (
            encoding._mergeable_ranks
        )  # which are here already, in no file
        tokenizer = converter.converted()
    else:
        tokenizer = encoding.tokenizer
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=tokenizer.id_to_token(encoding.eot_token),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )  # text that looks special is text


def export(args):
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists, and is not an empty folder")
    transformers.utils.logging.disable_progress_bar()
    model, encoding = load(args.checkpoint, "cpu")
    m = args.heads or model.config.n_h
    theirs = to_transformers(model, m, encoding.eot_token)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.out.parent) as temporary:
        theirs.save_pretrained(temporary + "/whole")
        to_tokenizer(encoding, model.config.context).save_pretrained(temporary + "/whole")
        Path(temporary, "whole").replace(args.out)  # there all at once, or not at all
    print(f"wrote {args.out}: {model.config.attention} with {m} heads, as {type(theirs).__name__}")


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="written by train.py")
    parser.add_argument(
        "--heads", type=positive, help="head budget, 1 to all; by default all heads"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/hf"), help="folder to write; it must be new or empty"
    )
    parser.attempt(export, parser.parse_args())


if __name__ == "__main__":
    main()
