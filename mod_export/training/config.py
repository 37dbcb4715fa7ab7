"""What a training run is told, and what follows from it. Knows nothing of torch.

config = TrainConfig(data=("train/",), target=0.5, parameters="routers").validate(["kv"])
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from mod_export.config import of_kinds
from mod_export.errors import UserError

METHODS = ("threshold", "topk", "static")
PARAMETERS = ("routers", "lora", "full")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """data: files and directories; target: activation, one number or {kind: number}.

    method: how tokens are chosen; topk and static are baselines (docs/explanation/training-method.md)
    parameters: what is trained beside the routers: nothing (`routers`), LoRA, or all weights but
    embeddings
    start: activation at the first step, None: the target for `kv`, START for other kinds; anneal:
    share of the
        steps from start to target; per_layer: each unit meets the target, instead of all of a kind
        together
    load: a constant weight of the load term, None: train_control.py finds it; steady: steady.py
    learning rates: of routers, LoRA, full weights, None: rate_of(); warmup: share of the steps
    tokens: of the whole run; length, batch: of a forward on one device; accumulate: forwards of a
    step
    loss_on: `all` tokens or only `answers` of chat data
    precision: of autocast; dtype: of the weights that are not trained, and of a merged model
    recall: share of sequences that ask for passages of their own text (recall.py)
    """

    data: tuple[str, ...]
    target: float | dict[str, float] = 0.5
    method: str = "threshold"
    parameters: str = "routers"
    teacher: str = ""
    per_layer: bool = False
    start: float | None = None
    anneal: float = 0.1
    load: float | None = None
    steady: float = 10.0
    kl_weight: float = 1.0
    hidden_weight: float = 0.0
    lm_weight: float = 0.0
    temperature: float = 0.3
    tokens: int = 200_000
    length: int = 512
    batch: int = 1
    accumulate: int = 1
    router_lr: float = 1e-3
    lora_lr: float | None = None
    full_lr: float | None = None
    warmup: float = 0.05
    clip: float = 1.0
    lora_rank: int = 16
    lora_alpha: float = 32.0
    loss_on: str = "all"
    recall: float = 0.0
    limit: int | None = None
    precision: str = "auto"
    dtype: str = "float32"
    recompute: bool = False
    seed: int = 0
    eval_every: int = 100
    save_every: int = 100
    held_out: int = 8

    FREE = (
        "data",
        "router_lr",
        "lora_lr",
        "full_lr",
        "clip",
        "precision",
        "recompute",
        "eval_every",
        "save_every",
    )
    START = 0.95
    LORA_LR, WIDTH = 1e-3, 576

    def steps(self, processes: int = 1) -> int:
        """Optimizer steps of the whole run."""
        return max(
            1, math.ceil(self.tokens / (self.length * self.batch * self.accumulate * processes))
        )

    def target_of(self, kind: str) -> float:
        return self.target[kind] if isinstance(self.target, dict) else self.target

    def start_of(self, kind: str) -> float:
        """Activation of a kind at the first step: kv routers are good from the start, others have
        to grow into it.
        """
        if self.start is not None:
            return self.start
        return self.target_of(kind) if kind == "kv" else max(self.START, self.target_of(kind))

    def rate_of(self, n_embd: int) -> float:
        """Learning rate of LoRA or of all weights: best for SmolLM2-135M (docs/log.md), less
        where there is more.

        How it falls with the width, and that all weights have a tenth of LoRA's, is as Schulman et
        al. found it ("LoRA Without Regret", 2025).
        """
        lora = self.LORA_LR * math.sqrt(self.WIDTH / n_embd)
        if self.parameters == "lora":
            return lora if self.lora_lr is None else self.lora_lr
        return 0.1 * lora if self.full_lr is None else self.full_lr

    def to_dict(self) -> dict:
        return asdict(self)

    def fixed(self) -> dict:
        """What has to stay as it is when a run is resumed; learning rates may change, and where the
        data lie.
        """
        return {name: value for name, value in self.to_dict().items() if name not in self.FREE}

    def validate(self, kinds: list[str]) -> TrainConfig:
        """Return self; raises UserError for what does not fit the model's kinds of units, or
        together.
        """
        of_kinds(self.target, kinds)
        for kind in kinds:
            for name, value in (("target", self.target_of(kind)), ("start", self.start_of(kind))):
                if not 0 < value <= 1:  # written so that NaN fails too
                    raise UserError(
                        f"{name} activation {value} is not in (0, 1]", "0.5 runs half of all units"
                    )
        if self.method == "static" and self.parameters == "routers":
            raise UserError("static dropping has no routers to train", "train lora or full")
        if self.dtype != "float32" and self.parameters == "full":
            raise UserError(
                f"all weights are to be trained, which {self.dtype} is too coarse for",
                "leave out --dtype",
            )
        if not (self.kl_weight or self.hidden_weight or self.lm_weight):
            raise UserError(
                "all weights of the loss are 0", "give --kl-weight, --hidden-weight or --lm-weight"
            )
        return self
