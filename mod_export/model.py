"""The Mixture-of-Depths model in torch: the reference that the C++ runtime is checked against.

    model = MoDModel.from_base(base, tokenizer, config, routers)   # routers: {(layer, kind): (w [n_embd], b [1])}
    logits = model(input_ids)                                      # [B, T] -> [B, T, n_vocab], dense masked form
    logits, trace = model(input_ids, trace=True)                   # trace.logit, trace.active [B, T, n_units]
    ids = model.generate(input_ids, max_new_tokens=50)             # batch size 1, really skips
    model.save("dir"); model = MoDModel.load("dir")

For studies without routers, `from_base(base, tokenizer)` needs no config, and decisions can be given:

    model(input_ids, decisions={(5, "kv"): keep, (7, "attn"): active}, kv_window=64)   # bool [B, T] each

They replace a router's decision, sinks included, and may name any unit of any layer. `observe(unit, h, delta)` is
called for each block, attn and ffn unit that decides, with its input h and what it would add, [B, T, n_embd].
Other keywords go to the base model, e.g. `logits_to_keep`. Call it under torch.inference_mode() unless gradients
are wanted: those flow through the active tokens (the decision itself is hard).

`model.force = "active"` is the dense model, "inactive" skips every unit for every token, sinks included; `shift`
moves all thresholds, in logit space. A base model carries one MoDModel at a time: wrapping it again, or `detach`,
ends the former.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mod_export import hf
from mod_export.cache import MoDCache
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.layers import LayerRouting, Run, Unit
from mod_export.router import Router


@dataclass
class Trace:
    """Router logits (NaN where no router was asked) and decisions, [B, T, n_units] in the order of config.routed()."""

    logit: torch.Tensor
    active: torch.Tensor


class MoDModel(nn.Module):
    """A causal language model of transformers whose decoder layers obey routers. See the module's docstring."""

    def __init__(self, base: nn.Module, tokenizer, config: MoDConfig, routers: dict[Unit, tuple]):
        super().__init__()
        parts = hf.decoder_layers(base)
        config.validate(len(parts))
        check_routers(config, routers, hf.n_embd(base))
        if base.config._attn_implementation not in ("sdpa", "eager"):
            base.set_attn_implementation("sdpa")  # the only ones that take a mask for each layer
        if (former := base.__dict__.pop("_mod_model", None)) is not None:
            former.detach()
        self.base, self.tokenizer, self.config = base, tokenizer, config
        self.force: str | None = None
        self.shift = 0.0
        eps = hf.norm_eps(base)
        self.routers = nn.ModuleDict(
            {f"{layer}_{kind}": Router(*routers[layer, kind], config.threshold(layer, kind), eps)
             for layer, kind in config.routed()}
        )  # fmt: skip
        self.layers = [LayerRouting(index, part) for index, part in enumerate(parts)]
        base.__dict__["_mod_model"] = self  # not a submodule: that would be a cycle

    @classmethod
    def from_base(cls, base: nn.Module, tokenizer, config: MoDConfig | None = None, routers: dict | None = None):
        """Wrap a transformers model in place. Raises UserError if it is not supported or config and routers disagree."""
        return cls(base, tokenizer, config or MoDConfig(), routers or {}).eval()

    @property
    def n_layer(self) -> int:
        return len(self.layers)

    def detach(self) -> None:
        """Give the base model its own forwards back."""
        for layer in self.layers:
            layer.detach()
        self.base.__dict__.pop("_mod_model", None)

    def forward(self, input_ids, attention_mask=None, decisions=None, kv_window=None, trace=False, observe=None, **kwargs):
        """Dense masked form: input_ids [B, T], attention_mask [B, T] (0 = padding, either side) -> logits [B, T, n_vocab]."""
        position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if attention_mask is not None:
            position = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = position
        run = self._run(position, given=decisions or {}, observe=observe)
        run.kv_window = kv_window or run.kv_window
        logits = self._forward(run, input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        return (logits, self._trace(run)) if trace else logits

    def step(self, input_ids: torch.Tensor, cache: MoDCache, trace: bool = False, **kwargs):
        """Sparse form: the next tokens [1, T] of the cache's sequence -> logits [1, T, n_vocab]. Call without gradients."""
        if input_ids.shape[0] != 1:
            raise UserError(f"a batch of {input_ids.shape[0]} sequences", "the form with a cache takes one sequence")
        position = torch.arange(cache.n_tokens, cache.n_tokens + input_ids.shape[1], device=input_ids.device)
        run = self._run(position[None], cache=cache)
        cache.start(position)
        kwargs = {"position_ids": position[None], "past_key_values": cache, "use_cache": True, **kwargs}
        logits = self._forward(run, input_ids=input_ids, **kwargs)
        cache.finish(run.kv_window)
        return (logits, self._trace(run)) if trace else logits

    def new_cache(self) -> MoDCache:
        return MoDCache(self.n_layer)

    def _run(self, position: torch.Tensor, **kwargs) -> Run:
        if self.force not in (None, "active", "inactive"):
            raise ValueError(f"force is {self.force!r}, not None, 'active' or 'inactive'")
        return Run(
            position=position,
            routers={unit: self.routers[f"{unit[0]}_{unit[1]}"] for unit in self.config.routed()},
            sink_tokens=self.config.sink_tokens,
            kv_window=self.config.kv_window,
            scale_output=self.config.scale_output,
            shift=self.shift,
            force=self.force,
            additive_masks=self.base.config._attn_implementation == "eager",
            **kwargs,
        )

    def _forward(self, run: Run, **kwargs) -> torch.Tensor:
        for layer in self.layers:
            layer.run = run
        try:
            return self.base(**kwargs).logits
        finally:
            for layer in self.layers:
                layer.run = None

    def _trace(self, run: Run) -> Trace:
        units = self.config.routed()
        nothing = run.position.new_zeros((*run.position.shape, 0))
        if not units:
            return Trace(logit=nothing.float(), active=nothing.bool())
        return Trace(
            logit=torch.stack([run.logit[unit] for unit in units], dim=-1),
            active=torch.stack([run.active[unit] for unit in units], dim=-1),
        )


def check_routers(config: MoDConfig, routers: dict[Unit, tuple], n_embd: int) -> None:
    """Raise UserError, naming the tensor, unless there is one finite router for each routed unit and no other."""
    routed = set(config.routed())
    for layer, kind in sorted(routed ^ set(routers)):
        has, lacks = ("a threshold", "router") if (layer, kind) in routed else ("a router", "threshold")
        raise UserError(f"mod_{kind} of layer {layer} has {has} but no {lacks}", "convert the model again")
    for (layer, kind), tensors in routers.items():
        for name, tensor, size in zip(("weight", "bias"), tensors, (n_embd, 1), strict=True):
            where = f"model.layers.{layer}.mod_{kind}.{name}"
            if tuple(tensor.shape) != (size,):
                raise UserError(f"{where} has shape {list(tensor.shape)}", f"it must be [{size}]")
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{where} is not finite", "convert the model again")
