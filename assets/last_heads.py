"""Can the last heads of a trained MatMLA still learn? 300 more steps of it, in three ways.

PYTHONPATH=. python assets/last_heads.py out/mat321 --preset small --data CORPUS --out out/last

Trained are only heads 9 to 12, with all 12 at work; everything, with all 12 at work; everything,
with the budgets by their shares, as before. last_heads.json goes to --out. Flags are train.py's.
"""

import json
import sys

import torch

import train
from common import evaluate
from devices import start_processes

PER_HEAD = "W_UQ,W_QR,W_UK,W_UV,W_O"  # what a budget cuts
RECIPE = "--steps 300 --warmup 30 --lr 0.002 --lr-adamw 0.001 --seed 2".split()
WAYS = {
    "heads 9 to 12 train, at 12 heads": ["--budgets", "12", "--only", PER_HEAD],
    "everything trains, at 12 heads": ["--budgets", "12"],
    "everything trains, 12, 8 and 4 by their shares": [],
}


def rows_of_last_heads(name, p, first=8, n_h=12):
    """True where a weight belongs to heads 9 to 12: rows of it, or columns of W_O."""
    mask = torch.zeros_like(p, dtype=torch.bool)
    part = mask.T if "W_O" in name else mask
    part[first * len(part) // n_h :] = True
    return mask


def go_on(args):
    """Losses at 12, 8 and 4 heads, before and after the steps."""
    run = train.Run(args, start_processes(args))
    before = evaluate(run.model, run.held_out, 256, (12, 8, 4))
    masks = {}
    if args.only:
        for name, p in run.model.named_parameters():
            if p.requires_grad:
                masks[p] = rows_of_last_heads(name, p), p.detach().clone()
                p.register_hook(lambda grad, mask=masks[p][0]: grad * mask)
    for _ in range(args.steps):
        run.advance()
        with torch.no_grad():
            for p, (mask, start) in masks.items():  # the others would decay
                p.copy_(torch.where(mask, p, start))
    with torch.compiler.set_stance("force_eager"):
        return {"before": before, "after": evaluate(run.model, run.held_out, 256, (12, 8, 4))}


source, *flags = sys.argv[1:]
results = {}
for way, own in WAYS.items():
    _, args = train.settings(["--init", f"{source}/checkpoint.pt", *RECIPE, *flags, *own])
    results[way] = go_on(args)
    print(way, results[way], flush=True)
args.out.mkdir(parents=True, exist_ok=True)
(args.out / "last_heads.json").write_text(json.dumps(results, indent=1) + "\n")
