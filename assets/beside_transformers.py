"""One decoding step of MatMLA, read absorbed, beside the same model exported to transformers.

    PYTHONPATH=. python assets/beside_transformers.py

They take turns of 50 steps each. The last line of output is the result as JSON.
"""

import json
from statistics import median
from time import perf_counter

import torch
import transformers
from transformers import DynamicCache

from export import to_transformers
from matmla import GPT, Config

HEADS, PREFIX, STEPS = 12, 200, 50


@torch.inference_mode()
def turn(model, theirs, tokens):
    """How many times as long theirs takes for the last STEPS tokens [B, PREFIX + STEPS]."""
    cache, other = model.new_cache(*tokens.shape), DynamicCache(config=theirs.config)
    prefix, rest = tokens[:, :PREFIX], tokens[:, PREFIX:].split(1, 1)
    model.step(prefix, HEADS, cache)
    theirs(prefix, past_key_values=other)

    start = perf_counter()
    ours = [model.step(token, HEADS, cache) for token in rest]
    middle = perf_counter()
    same = [theirs(token, past_key_values=other).logits[:, 0] for token in rest]
    stop = perf_counter()
    assert (torch.stack(ours) - torch.stack(same)).abs().max() < 1e-5
    return (stop - middle) / (middle - start)


torch.manual_seed(0)
torch.set_num_threads(1)
model = GPT(Config()).eval()
theirs = to_transformers(model, HEADS)
result = {"torch": torch.__version__, "transformers": transformers.__version__, "ratio": {}}
for batch in 1, 8:
    tokens = torch.randint(257, (batch, PREFIX + STEPS))
    ratio = median([turn(model, theirs, tokens) for _ in range(9)][2:])  # the first two warm up
    print(f"batch {batch}: a step in transformers takes {ratio:.2f} times as long as here")
    result["ratio"][batch] = ratio
print(json.dumps(result))
