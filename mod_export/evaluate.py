"""How much a Mixture-of-Depths model loses against its dense base: perplexity, KL, K/V, passkey retrieval.

The base is the same weights with every unit active. Knows nothing of GGUF files or of the runtime.

    model = MoDModel.load("mod")
    loss(model, pack(model.tokenizer, text, 2048, count=4))   # Loss(perplexity=..., kl=..., kv_share=...)
    passkey(model, haystack_text, length=2048)                # {"mod": 0.9, "dense": 1.0, "trials": 20}
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.model import MoDModel

_ROWS = 256  # rows of logits [_ROWS, n_vocab] that are turned into float32 probabilities at a time


@dataclass(frozen=True)
class Loss:
    """Means over the tokens that count. kl: nats, dense against MoD; kv_share: cells at the end against dense ones."""

    tokens: int
    perplexity_dense: float
    perplexity: float
    kl: float
    top1_agreement: float
    activation: float
    kv_share: float


@torch.inference_mode()
def loss(model: MoDModel, sequences: torch.Tensor, skip: int = 0, progress: Callable = iter) -> Loss:
    """Compare `model` with its dense base on sequences [n, T]; the first `skip` positions of each do not count.

    Early tokens of a sequence lie within every window and tell little of what is forgotten later, hence `skip`.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    active, share, count = 0.0, 0.0, 0
    for ids in progress(sequences):
        dense = dense_logits(model, ids[None])[0, skip:]
        logits, trace = model(ids[None], trace=True)
        sums += divergence(dense, logits[0, skip:], ids[skip:])
        active += trace.active.float().mean().item() if trace.active.numel() else 1.0
        share += kv_share(model.config, trace.active[0], model.n_layer)
        count += len(ids) - skip - 1
    kl, nll_dense, nll, same = (sums / count).tolist()
    n = len(sequences)
    return Loss(count, math.exp(nll_dense), math.exp(nll), kl, same, active / n, share / n)


def dense_logits(model: MoDModel, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """Logits [B, T, n_vocab] of the model with every unit active."""
    before, model.force = model.force, "active"
    try:
        return model(ids, **kwargs)
    finally:
        model.force = before


def divergence(dense: torch.Tensor, other: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sums over the positions that have a next token, float64 [4]: KL, NLL of dense, NLL of other, same best token.

    dense, other: logits [T, n_vocab]; ids: [T].
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(ids) - 1, _ROWS):
        rows = slice(start, min(start + _ROWS, len(ids) - 1))
        target = ids[start + 1 : rows.stop + 1, None]
        p, q = dense[rows].float().log_softmax(-1), other[rows].float().log_softmax(-1)
        sums += torch.stack([
            (p.exp() * (p - q)).sum().double(),
            -p.gather(1, target).sum().double(),
            -q.gather(1, target).sum().double(),
            (p.argmax(-1) == q.argmax(-1)).sum().double(),
        ])  # fmt: skip
    return sums


def kv_share(config: MoDConfig, active: torch.Tensor, n_layer: int) -> float:
    """Cells whose K/V a next token could see, over those of the dense model.

    active: decisions [T, n_units] in the order of config.routed().
    """
    n_tokens, cells = len(active), dict.fromkeys(range(n_layer), float(len(active)))
    recent = torch.arange(n_tokens) >= n_tokens + 1 - config.kv_window  # the next token's window holds one token less
    stored = {}
    for index, (layer, kind) in enumerate(config.routed()):
        if kind in ("block", "attn"):
            stored[layer] = stored.get(layer, torch.ones(n_tokens, dtype=torch.bool)) & active[:, index]
        elif kind == "kv":
            visible = active[:, index] | recent
            stored[layer] = stored.get(layer, torch.ones(n_tokens, dtype=torch.bool)) & visible
    cells.update({layer: mask.sum().item() for layer, mask in stored.items()})
    return sum(cells.values()) / (n_layer * n_tokens)


NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = (
    "Some important information is hidden in the following text. Find it and memorize it.\n\n{text}\n\n"
    "What is the pass key mentioned in the text?"
)
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.inference_mode()
def passkey(
    model: MoDModel,
    haystack: str,
    length: int,
    depths: Sequence[float] = DEPTHS,
    keys: int = 4,
    seed: int = 0,
    progress: Callable = iter,
) -> dict:
    """Share of 5-digit keys, hidden at `depths` in a prompt of about `length` tokens, that greedy decoding retrieves.

    The answer is begun with "The pass key is "; its digits are checked in one forward: greedy decoding gives them
    exactly if each is the best token after those before it (passkey task: Mohtashami and Jaggi, arXiv 2305.16300).
    """
    rng = random.Random(seed)
    trials = [(depth, rng.randrange(10000, 100000)) for _ in range(keys) for depth in depths]
    right = {"dense": {}, "mod": {}}
    for depth, key in progress(trials):
        ids, n_answer = _passkey_prompt(model.tokenizer, haystack, length, depth, key, rng)
        for name, run in (("dense", lambda x, **kw: dense_logits(model, x, **kw)), ("mod", model)):
            best = run(ids, logits_to_keep=n_answer + 1)[0, :-1].argmax(-1)
            right[name].setdefault(depth, []).append(bool((best == ids[0, -n_answer:]).all()))
    result = {"length": length, "trials": len(trials)}
    for name, by_depth in right.items():
        result[name] = sum(map(sum, by_depth.values())) / len(trials)
        result[f"{name}_by_depth"] = {str(depth): sum(hits) / len(hits) for depth, hits in by_depth.items()}
    return result


def _passkey_prompt(tokenizer, haystack: str, length: int, depth: float, key: int, rng) -> tuple[torch.Tensor, int]:
    """Prompt and answer as ids [1, about length], and the number of answer tokens."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    needle, answer = encode("\n\n" + NEEDLE.format(key=key) + "\n\n"), encode(f"{key}.")
    before, after = _chat(tokenizer, QUESTION.format(text="\0")).split("\0")
    head, tail = encode(before), encode(after + "The pass key is ")
    n_hay = length - len(head) - len(tail) - len(needle) - len(answer)
    if n_hay < 16:
        raise UserError(f"a passkey prompt does not fit into {length} tokens", "use a longer context")
    chars = 8 * n_hay  # more than enough: English has 4 to 5 characters in a token
    if len(haystack) < chars:
        raise UserError(f"haystack too short for {length} tokens", "give a longer text")
    start = rng.randrange(len(haystack) - chars + 1)
    hay = encode(haystack[start : start + chars])[:n_hay]
    cut = int(depth * len(hay))
    return torch.tensor([head + hay[:cut] + needle + hay[cut:] + tail + answer]), len(answer)


def _chat(tokenizer, text: str) -> str:
    """`text` as a user's message in the model's chat format; as it is where the tokenizer has no such format."""
    if not getattr(tokenizer, "chat_template", None):
        return text + "\n\n"
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
