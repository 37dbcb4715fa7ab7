"""A slow reference of a routed Llama, in numpy: what docs/explanation/semantics.md says, in loops.

It shares no code with the package. Each query of each head looks at each key on its own, so it also
says what the K/V heads of a layer decide apart.

    logits, active = reference(model, ids)      # [T, n_vocab], {unit: [T]}
"""

from __future__ import annotations

import math

import numpy as np

KINDS = ("block", "attn", "ffn")


def reference(model, ids: list[int]) -> tuple[np.ndarray, dict[tuple, np.ndarray]]:
    """Return logits [T, n_vocab] and the decisions [T] of each unit, all in float64.

    model: a MoDModel on a Llama
    """
    weights = {k: v.double().numpy() for k, v in model.base.state_dict().items()}
    settings, eps = model.base.config, model.base.config.rms_norm_eps
    active: dict[tuple, np.ndarray] = {}

    def normed(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

    def decide(unit, h):
        """Decisions and factors of a unit that is routed; None of another."""
        if unit not in routers:
            return None, None
        w, b, p = routers[unit]
        score = 1 / (1 + np.exp(-(normed(h) @ w + b)))
        passed = score >= p
        active[unit] = passed | (np.arange(len(h)) < model.config.sink_tokens)
        scaled = model.config.scale_output
        return active[unit], np.where(passed & scaled, score, 1.0)

    routers = {
        tuple(unit): (
            w.double().numpy(),
            b.double().numpy()[0],
            np.float32(model.config.threshold(unit)),
        )
        for unit, (w, b) in model.router_tensors().items()
    }
    h = weights["model.embed_tokens.weight"][ids]
    for layer in range(settings.num_hidden_layers):
        name = f"model.layers.{layer}."
        part = {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}
        kept = [
            (decide((layer, "kv", head), h)[0], model.config.window((layer, "kv", head)))
            for head in range(settings.num_key_value_heads)
        ]
        (block, block_gate), (attn, attn_gate) = (decide((layer, k), h) for k in KINDS[:2])
        stored = block if block is not None else attn
        before = h
        x = normed(h) * part["input_layernorm.weight"]
        h = h + _chosen(_attention(x, part, settings, stored, kept), attn, attn_gate)
        ffn, ffn_gate = decide((layer, "ffn"), h)
        x = normed(h) * part["post_attention_layernorm.weight"]
        gate = x @ part["mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (x @ part["mlp.up_proj.weight"].T)
        h = h + _chosen(inner @ part["mlp.down_proj.weight"].T, ffn, ffn_gate)
        h = before + _chosen(h - before, block, block_gate)
    return normed(h) * weights["model.norm.weight"] @ weights["lm_head.weight"].T, active


def _chosen(delta, active, gate):
    """What a unit adds for the active tokens, and nothing for the others."""
    return delta if active is None else np.where(active[:, None], gate[:, None] * delta, 0.0)


def _attention(x, part, settings, stored, kept):
    """kept: of each K/V head its decisions [T], None for all, and its window."""
    n, d = len(x), settings.hidden_size // settings.num_attention_heads
    group = settings.num_attention_heads // settings.num_key_value_heads
    q, k, v = (
        (x @ part[f"self_attn.{c}_proj.weight"].T).reshape(n, -1, d) for c in ("q", "k", "v")
    )
    q, k = _rope(q), _rope(k)
    out = np.zeros_like(q)
    for i in range(n):
        for head in range(settings.num_attention_heads):
            keep, window = kept[head // group]
            seen = [
                j
                for j in range(i + 1)
                if j == i
                or (stored is None or stored[j])
                and (keep is None or keep[j] or i - j < window)
            ]
            scores = np.array([q[i, head] @ k[j, head // group] for j in seen]) / math.sqrt(d)
            p = np.exp(scores - scores.max())
            out[i, head] = sum(
                share * v[j, head // group] for share, j in zip(p / p.sum(), seen, strict=True)
            )
    return out.reshape(n, -1) @ part["self_attn.o_proj.weight"].T


def _rope(x, base: float = 10000.0):
    """Rotate the halves of x [T, n_head, d] by position, as transformers has them."""
    d = x.shape[-1]
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
