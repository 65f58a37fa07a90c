"""How long a prompt takes on a GPU, eager and compiled: the paper preset, random weights.

PYTHONPATH=. python assets/prompt_speed.py

first_s is the first compiled call, which compiles and reads the prompt. The last line of output is
the table as JSON.
"""

import json
import time
from dataclasses import replace

import torch

from bench_cache import seconds
from common import PRESETS, Table, make_config
from matmla import GPT

DEVICE = torch.device("cuda", 0)


@torch.no_grad()
def compare(attention, heads, batch, length):
    """A row: ms of a prompt of `batch` sequences, eager and compiled, and seconds of the first."""
    torch.compiler.reset()
    torch.manual_seed(0)
    config = replace(make_config(PRESETS["paper"]), attention=attention, context=length)
    with torch.device(DEVICE):
        model = GPT(config).bfloat16()
    tokens = torch.randint(50257, (batch, length), device=DEVICE)
    cache = model.new_cache(batch, length)

    def prompt():
        cache.rewind(0)
        return model.step(tokens, heads, cache).argmax(-1)

    eager = min(seconds(prompt) for _ in range(2))
    for block in model.blocks:
        block.compile(dynamic=False)
    start = time.perf_counter()
    prompt()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    compiled = min(seconds(prompt) for _ in range(2))
    return {
        "attention": attention,
        "heads": heads,
        "sequences": batch,
        "tokens": length,
        "eager_ms": eager * 1e3,
        "compiled_ms": compiled * 1e3,
        "ratio": eager / compiled,
        "first_s": first,
    }


table = Table()
rows = []
for attention, heads in (("mha", 12), ("matmla", 12), ("matmla", 4)):
    for batch, length in ((1, 2048), (16, 4096)):
        rows.append(compare(attention, heads, batch, length))
        table.add(rows[-1])
where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
print("\n" + json.dumps({**where, "rows": rows}))
