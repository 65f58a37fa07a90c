"""
Latent attention in numbers that you can follow by hand: four heads, three tokens, latents of two.

    python walkthrough.py

The classes of matmla.py do the work, with weights set by hand. Whatever is computed a second way is
asserted to be the same, or, in step 5, not to be. A position is a right angle here, so that RoPE
too leaves round numbers.
"""

import math

import torch

from common import Parser
from matmla import ATTENTION, Cache, Config, rope

WEIGHTS = {
    "W_DKV": [[2, 0, 3, 0], [1, 1, -1, -2]],
    "W_KR": [[1, 0, 0, 0], [0, 0, 1, 0]],
    # Two rows for each of four heads: of c ...
    "W_UK": [[1, 0], [1, 1], [2, 0], [0, -1], [0, 1], [1, 0], [1, 1], [0, 1]],
    "W_UV": [[1, 1], [0, 2], [0, 1], [1, 0], [1, 0], [0, 1], [1, -1], [1, 0]],
    # ... and of x.
    "W_UQ": [[0, 0, 1, 0], [1, 0, 0, 0], [1, 0, -1, 0], [0, 0, 1, 0]] * 2,
    "W_QR": [[0, 0, 1, 0], [0, 0, -1, 1], [0, 0, -1, 0], [0, 1, 0, 0]] * 2,
    "W_O": [[1, 0] * 4, [0, 1] * 4, [0, 0] * 4, [0, 0] * 4],  # y = (o_1 + ... + o_4, 0, 0)
}


def by_hand(name, n_h=4):
    """An attention of matmla.py with these weights; if it has fewer heads or keys, the first."""
    sizes = Config(attention=name, d=4, n_h=n_h, n_kv=2, d_h=2, d_c=2, d_cq=0, d_R=2)
    attention = ATTENTION[name](sizes).double().requires_grad_(False)
    W = {part: torch.tensor(rows).double() for part, rows in WEIGHTS.items()}
    W |= {"W_Q": W["W_UQ"], "W_K": W["W_UK"] @ W["W_DKV"], "W_V": W["W_UV"] @ W["W_DKV"]}
    for part, module in attention.named_children():
        if part in W:
            module.weight.copy_(W[part][tuple(map(slice, module.weight.shape))])
    return attention


def turn(u, angles):
    """R u for each of the vectors u [n, 2] and its angle, or one angle for all."""
    return rope(u[None, :, None], angles.expand(len(u)), 1.0)[0, :, 0]


def decode_step(mla, x, angle, rows):
    """One token x [d] of MLA, from x to y [d]. rows: the cache, a list; the token adds its row."""
    W_UK = mla.W_UK.weight.unflatten(0, (-1, mla.d_h))  # [n_h,d_h,d_c]
    W_UV = mla.W_UV.weight.unflatten(0, (-1, mla.d_h))  # [n_h,d_h,d_c]

    c = mla.norm_KV(mla.W_DKV(x))  # [d_c]: the latent
    k_R = turn(mla.W_KR(x)[None], angle)[0]  # [d_R]: the key for position
    rows.append(torch.cat((c, k_R)))  # d_c + d_R numbers more in the cache

    c, k_R = torch.stack(rows).split((mla.d_c, mla.d_R), 1)  # [S,d_c], [S,d_R]: of all so far
    q_C = mla.W_UQ(x).view(-1, mla.d_h)  # [n_h,d_h]
    q_R = turn(mla.W_QR(x).view(-1, mla.d_R), angle)  # [n_h,d_R]
    q_latent = torch.einsum("hd,hdc->hc", q_C, W_UK)  # [n_h,d_c]: W_UKᵀ q_C
    scores = (q_latent @ c.T + q_R @ k_R.T) / math.sqrt(mla.d_h + mla.d_R)  # [n_h,S]
    p = scores.softmax(1)  # [n_h,S]
    o = torch.einsum("hc,hdc->hd", p @ c, W_UV)  # [n_h,d_h]: W_UV (Σ p c)
    return mla.W_O(o.flatten())  # [d]


def same(a, b, rounding=1e-12):
    return torch.allclose(a, b, rtol=0, atol=rounding)


