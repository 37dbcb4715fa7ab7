"""The points of the training study: what is routed, how much of it, and how it is trained.

ways: `calibrated` is the conversion without training; `window` keeps sinks and a window of the same
K/V; the others are training methods of mod_export.training.run, all with the same tokens.
"""

WAYS = {
    "calibrated": {"train": None},
    "routers": {"train": {"parameters": "routers"}},
    "lora": {"train": {"parameters": "lora"}},
    "full": {"train": {"parameters": "full"}},
    "topk": {"train": {"parameters": "lora", "method": "topk"}},
    "no-distillation": {"train": {"parameters": "routers", "kl_weight": 0.0, "lm_weight": 1.0}},
    "lora-no-distillation": {"train": {"parameters": "lora", "kl_weight": 0.0, "lm_weight": 1.0}},
    "static": {"train": {"parameters": "lora", "method": "static"}},
}
# Each share of the dense model's K/V has a window; training.py derives the activation from it.
KV_TARGETS = {0.5: 256, 0.25: 256, 0.125: 128}
COMPUTE_TARGETS = (0.9, 0.8, 0.6)
# beside the kv of a quarter: the activation of each kind
COMBINED = {
    "attn+kv": {"attn": 0.8, "kv": 0.1138},
    "ffn+kv": {"ffn": 0.9, "kv": 0.1138},
    "block+kv": {"block": 0.9, "kv": 0.1138},
}


def _points() -> dict[str, dict]:
    found = {}
    for share, window in KV_TARGETS.items():
        for way in (*WAYS, "window"):
            options = WAYS.get(way, {"train": None})
            found[f"kv-{share}-{way}"] = {
                "units": "kv",
                "kv_share": share,
                "window": window,
                "way": way,
                **options,
            }
    for kind in ("block", "attn", "ffn"):
        for target in COMPUTE_TARGETS:
            for way, options in WAYS.items():
                found[f"{kind}-{target}-{way}"] = {
                    "units": kind,
                    "target": target,
                    "way": way,
                    **options,
                }
    for units, targets in COMBINED.items():
        name = "+".join(f"{kind}-{target}" for kind, target in targets.items())
        options = {"units": units, "target": targets, "window": KV_TARGETS[0.25], "way": "lora"}
        found[f"{name}-lora"] = options | WAYS["lora"]
    return found


POINTS = _points()
