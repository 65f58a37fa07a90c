"""
TransMLA (arXiv:2502.07864): a pretrained GQA model becomes an MLA model with the same cache, exactly.

    python transmla.py MODEL                           a folder, .gguf file or Hugging Face id of a Llama, Mistral or Qwen2
    python transmla.py MODEL --d-R 64 --d-c 192,128    smaller caches, no longer exact; the last one is saved
    python transmla.py MODEL --budgets 9,6,3           as MatMLA, in every layer the most important heads first
    python sample.py --checkpoint out/transmla/checkpoint.pt
    python train.py --init out/transmla/checkpoint.pt --out out/healed --data FILE --context 512 --lr 5e-4 --lr-adamw 5e-5

Why RoPE is no obstacle: nothing has to move through it. A GQA layer caches n_kv rotated keys and n_kv values. Its keys, side
by side, are one k_R of width n_kv·d_h, whose frequencies start anew after every d_h numbers; its values are c_KV. A query is
zero outside the slot of its own key, and W_UV picks the value. For head h of group g = h // (n_h / n_kv):

    q_R = (0, ..., q_h, ..., 0)        q_R · k_R = q_h · k_g
    W_UV = (0, ..., 1, ..., 0)         W_UV c_KV = v_g

q_C · k_C = q_hᵀ W_UK c_KV says nothing yet: W_UK is zero (W_UQ is not, or no gradient would ever reach either). There, and
in the zeros of W_QR and W_UV, training finds what GQA cannot say.
"""

import json
import logging
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, normalizers, processors

from matmla import GPT, Config
from train import Parser, check_budgets, documents, get_encoding, integers, pick_device, positive, save

# ---------------------------------------------------------------- reading a pretrained model

OURS = {    # transformers' names
    "model.layers": "blocks", "model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "unembed",
    "input_layernorm": "norm_attention", "post_attention_layernorm": "norm_feed_forward",
    "self_attn.q_proj": "attention.W_Q", "self_attn.k_proj": "attention.W_K",
    "self_attn.v_proj": "attention.W_V", "self_attn.o_proj": "attention.W_O",
    "mlp.gate_proj": "feed_forward.W_gate", "mlp.up_proj": "feed_forward.W_up", "mlp.down_proj": "feed_forward.W_down",
}


def rename(name):
    for theirs, ours in OURS.items():
        name = name.replace(theirs, ours)
    return name


def obstacles(c):
    """What a config of transformers asks for that GPT does not have, by name."""
    with torch.device("meta"):
        names = [name for name, _ in transformers.AutoModelForCausalLM.from_config(c).named_parameters()]
    ours = re.compile(r"((embed|unembed|norm|blocks\.\d+\.(norm_\w+|feed_forward\.W_\w+|attention\.W_[QKVO]))\.weight"
                      r"|blocks\.\d+\.attention\.W_[QKV]\.bias)")
    foreign = [name for name in names if not ours.fullmatch(rename(name))]
    rope, window, act = (getattr(c, name, None) for name in ("rope_parameters", "sliding_window", "hidden_act"))
    rope = rope or {}
    return [what for what, found in {
        "mixture of experts": any("experts" in name for name in foreign),
        "QK-norm": any("q_norm" in name for name in foreign),
        f"RoPE scaling ({rope.get('rope_type')})": rope.get("rope_type", "default") != "default",
        "RoPE on a part of a head": rope.get("partial_rotary_factor", 1) != 1,
        f"a sliding window of {window} tokens": window and window < c.max_position_embeddings,
        f"the activation {act}": act != "silu",
        f"the weight {' '.join(foreign[:1])}": foreign,
        f"the architecture {c.model_type}": c.model_type not in ("llama", "mistral", "qwen2"),
    }.items() if found]


