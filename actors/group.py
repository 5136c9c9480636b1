"""A model over several processes: rank actors in one placement group, led by the first, which looks like any actor.

DeepSpeed-inference cuts the matrices (AutoTP); raysys/shards.py does what has to be done between the ranks, with
gradients. The first rank takes calls as an evaluator or an editor does, hands each to the others and then does its own
part; so calls reach all ranks in one order. A group is one failure unit: when any rank is lost, the first one ends
itself, whoever started the group ends what is left, and a new group is made under a new name.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from torch import nn

from raysys.model import Model
from raysys.shards import Columns, Ranks, Rows, Sharded


def split(whole: Model, ranks: Ranks, device: str = "cpu") -> Sharded:
    """This rank's part of `whole` (on the CPU), on `device` (cpu, cuda); `whole` is used up. All ranks call it at once.

    Embeddings and head stay whole on every rank: a head that DeepSpeed cuts has no gradients.
    """
    net, head = whole.net, whole.net.get_output_embeddings()
    os.environ["DS_ACCELERATOR"] = device
    os.environ |= {"RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.size), "LOCAL_RANK": "0"}
    with _quietly():
        import deepspeed
        from deepspeed.module_inject.layers import LinearAllreduce

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # wants a compiler, and crashes without one
        net.set_output_embeddings(nn.Identity())
        parallel = {"tp_size": ranks.size}
        net = deepspeed.init_inference(
            net, tensor_parallel=parallel, dtype=whole.dtype, replace_with_kernel_inject=False
        ).module
    net.set_output_embeddings(head.to(device))
    for name, layer in list(net.named_modules()):
        if (sizes := getattr(layer, "_partition_sizes", None)) is not None:
            parent, _, leaf = name.rpartition(".")
            made = (Rows if isinstance(layer, LinearAllreduce) else Columns)(layer.weight, layer.bias, sizes, ranks)
            setattr(net.get_submodule(parent), leaf, made)
    return Sharded(whole, net, ranks)


@contextmanager
def _quietly() -> Iterator[None]:
    """DeepSpeed prints and logs what it finds in a model."""
    kept = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(kept)
