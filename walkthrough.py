"""
Latent attention in numbers that you can follow by hand: two heads, three tokens, a latent of two numbers.

    python walkthrough.py

The classes of matmla.py do the work, with weights set by hand. Whatever is computed a second way is asserted to be the
same, or, in step 5, not to be. A position is a right angle here, so that RoPE too leaves round numbers.
"""

import math

import torch

from matmla import ATTENTION, Cache, Config, rope

W_Q, W_K, W_V = (
    [[0, 1], [1, 0], [1, -1], [0, 1]],
    [[1, 0], [1, 1], [2, 0], [0, -1]],
    [[1, 1], [0, 2], [0, 1], [1, 0]],
)
WEIGHTS = {  # two rows are head 1, the next two head 2
    "W_Q": W_Q,
    "W_K": W_K,
    "W_V": W_V,  # of x
    "W_UQ": W_Q,
    "W_UK": W_K,
    "W_UV": W_V,  # the same numbers, but W_UK and W_UV are of c
    "W_QR": [[0, 1], [-1, 1], [-1, 1], [0, 0]],
    "W_KR": [[1, 0], [0, 1]],
    "W_DKV": [[2, 3], [2, -3]],
    "W_O": [[1, 0, 1, 0], [0, 1, 0, 1]],  # y = o_1 + o_2
}


def by_hand(name, n_h=2):
    """An attention of matmla.py with these weights; if it has fewer heads or keys, the first of them."""
    c = Config(attention=name, d=2, n_h=n_h, n_kv=1, d_h=2, d_c=2, d_cq=0, d_R=2)
    attention = ATTENTION[name](c).double().requires_grad_(False)
    for part, module in attention.named_children():
        if part in WEIGHTS:
            rows, columns = module.weight.shape
            module.weight.copy_(torch.tensor(WEIGHTS[part])[:rows, :columns])
    return attention


def turn(u, angles):
    """R u for each of the vectors u [n, 2] and its angle."""
    return rope(u[None, :, None], angles, 1.0)[0, :, 0]


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
    print("\n    " + "".join(f"{heading:<16}" for heading in columns).rstrip())
    for cells in zip(*columns.values()):
        print("    " + "".join(f"{text(cell):<16}" for cell in cells).rstrip())


