"""Measure the KL to the dense model, of routers and of plain baselines.

The activation is set on the very text that they are judged by.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch

from mod_export.calibration.thresholds import (
    MAX_LOGIT,
    quantile_threshold,
    routing_of,
    set_thresholds,
)
from mod_export.config import MoDConfig, UnitConfig
from mod_export.data import text as data_text
from mod_export.evaluation.perplexity import loss
from mod_export.evaluation.readers import Pair, TorchReader
from mod_export.metrics import divergence, visible_share
from mod_export.model import architectures, loading
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import rms_norm
from mod_export.units import KV, Unit, shares_by_kind

TOLERANCE = 0.015  # K/V count as equal within this distance of activation.
ROUNDS = 3


@dataclass
class Result:
    """Means over positions of several texts.

    kl_late: the mean over the second half of each sequence.
    """

    activation: float
    kv_share: float
    kl: float
    kl_late: float
    perplexity: dict[str, float]
    kl_by_text: dict[str, float]


class Judge:
    """Hold the dense model's logits of texts {name: [n, T]} and compare variants with them."""

    def __init__(self, base, tokenizer, texts: dict[str, torch.Tensor], sinks: int, kv_window: int):
        self.base, self.tokenizer, self.texts = base, tokenizer, texts
        self.sinks, self.kv_window = sinks, kv_window
        plain = MoDModel.from_base(base, tokenizer)
        self.n_layer = plain.n_layer
        self.windows = architectures.layer_windows(plain.base)
        # Each layer of the dense model gives a router these inputs: {layer: [[T, n_embd], ...]}.
        self.inputs = {}
        with torch.inference_mode(), self._noting_inputs():
            self.dense = {
                name: [plain(ids[None])[0].half() for ids in rows] for name, rows in texts.items()
            }

    @torch.inference_mode()
    def routers(self, routers: dict, target: float, per_layer: bool = False) -> Result:
        """Judge routers with thresholds that give `target` on these very texts.

        All that is compared then has equal K/V.

        The first thresholds are those for the dense model's hidden states; further ones follow from
        what the routers said in the round before.
        """
        model = MoDModel.from_base(self.base, self.tokenizer, self._config(routers), routers)
        logits = self._dense_logits(routers)
        for _ in range(ROUNDS):
            self._set_thresholds(model, logits, target, per_layer)
            result, logits = self._run(lambda ids: model(ids, trace=True), model.config)
            if abs(result.activation - target) < TOLERANCE:
                break
        return result

    @torch.inference_mode()
    def static(
        self, kind: str, dropped: list[int], layers: list[int], kv_window: int, sinks: int = 0
    ) -> Result:
        """Judge units that are active or not whatever the token is.

        The units of the layers `dropped` are active only at sinks.
        """
        model = MoDModel.from_base(self.base, self.tokenizer)
        width = architectures.n_embd(self.base)
        config = self._config(
            {Unit(layer, kind): (torch.zeros(width), torch.zeros(1)) for layer in layers}, kv_window
        )

        def run(ids):
            position = torch.arange(ids.shape[1])[None]
            given = {
                Unit(i, kind): (position < sinks) if i in dropped else position >= 0 for i in layers
            }
            logits = model(ids, decisions=given, kv_window=kv_window)
            active = torch.stack([given[unit] for unit in config.routed()], dim=-1)
            return logits, SimpleNamespace(active=active, logit=active.float())

        return self._run(run, config)[0]

    def _run(self, run, config: MoDConfig) -> tuple[Result, list]:
        """Judge run(ids [1, T]) -> logits and trace.

        The method also returns the routers' logits [T, n_units] of each sequence.
        """
        total, late = torch.zeros(2, 4, dtype=torch.float64)
        count = n_late = 0
        active, share, router_logits, perplexity, by_text = [], [], [], {}, {}
        for name, sequences in self.texts.items():
            sums, tokens = torch.zeros(4, dtype=torch.float64), 0
            for ids, dense in zip(sequences, self.dense[name], strict=True):
                logits, trace = run(ids[None])
                half = len(ids) // 2
                first = divergence(dense[: half + 1], logits[0, : half + 1], ids[: half + 1])
                second = divergence(dense[half:], logits[0, half:], ids[half:])
                sums, late = sums + first + second, late + second
                tokens, n_late = tokens + len(ids) - 1, n_late + len(ids) - half - 1
                active.append(trace.active.float().mean().item())
                share.append(visible_share(config, trace.active[0], self.windows))
                router_logits.append(trace.logit[0].clone())
            perplexity[name], by_text[name] = math.exp(sums[2] / tokens), (sums[0] / tokens).item()
            total, count = total + sums, count + tokens
        kl, kl_late, n = (total[0] / count).item(), (late[0] / n_late).item(), len(active)
        return Result(
            sum(active) / n, sum(share) / n, kl, kl_late, perplexity, by_text
        ), router_logits

    def _config(self, routers: dict, kv_window: int | None = None) -> MoDConfig:
        units = {}
        for kind in {unit.kind for unit in routers}:
            p = tuple(0.5 if (layer, kind) in routers else 0.0 for layer in range(self.n_layer))
            units[kind] = UnitConfig(threshold=p, activation=tuple(1.0 for _ in p))
        return MoDConfig(sink_tokens=self.sinks, kv_window=kv_window or self.kv_window, units=units)

    def _set_thresholds(
        self, model: MoDModel, logits: list, target: float, per_layer: bool
    ) -> None:
        """Set thresholds from the routers' logits.

        logits: a list of [T, n_units]. Sinks are active anyway.
        """
        for part in logits:
            part[: self.sinks] = float("inf")
        joined = torch.cat(logits)
        cuts = (
            joined.quantile(1 - target, dim=0)
            if per_layer
            else _quantile(joined, target).expand(joined.shape[1])
        )
        for unit, cut in zip(model.config.routed(), cuts.tolist(), strict=True):
            model.router(unit).threshold = 1 / (1 + math.exp(-max(-MAX_LOGIT, min(MAX_LOGIT, cut))))

    def _dense_logits(self, routers: dict) -> list:
        """Return the logits of routers at the layers' inputs while nothing is skipped."""
        columns = []
        for unit, (weight, bias) in sorted(routers.items()):
            columns.append([x.float() @ weight + bias for x in self.inputs[unit.layer]])
        return [torch.stack(parts, dim=-1) for parts in zip(*columns, strict=True)]

    @contextmanager
    def _noting_inputs(self):
        eps = architectures.norm_eps(self.base)

        def hook(layer):
            def note(_module, args, kwargs):
                h = args[0] if args else kwargs["hidden_states"]
                self.inputs.setdefault(layer, []).append(rms_norm(h[0], eps).half())

            return note

        parts = architectures.decoder_layers(self.base)
        hooks = [
            part.layer.register_forward_pre_hook(hook(i), with_kwargs=True)
            for i, part in enumerate(parts)
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def _quantile(values: torch.Tensor, target: float) -> torch.Tensor:
    ordered = values.flatten().sort().values
    return ordered[min(round((1 - target) * len(ordered)), len(ordered) - 1)]


def meet_target(made: MoDModel, sequences: torch.Tensor, target: float | dict) -> None:
    """Shift the thresholds of each kind for the target on these sequences.

    Ways are then compared at equal activation.
    """
    groups = made.config.by_kind()
    set_thresholds(made, sequences, groups, shares_by_kind(target, groups), rounds=2)


def meet_kv_share(made: MoDModel, sequences: torch.Tensor, kv_share: float) -> None:
    """Shift the thresholds of the kv units for a share of the dense K/V at the sequences' ends.

    Ways are then compared at equal bytes, whatever their windows are. All layers must attend to all
    tokens. sequences: [n, T]. Raises ValueError where windows alone take more.
    """
    units = made.config.by_kind()[KV]
    n, n_token = sequences.shape
    whole = 1 - len(units) / (made.n_layer * made.config.heads(KV))  # share that is never forgotten
    windows = torch.tensor([made.config.window(unit) for unit in units])
    recent = torch.arange(n_token)[:, None] >= n_token + 1 - windows
    for _ in range(ROUNDS):
        found, _ = routing_of(made, sequences)
        logits = torch.stack([found[unit].view(n, n_token) for unit in units], dim=-1)
        free = logits[:, ~recent].flatten()  # [n * cells that a decision frees]
        rest = (kv_share - whole) / (1 - whole) - recent.float().mean().item()
        if rest < 0:
            raise ValueError(f"windows alone take more than {kv_share} of the K/V")
        p = quantile_threshold(free, rest * recent.numel() * n / len(free))
        for unit in units:
            made.router(unit).threshold = p


@torch.inference_mode()
def judge_point(
    made: MoDModel,
    target: float | dict | None,
    model: str,
    texts: tuple,
    length: int,
    count: int,
    kv_share: float | None = None,
    **_,
) -> dict:
    """Return KL and perplexities against the original `model` on each text, activation and K/V.

    target: the activation on these texts for which all thresholds are moved alike. kv_share: the
    same for a share of the dense K/V. None leaves thresholds as they are.
    """
    original, found = loading.load(model)[0], {}
    for module in (original, made):
        module.to("cuda" if torch.cuda.is_available() else "cpu")
    files = dict(text.split("=", 1) for text in texts)
    firsts = [
        data_text.pack(made.tokenizer, data_text.read_texts([file]), length, 1)
        for file in files.values()
    ]
    if target is not None:
        meet_target(made, torch.cat(firsts), target)
    if kv_share is not None:
        meet_kv_share(made, torch.cat(firsts), kv_share)
    dense = TorchReader(MoDModel.from_base(original, made.tokenizer), model)
    pair = Pair(dense, TorchReader(made))
    for name, file in files.items():
        found[name] = asdict(
            loss(pair, data_text.pack(made.tokenizer, data_text.read_texts([file]), length, count))
        )
    return found
