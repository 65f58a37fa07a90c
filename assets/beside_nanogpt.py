"""Training speed beside nanoGPT: 12 layers of width 768, 1,024 tokens, on one GPU.

git clone https://github.com/karpathy/nanoGPT
PYTHONPATH=.:nanoGPT python assets/beside_nanogpt.py

nanoGPT, 124M parameters, trains as its own train.py does by default: the model compiled, fused
AdamW, gradients clipped. MatMLA, 118M, trains as our train.py does: at 12, 8 and 4 heads, with Muon
and AdamW. One is measured after the other. The last line of output is the table as JSON.
"""

import gc
import json
from functools import partial
from statistics import median

import numpy as np
import torch
from model import GPT, GPTConfig  # nanoGPT's model.py

import train
from bench_cache import seconds
from common import Table
from data import windows
from devices import World

DEVICE = torch.device("cuda", 0)
PASSES = 1, 40  # of a step
TOKENS = np.random.default_rng(0).integers(50257, size=1_000_000).astype(np.uint16)
FLAGS = "--preset paper --context 1024 --d-ff 2048 --tokenizer gpt2 --data none --out none".split()


def nanogpt(micro_batch):
    """A function that takes a step of nanoGPT, of so many passes."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=1024, vocab_size=50304, bias=False)
    model = GPT(config).to(DEVICE)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
    compiled = torch.compile(model)
    order = np.random.default_rng(0)

    def step(passes):
        for _ in range(passes):
            starts = order.integers(len(TOKENS) - 1024, size=micro_batch)
            x, y = windows(TOKENS, starts, 1024, DEVICE)
            with torch.autocast("cuda", torch.bfloat16):
                loss = compiled(x, y.contiguous())[1] / passes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matmla(micro_batch):
    """A function that takes a step of train.py, of so many passes."""
    _, args = train.settings([*FLAGS, "--micro-batch", str(micro_batch)])
    model, optimizers, run_pass = train.build(args, World(DEVICE))
    count = 0

    def step(passes):
        nonlocal count
        args.batch = micro_batch * passes
        train.train_step(model, optimizers, TOKENS, count, args, World(DEVICE), run_pass)
        count += 1

    return step


def speeds(step, micro_batch):
    """Tokens per second for each of PASSES: medians of three times a second or more."""
    result = []
    for passes in PASSES:
        call = partial(step, passes)
        for _ in range(3):  # compiles, and captures
            call()
        time = median(seconds(call) for _ in range(3))
        result.append(micro_batch * passes * 1024 / time)
    return result


table = Table()
rows = []
for micro_batch in (12, 48, 96):
    found = []
    for build in (nanogpt, matmla):  # one after the other, memory does not hold both
        found.append(speeds(build(micro_batch), micro_batch))
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    for passes, theirs, ours in zip(PASSES, *found):
        row = {
            "micro-batch": micro_batch,
            "passes": passes,
            "nanoGPT, tokens/s": round(theirs),
            "MatMLA, tokens/s": round(ours),
            "MatMLA / nanoGPT": ours / theirs,
        }
        rows.append(row)
        table.add(row)
where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
print("\n" + json.dumps({**where, "rows": rows}))