def walk():
    x, angles = torch.tensor([[1, 0], [0, 1], [2, 1]]).double(), torch.arange(3) * math.pi / 2
    mla, matmla = by_hand("mla"), by_hand("matmla")
    print(
        f"Three tokens: x = {', '.join(map(text, x))}. Two heads of width 2. Matrices are written [row; row]."
    )
    print(
        "RoPE turns token t by t right angles: R(1) (a, b) = (-b, a) and R(2) (a, b) = (-a, -b).\n"
    )

    print(
        "1. Every token leaves a row in the cache. MHA: a key k = R(t) W_K x and a value v = W_V x of each"
    )
    print(
        "   head. GQA: one k and v for all heads. MLA: a latent c (step 2) and one key k_R (step 6)."
    )
    print("   Token 1 leaves this, if W_K and W_V have the numbers of W_UK and W_UV in step 3:\n")
    print(f"    {'':<68}numbers  at default sizes")
    written = {}
    for label, name, m, default_m, parts in (
        ("MHA", "mha", 2, 12, "k_1 v_1 k_2 v_2"),
        ("nested MHA, full", "nested_mha", 2, 12, "k_1 v_1 k_2 v_2"),
        ("nested MHA, ragged", "nested_mha", 1, 4, "k_1 v_1"),  # written by fewer heads
        ("GQA", "gqa", 2, 12, "k v"),
        ("MLA", "mla", 2, 12, "c k_R"),
        ("MatMLA", "matmla", 2, 12, "c k_R"),
    ):
        rows = written[label] = by_hand(name).write(x[None], angles, m)[0]  # [token, numbers]
        row = "  ".join(f"{part} {text(v)}" for part, v in zip(parts.split(), rows[1].view(-1, 2)))
        default = ATTENTION[name](Config(attention=name)).row_width(default_m)
        print(f"    {label:<20}{row:<48}{rows.shape[1]:<9}{default}, {default_m} heads")
    assert same(written["nested MHA, full"], written["MHA"]) and same(
        written["MatMLA"], written["MLA"]
    )
    assert same(written["nested MHA, ragged"], written["MHA"][:, :4])

    print("\n2. Compress: one short latent stands for the keys and values of all heads.")
    print(
        f"   c = norm(W_DKV x), W_DKV = {text(mla.W_DKV.weight)}. The norm divides by the root of the mean square."
    )
    c, k_R = written["MLA"].split(2, 1)
    long = mla.W_DKV(x)
    root = long.square().mean(1).sqrt()
    table({"x": x, "W_DKV x": long, "root": root, "c": c})
    assert same(c, long / root[:, None], rounding=1e-6)  # the norm has an eps

    print(
        "\n3. Expand: each head makes its own key k = W_UK c and value v = W_UV c out of it, with"
    )
    W_UQ, W_UK, W_UV = (
        W.weight.view(2, 2, 2) for W in (mla.W_UQ, mla.W_UK, mla.W_UV)
    )  # [head, row, column]
    for h, end in enumerate(",."):
        print(f"   W_UK = {text(W_UK[h])} and W_UV = {text(W_UV[h])} in head {h + 1}{end}")
    k, v = c @ W_UK.mT, c @ W_UV.mT  # [head, token, 2]
    table(
        {"c": c, "k of head 1": k[0], "v of head 1": v[0], "k of head 2": k[1], "v of head 2": v[1]}
    )

    print(
        "\n4. Absorb: apply W_UK to every latent, or once to the query.  q·k = q·(W_UK c) = (W_UKᵀ q)·c"
    )
    q = mla.W_UQ(x[2]).view(2, 2)  # [head, 2]
    carry = torch.einsum("hkc,hk->hc", W_UK, q)
    print(
        f"   Token 2 asks. In head 1, W_UQ = {text(W_UQ[0])}, so q = W_UQ x = {text(q[0])} and "
        f"W_UKᵀ q = {text(carry[0])}."
    )
    naive, absorbed = torch.einsum("hsk,hk->hs", k, q), carry @ c.T  # [head, token]
    table({"k": k[0], "q·k": naive[0], "c": c, "(W_UKᵀ q)·c": absorbed[0]})
    assert same(naive, absorbed)

    print(
        "\n5. Put RoPE inside k, and R(s) turns key s, R(2) the query. The score is qᵀ R(s-2) W_UK c, so the"
    )
    print(
        f"   query must carry W_UKᵀ R(2-s) q, another vector for every s. One for all, {text(carry[0])}, is wrong:"
    )
    turned = turn(k[0], angles) @ turn(q[:1], angles[2:])[0]
    needed = turn(q[0].expand(3, 2), angles[2] - angles) @ W_UK[0]
    table(
        {
            "s": torch.arange(3),
            "score": turned,
            "to carry": needed,
            "score with it": (needed * c).sum(1),
            f"with {text(carry[0])}": absorbed[0],
            "off by": (absorbed[0] - turned).abs(),
        }
    )
    assert same((needed * c).sum(1), turned) and not same(absorbed[0], turned, rounding=1)

    print(
        "\n6. Decouple RoPE: position gets a key of its own, cached beside c, and the two scores are added."
    )
    q_R = turn(mla.W_QR(x[2]).view(2, 2), angles[[2, 2]])  # [head, 2]
    print(
        f"   k_R = R(s) W_KR x and q_R = R(2) W_QR x = {text(q_R[0])}, with W_KR = {text(mla.W_KR.weight)} "
        f"and W_QR = {text(mla.W_QR.weight[:2])}.\n   The scale is 1/√(d_h + d_R) = 1/2."
    )
    s, s_absorbed = ((score + q_R @ k_R.T) / 2 for score in (naive, absorbed))
    p = s_absorbed.softmax(1)
    table(
        {
            "q·k, step 4": naive[0],
            "k_R": k_R,
            "q_R·k_R": k_R @ q_R[0],
            "sum / 2": s[0],
            "absorbed": s_absorbed[0],
            "p = softmax": p[0],
        }
    )
    o, o_absorbed = torch.einsum("hs,hsv->hv", p, v), torch.einsum("hvc,hc->hv", W_UV, p @ c)
    print(
        "\n   Values are absorbed, too: apply W_UV to every latent, or once to their sum.  Σ p v = W_UV (Σ p c)\n"
    )
    for h in 0, 1:
        print(f"    head {h + 1}    Σ p c = {text((p @ c)[h]):<14}o_{h + 1} = Σ p v = {text(o[h])}")
    asked = x[None, 2:], written["MLA"][None], angles[2:]
    y = mla.read(*asked, 2)[0, 0]
    print(
        f"    layer     y = W_O (o_1; o_2) = o_1 + o_2 = {text(y)}, since W_O = {text(mla.W_O.weight)}"
    )
    assert same(s, s_absorbed) and same(o, o_absorbed)
    assert same(y, o[0] + o[1]) and same(y, mla.read_absorbed(*asked, 2)[0, 0])

    print(
        "\n7. MatMLA: no head wrote these rows, so any number of heads may read them. Token 2 reads them again:\n"
    )
    one, two = (matmla.read(*asked, m)[0, 0] for m in (1, 2))
    print(f"    2 heads   y = o_1 + o_2 = {text(two)}")
    print(f"    1 head    y = o_1 = {text(one)}, as an MLA with only head 1 would")
    assert (
        same(one, o[0]) and same(one, by_hand("mla", n_h=1).read(*asked, 1)[0, 0]) and same(two, y)
    )
    assert same(*(matmla.write(x[None], angles, m) for m in (1, 2)))
    try:
        by_hand("nested_mha")(x[None, 2:], 2, Cache(written["nested MHA, ragged"][None]))
        raise AssertionError("2 heads found their keys in rows that 1 head wrote")
    except ValueError as error:
        print(f"    Nested MHA, from rows that 1 head wrote: {error}.")


if __name__ == "__main__":
    walk()
