"""Tiny random GGUF files with routers, and their forward pass in numpy.

The architecture is llama's, or with sliding layers that of `granite_swa`, which adds attention
windows and sinks to it.

The forward pass is a second, independent oracle. The file has no tokenizer, and tokens are numbers;
with `vocab` tokens are the printable characters of ASCII. Router biases are placed in gaps between
the scores of given token sequences, so that float noise cannot flip a decision (`place_biases`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from mod_export.units import ATTN, BLOCK, KV, Unit, deciding_order
from tests.support.lora_files import write_lora
from tests.support.windows import Window

EPS = 1e-5


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def widest_gap(scores, activation: float) -> float:
    """Return the middle of the widest gap between scores, where about `activation` lie above."""
    scores = np.sort(scores)
    lo = int(len(scores) * (1 - activation))
    near = slice(max(1, lo - len(scores) // 8), min(len(scores), lo + len(scores) // 8 + 1))
    gaps = np.diff(scores)[near.start - 1 : near.stop - 1]
    i = near.start - 1 + int(np.argmax(gaps))
    assert gaps.max() > 2e-4, "no gap between scores: use other tokens"
    return float(scores[i] + scores[i + 1]) / 2


class Out(NamedTuple):
    logits: np.ndarray  # [T, n_vocab]
    active: np.ndarray  # [T, n_units] bool
    score: np.ndarray  # [T, n_units] router logits
    embd: np.ndarray  # [T, n_embd]


@dataclass
class Tiny:
    """A random llama model; `routers` maps (layer, kind) or (layer, "kv", head) to [w, b, p].

    windows: (layer, "kv", head) -> its window, where it has one of its own. sliding: layers whose
    attention sees the last `n_swa` tokens.
    """

    n_layer: int = 5
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 192
    n_vocab: int = 96
    tied: bool = False
    sink_tokens: int = 2
    kv_window: int = 8
    windows: dict = field(default_factory=dict)
    scale_output: bool = False
    sliding: tuple = ()
    n_swa: int = 12
    seed: int = 0
    arch: str = "llama"
    n_ctx: int = 4096
    vocab: bool = False
    template: str = ""  # The template is that of chats, and needs a vocabulary.
    sampling: dict = field(default_factory=dict)  # name -> number that the file recommends
    routers: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        e, kv = self.n_embd, self.n_embd // self.n_head * self.n_head_kv

        def mat(rows: int, cols: int, gain: float = 1.0):
            return (rng.standard_normal((rows, cols)) * gain / np.sqrt(cols)).astype(np.float32)

        def norm():
            return (1 + 0.1 * rng.standard_normal(e)).astype(np.float32)

        if self.sliding:
            self.arch = "granite_swa"
        t = self.tensors
        t["token_embd.weight"] = mat(self.n_vocab, e, np.sqrt(e))
        if not self.tied:
            t["output.weight"] = mat(self.n_vocab, e, 2)
        t["output_norm.weight"] = norm()
        for layer in range(self.n_layer):
            b = f"blk.{layer}."
            t |= {
                b + "attn_norm.weight": norm(),
                b + "ffn_norm.weight": norm(),
                b + "attn_q.weight": mat(e, e, 1.5),
                b + "attn_k.weight": mat(kv, e, 1.5),
                b + "attn_v.weight": mat(kv, e, 2),
                b + "attn_output.weight": mat(e, e),
                b + "ffn_gate.weight": mat(self.n_ff, e),
                b + "ffn_up.weight": mat(self.n_ff, e),
                b + "ffn_down.weight": mat(e, self.n_ff, 2),
            }
            if self.sliding:
                sinks = rng.standard_normal(self.n_head).astype(np.float32)
                t[b + "attn_sinks.weight"] = sinks

    start = 0  # the position of the first token of a text
    noise, fa_noise = 3e-4, 0.1  # of logits in f32, and with flash attention on f16
    without_kv = ()  # layers that read the K/V of others
    recurrent = ()  # layers with a state for each sequence
    n_back = 0  # tokens that contexts of the tests can take back from them

    @property
    def window(self) -> Window:
        """Return what the sliding layers see."""
        return Window(self.n_swa)

    @property
    def units(self) -> list:
        """Return the units in the order of their decisions."""
        return sorted((Unit(*unit) for unit in self.routers), key=deciding_order)

    def route(self, layers, kinds: str, p: float = 0.4, seed: int = 1) -> Tiny:
        """Put a random router of each of the kinds (joined with +) into the layers.

        The kind `heads` stands for a kv router of each K/V head.
        """
        rng = np.random.default_rng(seed)
        for layer in layers:
            for kind in kinds.split("+"):
                heads = range(self.n_head_kv) if kind == "heads" else [None]
                for head in heads:
                    unit = Unit(layer, kind) if head is None else Unit(layer, KV, head)
                    w = (rng.standard_normal(self.n_embd) / 8).astype(np.float32)
                    self.routers[unit] = [w, 0.0, p]
        return self

    @property
    def heads(self) -> int:
        """Return how many K/V heads decide apart."""
        return self.n_head_kv if any(unit.head is not None for unit in self.units) else 1

    def window_of(self, unit) -> int:
        """Return the window of a kv unit."""
        return self.windows.get(unit, self.kv_window)

    def place_biases(self, sequences, activation: float = 0.5) -> Tiny:
        """Set each bias so that about `activation` of the tokens are active.

        The bias lies in the widest gap near that activation.
        """

        def place(unit, raw):
            w, _, p = self.routers[unit]
            at = widest_gap(np.concatenate(raw), activation)
            self.routers[unit][1] = float(np.float32(logit(p) - at))

        self._forward_all(sequences, place)
        return self

    def forward(self, tokens, force: str = "none", shift=0.0) -> Out:
        """Run one sequence through the model, in float64.

        shift: one number, or one number per token.
        """
        return self._forward_all([tokens], force=force, shift=shift)[0]

    def _forward_all(self, sequences, place=None, force: str = "none", shift=0.0):
        """Run all sequences layer by layer.

        A bias can so be placed from the scores of all sequences.
        """
        t = {k: v.astype(np.float64) for k, v in self.tensors.items()}
        hs = [t["token_embd.weight"][np.asarray(s)] for s in sequences]
        acts, scores = [[] for _ in hs], [[] for _ in hs]

        def decide(unit):
            w, _, p = self.routers[unit]
            raws = [rms(h) @ w.astype(np.float64) for h in hs]
            if place:
                place(unit, raws)
            for i, raw in enumerate(raws):
                score = raw + self.routers[unit][1]
                act = (score >= logit(p) + shift) | (np.arange(len(raw)) < self.sink_tokens)
                if force != "none":
                    act[:] = force == "active"
                gate = np.where(score >= logit(p) + shift, 1 / (1 + np.exp(-score)), 1.0)
                acts[i].append(act), scores[i].append(score)
                yield i, act, gate if self.scale_output else np.ones_like(score)

        for layer in range(self.n_layer):
            full = {i: (np.ones(len(h), bool), np.ones(len(h))) for i, h in enumerate(hs)}
            kept = [np.ones((len(h), self.n_head_kv), bool) for h in hs]
            for unit in self.units:
                if unit[:2] == (layer, KV):
                    heads = slice(None) if unit.head is None else [unit.head]
                    for i, act, _ in decide(unit):
                        kept[i][:, heads] = act[:, None]
            got = {
                k: {i: (a, g) for i, a, g in decide((layer, k))}
                if (layer, k) in self.routers
                else dict(full)
                for k in (BLOCK, ATTN)
            }
            block_in = [h.copy() for h in hs]
            for i, h in enumerate(hs):
                act = got["block"][i][0] & got["attn"][i][0]
                delta = self._attention(t, layer, h, act, kept[i])
                hs[i] = h + got["attn"][i][1][:, None] * delta * act[:, None]
            if (layer, "ffn") in self.routers:
                got["ffn"] = {i: (a, g) for i, a, g in decide((layer, "ffn"))}
            for i, h in enumerate(hs):
                act, gate = got.get("ffn", full)[i]
                out = h + (gate * act)[:, None] * self._ffn(t, layer, h)
                b_act, b_gate = got["block"][i]
                hs[i] = block_in[i] + (b_gate * b_act)[:, None] * (out - block_in[i])
        out = t.get("output.weight", t["token_embd.weight"])
        results = []
        for h, act, score in zip(hs, acts, scores, strict=True):
            none = [np.zeros((len(h), 0))]
            columns = [np.column_stack(none + x) for x in (act, score)]
            embd = rms(h) * t["output_norm.weight"]
            results.append(Out(embd @ out.T, columns[0].astype(bool), columns[1], embd))
        return results

    def _attention(self, t, layer, h, act, kept):
        """kept: [T, n_head_kv], what is seen beyond the window."""
        b, d = f"blk.{layer}.", self.n_embd // self.n_head
        x = rms(h) * t[b + "attn_norm.weight"]
        q, k, v = (x @ t[f"{b}attn_{n}.weight"].T for n in "qkv")
        n, group = len(h), self.n_head // self.n_head_kv
        q = rope(q.reshape(n, self.n_head, d))
        k = rope(k.reshape(n, self.n_head_kv, d)).repeat(group, axis=1)
        v = v.reshape(n, self.n_head_kv, d).repeat(group, axis=1)
        dist = np.arange(n)[:, None] - np.arange(n)[None]
        windows = [self.window_of(unit) for unit in self._rows(layer, KV)]
        near = dist[..., None] < np.array(windows)  # [query, key, n_head_kv or 1]
        visible = ((dist >= 0) & act[None])[..., None] & (kept[None] | near)
        if layer in self.sliding:
            visible &= (dist < self.n_swa)[..., None]
        # rows of inactive tokens: any value, the result is not used
        visible |= np.eye(n, dtype=bool)[..., None]
        visible = visible.transpose(2, 0, 1).repeat(group, axis=0)
        s = np.where(visible, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d), -np.inf)
        top = s.max(-1, keepdims=True)
        sinks = t.get(b + "attn_sinks.weight", np.full(self.n_head, -np.inf))[:, None, None]
        s, sinks = np.exp(s - top), np.exp(sinks - top)
        y = np.einsum("hqk,khd->qhd", s / (s.sum(-1, keepdims=True) + sinks), v)
        return y.reshape(n, -1) @ t[b + "attn_output.weight"].T

    def _ffn(self, t, layer, h):
        b = f"blk.{layer}."
        x = rms(h) * t[b + "ffn_norm.weight"]
        g = x @ t[b + "ffn_gate.weight"].T
        return (g / (1 + np.exp(-g)) * (x @ t[b + "ffn_up.weight"].T)) @ t[b + "ffn_down.weight"].T

    def without(self, units) -> Tiny:
        """Return the dense model that is left when these units never run.

        Sublayers are zeroed, and blocks are removed.
        """
        blocks = {layer for layer, kind in units if kind == "block"}
        rest = [layer for layer in range(self.n_layer) if layer not in blocks]
        new = Tiny(**{**self.__dict__, "n_layer": len(rest), "routers": {}, "tensors": {}})
        new.tensors = {k: v for k, v in self.tensors.items() if not k.startswith("blk.")}
        for i, layer in enumerate(rest):
            part = {k: v for k, v in self.tensors.items() if k.startswith(f"blk.{layer}.")}
            new.tensors |= {k.replace(f"blk.{layer}.", f"blk.{i}."): v for k, v in part.items()}
            for kind, name in (("attn", "attn_output"), ("ffn", "ffn_down")):
                if (layer, kind) in units:
                    new.tensors[f"blk.{i}.{name}.weight"] = np.zeros_like(
                        self.tensors[f"blk.{layer}.{name}.weight"]
                    )
        return new

    def dense(self) -> Tiny:
        return self.without(())

    def lora(self, path: Path, rank: int = 4, seed: int = 3) -> Tiny:
        """Write a LoRA adapter for this model, and return the model with LoRA merged."""
        names = [name for name in self.tensors if "attn_q" in name or "ffn_down" in name]
        shapes = {name: self.tensors[name].shape for name in names}
        new = Tiny(**{**self.__dict__, "tensors": dict(self.tensors)})
        for name, (a, b) in write_lora(path, self.arch, shapes, rank, seed).items():
            new.tensors[name] = self.tensors[name] + b @ a
        return new

    def write(self, path: Path, keys: dict | None = None, tensors: dict | None = None) -> Path:
        """Write the GGUF file.

        keys, tensors: replace single values, to make bad files. None leaves a value out.
        """
        w = gguf.GGUFWriter(str(path), self.arch)
        w.add_context_length(self.n_ctx)
        w.add_embedding_length(self.n_embd)
        w.add_block_count(self.n_layer)
        w.add_feed_forward_length(self.n_ff)
        w.add_head_count(self.n_head)
        w.add_head_count_kv(self.n_head_kv)
        w.add_layer_norm_rms_eps(EPS)
        w.add_rope_freq_base(10000.0)
        w.add_vocab_size(self.n_vocab)
        w.add_file_type(0)
        if self.sliding:
            w.add_sliding_window(self.n_swa)
            w.add_sliding_window_pattern([layer in self.sliding for layer in range(self.n_layer)])
            w.add_logit_scale(1.0)
        self._write_vocab(w)
        for name, value in self.sampling.items():
            w.add_float32(f"general.sampling.{name}", value)
        for key, (value, kind, sub) in (self.mod_keys() | (keys or {})).items():
            if value is not None:
                w.add_key_value(f"{self.arch}.mod.{key}", value, kind, sub)
        data = dict(self.tensors)
        for layer, kind in {unit[:2] for unit in self.routers}:
            none = [np.zeros(self.n_embd, np.float32), 0.0, 0.0]
            parts = [self.routers.get(unit, none) for unit in self._rows(layer, kind)]
            weight = np.stack([weight for weight, _, _ in parts])
            data[f"blk.{layer}.mod_{kind}.weight"] = weight if len(parts) > 1 else weight[0]
            data[f"blk.{layer}.mod_{kind}.bias"] = np.array([b for _, b, _ in parts], np.float32)
        for name, value in (data | (tensors or {})).items():
            if value is not None:
                w.add_tensor(name, np.ascontiguousarray(value))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return path

    def _write_vocab(self, w: gguf.GGUFWriter) -> None:
        """Write a token for each printable character of ASCII, and one that ends a turn."""
        if not self.vocab:
            w.add_tokenizer_model("no_vocab")
            return
        assert self.n_vocab == 96
        w.add_tokenizer_model("gpt2")
        w.add_token_list(["\u0120", *map(chr, range(33, 127)), "</s>"])
        w.add_token_types([gguf.TokenType.NORMAL] * 95 + [gguf.TokenType.CONTROL])
        w.add_token_merges(["~ ~"])  # one has to be there
        w.add_eos_token_id(95)
        if self.template:
            w.add_chat_template(self.template)

    def _rows(self, layer: int, kind: str) -> list:
        """Return the units of the rows of a layer's router tensor."""
        heads = self.heads if kind == KV else 1
        return [Unit(layer, kind, j) if heads > 1 else Unit(layer, kind) for j in range(heads)]

    def mod_keys(self) -> dict:
        """Return value, type and type of the elements of each key, named without its `{arch}.mod.`.

        A dense model has no such keys.
        """
        if not self.routers:
            return {}
        v = gguf.GGUFValueType
        out = {
            "version": (2 if self.heads > 1 or self.windows else 1, v.UINT32, None),
            "gating_func": ("sigmoid", v.STRING, None),
            "scale_output": (self.scale_output, v.BOOL, None),
            "sink_tokens": (self.sink_tokens, v.UINT32, None),
            "kv_window": (self.kv_window, v.UINT32, None),
        }
        for kind in {unit[1] for unit in self.routers}:
            units = [u for layer in range(self.n_layer) for u in self._rows(layer, kind)]
            p = [self.routers.get(unit, (0, 0, 0.0))[2] for unit in units]
            if kind == KV and self.windows:
                largest = max(self.window_of(u) for u in self.units if u.kind == KV)
                own = [self.window_of(u) if u in self.routers else largest for u in units]
                out["kv.window"] = (own, v.ARRAY, v.UINT32)
                out["kv_window"] = (max(own), v.UINT32, None)
            out[f"{kind}.threshold"] = (p, v.ARRAY, v.FLOAT32)
            out[f"{kind}.activation"] = ([0.5 if x else 1.0 for x in p], v.ARRAY, v.FLOAT32)
        return out


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def rope(x, base: float = 10000.0):
    """Rotate pairs of neighbours of x [T, n_head, d] by position, as GGUF's llama has them."""
    d = x.shape[-1]
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)
