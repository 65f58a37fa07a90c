"""
Latent attention in numbers that you can follow by hand: two heads, three tokens, a latent of two numbers.

    python walkthrough.py

The numbers come out of the classes of matmla.py, with weights set by hand; what is computed beside them, step by step,
is asserted to be the same. Token t turns by t right angles, so that RoPE too leaves round numbers.
"""

import math

import torch

from matmla import ATTENTION, Cache, Config, rope

SIZES = dict(d=2, n_h=2, n_kv=1, d_h=2, d_c=2, d_cq=0, d_R=2)
WEIGHTS = {    # two rows for head 1, then two rows for head 2, where a weight has heads
    "W_DKV": [[2, 3], [2, -3]],
    "W_UQ": [[0, 1], [1, 0], [1, -1], [0, 1]],
    "W_UK": [[1, 0], [1, 1], [2, 0], [0, -1]],
    "W_UV": [[1, 1], [0, 2], [0, 1], [1, 0]],
    "W_KR": [[1, 0], [0, 1]],
    "W_QR": [[0, 1], [1, -1], [1, -1], [0, 0]],
    "W_O": [[1, 0, 1, 0], [0, 1, 0, 1]],    # y = o_1 + o_2
}
WEIGHTS |= {"W_Q": WEIGHTS["W_UQ"], "W_K": WEIGHTS["W_UK"], "W_V": WEIGHTS["W_UV"]}    # MHA's: the same, but of x, not of c
X = [[1, 0], [0, 1], [2, 1]]                                            # three tokens


def by_hand(name, **sizes):
    """An attention of matmla.py with these weights; with fewer heads or keys, their first rows."""
    attention = ATTENTION[name](Config(attention=name, **SIZES | sizes)).double()
    for part, module in attention.named_children():
        if part in WEIGHTS:
            rows, columns = module.weight.shape
            module.weight.data = torch.tensor(WEIGHTS[part]).double()[:rows, :columns]
    return attention.requires_grad_(False)


def text(v):
    """A number or a vector, rounded to two decimals, without zeros that say nothing."""
    if v.dim():
        return "(" + ", ".join(map(text, v)) + ")"
    return f"{round(v.item(), 2) + 0:.2f}".rstrip("0").rstrip(".")


def table(*columns, width=16):
    """Print columns: a heading, then a cell for each token."""
    for cells in zip(*columns):
        print("    " + "".join(f"{cell if isinstance(cell, str) else text(cell):<{width}}" for cell in cells).rstrip())


def same(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-12)


