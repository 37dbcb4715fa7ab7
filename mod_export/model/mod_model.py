"""The Mixture-of-Depths model in torch: the reference that the C++ runtime is checked against.

    model = MoDModel.from_base(base, tokenizer, config, routers)
    logits = model(input_ids)                            # [B, T] -> [B, T, n_vocab], dense form
    logits, trace = model(input_ids, trace=True)         # trace.logit, .active [B, T, n_units]
    ids = model.generate(input_ids, max_new_tokens=50)   # batch size 1, really skips
    model.save("dir"); model = MoDModel.load("dir")

routers is {Unit: (weight [n_embd], bias [1])}. Without routers, `from_base(base,
tokenizer)` needs no config, and decisions, bool [B, T], can be given:

    model(input_ids, decisions={(5, "kv"): keep, (7, "attn"): active}, kv_window=64)
    model(input_ids, decisions={(5, "kv", 0): keep, (5, "kv", 1): other})     # of K/V heads

Given decisions replace those of a router, sinks included, and may name any unit of any layer. Other
keywords go to the base model, e.g. `logits_to_keep`. Use torch.inference_mode() unless gradients
are wanted. Decisions are hard, so gradients flow through the active tokens only. A `strategy`
changes that, or looks at the units (routing.DecisionStrategy, training/relaxation.py).

`model.force = "active"` is the dense model. "inactive" skips every unit for every token, sinks
included. `model.shift` moves all thresholds, in logit space. A base model carries one MoDModel at a
time: to wrap it again, or `detach`, ends the former.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import schema
from mod_export.model import architectures, directory, generation
from mod_export.model.cache import MoDCache
from mod_export.model.layer_walk import LayerWalk
from mod_export.model.layers import unwrap_layers, wrap_layers
from mod_export.model.router import Router
from mod_export.model.routing import DecisionStrategy, RoutingState, TopK
from mod_export.model.walk_state import WalkState
from mod_export.units import KV, Unit


@dataclass
class RoutingTrace:
    """Router logits and decisions, both [B, T, n_units], units in the order of config.routed().

    hidden: residual stream before each layer and at the end, as transformers gives it, where it was
    asked for
    """

    logit: torch.Tensor
    active: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None


class MoDModel(nn.Module):
    """A causal language model of transformers whose decoder layers obey routers.

    The module's docstring shows its use.
    """

    def __init__(self, base: nn.Module, tokenizer, config: MoDConfig, routers: dict[Unit, tuple]):
        super().__init__()
        config.validate(len(architectures.decoder_layers(base)))
        check_routers(config, routers, architectures.n_embd(base))
        architectures.check_heads(base, config.heads(KV))
        architectures.check_units(base, config.routed())
        eps = architectures.norm_eps(base)
        self._kv_heads = architectures.kv_heads(base)
        if base.config._attn_implementation not in ("sdpa", "eager"):
            # Other implementations take no mask for a layer.
            base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
        self.base, self.tokenizer, self.config = base, tokenizer, config
        self.routers = nn.ModuleDict()
        for unit in config.routed():
            self.routers[_key(unit)] = Router(*routers[unit], config.threshold(unit), eps)
        self.routers.to(base.device)
        self.force: str | None = None
        self.shift = 0.0
        self.strategy = TopK(config.top_k) if config.top_k else DecisionStrategy()
        self.layers = wrap_layers(base)

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        tokenizer,
        config: MoDConfig | None = None,
        routers: dict | None = None,
    ):
        """Wrap a transformers model in place.

        Raises UserError if the model, the config and the routers do not fit.
        """
        return cls(base, tokenizer, config or MoDConfig(), routers or {}).eval()

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype = torch.float32):
        """Read what `save` wrote. Raises UserError naming what is missing or wrong."""
        return cls.from_base(*directory.load(path, dtype))

    def save(self, path: str | Path, force: bool = False, **kwargs) -> None:
        """Write a Hugging Face directory (directory.py).

        Raises UserError if it exists and `force` is not set.
        """
        directory.save(
            path, self.base, self.tokenizer, self.config, self.router_tensors(), force, **kwargs
        )

    def router_tensors(self) -> dict[Unit, tuple]:
        """{Unit: (weight [n_embd], bias [1])}."""
        routers = {unit: self.router(unit) for unit in self.config.routed()}
        return {unit: (r.weight.detach(), r.bias.detach()) for unit, r in routers.items()}

    def router(self, unit: Unit) -> Router:
        """The router of a routed unit."""
        return self.routers[_key(unit)]

    def replace_router(self, unit: Unit, router: Router) -> None:
        """Let another router decide for a routed unit."""
        self.routers[_key(unit)] = router

    @contextmanager
    def forced(self, force: str | None) -> Iterator[None]:
        """`force` for a while: `with model.forced("active")` the model is the dense one."""
        before, self.force = self.force, force
        try:
            yield
        finally:
            self.force = before

    @property
    def n_layer(self) -> int:
        return len(self.layers)

    def detach(self) -> None:
        """Give the base model its own forwards back."""
        unwrap_layers(self.base, self.layers)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        *,
        decisions=None,
        kv_window=None,
        trace=False,
        strategy: DecisionStrategy | None = None,
        **kwargs,
    ):
        """Compute the dense masked form: input_ids [B, T] -> logits [B, T, n_vocab].

        With `trace` the result is (logits, RoutingTrace).

        attention_mask: [B, T], 0 for padding on either side; positions count from the first token
        that is none. strategy: replaces that of the model. Raises ValueError where the base model
        is not prepared for the strategy.
        """
        strategy = strategy or self.strategy
        strategy.check(self.base)
        position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if attention_mask is not None:
            position = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = position
        given = {Unit(*unit): active for unit, active in (decisions or {}).items()}
        if given:
            architectures.check_units(self.base, [*self.config.routed(), *given])
        state = self._state(position, strategy, given=given)
        if kv_window is not None:
            state = replace(state, kv_window=kv_window, windows={})
        out = self._forward(
            state, input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs
        )
        return (
            (out.logits, replace(self._trace(state), hidden=out.hidden_states))
            if trace
            else out.logits
        )

    @torch.no_grad()
    def traces(
        self,
        sequences: Sequence[torch.Tensor],
        label: str | None = None,
        kept: WalkState | None = None,
        strategy: DecisionStrategy | None = None,
    ) -> list[RoutingTrace]:
        """Return the traces [1, T, n_units] of sequences [T] in the dense form.

        All sequences pass a layer before any goes on, so that the weights are read once
        (layer_walk.py). label: of the progress that is shown. kept: of a stopped walk. strategy:
        replaces that of the model, as in a forward.
        """
        strategy = strategy or self.strategy
        strategy.check(self.base)
        states: list[RoutingState] = []
        for ids in sequences:
            position = torch.arange(len(ids), device=self.base.device)[None]
            state = self._state(position, strategy)
            for other in states:
                if other.position.shape == position.shape:
                    state.masks = other.masks  # they take a number for each pair of tokens
            states.append(state)
        found = {} if kept is None else kept.found
        for unit, decided in found.items():
            for state, (logit, active) in zip(states, decided, strict=True):
                state.logit[Unit(*unit)] = logit.to(self.base.device)
                state.active[Unit(*unit)] = active.to(self.base.device)
        units = self.config.routed()
        stop = max((unit.layer for unit in units), default=-1) + 1
        if kept is not None and kept.layer == stop:
            return [self._trace(state) for state in states]
        walk = LayerWalk(self.base, sequences)
        for layer in walk.layers(stop, label, kept):
            for number, state in enumerate(states):
                with self._deciding(layer, state):
                    walk.pass_layer(number)
            for unit in (unit for unit in units if unit.layer == layer):
                found[tuple(unit)] = [(s.logit[unit], s.active[unit]) for s in states]
        return [self._trace(state) for state in states]

    @contextmanager
    def deciding(
        self, input_ids: torch.Tensor, layer: int, decisions: dict, strategy: DecisionStrategy
    ) -> Iterator[None]:
        """Let a layer that is called by itself obey given decisions on input_ids [B, T]."""
        position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        with self._deciding(layer, self._state(position, strategy, given=decisions)):
            yield

    @contextmanager
    def _deciding(self, layer: int, state: RoutingState) -> Iterator[None]:
        self.layers[layer].state = state
        try:
            yield
        finally:
            self.layers[layer].state = None

    def new_cache(self) -> MoDCache:
        """An empty cache for `step`."""
        by_head = {unit.layer for unit in self.config.routed() if unit.head is not None}
        heads = [self._kv_heads if i in by_head else 1 for i in range(self.n_layer)]
        return MoDCache(heads, [layer.index for layer in self.layers if layer.recurrent])

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor, cache: MoDCache, *, trace=False, **kwargs):
        """Compute the sparse form: the next tokens [1, T] -> their logits [1, T, n_vocab].

        The tokens continue the cache's sequence.
        """
        if input_ids.shape[0] != 1:
            raise UserError(
                f"a batch of {input_ids.shape[0]} sequences",
                "the form with a cache takes one sequence",
            )
        position = torch.arange(
            cache.n_tokens, cache.n_tokens + input_ids.shape[1], device=input_ids.device
        )
        state = self._state(position[None], self.strategy, cache=cache)
        cache.start(position)
        logits = self._forward(
            state,
            input_ids=input_ids,
            position_ids=position[None],
            past_key_values=cache,
            use_cache=True,
            **kwargs,
        ).logits
        cache.finish()
        return (logits, self._trace(state)) if trace else logits

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **kwargs) -> torch.Tensor:
        """Continue one sequence, input_ids [1, T] -> [1, T + n].

        The options are those of generation.generate.
        """
        return generation.generate(self, input_ids, max_new_tokens, **kwargs)

    def _state(self, position: torch.Tensor, strategy: DecisionStrategy, **kwargs) -> RoutingState:
        if self.force not in (None, "active", "inactive"):
            raise ValueError(f"force is {self.force!r}, not None, 'active' or 'inactive'")
        return RoutingState(
            position=position,
            strategy=strategy,
            routers={unit: self.router(unit) for unit in self.config.routed()},
            sink_tokens=self.config.sink_tokens,
            kv_window=self.config.kv_window,
            windows={unit: self.config.window(unit) for unit in self.config.routed()},
            kv_heads=self._kv_heads,
            group=architectures.query_group(self.base),
            scale_output=self.config.scale_output,
            shift=self.shift,
            force=self.force,
            additive_masks=self.base.config._attn_implementation == "eager",
            **kwargs,
        )

    def _forward(self, state: RoutingState, **kwargs):
        if torch.is_grad_enabled() and any(
            getattr(m, "gradient_checkpointing", False) for m in self.base.modules()
        ):
            # Its second forward would come after this one, and would be that of the dense model.
            raise UserError(
                "gradient checkpointing is on", "turn it off, and train with --recompute"
            )
        if (n_logits := kwargs.get("logits_to_keep")) and isinstance(n_logits, int):
            kwargs["logits_to_keep"] = architectures.last_logits(n_logits, kwargs["input_ids"])
        for layer in self.layers:
            layer.state = state
        try:
            return self.base(**kwargs)
        finally:
            for layer in self.layers:
                layer.state = None

    def _trace(self, state: RoutingState) -> RoutingTrace:
        units = self.config.routed()
        if not units:
            nothing = torch.zeros(*state.position.shape, 0, device=state.position.device)
            return RoutingTrace(logit=nothing, active=nothing.bool())
        return RoutingTrace(
            logit=torch.stack([state.logit[unit] for unit in units], dim=-1),
            active=torch.stack([state.active[unit] for unit in units], dim=-1),
        )


def check_routers(config: MoDConfig, routers: dict[Unit, tuple], n_embd: int) -> None:
    """Raise UserError unless each routed unit has one finite router and no other unit has one.

    The error names the tensor.
    """
    routed = set(config.routed())
    for odd in sorted(routed ^ set(routers)):
        unit = Unit(*odd)
        has, lacks = ("a threshold", "router") if unit in routed else ("a router", "threshold")
        raise UserError(
            f"mod_{unit.kind} of {unit.place} has {has} but no {lacks}", "convert the model again"
        )
    for unit, tensors in routers.items():
        names = schema.hf_tensor_names(*unit[:2])
        for name, tensor, size in zip(names, tensors, (n_embd, 1), strict=True):
            if tuple(tensor.shape) != (size,):
                raise UserError(f"{name} has shape {list(tensor.shape)}", f"it must be [{size}]")
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{name} is not finite", "convert the model again")


def _key(unit: Unit) -> str:
    """Name of a unit's router in the ModuleDict, where dots are not allowed."""
    return "_".join(map(str, unit))
