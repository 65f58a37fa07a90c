"""Which device, how precise, several processes, the compiler, CUDA graphs of training passes.

A reader of train.py may skip this file. It changes how fast a run is and, on a GPU, the rounding.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from tokenizer import UserError


def pick_device(name):
    """The device of that name. UserError if it does not work."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        return torch.ones(1, device=name).abs().device  # fails here, not in the middle
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name!r} on this machine") from None


def mixed_precision(device):
    """On a GPU, products are computed in bfloat16."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@dataclass
class World:
    """The processes of a run, one per device, and which this is. The first writes and prints."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self):
        return self.rank == 0

    def average(self, tensors):
        """Replace the tensors by their mean over all processes, in one message."""
        if self.size > 1:
            joined = torch.cat([x.flatten() for x in tensors])
            dist.all_reduce(joined)
            parts = (joined / self.size).split([x.numel() for x in tensors])
            torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors)])

    def wait(self):
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def leave(self):
        """End together: one that leaves early may hang another."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def start_processes(args):
    """The World that torchrun has made, or a process alone."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.batch % size:
        raise UserError(f"a batch of {args.batch} cannot be shared evenly by {size} processes")
    device = pick_device(args.device)
    if size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # preparing data takes long
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return World(device, rank, size)


def compile_parts(model):
    """Compile the blocks and the loss in place. Equal blocks share a graph per kind of `heads`."""
    from torch._dynamo import config  # slow to import, needed only here
    from torch._inductor.config import triton

    config.recompile_limit = config.accumulated_recompile_limit = 1000  # else torch stops at 8
    if hasattr(triton, "mix_order_reduction"):  # from torch 2.10 on, a fusion that can make
        triton.mix_order_reduction = False  # gradients wrong: pytorch issue 193061
    for block in model.blocks:
        block.compile(dynamic=False)
    tuned = {"max_autotune_pointwise": True}  # logits are the largest tensor: 10% faster
    model.loss = torch.compile(model.loss, dynamic=False, options=tuned)


def can_compile(device):
    """Whether torch.compile works here: it wants a C++ compiler, and Triton on a GPU."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever is missing, training goes without
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        print(f"training without torch.compile, which does not work here: {reason}", flush=True)
        return False


class Captured:
    """A function as a CUDA graph, which the GPU runs without waiting for Python.

    The first call runs it as it is, to compile and to allocate. The second captures it. From then
    on it is replayed: on the same tensors, with the result in the same place. pool: memory that
    graphs share which never run at the same time.
    """

    def __init__(self, function, pool):
        self.function = function
        self.pool = pool
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            return self.function()
        if self.calls == 2:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.result = self.function()
        self.graph.replay()
        return self.result


class CapturedPasses:
    """train.py's run_pass with a CUDA graph for each kind of pass: heads, sequences, weight.

    A pass of a small micro-batch takes the host longer to launch than the GPU to compute. Heads
    drawn for every layer are of too many kinds, and run as they are.
    """

    def __init__(self, run_pass):
        self.run_pass = run_pass
        self.pool = torch.cuda.graph_pool_handle()
        self.kinds = {}

    def __call__(self, model, x, y, heads, weight):
        if isinstance(heads, list):
            return self.run_pass(model, x, y, heads, weight)
        kind = heads, len(x), weight
        if kind not in self.kinds:
            place = x.clone(), y.clone()
            run_pass = partial(self.run_pass, model, *place, heads, weight)
            self.kinds[kind] = place, Captured(run_pass, self.pool)
        place, captured = self.kinds[kind]
        place[0].copy_(x)
        place[1].copy_(y)
        return captured()
