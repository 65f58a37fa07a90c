"""One decoding step of MatMLA, read absorbed, beside the same model exported to transformers, in turns of 50 steps.

    PYTHONPATH=. python assets/beside_transformers.py
"""

import time
from statistics import median

import torch
import transformers

from export import to_transformers
from matmla import GPT, Config

torch.manual_seed(0)
torch.set_num_threads(1)
model = GPT(Config()).eval()
theirs = to_transformers(model, 12)

with torch.inference_mode():
    for batch in 1, 8:
        tokens, times = torch.randint(257, (batch, 251)), []
        for turn in range(9):
            cache, their_cache = model.new_cache(batch, 251), transformers.DynamicCache(config=theirs.config)
            model.step(tokens[:, :200], 12, cache)
            theirs(tokens[:, :200], past_key_values=their_cache)
            seconds = []
            for step in (lambda x: model.step(x, 12, cache),
                         lambda x: theirs(x, past_key_values=their_cache, logits_to_keep=1).logits[:, 0]):
                start = time.perf_counter()
                for x in tokens[:, 200:250].split(1, 1):
                    step(x)
                seconds.append(time.perf_counter() - start)
                last = step(tokens[:, 250:])
                assert len(seconds) == 1 or (last - ours).abs().max() < 1e-5
                ours = last
            times.append(seconds[1] / seconds[0])
        print(f"batch {batch}: a step in transformers takes {median(times[2:]):.2f} times as long as here")