def text(v):
    """A number, (a vector) or [a matrix; row by row], with at most two decimals."""
    if v.dim() == 2:
        return "[" + "; ".join(" ".join(map(text, row)) for row in v) + "]"
    if v.dim() == 1:
        return "(" + ", ".join(map(text, v)) + ")"
    return f"{round(v.item(), 2) + 0:g}"  # + 0: no -0


def table(columns):
    """Print {heading: a number or vector for each token}."""
    print("\n    " + "".join(f"{heading:<15}" for heading in columns).rstrip())
    for cells in zip(*columns.values()):
        print("    " + "".join(f"{text(cell):<15}" for cell in cells).rstrip(), flush=True)


def leave_rows(x, angles):
    """Step 1. Returns {attention: its rows [token, numbers]}."""
    print(f"""\
Three tokens: x = {", ".join(map(text, x))}. Four heads of width 2.
Matrices are written [row; row]. RoPE turns token t by t right angles: R(1) (a, b) = (-b, a).

1. Every token leaves a row in the cache. MHA: a key k = R(t) W_K x and a value v = W_V x for each
   head. GQA: a key and a value for every two neighbouring heads. MLA: a latent c (step 2) and one
   key k_R (step 6). Token 1 leaves this, where W_K = W_UK W_DKV and W_V = W_UV W_DKV (steps 2
   and 3). Nested MHA keeps 3 of 4 heads here; at the default sizes it would keep 8 of 12.

    numbers of token 1 {"":<62}here    default""")
    written = {}
    for label, name, m, default_m in (
        ("MHA", "mha", 4, 12),
        ("nested MHA, ragged", "nested_mha", 3, 8),
        ("GQA", "gqa", 4, 12),
        ("MLA", "mla", 4, 12),
        ("MatMLA", "matmla", 3, 8),
    ):
        rows = written[label] = by_hand(name).write(x[None], angles, m)[0]
        row = " ".join(map(text, rows[1].view(-1, 2)))
        default = ATTENTION[name](Config(attention=name)).row_width(default_m)
        print(f"    {label:<19}{row:<62}{rows.shape[1]:<8}{default}")
    assert (
        same(written["nested MHA, ragged"], written["MHA"][:, :12])
        and same(written["GQA"], written["MHA"][:, :8])
        and same(written["MatMLA"], written["MLA"])
    )
    return written


