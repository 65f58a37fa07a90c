"""
TransMLA (arXiv:2502.07864): a pretrained GQA model becomes an MLA model with the same cache.

    python transmla.py MODEL                           the same logits
    python transmla.py MODEL --budgets 9,6,3           MatMLA; with all 9 heads the same logits
    python transmla.py MODEL --d-R 64 --d-c 192,128    smaller caches; the last one is saved
    python transmla.py MODEL --deepseek                an MLA as DeepSeek has it, for export.py

    python train.py --init out/transmla/checkpoint.pt --out out/healed --data FILE \\
        --lr 5e-4 --lr-adamw 5e-5                      heals what is not exact

MODEL is a folder, a .gguf file or a Hugging Face id of a Llama, Mistral, Mixtral, Qwen2, 2.5 or 3.

Why RoPE is no obstacle: nothing has to move through it. A GQA layer caches n_kv rotated keys and
n_kv values. Its keys, side by side, are one k_R of width n_kv·d_h, whose frequencies start anew
after every d_h numbers; its values are c_KV. A query is zero outside the slot of its own key, and
W_UV picks the value. For head h of group g = h // (n_h / n_kv):

    q_R = (0, ..., q_h, ..., 0)        q_R · k_R = q_h · k_g
    W_UV = (0, ..., 1, ..., 0)         W_UV c_KV = v_g

W_UK is zero, so q_C · k_C is 0 at first. W_UQ is not zero, so that gradients reach W_UK. In W_UK,
and in the zeros of W_QR and W_UV, training may find what GQA cannot say. (RESULTS.md has a case in
which that gained nothing.)
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import torch

from common import Parser, Table, check_budgets, integers, perplexity, positive, save
from data import encode
from devices import pick_device
from hub import read_pretrained
from matmla import attend
from pretrained import make_model, to_gqa, with_one
from tokenizer import UserError, get_encoding


def to_mla(weights, gqa, c, order=None, moments=None):
    """Weights of an MLA with Config c from those of a GQA, in float64 where they are new.

    order: for every layer, its heads in a new order. Any order is the same layer, for every head
    has a part of its own in all weights that are by heads. moments: from `second_moments`, to
    rotate keys, to cut, and for an ordinary MLA; without them nothing of it is done.
    """
    new = dict(weights)
    for i in range(c.n_layer):
        prefix = f"blocks.{i}.attention."
        old = {}
        for name in ("W_Q", "W_K", "W_V", "W_O", "norm_q"):
            if f"{prefix}{name}.weight" in new:
                old[name] = new.pop(f"{prefix}{name}.weight").double()
        heads = torch.tensor(order[i] if order else range(c.n_h))
        layer = layer_to_mla(old, gqa, c, heads, moments[i] if moments else None)
        if "pretrained" not in c.attention:
            g = new[f"blocks.{i}.norm_attention.weight"].double()
            layer = layer_to_deepseek(layer, moments[i], g)
            del new[f"{prefix}frequencies"]
        new |= {f"{prefix}{name}.weight": W for name, W in layer.items()}
    return new


def layer_to_mla(old, gqa, c, heads, moment=None):
    """`to_mla` for one layer. heads: their order. moment: of what W_K and W_V see, as a matrix.

    In einsum f is a frequency, p its pair, g a kv head, s a slot of k_R, i an input.
    """
    n_h, n_kv, d_h = c.n_h, gqa.n_kv, c.d_h
    kept = c.d_R // d_h  # slots
    group = heads // (n_h // n_kv)
    Q = old["W_Q"].unflatten(0, (n_h, -1, 2))[heads]  # [h,f,p,i]
    K = old["W_K"].unflatten(0, (n_kv, -1, 2))  # [g,f,p,i]
    V = old["W_V"]
    new = {}

    # MLA divides a score by √(d_h + d_R), GQA by √d_h. With QK-norm that is made good after the
    # norm, which is the mean over all slots of k_R there, and over one here.
    scale = ((d_h + c.d_R) / d_h) ** 0.5
    if "norm_q" in old:
        new["norm_q_C"] = old["norm_q"] * scale
        new["norm_q_R"] = old["norm_q"].repeat(kept) * scale / kept**0.5
        scale = 1.0

    # RoRoPE. q·k is a sum over frequencies, and at one frequency RoPE turns the pairs of all keys
    # by one angle. An orthogonal U_f across the kv heads, one for both numbers of a pair, commutes
    # with that. PCA puts most into slot 0.
    U = torch.eye(n_kv).double().expand(d_h // 2, -1, -1)  # [f,g,s]
    if moment is not None and "norm_q" not in old:
        covariance = torch.einsum("gfpi,ij,hfpj->fgh", K, moment, K)
        U = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    K = torch.einsum("fgs,gfpi->sfpi", U, K)
    U = U[:, group]  # [f,h,s]: where a head finds its key

    # The other slots live on without RoPE, in one latent with the values, at equal norm, so that
    # PCA is fair to both. (1e-12: mere rounding must not grow to a norm.)
    rest = K[kept:].flatten(0, 2)
    both = torch.cat((rest, V))
    P = torch.eye(c.d_c).double()
    balance = 1.0
    if moment is not None:
        in_keys = torch.einsum("ri,ij,rj->", rest, moment, rest)
        in_values = torch.einsum("ri,ij,rj->", V, moment, V)
        least = 1e-12 * (in_keys + in_values) + 1e-300  # a layer may have nothing but zeros
        balance = (in_keys.clamp(min=least) / in_values.clamp(min=least)) ** 0.5
        both = torch.cat((rest / balance, V))
        P = torch.linalg.eigh(both @ moment @ both.T).eigenvectors.flip(-1)
        P = P[:, : c.d_c]  # both ≈ P Pᵀ both
    P_K, P_V = P.split((len(rest), len(V)))
    P_K = P_K.unflatten(0, K[kept:].shape[:3]) * balance  # [s,f,p,c], empty if no slot is left

    W_UK = torch.einsum("fhs,sfpc->hfpc", U[..., kept:], P_K)
    W_QR = torch.einsum("fhs,hfpi->hsfpi", U[..., :kept], Q)
    return new | {
        "W_UQ": Q.flatten(0, 2) * scale,
        "W_QR": W_QR.flatten(0, 3) * scale,
        "W_DKV": P.T @ both,
        "W_KR": K[:kept].flatten(0, 2),
        "W_UK": W_UK.flatten(0, 2),
        "W_UV": P_V.unflatten(0, (n_kv, d_h))[group].flatten(0, 1),
        "W_O": old["W_O"].unflatten(1, (n_h, d_h))[:, heads].flatten(1),
    }


def layer_to_deepseek(layer, moment, g):
    """The MLA of matmla.py from one with biases and without a norm, by what is most like it.

    g: the weight of the norm in front, so x = g n, where n has the same length for every token.

    A bias is the column of a 1 behind x. In its place stands what is nearest to 1 among the linear
    maps of x, by least squares.

    The norm divides each token's latent by its length. That changes little if the length is nearly
    the same for all. So the latent becomes an orthogonal projection of n; W_UK and W_UV undo it.
    It takes the map to 1 in, because most of n's length is there, and leaves its least number out.
    The norm's weight gives it back the mean square that it had.
    """
    d = len(g)
    covariance, mean = moment[:d, :d], moment[:d, d]
    one = torch.linalg.pinv(covariance, hermitian=True) @ mean
    new = dict(layer)
    for name in ("W_UQ", "W_QR", "W_DKV", "W_KR"):
        new[name] = layer[name][:, :d] + layer[name][:, d, None] * one
    Q, R = torch.linalg.qr((torch.cat((one[None], new["W_DKV"][:-1])) * g).T)
    new["W_DKV"] = Q.T / g
    for name in ("W_UK", "W_UV"):
        new[name] = layer[name][:, :-1] @ R.T[1:]
    square = torch.einsum("ci,ij,cj->c", new["W_DKV"], covariance, new["W_DKV"])
    new["norm_KV"] = square.mean().sqrt().expand(len(square))
    return new


def build(c, weights, dtype=torch.float32, device="cpu"):
    """The model with these weights."""
    with torch.device("meta"):
        model = make_model(c, weights)  # no random weights first
    model.load_state_dict(weights, assign=True)
    return model.to(device, dtype).eval()


def check(theirs, gqa, old, mla, new, tokens):
    """Print how far logits of tokens [B, T] are apart. UserError if that is more than rounding."""
    right = {torch.float32: theirs(tokens).logits}
    right[torch.float64], _ = build(gqa, old, torch.float64)(tokens)
    size = right[torch.float32].abs().max().clamp(min=1).item()
    table = Table()
    for name, c, weights in (
        ("our GQA", gqa, old),
        ("our MLA, expanded", mla, new),
        ("our MLA, absorbed", mla, new),
    ):
        off = []
        for dtype, logits in right.items():
            model = build(c, weights, dtype)
            for block in model.blocks:
                block.attention.absorb_below = math.inf  # where there is a cache
            cache = model.new_cache(*tokens.shape) if "absorbed" in name else None
            off.append((model(tokens, cache=cache)[0] - logits).abs().max().item())
        table.add(
            {
                "largest difference of logits": name,
                "from transformers, float32": f"{off[0]:.1e}",
                "from our GQA, float64": f"{off[1]:.1e}",
            }
        )
        if not (off[0] < 1e-4 * size and off[1] < 1e-10 * size):
            raise UserError(
                f"{name} is another model: logits are off by {off[0]:.1e}, {off[1]:.1e}"
            )


def read_text(name, count, encoding, context):
    """[2, n, width + 1]: windows of a text to measure on, and as many others to calibrate on.

    Each half has about `count` tokens. UserError if the text has too few for one window each.
    """
    width = min(512, context)
    most = 2 * math.ceil(count / width) * (width + 1)
    tokens = []
    for _, part in encode(name, encoding):
        tokens += part
        if len(tokens) >= most:
            break
    n = min(len(tokens), most) // (2 * (width + 1))
    if n == 0:
        raise UserError(f"{name} has {len(tokens)} tokens, at least {2 * (width + 1)} are needed")
    return torch.tensor(tokens[: 2 * n * (width + 1)]).view(2, n, width + 1)


def second_moments(model, windows):
    """For every layer of a GQA, the mean of x xᵀ over all tokens, x being what W_K and W_V see.

    A list of [d + 8, d + 8], in float64.
    """
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
    """[n_layer, n_h]: about how much the loss would rise without a head, up to one factor.

    It is the Fisher information of a gate, at 1, on what the head has read: the sum over all tokens
    of (o · ∂loss/∂o)². As in arXiv:2204.09656.
    """
    score = torch.zeros(len(model.blocks), model.config.n_h)
    read = []  # o [1,T,n_h,d_h], layer by layer

    def watched(*given):
        read.append(attend(*given))
        return read[-1]

    for block in model.blocks:
        block.attention.attend = watched
    try:
        for w in windows:
            read.clear()
            _, loss = model(w[None, :-1], w[None, 1:])
            for i, (o, grad) in enumerate(zip(read, torch.autograd.grad(loss, read))):
                score[i] += (o * grad).detach().sum(-1).square().sum((0, 1)).cpu()
    finally:
        for block in model.blocks:
            del block.attention.attend  # there remains that of the class
    return score


def measure(c, weights, text):
    """Rows of a table, one a budget: the cache, and perplexity on windows of a text, if any."""
    model = build(c, weights, device=text.device)
    size = model.new_cache(1, 1).nbytes // 2  # the weights are in float32
    rows = []
    for m in c.budgets:
        losses = [model(w[None, :-1], w[None, 1:], m)[1].item() for w in text]
        rows.append(
            {
                "attention": c.attention,
                "d_c": None if "gqa" in c.attention else c.d_c,
                "d_R": None if "gqa" in c.attention else c.d_R,
                "heads": m,
                "cache, bytes per token (bfloat16)": size,
                "perplexity": perplexity(fmean(losses)) if losses else None,
            }
        )
    return rows


def plan(args, gqa, weights):
    """Configs of what to make: the exact MLA, then those that are asked for. UserError if wrong."""
    kind = "matmla" if args.budgets else "mla"
    attention = gqa.attention.replace("gqa", kind)
    exact = replace(gqa, attention=attention, budgets=args.budgets or gqa.budgets)
    check_budgets(exact.budgets, exact)
    if not (args.d_R or args.d_c or args.deepseek):
        return [exact]

    full = gqa.d_R
    norm_eps = 1e-6 if args.deepseek else gqa.norm_eps  # transformers has latents with no other
    if args.deepseek:  # one key with RoPE; a latent need not be wider than x
        attention = kind
        d_R = args.d_R or gqa.d_h
        most = min(2 * full - d_R, gqa.d)
        widths = args.d_c or (most,)
        least = 2  # one of them is the map to 1
    else:
        d_R = args.d_R or full
        most = 2 * full - d_R
        widths = args.d_c or (full,)
        least = 1
    qk_norm = "qk_norm" in gqa.attention
    experts = "blocks.0.W_up.router.weight" in weights
    ordinary = gqa.rope_base ** (-torch.arange(0, gqa.d_h, 2) / gqa.d_h)
    scaled = not torch.allclose(weights["blocks.0.attention.frequencies"], ordinary)
    wrong = {
        "--deepseek: an ordinary MLA has no QK-norm": args.deepseek and qk_norm,
        "--deepseek: an ordinary MLA has no experts": args.deepseek and experts,
        "--deepseek: an ordinary MLA has no RoPE scaling": args.deepseek and scaled,
        f"--deepseek: d_R must be {gqa.d_h}": args.deepseek and d_R != gqa.d_h,
        f"QK-norm: d_R must be {full}, for keys cannot go into the latent": qk_norm and d_R < full,
        f"d_R {d_R} must be a multiple of {gqa.d_h} up to {full}": d_R % gqa.d_h or d_R > full,
        f"d_c {widths} must be in {least}..{most}": not least <= min(widths) <= max(widths) <= most,
    }
    for words in wrong:
        if wrong[words]:
            raise UserError(words)
    other = replace(exact, attention=attention, d_R=d_R, norm_eps=norm_eps)
    return [exact, *(replace(other, d_c=d_c) for d_c in widths)]


def spare_runs(out):
    """UserError if a model was trained in this folder, or in gqa in it: it would be lost."""
    for log in out / "metrics.jsonl", out / "gqa" / "metrics.jsonl":
        if log.exists() and log.stat().st_size:
            raise UserError(f"{log.parent} has a trained run: choose another --out")


def write(path, config, weights, encoding):
    """Save a checkpoint that train.py can start from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(
        path,
        config=asdict(config),
        settings={},
        encoding=encoding,
        step=0,
        model={name: W.float().contiguous() for name, W in weights.items()},
        optimizers=[],
        log=[],
    )
    print(f"wrote {path}")


