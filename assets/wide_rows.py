"""Reading a latent cache of wide rows on a GPU: `attend`, and flash decoding in several ways.

PYTHONPATH=. python assets/wide_rows.py

decode.py has flash decoding for rows of up to 256 numbers. For wider ones none of these ways is
good at every size. A line says how large a tile is, how many are loaded ahead (stages), how many
warps share one, how many times as fast as `attend` it is, and how far off its result.
"""

import itertools

import torch

from bench_cache import seconds
from decode import capture_graph, flash
from matmla import attend

DEVICE = torch.device("cuda", 0)
CHIP = torch.cuda.get_device_properties(DEVICE)
WIDTHS = (9, 384, 192), (16, 576, 512)  # heads, d_c + d_R, d_c
SHAPES = (64, 8192), (16, 4096), (1, 16384), (1, 2048)
WAYS = (64, 1, 4), (64, 1, 8), (32, 2, 4), (32, 1, 4), (16, 2, 4), (64, 2, 8), (64, 3, 4)


def measure(read, *arguments):
    """(seconds of one call, its result), compiled and as a CUDA graph."""
    torch.compiler.reset()
    compiled = torch.compile(read, dynamic=False)
    graph, result = capture_graph(lambda: compiled(*arguments), DEVICE)
    return seconds(graph.replay), result


for (h, w, w_v), (B, S) in itertools.product(WIDTHS, SHAPES):
    torch.manual_seed(0)
    rows = torch.randn(B, S, 1, w, device=DEVICE).bfloat16()
    q = torch.randn(B, 1, h, w, device=DEVICE).bfloat16()
    given = q, rows, rows[..., :w_v], torch.tensor([S - 1], device=DEVICE), w**-0.5
    gigabytes = B * S * w * 2 / 1e9

    first, right = measure(attend, *given)
    print(f"h {h} w {w}/{w_v} {B}x{S}: attend {first * 1e6:.0f} us {gigabytes / first:.0f} GB/s")
    for tile, stages, warps in WAYS:
        name = f"   tile {tile} stages {stages} warps {warps}: "
        options = {
            "BLOCK_N": tile,
            "num_warps": warps,
            "num_stages": stages,
            "SPLIT_KV": max(1, min(2 * CHIP.multi_processor_count // B, S // tile)),
        }
        try:
            time, o = measure(flash, *given, options)
        except Exception as error:  # most likely the tile is too large
            print(f"{name}{type(error).__name__}", flush=True)
            continue
        off = ((o.float() - right.float()).norm() / right.float().norm()).item()
        speed = f"{time * 1e6:.0f} us {gigabytes / time:.0f} GB/s x{first / time:.2f}"
        print(f"{name}{speed} off {off:.1e}", flush=True)