def walk():
    x = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [2, 0, 1, 0]]).double()  # [token, d]
    angles = torch.arange(3) * math.pi / 2
    written = leave_rows(x, angles)
    mla = by_hand("mla")
    W_UQ, W_UK, W_UV = (W.weight.view(4, 2, -1) for W in (mla.W_UQ, mla.W_UK, mla.W_UV))
    c, k_R = written["MLA"].split(2, 1)

    print(f"""
2. Compress: 4 numbers become 2, one short latent for the keys and values of all heads.
   c = norm(W_DKV x), W_DKV = {text(mla.W_DKV.weight)}. \
The norm divides by the root of the mean square.""")
    long = mla.W_DKV(x)
    root = long.square().mean(1).sqrt()
    table({"x": x, "W_DKV x": long, "root": root, "c": c})
    assert same(c, long / root[:, None], rounding=1e-6)  # the norm has an eps

    print(f"""
3. Expand: 2 numbers become 16. Each of 4 heads makes a key k = W_UK c and a value v = W_UV c.
   In head 1, W_UK = {text(W_UK[0])} and W_UV = {text(W_UV[0])}; \
in head 2, {text(W_UK[1])} and {text(W_UV[1])}.""")
    k, v = c @ W_UK.mT, c @ W_UV.mT  # [head, token, 2] each
    table({"c": c, "k, head 1": k[0], "v, head 1": v[0], "k, head 2": k[1], "v, head 2": v[1]})

    q = mla.W_UQ(x[2]).view(4, 2)  # [head, 2]
    carry = torch.einsum("hkc,hk->hc", W_UK, q)
    print(f"""
4. Absorb: apply W_UK to every latent, or once to the query.  q·k = q·(W_UK c) = (W_UKᵀ q)·c
   Token 2 asks: x = {text(x[2])}. In head 1, W_UQ = {text(W_UQ[0])} and \
W_UK = {text(W_UK[0])},
   so q = W_UQ x = {text(q[0])} and W_UKᵀ q = {text(carry[0])}. \
c = norm(W_DKV x), W_DKV = {text(mla.W_DKV.weight)}.
   For 3 latents the left takes 3·4 + 3·2 = 18 multiplications, the right 4 + 3·2 = 10.""")
    expanded, absorbed = torch.einsum("hsk,hk->hs", k, q), carry @ c.T  # [head, token]
    table({"x": x, "c": c, "k = W_UK c": k[0], "q·k": expanded[0], "(W_UKᵀ q)·c": absorbed[0]})
    assert same(expanded, absorbed)

    print(f"""
5. Put RoPE inside k: R(s) turns key s, R(2) the query q = {text(q[0])}, so that the score is
   (R(2) q)·(R(s) W_UK c) = qᵀ R(s-2) W_UK c. The query must carry W_UKᵀ R(s-2)ᵀ q, another vector
   for every s. One for all, W_UKᵀ q = {text(carry[0])}, is wrong:""")
    score = turn(k[0], angles) @ turn(q[:1], angles[2])[0]
    must = turn(q[0].expand(3, 2), angles[2] - angles) @ W_UK[0]
    right, wrong = (must * c).sum(1), absorbed[0]
    table(
        {
            "s": torch.arange(3),
            "c": c,
            "score": score,
            "must carry": must,
            "that · c": right,
            f"{text(carry[0])} · c": wrong,
        }
    )
    assert same(right, score) and not same(wrong, score, rounding=1)

    q_R = turn(mla.W_QR(x[2]).view(4, 2), angles[2])  # [head, 2]
    print(f"""
6. Decouple RoPE: position gets a key of its own, cached beside c, and the two scores are added.
   k_R = R(s) W_KR x, for all heads. q_R = R(2) W_QR x = {text(q_R[0])} in head 1.
   W_KR = {text(mla.W_KR.weight)}, W_QR = {text(mla.W_QR.weight[:2])}. Scale: 1/√(d_h + d_R).""")
    scores, s_absorbed = ((s + q_R @ k_R.T) / 2 for s in (expanded, absorbed))
    p = s_absorbed.softmax(1)
    table(
        {
            "q·k": expanded[0],
            "k_R": k_R,
            "q_R·k_R": k_R @ q_R[0],
            "sum / 2": scores[0],
            "p = softmax": p[0],
        }
    )
    print("\n   Values are absorbed, too: W_UV after the sum.  Σ p (W_UV c) = W_UV (Σ p c)")
    o, o_absorbed = torch.einsum("hs,hsv->hv", p, v), torch.einsum("hvc,hc->hv", W_UV, p @ c)
    table({"head": torch.arange(1, 5), "Σ p v": o, "Σ p c": p @ c, "W_UV (Σ p c)": o_absorbed})
    assert same(scores, s_absorbed) and same(o, o_absorbed)

    print(
        "\n7. MatMLA: no head wrote these rows, so any number of heads may read them for token 2.\n"
    )
    given = x[None], written["MLA"][None], angles
    for m in 4, 3, 2:
        y = by_hand("matmla").read(*given, m)[0, 2]
        print(f"    {m} heads: y = W_O (o_1; ...; o_{m}) = (Σ o, then 0, 0) = {text(y)}")
        assert same(y[:2], o[:m].sum(0)) and same(y, by_hand("mla", m).read(*given, m)[0, 2])
    try:
        by_hand("nested_mha")(x[None, 2:], 4, Cache(written["nested MHA, ragged"][None]))
        raise AssertionError("4 heads found their keys in rows that 3 heads wrote")
    except ValueError as error:
        print(f"    Nested MHA, whose rows have 3 heads: {error}.")

    print(
        "\n8. All together: decode_step, in this script, takes a token, leaves its row, returns y."
    )
    rows = []
    y = torch.stack([decode_step(mla, *token, rows) for token in zip(x, angles)])
    assert same(torch.stack(rows), written["MLA"])
    assert same(y, mla.read(*given, 4)[0]) and same(y, mla.read_absorbed(*given, 4)[0])
    table({"x": x, "c": c, "k_R": k_R, "y": y})


def main():
    parser = Parser(__doc__)
    parser.parse_args()
    parser.run(walk)


if __name__ == "__main__":
    main()
