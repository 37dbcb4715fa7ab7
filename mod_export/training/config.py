"""The options of a training run, and what follows from them.

This module knows nothing of torch. The help text of each field is that of its option in
`mod-export train` (cli/train.py).

    config = TrainConfig(data=("train/",), target=0.5, parameters="routers").validate(["kv"])
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace

from mod_export.errors import UserError
from mod_export.units import KV, shares_by_kind

METHODS = ("threshold", "topk", "static")
PARAMETERS = ("routers", "lora", "full")
LOSS_ON = ("all", "answers")
PRECISIONS = ("auto", "no", "bf16", "fp16")
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Tokens of a sequence by default, where kv units have something to forget in so many, and otherwise
# how many times the window.
LENGTH, LENGTH_WINDOWS = 512, 4
# Activation at the first step of the kinds that have to grow into skipping.
START_ACTIVATION = 0.95
# The best learning rate of LoRA for a model of this width (docs/log.md).
LORA_RATE = 1e-3
LORA_RATE_WIDTH = 576
# The learning rate of all weights as a share of that of LoRA.
FULL_RATE_SHARE = 0.1

# The options that may change when a run is resumed.
RESUMABLE_CHANGES = (
    "data",
    "router_lr",
    "lora_lr",
    "full_lr",
    "clip",
    "device",
    "precision",
    "recompute",
    "eval_every",
    "save_every",
)


def option(default, text: str, default_text: str = ""):
    """Return a field with a default and a help text.

    default_text: what the help shows as the default, where the value itself says too little.
    """
    return field(default=default, metadata={"help": text, "default_text": default_text})


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run; help_of gives the meaning of each."""

    data: tuple[str, ...] = field(
        metadata={
            "help": "Text, .gz, JSONL of messages or text, or a directory of these. The option "
            "can be repeated."
        }
    )
    target: float | dict[str, float] = option(
        0.5,
        "Share of (token, unit) pairs that are to run. Each kind can have its own: "
        "kv=0.5,attn=0.8.",
    )
    method: str = option(
        "threshold",
        "How units are chosen. threshold compares each score with a threshold. topk takes the best "
        "scores of each sequence, a baseline that cannot be exported. static takes the same units "
        "for all tokens, a baseline too.",
    )
    parameters: str = option(
        "routers", "What is trained: routers only, LoRA too, or all weights but the embeddings."
    )
    teacher: str = option("", "Model to distil from.", "DIR with all units active")
    per_layer: bool = option(
        False, "Each unit meets the target, instead of all of a kind together."
    )
    start: float | None = option(
        None, "Activation at the first step.", "the target for kv, 0.95 for other kinds"
    )
    anneal: float = option(
        0.1, "Share of the steps that lead from the start to the target activation."
    )
    load: float | None = option(None, "A fixed price of activation, in nats.", "measured")
    drift_penalty: float = option(
        10.0, "Weight of what keeps routers from following the kind of text and its length."
    )
    kl_weight: float = option(1.0, "Weight of the KL to the teacher's logits.")
    hidden_weight: float = option(0.0, "Weight of the distance to the teacher's hidden states.")
    lm_weight: float = option(0.0, "Weight of the language-model loss.")
    temperature: float = option(0.3, "Temperature of the relaxed decisions about keys.")
    tokens: int = option(200_000, "Tokens of the whole run.")
    length: int | None = option(
        None,
        "Tokens of a sequence.",
        "512; four times the largest window of kv units, where twice that is more",
    )
    batch: int = option(1, "Sequences of a forward, per device.")
    accumulate: int = option(1, "Forwards of a step.")
    router_lr: float = option(1e-3, "Learning rate of routers.")
    lora_lr: float | None = option(
        None, "Learning rate of LoRA.", "0.001 at a width of 576, falls with the width's root"
    )
    full_lr: float | None = option(None, "Learning rate of all weights.", "a tenth of LoRA's")
    warmup: float = option(
        0.05,
        "Share of the steps in which the learning rate rises. The rate then falls as a cosine.",
    )
    clip: float = option(1.0, "Largest norm of the gradient.")
    lora_rank: int = option(16, "Rank of LoRA.")
    lora_alpha: float = option(32.0, "Scale of LoRA, whose product counts alpha / rank times.")
    loss_on: str = option(
        "all", "Tokens that count in the loss: all, or only the assistant's answers."
    )
    recall: float = option(
        0.0,
        "Share of sequences that become a conversation, in which a user asks for passages of the "
        "text.",
    )
    limit: int | None = option(
        None, "Largest number of tokens to read, of all files in proportion."
    )
    precision: str = option(
        "auto",
        "Type of autocast. auto is bf16 on GPUs that have it, and no elsewhere. fp16 is for GPUs.",
    )
    device: str | None = option(None, "Where torch computes.", "the GPU where torch finds one")
    dtype: str = option(
        "auto",
        "Type of the weights that are not trained, and of a merged model. auto: that of the files "
        "where the device is fast in it, else float32. bfloat16 takes half of its memory.",
    )
    four_bit: bool = option(
        False,
        "Keep the matrices of the layers, which are not trained, in 4 bits (NF4), on CUDA. They "
        "take a quarter of the memory of bfloat16.",
    )
    recompute: bool = option(
        False, "Compute layers again in the backward pass, which saves memory."
    )
    seed: int = option(0, "Seed of the order of the data and of noise.")
    eval_every: int = option(100, "Steps between evaluations on held-out text.")
    save_every: int = option(100, "Steps between checkpoints.")
    held_out: int = option(8, "Sequences to evaluate on.")

    def for_window(self, window: int) -> TrainConfig:
        """Return the options with a length.

        window: the largest of the model's kv units, 0 where it has none.
        """
        if self.length is not None:
            return self
        return replace(self, length=LENGTH_WINDOWS * window if 2 * window > LENGTH else LENGTH)

    def steps(self, processes: int = 1) -> int:
        """Return the number of optimizer steps of the whole run, of options with a length."""
        tokens = self.length * self.batch * self.accumulate * processes
        return max(1, math.ceil(self.tokens / tokens))

    def target_of(self, kind: str) -> float:
        """Return the activation of a kind at the end."""
        return self.target[kind] if isinstance(self.target, dict) else self.target

    def start_of(self, kind: str) -> float:
        """Return the activation of a kind at the first step.

        Routers of `kv` are good from the start; other kinds have to grow into skipping.
        """
        if self.start is not None:
            return self.start
        if kind == KV:
            return self.target_of(kind)
        return max(START_ACTIVATION, self.target_of(kind))

    def rate_of(self, n_embd: int) -> float:
        """Return the learning rate of LoRA, or of all weights.

        The rate falls with the width as Schulman et al. found it ("LoRA Without Regret", 2025). The
        same source has the tenth for all weights.
        """
        lora = LORA_RATE * math.sqrt(LORA_RATE_WIDTH / n_embd)
        if self.parameters == "lora":
            return lora if self.lora_lr is None else self.lora_lr
        return FULL_RATE_SHARE * lora if self.full_lr is None else self.full_lr

    def to_dict(self) -> dict:
        """Return all options as a dictionary."""
        return asdict(self)

    def fixed(self) -> dict:
        """Return the options that have to stay as they are when a run is resumed."""
        return {k: value for k, value in self.to_dict().items() if k not in RESUMABLE_CHANGES}

    def validate(self, kinds: list[str]) -> TrainConfig:
        """Return the options themselves.

        Raises UserError where options do not fit the model's kinds of units, or one another.
        """
        shares_by_kind(self.target, kinds)
        for kind in kinds:
            for name, value in (("target", self.target_of(kind)), ("start", self.start_of(kind))):
                if not 0 < value <= 1:  # This form refuses NaN too.
                    raise UserError(
                        f"{name} activation {value} is not in (0, 1]", "0.5 runs half of all units"
                    )
        if self.method == "static" and self.parameters == "routers":
            raise UserError("static dropping has no routers to train", "train lora or full")
        if self.parameters == "full" and (self.four_bit or self.dtype not in ("auto", "float32")):
            coarse, option = (
                ("a type of 4 bits", "--four-bit") if self.four_bit else (self.dtype, "--dtype")
            )
            raise UserError(
                f"all weights are to be trained, which {coarse} is too coarse for",
                f"leave out {option}",
            )
        if not (self.kl_weight or self.hidden_weight or self.lm_weight):
            raise UserError(
                "all weights of the loss are 0", "give --kl-weight, --hidden-weight or --lm-weight"
            )
        return self


def help_of(name: str) -> str:
    """Return the help text of a field of TrainConfig."""
    return next(f for f in fields(TrainConfig) if f.name == name).metadata["help"]


def default_text_of(name: str) -> str:
    """Return what the help shows as the default of a field, or nothing for the value itself."""
    return next(f for f in fields(TrainConfig) if f.name == name).metadata.get("default_text", "")


def default_of(name: str):
    """Return the default of a field of TrainConfig."""
    return next(f for f in fields(TrainConfig) if f.name == name).default
