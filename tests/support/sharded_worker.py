"""One process of a training on several: torchrun --nproc-per-node 2 sharded_worker.py ddp|fsdp DIR

Trains DIR/mod-... in several ways into DIR/ddp-..., or into DIR/fsdp-..., each of these interrupted
and resumed.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from mod_export.model.model_shape import ModelShape
from mod_export.training import loop, run
from mod_export.training.config import TrainConfig
from mod_export.training.memory import WHOLE_LAYERS, MemoryPlan, needed
from mod_export.training.run import train

WAYS = {
    "routers": ({"parameters": "routers"}, "full"),
    "lora": ({"parameters": "lora", "lora_rank": 2, "accumulate": 2, "recompute": True}, "adapter"),
    "full": ({"parameters": "full", "hidden_weight": 0.5}, "full"),
    # This way does not clip. The norm is summed in another order, and its last place in bfloat16
    # can tip a token's decision.
    "half": ({"parameters": "lora", "lora_rank": 2, "dtype": "bfloat16", "clip": 1e9}, "full"),
    # This way has no noise, which is another on each process, and no thresholds, which follow the
    # mean of their quantiles.
    "static": ({"parameters": "full", "method": "static", "target": 0.5}, "full"),
}
STEPS, LENGTH, CUT = 6, 32, 5  # The cut comes after half of the steps, with a checkpoint of four.


def shard() -> None:
    """Shard the model as `accelerate launch --use_fsdp` does.

    Accelerate shards on accelerators only, but torch can shard on CPUs.
    """
    init = Accelerator.__init__

    def sharded(self, *args, **kwargs):
        init(self, *args, **kwargs)
        PartialState().distributed_type = self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )

    Accelerator.__init__ = sharded


def check(is_sharded: bool) -> None:
    """Check that runs are what they are meant to be."""
    go = loop.Loop.go

    def checked(self, *args):
        assert isinstance(self.student, FSDPModule) == is_sharded
        if is_sharded:
            check_pieces(self.model.base)
        return go(self, *args)

    loop.Loop.go = checked


def check_pieces(base: torch.nn.Module) -> None:
    """Check that a process holds its share of all weights, as training/memory.py says of FSDP."""
    if any(p.requires_grad for p in base.parameters()):
        return
    shape = ModelShape.of(base)
    plan = MemoryPlan(weight_bytes=base.dtype.itemsize, pieces=2)
    pieces = needed(shape, plan).weights
    pieces -= plan.weight_bytes * WHOLE_LAYERS * shape.in_layer  # which are whole in a forward
    held = sum(getattr(p, "_local_tensor", p).nbytes for p in base.parameters())
    # The weights outside of the layers are whole from the first forward on, beside their pieces.
    outside = plan.weight_bytes * shape.outside
    assert held in (pieces - outside, pieces - outside // 2), (held, pieces, outside)


def interrupted(*args, **kwargs) -> None:
    gradients = loop.Loop._gradients

    def stopped(self, number, stop):
        if number == CUT:
            raise KeyboardInterrupt
        return gradients(self, number, stop)

    loop.Loop._gradients = stopped
    try:
        train(*args, **kwargs)
    except KeyboardInterrupt:
        loop.Loop._gradients = gradients


def config(folder: Path, options: dict, batch: int = 2, processes: int = 2) -> TrainConfig:
    tokens = STEPS * batch * LENGTH * processes * options.get("accumulate", 1)
    base = {
        "data": (str(folder / "text.txt"),),
        "target": {"kv": 0.5, "attn": 0.7},
        "tokens": tokens,
        "batch": batch,
        "length": LENGTH,
        "held_out": 3,
        "eval_every": 100,
        "save_every": 2,
    }
    return TrainConfig(**base | options)


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    run.plot = lambda *_: None  # which would take longer than the training
    check(mode == "fsdp")
    if mode == "fsdp":
        shard()
    for name, (options, save_as) in WAYS.items():
        mod = folder / ("mod-ffn" if name == "static" else "mod")
        args = (str(mod), str(folder / f"{mode}-{name}"), config(folder, options), save_as)
        if mode == "fsdp":
            interrupted(*args)
        train(*args, resume=mode == "fsdp")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
