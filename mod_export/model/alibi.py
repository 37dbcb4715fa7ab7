"""BLOOM and MPT in forwards like those of newer models: the bias of their attention is in the keys.

The score of a query at position i and a key at j has the bias slope * (j - i), with a slope for
each head (ALiBi, Press et al., arXiv 2108.12409). The part with i changes no softmax. Here a query
has two components more, and a key has its position there, so that their product gives the rest.
Like a key with RoPE, such a key means the same in every cell, and the attention can be any that
takes queries, keys and values. transformers adds the bias in its own modules, by column.

    adapt(base)     # in place: the same weights and names, the same logits up to float noise
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# A position is DIGIT * a + b, so that 16 bits hold both numbers.
DIGIT = 256
COMPONENTS = 8  # that queries and keys get; fast kernels want a multiple of 8


def adapt(base: nn.Module) -> None:
    """Give the modules of a BLOOM or an MPT the forwards of this file."""
    if isinstance(base, _CausalModel):
        return
    for module in base.modules():
        if form := FORMS.get(type(module).__name__):
            module.__class__ = _in_form(form, type(module))
            module.config = base.config
    base.set_attn_implementation("sdpa")


def lacking(config) -> str | None:
    """Return what a configuration asks for that these forwards leave out; None for nothing."""
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        return "its residual stream is normed in every layer"
    if not getattr(getattr(config, "attn_config", None), "alibi", True):
        return "transformers computes MPT with ALiBi, and its configuration has none"
    return None


@lru_cache
def _in_form(form: type, original: type) -> type:
    # The configuration that is saved has the name of the class.
    return type(original.__name__, (form, original), {})


def slopes(n_head: int, largest: float) -> list[float]:
    """Return the slope of each head. largest: the exponent of the last head, as a power of 1/2.

    Where n_head is no power of 2, the other heads have slopes between those of a power.
    """
    power = 1 << int(math.log2(n_head))
    step = largest / power
    between = [(head + 0.5) * step for head in range(n_head - power)]
    return [2.0**-x for x in [(head + 1) * step for head in range(power)] + between]


class _CausalModel:
    _supports_sdpa = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def set_attn_implementation(self, attn_implementation, **kwargs):
        # MPT's configuration has a part that transformers would take for that of another model.
        super().set_attn_implementation({"": attn_implementation}, **kwargs)


class _Decoder:
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **_kwargs,
    ):
        h = self.embedded(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        layers, norm = self.layers_and_norm()
        more = {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=h,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            ),
            "position_ids": torch.arange(past, past + h.shape[1], device=h.device)[None],
            "past_key_values": past_key_values,
        }
        states = [h]
        for layer in layers:
            h = layer(h, **more)
            states.append(h)
        h = states[-1] = norm(h)
        hidden = tuple(states) if output_hidden_states else None
        return BaseModelOutputWithPast(h, past_key_values, hidden_states=hidden)


class _BloomDecoder(_Decoder):
    def embedded(self, input_ids):
        return self.word_embeddings_layernorm(self.word_embeddings(input_ids))

    def layers_and_norm(self):
        return self.h, self.ln_f


class _MptDecoder(_Decoder):
    def embedded(self, input_ids):
        return self.wte(input_ids)

    def layers_and_norm(self):
        return self.blocks, self.norm_f


class _BloomLayer:
    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        more = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
        h = hidden_states + self.self_attention(self.input_layernorm(hidden_states), **more)[0]
        return h + self.mlp(self.post_attention_layernorm(h), h.new_zeros(()))


class _MptLayer:
    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        more = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
        h = hidden_states + self.attn(self.norm_1(hidden_states), **more)[0]
        return h + self.ffn(self.norm_2(h), h.new_zeros(()))


class _Attention:
    """`projected` gives query, key and value [B, n_head, T, head_dim]."""

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, **_kwargs
    ):
        query, key, value = self.projected(hidden_states)
        scale, largest, output = self.constants()
        slope = query.new_tensor(slopes(query.shape[1], largest)) / scale
        query = _with(query, torch.stack([DIGIT * slope, slope], dim=-1)[:, None])
        digits = torch.stack([position_ids // DIGIT, position_ids % DIGIT], dim=-1)
        key = _with(key, digits[:, None])
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, sdpa_attention_forward
        )
        out, weights = attend(self, query, key, value, attention_mask, scaling=scale)
        return output(out.flatten(2)), weights


class _BloomAttention(_Attention):
    def projected(self, h):
        heads = self.query_key_value(h).unflatten(-1, (self.num_heads, 3, -1))
        return heads.transpose(1, 2).unbind(3)

    def constants(self):
        return self.inv_norm_factor, 8, self.dense


class _MptAttention(_Attention):
    def projected(self, h):
        qkv = self.Wqkv(h)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        return qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def constants(self):
        return self.softmax_scale, self.config.attn_config.alibi_bias_max, self.out_proj


def _with(x: torch.Tensor, components: torch.Tensor) -> torch.Tensor:
    """Return x [B, n_head, T, head_dim] with two components more, and zeros up to COMPONENTS."""
    padded = F.pad(components.to(x.dtype), (0, COMPONENTS - components.shape[-1]))
    return torch.cat([x, padded.expand(*x.shape[:-1], -1)], dim=-1)


FORMS = {
    **dict.fromkeys(("BloomForCausalLM", "MptForCausalLM"), _CausalModel),
    "BloomModel": _BloomDecoder,
    "BloomBlock": _BloomLayer,
    "BloomAttention": _BloomAttention,
    "MptModel": _MptDecoder,
    "MptBlock": _MptLayer,
    "MptAttention": _MptAttention,
}