def walk():
    x, right_angles = torch.tensor([X]).double(), torch.arange(3) * math.pi / 2
    mha, full, gqa, mla, matmla = map(by_hand, ("mha", "nested_mha", "gqa", "mla", "matmla"))
    print("Three tokens, x = (1, 0), (0, 1), (2, 1). Two heads of width 2. Token t turns by t right angles.\n")

    print("1. A token leaves a row in the cache. Here is that of token 1, and how long it is with 12 heads by default.\n")
    rows = {}
    for label, attention, m, big, parts in (
        ("MHA", mha, 2, 12, "k_1 v_1 k_2 v_2"), ("nested MHA, full", full, 2, 12, "k_1 v_1 k_2 v_2"),
        ("nested MHA, ragged", full, 1, 4, "k_1 v_1"), ("GQA", gqa, 2, 12, "k v"),
        ("MLA", mla, 2, 12, "c k_R"), ("MatMLA", matmla, 2, 12, "c k_R"),
    ):
        rows[label] = attention.write(x, right_angles, m)[0]                                    # [3 tokens, numbers]
        row = "  ".join(f"{part} {text(v)}" for part, v in zip(parts.split(), rows[label][1].view(-1, 2)))
        name = next(name for name, kind in ATTENTION.items() if type(attention) is kind)
        long = ATTENTION[name](Config(attention=name)).numbers(big)
        print(f"    {label:<20}{row:<48}{attention.numbers(m)} numbers, {long:>3} with {big}")
    assert same(rows["MHA"], rows["nested MHA, full"]) and same(rows["MHA"][:, :4], rows["nested MHA, ragged"])
    assert same(rows["MLA"], rows["MatMLA"])

    print("\n2. Compress: a latent of 2 numbers for the keys and values of all heads.    c = norm(W_DKV x)\n")
    raw = x[0] @ mla.W_DKV.weight.T
    c, k_R = rows["MLA"].split(2, -1)
    assert torch.allclose(c, raw / raw.square().mean(-1, keepdim=True).sqrt(), atol=1e-6)      # 1e-6: eps
    table(["x", *x[0]], ["W_DKV x", *raw], ["its rms", *raw.square().mean(-1).sqrt()], ["c", *c])

    print("\n3. Expand: each head makes its own key and value of it.    k = W_UK c    v = W_UV c\n")
    W_UK, W_UV = (W.weight.unflatten(0, (2, 2)) for W in (mla.W_UK, mla.W_UV))                  # [head, 2, 2]
    k, v = (torch.einsum("hdc,sc->hsd", W, c) for W in (W_UK, W_UV))                            # [head, token, 2]
    table(["c", *c], ["k of head 1", *k[0]], ["v of head 1", *v[0]], ["k of head 2", *k[1]], ["v of head 2", *v[1]])

    print("\n4. Absorb: token 2 asks, head 1. W_UK may be applied to every key, or once to the query.\n")
    q = (x[0, 2] @ mla.W_UQ.weight.T)[:2]
    carried = W_UK[0].T @ q
    naive, absorbed = k[0] @ q, c @ carried
    print(f"    q = {text(q)}    q·k = q·(W_UK c) = (W_UKᵀ q)·c    W_UKᵀ q = {text(carried)}\n")
    table(["k", *k[0]], ["q·k", *naive], ["c", *c], ["(W_UKᵀ q)·c", *absorbed])
    assert same(naive, absorbed)

    print("\n5. RoPE inside k: key s turns by s right angles, the query by 2. The score is qᵀ R(s-2) W_UK c, and so")
    print(f"   the query must carry W_UKᵀ R(s-2)ᵀ q: another vector for every s. With {text(carried)} for all:\n")
    turn = lambda u, positions: rope(u[None, :, None], positions, 1.0)[0, :, 0]
    right = turn(k[0], right_angles) @ turn(q[None], right_angles[2:])[0]
    needed = turn(q.expand(3, 2), right_angles[2] - right_angles) @ W_UK[0]
    table(["s", *torch.arange(3)], ["score", *right], ["to carry", *needed], ["score with it", *(c * needed).sum(-1)],
          [f"with {text(carried)}", *absorbed], ["off by", *(absorbed - right).abs()])
    assert same((c * needed).sum(-1), right) and not same(absorbed, right)

    print("\n6. RoPE decoupled: one more key for position, cached as it is. Scores are added.    k_R = R(s) W_KR x\n")
    q_C, q_R = (part[0, 0, 0] for part in mla.queries(x[:, 2:], right_angles[2:], 2))
    naive = torch.cat((k[0], k_R), -1) @ torch.cat((q_C, q_R)) / 2                              # √(d_h + d_R) = 2
    absorbed = torch.cat((c, k_R), -1) @ torch.cat((carried, q_R)) / 2
    p = absorbed.softmax(0)
    print(f"    q_R = {text(q_R)}    scores / √(2+2), then softmax\n")
    table(["k_R", *k_R], ["q_R·k_R", *k_R @ q_R], ["naive", *naive], ["absorbed", *absorbed], ["p", *p])
    assert same(naive, absorbed)
    o = p @ v[0]
    assert same(o, W_UV[0] @ (p @ c))
    print(f"\n    o_1 = Σ p v = W_UV (Σ p c) = W_UV {text(p @ c)} = {text(o)}")
    arguments = x[:, 2:], rows["MLA"][None], right_angles[2:]
    y, y_absorbed = mla.read(*arguments, 2)[0, 0], mla.read_absorbed(*arguments, 2)[0, 0]
    assert same(y, y_absorbed)
    print(f"    y = o_1 + o_2 = {text(y)} by `read`, {text(y_absorbed)} by `read_absorbed` of matmla.py")

    print("\n7. No head wrote these rows, so any number of heads can read them.\n")
    one = matmla.read(*arguments, 1)[0, 0]
    alone = by_hand("mla", n_h=1)
    assert same(one, o) and same(one, alone.read(*arguments, 1)[0, 0]) and same(matmla.read(*arguments, 2)[0, 0], y)
    print(f"    MatMLA, 2 heads    y = o_1 + o_2 = {text(y)}")
    print(f"    MatMLA, 1 head     y = o_1       = {text(one)}, as an MLA that has only head 1")
    try:
        full(x[:, 2:], 2, Cache(torch.zeros(1, 3, 4), heads=1))
    except ValueError as error:
        print(f"    nested MHA, rows of 1 head, read by 2: {error}")


if __name__ == "__main__":
    walk()