@torch.no_grad()
def transmla(args):
    """Read, plan, calibrate, convert exactly and check that, convert further, measure, save."""
    spare_runs(args.out)
    device = pick_device(args.device)
    theirs, encoding = read_pretrained(args.model)
    gqa, old = to_gqa(theirs)
    configs = plan(args, gqa, old)

    # A text to measure on and one to calibrate on. To show exactness, any tokens will do.
    order = moments = None
    text = torch.empty(0, 1, device=device)
    tokens = torch.randint(gqa.vocab_size, (1, min(256, gqa.context)))
    if encoding:
        halves = read_text(args.text, args.tokens, get_encoding(encoding), gqa.context)
        text, other = halves.to(device)
        tokens = text[:1, : tokens.shape[1]].cpu()
        original = build(gqa, old, device=device)
        if args.budgets:
            order = importance(original, other).argsort(descending=True).tolist()
        if len(configs) > 1:
            moments = second_moments(original, other)
    elif len(configs) > 1 or args.budgets:
        raise UserError(
            f"{args.model} has no tokenizer, so no text can tell which keys or heads matter"
        )

    new = to_mla(old, gqa, configs[0], order)
    check(theirs, gqa, old, configs[0], new, tokens)

    table = Table()
    for row in measure(gqa, old, text) + measure(configs[0], new, text):
        table.add(row)
    for c in configs[1:]:
        new = to_mla(old, gqa, c, order, moments)
        for row in measure(c, new, text):
            table.add(row)

    write(args.out / "checkpoint.pt", configs[-1], new, encoding)
    before = args.out / "gqa" / "checkpoint.pt"
    before.unlink(missing_ok=True)  # it may be of another model
    if args.keep_gqa:
        write(before, gqa, old, encoding)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", help="folder or .gguf file of a pretrained model, or its Hugging Face id")
    add("--text", default="stdlib", help="to measure and to calibrate on, like --data of train.py")
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
        "--deepseek",
        action="store_true",
        help="save an ordinary MLA: one key with RoPE, a norm on the latent, no biases",
    )
    add(
        "--keep-gqa",
        action="store_true",
        help="save the model before its conversion, too, in gqa/checkpoint.pt of --out",
    )
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that is there")
    add("--out", default=Path("out/transmla"), type=Path, help="folder for checkpoint.pt")
    args = parser.parse_args()
    parser.run(transmla, args)


if __name__ == "__main__":
    main()
