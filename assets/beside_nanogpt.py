"""Training speed beside nanoGPT: 12 layers of width 768, 1,024 tokens, by turns on one GPU.

git clone https://github.com/karpathy/nanoGPT
PYTHONPATH=.:nanoGPT python assets/beside_nanogpt.py

nanoGPT, 124M parameters, trains as its own train.py does by default: the model compiled, fused
AdamW, gradients clipped. MatMLA, 118M, trains as our train.py does: at 12, 8 and 4 heads, with Muon
and AdamW. The last line of output is the table as JSON.
"""

import json

import numpy as np
import torch
from model import GPT, GPTConfig  # nanoGPT's model.py

import train
from bench_cache import seconds
from common import Table
from data import windows
from devices import World

DEVICE = torch.device("cuda", 0)
TOKENS = np.random.default_rng(0).integers(50257, size=1_000_000).astype(np.uint16)
FLAGS = "--preset paper --context 1024 --d-ff 2048 --tokenizer gpt2 --data none --out none".split()


def nanogpt(micro_batch, passes):
    """A function that takes one step of nanoGPT."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=1024, vocab_size=50304, bias=False)
    model = GPT(config).to(DEVICE)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
    compiled = torch.compile(model)
    order = np.random.default_rng(0)

    def step():
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


def matmla(micro_batch, passes):
    """A function that takes one step of train.py."""
    sizes = ["--micro-batch", str(micro_batch), "--batch", str(micro_batch * passes)]
    _, args = train.settings([*FLAGS, *sizes])
    model, optimizers, run_pass = train.build(args, World(DEVICE))
    count = 0

    def step():
        nonlocal count
        train.train_step(model, optimizers, TOKENS, count, args, World(DEVICE), run_pass)
        count += 1

    return step


def compare(micro_batch, passes):
    """Tokens per second of both: the medians of five turns of a second or more."""
    both = {"nanoGPT": nanogpt(micro_batch, passes), "MatMLA": matmla(micro_batch, passes)}
    for step in both.values():
        for _ in range(3):  # compiles, and captures
            step()
    turns = [{name: seconds(step) for name, step in both.items()} for _ in range(5)]
    tokens = micro_batch * passes * 1024
    speed = {name: tokens / float(np.median([turn[name] for turn in turns])) for name in both}
    torch.compiler.reset()
    return {
        "micro-batch": micro_batch,
        "passes": passes,
        **{f"{name}, tokens/s": round(speed[name]) for name in both},
        "MatMLA / nanoGPT": speed["MatMLA"] / speed["nanoGPT"],
    }


table = Table()
rows = []
for passes in (1, 40):
    for micro_batch in (12, 48, 96):
        rows.append(compare(micro_batch, passes))
        table.add(rows[-1])
        torch.cuda.empty_cache()
print(
    "\n"
    + json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows})
)