def read_pretrained(name):
    """(transformers' model in float32, its tokenizer as `encoding` of a checkpoint). ValueError if it cannot be ours."""
    path, AutoModel = Path(name), transformers.AutoModelForCausalLM
    where = {"pretrained_model_name_or_path": name, "trust_remote_code": False}    # its weights, not its code
    if path.suffix == ".gguf":
        where |= {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)                # our own line says it
    try:
        c = transformers.AutoConfig.from_pretrained(**where)
        model, found = None, obstacles(c)
        if not found:
            model, info = AutoModel.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
            found = [f"a model without {missing}" for missing in sorted(info["missing_keys"])[:1]]
            extra = (key for key in sorted(info["unexpected_keys"]) if not key.endswith("rotary_emb.inv_freq"))
            found += [f"a model with a weight {key} beside its config" for key in extra][:1]
    except Exception as error:                                                  # whatever is wrong with the files of others
        raise ValueError(f"cannot read {name} ({type(error).__name__}: {str(error).strip()[:300]})") from None
    if found:
        raise ValueError(f"cannot convert {name}, not supported: {', '.join(found)}")
    return model.eval(), read_tokenizer(path, where, c)


def read_tokenizer(path, where, c):
    """What get_encoding takes for the model's own tokenizer; None if it came without one."""
    eos = c.eos_token_id or 0
    eos = eos if isinstance(eos, int) else eos[0]
    if (path / "pieces.json").exists():
        return {"json": from_pieces(path / "pieces.json", c.bos_token_id), "eot_token": eos}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except Exception:                                                           # it depends on the family what is raised,
        return None
    if not tokenizer.encode("a", add_special_tokens=False):                     # if it is not made up from nothing
        return None
    eos = eos if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return {"json": tokenizer.backend_tokenizer.to_str(), "eot_token": eos}


def from_pieces(path, bos):
    """tokenizer.json for a list of SentencePiece's byte pairs in the order of their merges, as llama2.c's models have it."""
    pieces = json.loads(path.read_text("utf-8"))
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [(p[:k], p[k:]) for p in pieces for k in range(1, len(p)) if p[:k] in ids and p[k:] in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token=pieces[0]))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.post_processor = processors.TemplateProcessing("bos $A", special_tokens=[("bos", bos)])
    return tokenizer.to_str()


