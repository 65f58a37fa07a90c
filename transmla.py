"""
TransMLA (arXiv:2502.07864): a pretrained GQA model becomes an MLA model with the same cache, exactly.

    python transmla.py MODEL                           a folder, .gguf file or Hugging Face id: Llama, Mistral or Qwen2
    python transmla.py MODEL --d-R 64 --d-c 192,128    smaller caches, no longer exact; the last one is saved
    python transmla.py MODEL --budgets 9,6,3           as MatMLA, in every layer the most important heads first
    python train.py --init out/transmla/checkpoint.pt --out out/healed --data FILE --lr 5e-4 --lr-adamw 5e-5

Why RoPE is no obstacle: nothing has to move through it. A GQA layer caches n_kv rotated keys and n_kv values. Its keys,
side by side, are one k_R of width n_kv·d_h, whose frequencies start anew after every d_h numbers; its values are c_KV.
A query is zero outside the slot of its own key, and W_UV picks the value. For head h of group g = h // (n_h / n_kv):

    q_R = (0, ..., q_h, ..., 0)        q_R · k_R = q_h · k_g
    W_UV = (0, ..., 1, ..., 0)         W_UV c_KV = v_g

W_UK is zero, so q_C · k_C = q_hᵀ W_UK c_KV says nothing yet (W_UQ is not, or no gradient would ever reach either).
There, and in the zeros of W_QR and W_UV, training finds what GQA cannot say.
"""

import json
import logging
import math
import re
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
import transformers
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map

import matmla
from common import (
    Parser,
    check_budgets,
    integers,
    perplexity,
    pick_device,
    positive,
    print_row,
    save,
)  # first of ours
from data import encode, get_encoding
from matmla import GPT, Config
from pretrained import from_pieces, rename, with_one

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "tekken.json",
)


def obstacles(c, reader=None):
    """What a config of transformers, or the .gguf file it comes from, asks for that GPT does not have, by name."""
    with torch.device("meta"):
        names = [
            name for name, _ in transformers.AutoModelForCausalLM.from_config(c).named_parameters()
        ]
    ours = r"(blocks\.\d+\.)?(attention\.)?(embed|unembed|norm|norm_[af]\w+|W_\w+)\.weight|.*\.W_[QKV]\.bias"
    foreign = [name for name in names if not re.fullmatch(ours, rename(name))]
    rope, window, act = (
        getattr(c, name, None) for name in ("rope_parameters", "sliding_window", "hidden_act")
    )
    rope = (rope or {}).get("rope_type", "default")
    asked = {
        "mixture of experts": any("experts" in name for name in foreign),
        "QK-norm": any("q_norm" in name for name in foreign),
        f"RoPE scaling ({rope})": rope != "default",
        f"a sliding window of {window} tokens": window and window < c.max_position_embeddings,
        f"the activation {act}": act != "silu",
        f"the weight {' '.join(foreign[:1])}": foreign,
        f"the architecture {c.model_type}": c.model_type not in ("llama", "mistral", "qwen2"),
    }
    found = [what for what in asked if asked[what]]
    if found or not reader:
        return found

    family = reader.fields[
        "general.architecture"
    ].contents()  # what transformers leaves in the file
    taken = transformers.integrations.GGUF_CONFIG_MAPPING[family]
    d_h = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    idle = {"attention.key_length": d_h, "attention.value_length": d_h, "rope.dimension_count": d_h}
    for key, field in reader.fields.items():
        prefix, _, key = key.partition(".")
        if (
            prefix == family
            and not taken.get(key)
            and (value := field.contents()) not in (idle.get(key), "none")
        ):
            found.append(
                f"RoPE scaling ({value})" if key == "rope.scaling.type" else f"{key} = {value}"
            )
    theirs = get_tensor_name_map(MODEL_ARCH[family.upper()], c.num_hidden_layers)
    known = {theirs.get_name(name, (".weight", ".bias")) for name in names}
    return found + [
        f"the weight {tensor.name}" for tensor in reader.tensors if tensor.name not in known
    ]


def read_pretrained(name):
    """(transformers' model in float32, its tokenizer or None as in a checkpoint). ValueError if it cannot be ours."""
    path, step, reader = Path(name), "config", None
    where = {
        "pretrained_model_name_or_path": name,
        "trust_remote_code": False,
    }  # its weights, not its code
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our own line says it
    try:
        if path.suffix == ".gguf":
            reader = GGUFReader(path)
            where |= {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        c = transformers.AutoConfig.from_pretrained(**where)
        found = obstacles(c, reader)
        if not found:
            step = "tokenizer"
            encoding = read_tokenizer(name, where, c, reader)
            step, where["dtype"] = "weights", torch.float32
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                **where, output_loading_info=True
            )
            found = [f"a model without {key}" for key in sorted(info["missing_keys"])]
            found += [f"a weight {key} more" for key in sorted(info["unexpected_keys"])]
    except Exception as error:  # whatever is wrong with the files of others
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        raise ValueError(f"cannot use the {step} of {name} ({reason})") from None
    if found:
        raise ValueError(f"cannot convert {name}, not supported: {', '.join(found[:3])}")
    return model.eval(), encoding


