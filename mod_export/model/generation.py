"""Continue a sequence with the sparse form of a MoD model.

The prompt is read in chunks, and the answer is written token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch


@torch.no_grad()
def generate(
    model,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: Collection[int] | None = None,
    chunk: int = 512,
    on_token: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Continue input_ids [1, T] to [1, T + n], n <= max_new_tokens.

    A stop token ends the result, which holds it. temperature: 0 takes the likeliest token. top_k: 0
    is off. top_p: 1 is off. stop_ids: by default the model's own end-of-sequence tokens. chunk:
    tokens per prefill step, which changes memory and speed but not the result. Raises ValueError
    for an empty prompt.
    """
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty")
    stop = set(_end_of_sequence(model.base) if stop_ids is None else stop_ids)
    generator = torch.Generator(input_ids.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    cache = model.new_cache()
    for start in range(0, input_ids.shape[1], chunk):
        logits = model.step(input_ids[:, start : start + chunk], cache, logits_to_keep=1)
    ids = input_ids
    for count in range(1, max_new_tokens + 1):
        token = sample(logits[0, -1], temperature, top_k, top_p, generator)
        ids = torch.cat((ids, torch.tensor([[token]], device=ids.device)), dim=1)
        if on_token is not None:
            on_token(token)
        if token in stop or count == max_new_tokens:
            break
        logits = model.step(ids[:, -1:], cache)
    return ids


def sample(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Draw one token from logits [n_vocab]."""
    if temperature <= 0:
        return int(logits.argmax())
    order = torch.sort(logits.float() / temperature, descending=True)
    p = torch.softmax(order.values, dim=-1)
    if top_k > 0:
        p[top_k:] = 0
    p[p.cumsum(-1) - p >= top_p] = 0  # The token that crosses the bound stays.
    return int(order.indices[torch.multinomial(p, 1, generator=generator)])


def _end_of_sequence(base) -> list[int]:
    ids = base.generation_config.eos_token_id
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]
