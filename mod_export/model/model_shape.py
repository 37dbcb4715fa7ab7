"""The dimensions of a model that its memory depends on.

shape = ModelShape.of(base)                 # the weights may be on the device `meta`
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mod_export.model import architectures


@dataclass(frozen=True)
class ModelShape:
    """The dimensions that memory depends on.

    in_layers: parameters of all decoder layers. in_linear: those of them in linear modules.
    outside: parameters of embeddings, output matrix and last norm. features: inputs and outputs of
    all linear modules of the layers together. inputs: their inputs alone. ff: width of the FFN that
    a token sees.
    """

    layers: int
    embd: int
    heads: int
    heads_kv: int
    head_size: int
    ff: int
    vocab: int
    in_layers: int
    in_linear: int
    outside: int
    features: int
    inputs: int

    @classmethod
    def of(cls, base: nn.Module) -> ModelShape:
        """Return the shape of a model of transformers."""
        config, parts = base.config, architectures.decoder_layers(base)
        linears = [m for part in parts for m in part.layer.modules() if isinstance(m, nn.Linear)]
        in_layers = sum(p.numel() for part in parts for p in part.layer.parameters())
        heads, embd = _largest(config, "num_attention_heads") or 1, architectures.n_embd(base)
        experts = _largest(config, "num_experts_per_tok") or 1
        ff = _largest(config, "moe_intermediate_size") or _largest(config, "intermediate_size")
        return cls(
            len(parts),
            embd,
            heads,
            _largest(config, "num_key_value_heads") or heads,
            _largest(config, "head_dim") or embd // heads,
            experts * (ff or 4 * embd),
            base.get_output_embeddings().weight.shape[0],
            in_layers,
            sum(p.numel() for linear in linears for p in linear.parameters()),
            sum(p.numel() for p in base.parameters()) - in_layers,
            sum(linear.in_features + linear.out_features for linear in linears),
            sum(linear.in_features for linear in linears),
        )

    @property
    def parameters(self) -> int:
        return self.in_layers + self.outside

    @property
    def in_layer(self) -> float:
        """Parameters of a layer."""
        return self.in_layers / self.layers


def _largest(config, name: str) -> int:
    """Return a number of the configuration, of several layers the largest one, or 0."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # each layer has its own, as in Gemma 4
        found = [getattr(layer, name, None) or 0 for layer in config.per_layer_config]
    return max(found) if isinstance(found, (list, tuple)) else found or 0