def read_tokenizer(name, where, c, reader):
    """What get_encoding takes for the model's own tokenizer; None if there is none. It raises what a library raises."""
    pieces, has_file = Path(name, "pieces.json"), transformers.utils.has_file
    if reader or any(has_file(name, file) for file in TOKENIZERS):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        if not tokenizer.is_fast or not tokenizer.encode("a", add_special_tokens=False):
            raise ValueError(f"{type(tokenizer).__name__} has no fast form, or no vocabulary")
        content, end = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
    elif pieces.exists():
        content, end = from_pieces(pieces, c.bos_token_id), None
    else:
        return None
    content, end = json.loads(content), c.eos_token_id if end is None else end
    content["added_tokens"] = [
        token
        for token in content["added_tokens"]  # special ones that it has no vector for
        if token["id"] < c.vocab_size or not token["special"]
    ]
    encoding = {"json": json.dumps(content), "eot_token": end[0] if isinstance(end, list) else end}
    ours = get_encoding(encoding)
    for token in ours.n_vocab - 1, ours.eot_token, *ours.front:
        if token not in range(c.vocab_size):
            raise ValueError(
                f"its token {token} is not in the embedding of {c.vocab_size} (None: no end of text)"
            )
    return encoding


def to_gqa(model):
    """(config, weights) of our GQA from transformers' model. The config has the sizes of the exact MLA already."""
    c, weights = model.config, {rename(name): W for name, W in model.state_dict().items()}
    n_h, n_kv = c.num_attention_heads, c.num_key_value_heads
    d_h = len(weights["blocks.0.attention.W_Q.weight"]) // n_h
    config = Config(
        attention="pretrained_gqa",
        vocab_size=c.vocab_size,
        context=c.max_position_embeddings,
        d=c.hidden_size,
        n_layer=c.num_hidden_layers,
        n_h=n_h,
        n_kv=n_kv,
        d_h=d_h,
        d_c=n_kv * d_h,
        d_cq=0,
        d_R=n_kv * d_h,
        d_ff=c.intermediate_size,
        budgets=(n_h,),
        rope_base=c.rope_parameters["rope_theta"],
        norm_eps=c.rms_norm_eps,
        tie=torch.equal(weights["embed.weight"], weights["unembed.weight"]),
    )
    for name in [name for name in weights if re.search(r"W_[QKV]\.weight", name)]:
        bias = weights.pop(name.replace("weight", "bias"), torch.zeros(len(weights[name])))
        W = F.pad(torch.cat((weights[name], bias[:, None]), 1), (0, 7))  # for with_one(x)
        if "W_V" not in name:  # x_i, x_(i+d_h/2) become neighbours
            W = W.unflatten(0, (-1, 2, d_h // 2)).transpose(1, 2).flatten(0, 2)
        weights[name] = W
    return config, weights


def to_mla(weights, gqa, c, order=None, moments=None):
    """Weights of GPT(c), an MLA or MatMLA, from those of GPT(gqa). In float64, where they are new.

    order: for every layer, heads as they shall be. Any order is the same layer, for every head has a part of its own in
    all weights that are by heads. moments: of second_moments; without them nothing is rotated or cut.
    """
    new = dict(weights)
    for i in range(c.n_layer):
        name = f"blocks.{i}.attention.{{}}.weight".format
        old = [new.pop(name(W)).double() for W in ("W_Q", "W_K", "W_V", "W_O")]
        heads = torch.tensor(order[i] if order else range(c.n_h))
        layer = layer_to_mla(*old, gqa, c, heads, moments and moments[i])
        new |= {name(W): value for W, value in layer.items()}
    return new


def layer_to_mla(W_Q, W_K, W_V, W_O, gqa, c, heads, moment):
    """`to_mla` for one layer. In einsum f is a frequency, p its pair, g a kv head, s a slot of k_R, i an input."""
    n_h, n_kv, d_h, kept = c.n_h, gqa.n_kv, c.d_h, c.d_R // c.d_h
    group = heads // (n_h // n_kv)
    Q = W_Q.unflatten(0, (n_h, -1, 2))[heads]  # [h,f,p,i]
    K = W_K.unflatten(0, (n_kv, -1, 2))  # [g,f,p,i]

    # RoRoPE. q·k is a sum over frequencies, and at one frequency RoPE turns the pairs of all keys by one angle. An
    # orthogonal U_f across the kv heads, one for both numbers of a pair, commutes with that. PCA puts most into slot 0.
    U = torch.eye(n_kv).double().expand(d_h // 2, -1, -1)  # [f,g,s]
    if moment is not None:
        U = torch.linalg.eigh(torch.einsum("gfpi,ij,hfpj->fgh", K, moment, K)).eigenvectors.flip(-1)
    K = torch.einsum("fgs,gfpi->sfpi", U, K)
    U = U[:, group]  # [f,h,s]: where a head finds its key
    scale = ((d_h + c.d_R) / d_h) ** 0.5  # MLA divides by √(d_h + d_R), GQA by √d_h
    W_QR = torch.einsum("fhs,hfpi->hsfpi", U[..., :kept], Q).flatten(0, 3) * scale

    # The other slots live on without RoPE, in one latent with the values, at equal norm, so that PCA is fair to both.
    rest, P = K[kept:].flatten(0, 2), torch.eye(c.d_c).double()
    both, balance = torch.cat((rest, W_V)), 1.0
    if moment is not None:
        in_keys, in_values = (torch.einsum("ri,ij,rj->", W, moment, W).item() for W in (rest, W_V))
        balance = max(in_keys / in_values, 1e-12) ** 0.5  # mere rounding must not grow to a norm
        both = torch.cat((rest / balance, W_V))
        P = torch.linalg.eigh(both @ moment @ both.T).eigenvectors.flip(-1)[
            :, : c.d_c
        ]  # both ≈ P Pᵀ both
    P_K, P_V = P.split((len(rest), len(W_V)))
    P_K = P_K.unflatten(0, K[kept:].shape[:3]) * balance  # [s,f,p,c], empty if no slot is left
    return {
        "W_UQ": Q.flatten(0, 2) * scale,
        "W_QR": W_QR,
        "W_DKV": P.T @ both,
        "W_KR": K[:kept].flatten(0, 2),
        "W_UK": torch.einsum("fhs,sfpc->hfpc", U[..., kept:], P_K).flatten(0, 2),
        "W_UV": P_V.unflatten(0, (n_kv, d_h))[group].flatten(0, 1),
        "W_O": W_O.unflatten(1, (n_h, d_h))[:, heads].flatten(1),
    }


def build(c, weights, dtype=torch.float32, device="cpu"):
    with torch.device("meta"):
        model = GPT(c)  # no random weights first
    model.load_state_dict(weights, assign=True)
    return model.to(device, dtype).eval()


def check(theirs, gqa, old, mla, new, tokens):
    """Print how far the logits of tokens [B, T] are apart. ValueError if that is more than rounding."""
    original, exact = theirs(tokens).logits, build(gqa, old, torch.float64)(tokens)[0]
    size = original.abs().max().clamp(min=1).item()
    for name, c, weights in (
        ("our GQA", gqa, old),
        ("our MLA, naive", mla, new),
        ("our MLA, absorbed", mla, new),
    ):
        off = []
        for right in original, exact:
            model = build(c, weights, right.dtype)
            for block in model.blocks:
                block.attention.absorb_below = (
                    math.inf
                )  # where there is a cache, it is read absorbed
            cache = model.new_cache(*tokens.shape) if "absorbed" in name else None
            off.append((model(tokens, cache=cache)[0] - right).abs().max().item())
        print_row(
            {
                "largest difference of logits": name,
                "from transformers, float32": f"{off[0]:.1e}",
                "from our GQA, float64": f"{off[1]:.1e}",
            },
            head=c is gqa,
        )
        if not (off[0] < 1e-4 * size and off[1] < 1e-10 * size):
            raise ValueError(
                f"{name} is another model: its logits are off by {off[0]:.1e}, {off[1]:.1e}"
            )


def second_moments(model, windows):
    """For every layer of a GQA, the mean over all tokens of x xᵀ, [d+8, d+8], x being what W_K, W_V see; float64."""
    moments = [0.0] * len(model.blocks)
    for w in windows:
        x = model.embed(w[None, :-1])
        for i, block in enumerate(model.blocks):
            seen = with_one(block.norm_attention(x)[0])
            moments[i] += (seen.T @ seen).cpu().double() / len(seen) / len(windows)
            x = block(x)
    return moments


@torch.enable_grad()
def importance(model, windows):
    """[n_layer, n_h]: about how much the loss would rise without a head, up to one factor: the Fisher information of a
    gate, at 1, on what the head has read, the sum of (o · ∂loss/∂o)² over all tokens. As in arXiv:2204.09656."""
    score, attend, read = torch.zeros(len(model.blocks), model.config.n_h), matmla.attend, []

    def watched(*given):
        read.append(attend(*given))  # o [1,T,n_h,d_h], layer by layer
        return read[-1]

    matmla.attend = watched
    for w in windows:
        read.clear()
        _, loss = model(w[None, :-1], w[None, 1:])
        for i, (o, grad) in enumerate(zip(read, torch.autograd.grad(loss, read))):
            score[i] += (o * grad).detach().sum(-1).square().sum((0, 1)).cpu()
    matmla.attend = attend
    return score


def read_text(name, count, encoding, context):
    """[2, n, width + 1]: windows of a text to measure on, about `count` tokens, and as many others to calibrate on."""
    width, stream = (
        min(512, context),
        chain.from_iterable(part for _, part in encode(name, encoding)),
    )
    tokens = list(islice(stream, 2 * math.ceil(count / width) * (width + 1)))
    if len(tokens) < 2 * (width + 1):
        raise ValueError(f"{name} has {len(tokens)} tokens, at least {2 * (width + 1)} are needed")
    return torch.tensor(tokens[: len(tokens) // (2 * width + 2) * (2 * width + 2)]).view(
        2, -1, width + 1
    )


@torch.no_grad()
def transmla(args):
    device = pick_device(args.device)
    theirs, encoding = read_pretrained(args.model)
    gqa, old = to_gqa(theirs)
    full, order, moments, kind = gqa.d_c, None, None, "matmla" if args.budgets else "mla"
    mla = replace(gqa, attention=f"pretrained_{kind}", budgets=args.budgets or gqa.budgets)
    check_budgets(mla.budgets, gqa.n_h)
    sizes = [(d_c, args.d_R or full) for d_c in args.d_c or [full]] if args.d_c or args.d_R else []
    for d_c, d_R in sizes:
        if d_R % gqa.d_h or d_R > full or not 1 <= d_c <= 2 * full - d_R:
            raise ValueError(
                f"d_R {d_R} must be a multiple of {gqa.d_h} up to {full}, d_c {d_c} in 1..{2 * full - d_R}"
            )
    original, text = (
        build(gqa, old, device=device),
        torch.randint(gqa.vocab_size, (1, min(256, gqa.context))),
    )
    if encoding:
        text, other = read_text(args.text, args.tokens, get_encoding(encoding), gqa.context).to(
            device
        )
        order = args.budgets and importance(original, other).argsort(descending=True).tolist()
        moments = sizes and second_moments(original, other)
    elif sizes or args.budgets:
        raise ValueError(
            f"{args.model} has no tokenizer, so no text can tell which keys or heads matter"
        )
    new = to_mla(old, gqa, mla, order)
    check(theirs, gqa, old, mla, new, text[:1, : min(256, gqa.context)].cpu())

    def rows(name, c, weights):
        model = build(c, weights, device=device)
        size = model.new_cache(1, 1).nbytes // 2  # of float32
        for m in c.budgets:
            losses = (
                model(w[None, :-1], w[None, 1:], m)[1].item() for w in text
            )  # read only if it is a text
            print_row(
                {
                    "model": f"our {name}",
                    "heads": m,
                    "cache, bytes per token (bfloat16)": size,
                    f"perplexity of {args.text}": perplexity(fmean(losses)) if encoding else None,
                },
                head=c is gqa,
            )

    rows(f"gqa, n_kv {gqa.n_kv}, d_h {gqa.d_h}", gqa, old)
    rows(f"{kind}, d_c {full}, d_R {full}", mla, new)
    for d_c, d_R in sizes:
        mla = replace(mla, d_c=d_c, d_R=d_R)
        new = to_mla(old, gqa, mla, order, moments)
        rows(f"{kind}, d_c {d_c}, d_R {d_R}", mla, new)
    args.out.mkdir(parents=True, exist_ok=True)
    path, new = (
        args.out / "checkpoint.pt",
        {name: W.float().contiguous() for name, W in new.items()},
    )
    save(
        path,
        config=asdict(mla),
        settings={},
        encoding=encoding,
        step=0,
        model=new,
        optimizers=[],
        log=[],
    )
    print(f"\nwrote {path}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", help="folder or .gguf file of a pretrained model, or its Hugging Face id")
    add(
        "--text",
        default="stdlib",
        help="to measure perplexity and to calibrate on, like --data of train.py",
    )
    add(
        "--tokens",
        default=8192,
        type=positive,
        help="of the text, to measure on; as many others to calibrate on",
    )
    add(
        "--d-R",
        type=positive,
        help="width of k_R, a multiple of the head width; by default every key keeps its RoPE",
    )
    add(
        "--d-c",
        type=integers,
        help="width of c_KV, or several to compare, like 192,128; the last one is saved",
    )
    add("--budgets", type=integers, help="save a MatMLA for these budgets, like 9,6,3")
    add(
        "--device",
        default="auto",
        help="cuda, mps or cpu; auto takes the first of them that is there",
    )
    add("--out", default=Path("out/transmla"), type=Path, help="folder for checkpoint.pt")
    parser.attempt(transmla, parser.parse_args())


if __name__ == "__main__":
    main()