def to_gqa(model):
    """(config, weights) of our GQA, from transformers' model. The config has the latent sizes of the exact MLA already."""
    c, given = model.config, model.state_dict()
    n_h, n_kv = c.num_attention_heads, c.num_key_value_heads
    d_h = getattr(c, "head_dim", None) or c.hidden_size // n_h
    config = Config(
        attention="gqa", vocab_size=c.vocab_size, context=c.max_position_embeddings, n_layer=c.num_hidden_layers,
        d=c.hidden_size, n_h=n_h, n_kv=n_kv, d_h=d_h, d_c=n_kv * d_h, d_cq=0, d_R=n_kv * d_h, d_ff=c.intermediate_size,
        budgets=(n_h,), rope_base=c.rope_parameters["rope_theta"], rope_width=d_h,
        norm_eps=c.rms_norm_eps, norm_latents=False,
        qkv_bias=any(name.endswith("bias") for name in given),
        tie=torch.equal(given["model.embed_tokens.weight"], given["lm_head.weight"]),
    )
    weights = {rename(name): w for name, w in given.items()}
    for name in weights:
        if re.search("W_[QK]", name):                                           # pairs x_i, x_(i+d_h/2) become neighbours
            weights[name] = weights[name].unflatten(0, (-1, 2, d_h // 2)).transpose(1, 2).flatten(0, 2)
    return config, weights


# ---------------------------------------------------------------- GQA -> MLA


def to_mla(weights, gqa, c, order=None, moments=None):
    """Weights of GPT(c), an MLA or MatMLA, from those of GPT(gqa). In float64, where they are new.

    order    for every layer, heads as they shall be; None: as they are. Any order is the same layer, because every head
             has its own slice of each of W_UQ, W_QR, W_UK, W_UV and W_O, and its place says nothing about its group.
    moments  for every layer, the mean of (x,1)(x,1)ᵀ, [d+1, d+1], over the tokens of a text; None: nothing is rotated or cut
    """
    new = {name: w for name, w in weights.items() if ".attention." not in name}
    for i in range(c.n_layer):
        old = {name: weights[f"blocks.{i}.attention.{name}.weight"].double() for name in ("W_Q", "W_K", "W_V", "W_O")}
        for name in ("W_Q", "W_K", "W_V"):                                      # the bias is the weight of a 1 next to x
            bias = weights.get(f"blocks.{i}.attention.{name}.bias", torch.zeros(len(old[name])))
            old[name] = torch.cat((old[name], bias[:, None].double()), 1)
        heads = torch.tensor(order[i] if order else range(c.n_h))
        for name, w in layer_to_mla(**old, gqa=gqa, c=c, heads=heads, moment=moments and moments[i]).items():
            biased = name in ("W_UQ", "W_QR", "W_DKV", "W_KR")
            new[f"blocks.{i}.attention.{name}.weight"] = w[:, :-1] if biased else w
            if biased and c.qkv_bias:
                new[f"blocks.{i}.attention.{name}.bias"] = w[:, -1]
    return new


def layer_to_mla(W_Q, W_K, W_V, W_O, gqa, c, heads, moment):
    """`to_mla` for one layer. In einsum f is a frequency, p its pair, g a kv head, s a slot of k_R, i the input (x,1)."""
    n_h, n_kv, d_h, kept = c.n_h, gqa.n_kv, c.d_h, c.d_R // c.d_h
    group = heads // (n_h // n_kv)
    Q = W_Q.unflatten(0, (n_h, -1, 2))[heads]                                   # [h,f,p,i]
    K = W_K.unflatten(0, (n_kv, -1, 2))                                         # [g,f,p,i]

    # RoRoPE. q·k is a sum over frequencies, and at one frequency RoPE turns the pairs of all keys by the same angle. An
    # orthogonal U_f across the kv heads, one for both numbers of a pair, commutes with that. PCA puts most into slot 0.
    U = torch.eye(n_kv).double().expand(d_h // 2, -1, -1)                       # [f,s,g]
    if moment is not None:
        U = torch.linalg.eigh(torch.einsum("gfpi,ij,hfpj->fgh", K, moment, K)).eigenvectors.flip(-1).mT
    K = torch.einsum("fsg,gfpi->sfpi", U, K)
    U = U[:, :, group].permute(2, 1, 0)                                         # [h,s,f]: where a head finds its key again
    scale = ((d_h + c.d_R) / d_h) ** 0.5                                        # MLA divides by √(d_h + d_R), GQA by √d_h
    W_KR = K[:kept].flatten(0, 2)
    W_QR = torch.einsum("hsf,hfpi->hsfpi", U[:, :kept], Q).flatten(0, 3) * scale
    W_UQ = Q.flatten(0, 2) * scale

    # The other slots live on without RoPE, in one latent with the values, at equal norm, so that PCA is fair to both.
    rest, balance = K[kept:].flatten(0, 2), 1.0
    if moment is not None:
        in_keys, in_values = (torch.einsum("ri,ij,rj->", W, moment, W).item() for W in (rest, W_V))
        balance = max(in_keys / in_values, 1e-12) ** 0.5                        # mere rounding must not grow to a norm
    both = torch.cat((rest / balance, W_V))
    P = torch.eye(len(both)).double() if moment is None else torch.linalg.eigh(both @ moment @ both.T).eigenvectors.flip(-1)
    P = P[:, : c.d_c]                                                           # both ≈ P Pᵀ both
    W_DKV = P.T @ both
    back = torch.einsum("hsf,fe,pq->hfpseq", U[:, kept:], torch.eye(d_h // 2).double(), torch.eye(2).double())
    W_UK = back.reshape(n_h * d_h, -1) @ P[: len(rest)] * balance               # zero if no slot is left for it
    W_UV = P[len(rest) :].unflatten(0, (n_kv, d_h))[group].flatten(0, 1)
    W_O = W_O.unflatten(1, (n_h, d_h))[:, heads].flatten(1)
    return {"W_UQ": W_UQ, "W_QR": W_QR, "W_DKV": W_DKV, "W_KR": W_KR, "W_UK": W_UK, "W_UV": W_UV, "W_O": W_O}


# ---------------------------------------------------------------- measuring


def build(c, weights, dtype=torch.float32, device="cpu"):
    with torch.device("meta"):
        model = GPT(c)                                                          # no random weights first
    model.load_state_dict(weights, assign=True)
    return model.to(device, dtype).eval()


def naive(model, tokens):
    return model(tokens)[0]


def absorbed(model, tokens):
    """Logits through the cache, in chunks, all of them read absorbed."""
    for block in model.blocks:
        block.attention.short = math.inf
    cache = model.new_cache(len(tokens), tokens.shape[1])
    return torch.cat([model(chunk, cache=cache)[0] for chunk in tokens.split(100, 1)], 1)


@torch.no_grad()
def check(theirs, gqa, old, mla, new, tokens):
    """Print how far the logits of tokens [B, T] are apart. ValueError if that is more than rounding."""
    original, exact = theirs(tokens).logits, naive(build(gqa, old, torch.float64), tokens)
    size = original.abs().max().clamp(min=1).item()
    print("| largest difference of logits | from transformers, float32 | from our GQA, float64 |\n|---|---|---|")
    for name, c, weights, run in ("our GQA", gqa, old, naive), ("our MLA, naive", mla, new, naive), \
            ("our MLA, absorbed", mla, new, absorbed):
        single = (run(build(c, weights), tokens) - original).abs().max().item()
        double = (run(build(c, weights, torch.float64), tokens) - exact).abs().max().item()
        print(f"| {name} | {single:.1e} | {double:.1e} |", flush=True)
        if not (single < 1e-4 * size and double < 1e-10 * size):
            raise ValueError(f"{name} is another model: its logits are off by {single:.1e}, {double:.1e}; nothing was saved")


@torch.no_grad()
def perplexity(logits_of, windows):
    """exp of the mean loss of windows [n, width + 1]."""
    return math.exp(sum(F.cross_entropy(logits_of(w[None, :-1])[0], w[1:]).item() for w in windows) / len(windows))


def inputs(modules, run):
    """What enters each of the modules during run(), and what run() returns."""
    seen = []
    hooks = [module.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for module in modules]
    result = run()
    for hook in hooks:
        hook.remove()
    return seen, result


@torch.no_grad()
def second_moments(model, windows):
    """For every layer, the mean over all tokens of (x,1)(x,1)ᵀ, where x [d] enters the attention. [d+1, d+1], float64."""
    sums = [0.0] * len(model.blocks)
    for w in windows:
        seen, _ = inputs([block.attention for block in model.blocks], lambda: model(w[None, :-1]))
        for i, x in enumerate(seen):
            x = F.pad(x[0], (0, 1), value=1.0)
            sums[i] += (x.T @ x).cpu().double() / len(x) / len(windows)
    return sums


def importance(model, windows):
    """[n_layer, n_h]: about how much the loss would rise without a head, up to one factor. As in arXiv:2204.09656.

    It is the Fisher information of a gate, at 1, on what the head has read: the sum of (o · ∂loss/∂o)² over all tokens.
    """
    score = torch.zeros(len(model.blocks), model.config.n_h)
    for w in windows:
        seen, (_, loss) = inputs([block.attention.W_O for block in model.blocks], lambda: model(w[None, :-1], w[None, 1:]))
        for i, (o, grad) in enumerate(zip(seen, torch.autograd.grad(loss, seen))):    # [1, T, n_h·d_h]
            score[i] += (o * grad).detach().unflatten(-1, (model.config.n_h, -1)).sum(-1).square().sum((0, 1)).cpu()
    return score


def read_text(name, count, encoding, context):
    """Windows [n, width + 1] of a text to measure on, about `count` tokens, and as many others to calibrate on."""
    tokens, width = [], min(512, context)
    for text in documents(name):
        tokens += [*encoding.encode_ordinary(text), encoding.eot_token]
        if len(tokens) >= 2 * (count / width + 1) * (width + 1):
            break
    n = min(math.ceil(count / width), len(tokens) // (2 * width + 2))
    if n == 0:
        raise ValueError(f"{name} has {len(tokens)} tokens, at least {2 * width + 2} are needed")
    return torch.tensor(tokens[: 2 * n * (width + 1)]).view(2, n, width + 1).unbind()


# ---------------------------------------------------------------- the script


def settings(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", help="folder or .gguf file of a pretrained model, or its Hugging Face id")
    add("--text", default="stdlib", help="to measure perplexity and to calibrate on, like --data of train.py")
    add("--tokens", default=8192, type=positive, help="how many of its tokens to measure on, and how many to calibrate on")
    add("--d-R", type=positive, help="width of k_R, a multiple of the head width; by default every key keeps its RoPE")
    add("--d-c", type=integers, help="width of c_KV, or several to compare, like 192,128; the last one is saved")
    add("--budgets", type=integers, help="save a MatMLA for these budgets, like 9,6,3")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    add("--out", default=Path("out/transmla"), type=Path, help="folder for checkpoint.pt, for sample.py and train.py --init")
    return parser, parser.parse_args(argv)


def transmla(args):
    device = pick_device(args.device)
    theirs, encoding = read_pretrained(args.model)
    gqa, old = to_gqa(theirs)
    full, budgets = gqa.d_c, args.budgets or (gqa.n_h,)
    sizes = [(d_c, args.d_R or full) for d_c in args.d_c or [full]] if args.d_c or args.d_R else []
    for d_c, d_R in sizes:
        if d_R % gqa.d_h or d_R > full or not 1 <= d_c <= 2 * full - d_R:
            raise ValueError(f"d_R = {d_R} must be a multiple of {gqa.d_h} up to {full}, d_c = {d_c} in 1..{2 * full - d_R}")
    check_budgets(budgets, gqa.n_h)
    if encoding is None and (sizes or args.budgets):
        raise ValueError(f"{args.model} has no tokenizer, so no text can tell which keys or heads matter")

    text = torch.randint(gqa.vocab_size, (1, min(256, gqa.context)))            # without a tokenizer, this can be checked
    if encoding:
        text, calibration = read_text(args.text, args.tokens, get_encoding(encoding), gqa.context)
        measured, calibration = text.to(device), calibration.to(device)
    original, order, moments = build(gqa, old, device=device), None, None
    if args.budgets:
        order = importance(original, calibration).argsort(descending=True).tolist()
    if sizes:
        moments = second_moments(original, calibration)
    mla = replace(gqa, attention="matmla" if args.budgets else "mla", budgets=budgets)
    new = to_mla(old, gqa, mla, order)
    check(theirs, gqa, old, mla, new, text[:1, : min(256, gqa.context)])

    def rows(c, weights, sizes):
        model = build(c, weights, device=device)
        for m in c.budgets:
            size = model.new_cache(1, 1).nbytes // 2                            # of float32
            ppl = f"{perplexity(lambda x: model(x, heads=m)[0], measured):.4f}" if encoding else "no tokenizer, no text"
            print(f"| our {c.attention}, {sizes} | {m} | {size:,} | {ppl} |", flush=True)

    print(f"\n| {args.text} | heads | cache, bytes per token (bfloat16) | perplexity |\n|---|---|---|---|")
    if encoding:
        print(f"| transformers | {gqa.n_h} | | {perplexity(lambda x: theirs.to(device)(x).logits, measured):.4f} |")
    rows(gqa, old, f"n_kv {gqa.n_kv}, d_h {gqa.d_h}")
    rows(mla, new, f"d_c {full}, d_R {full}")
    for d_c, d_R in sizes:
        mla = replace(mla, d_c=d_c, d_R=d_R)
        new = to_mla(old, gqa, mla, order, moments)
        rows(mla, new, f"d_c {d_c}, d_R {d_R}")
    args.out.mkdir(parents=True, exist_ok=True)
    config, new = asdict(mla), {name: w.float().contiguous() for name, w in new.items()}
    save(args.out / "checkpoint.pt", config=config, settings=config, encoding=encoding, step=0, model=new, optimizers=[])
    print(f"\nwrote {args.out / 'checkpoint.pt'}")


def main():
    parser, args = settings()
    parser.attempt(transmla, args)


if __name__ == "__main__":
    main()
