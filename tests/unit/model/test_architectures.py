"""Every causal language model type that transformers has: it has units of all kinds, of some kinds,
or is refused with a reason.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mod_export.calibration.costs import CostMeter
from mod_export.calibration.measuring import DEFAULT_SCORES
from mod_export.errors import UserError
from mod_export.model import architectures
from mod_export.model.lora import inject_lora, merge_lora
from mod_export.model.model_shape import ModelShape
from mod_export.model.role_check import check_roles
from mod_export.training.relaxation import Relaxation, RelaxedDecisions, relaxed_attention
from tests.support import tiny_torch as tiny

N_LAYER, N_VOCAB = 4, 100
IDS = torch.randint(3, N_VOCAB, (1, 24), generator=torch.Generator().manual_seed(7))
BASIC = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 2,
    "vocab_size": N_VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
ONE_KV = {"num_key_value_heads": 1}
HEAD = ONE_KV | {"head_dim": 16}
SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
TWO = {"num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16} | TWO
LOCAL_EXPERTS = {"num_local_experts": 4} | TWO
DEEPSEEK = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    **TWO,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
LATENT = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SHARED_EXPERT = {"shared_expert_intermediate_size": 16}
SHARED_MLP = {"shared_intermediate_size": 16}
TIMES = {"residual_multiplier": 0.3}  # what granite's attention and FFN give is multiplied with it
GEMMA4 = HEAD | SLIDING | {"global_head_dim": 16, "rms_norm_eps": 1e-2}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": N_VOCAB}
MOON = {"moe_num_experts": 4, "moe_k": 2, "moe_topk": 2, "moe_num_shared_experts": 1}
FULL, LINEAR = "full_attention", "linear_attention"
FIRST_LINEAR = {"layer_types": [LINEAR, FULL, FULL, FULL]}
DELTA_NET = FIRST_LINEAR | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONV = {"layer_types": ["conv", FULL, FULL, FULL]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8}
GRANITE_H = ONE_KV | MAMBA | FIRST_LINEAR | TIMES | SHARED_MLP
DBRX = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": N_LAYER,
    "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
}

# Each has units of all kinds. Model type, with a word more where a type is named twice -> fields.
ALL_KINDS = {
    **dict.fromkeys(
        ("apertus", "arcee", "bitnet", "ernie4_5", "internlm3", "iquestcoder"),
        ONE_KV,
    ),
    **dict.fromkeys(
        ("jais2", "llama", "ministral3", "nanochat", "nemotron", "olmo", "olmo2", "persimmon"),
        ONE_KV,
    ),
    **dict.fromkeys(("phi3", "qwen2", "smollm3", "stablelm", "starcoder2"), ONE_KV),
    **dict.fromkeys(
        ("gemma", "glm", "glm4", "helium", "hunyuan_v1_dense", "qwen3", "seed_oss"), HEAD
    ),
    **dict.fromkeys(
        ("cwm", "exaone4", "gemma2", "gemma3_text", "ministral", "olmo3", "vaultgemma"),
        HEAD | SLIDING,
    ),
    "mistral": ONE_KV | {"sliding_window": 12},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    **dict.fromkeys(("bloom", "gpt2", "gpt_bigcode", "mpt"), {}),
    "gpt_neox sequential": {"use_parallel_residual": False},
    "granite": ONE_KV | TIMES,
    "granite_swa": ONE_KV | TIMES | SLIDING,
    "granitemoe": ONE_KV | TIMES | LOCAL_EXPERTS,
    "granitemoeshared": ONE_KV | TIMES | LOCAL_EXPERTS | SHARED_MLP,
    "granitemoe_swa": ONE_KV | TIMES | LOCAL_EXPERTS | SHARED_MLP | SLIDING,
    "hyperclovax": ONE_KV | TIMES,
    # mixtures of experts
    **dict.fromkeys(("flex_olmo", "olmoe"), ONE_KV | EXPERTS),
    **dict.fromkeys(("mixtral", "phimoe"), ONE_KV | LOCAL_EXPERTS),
    **dict.fromkeys(("hy_v3", "mellum", "qwen3_moe"), HEAD | EXPERTS),
    **dict.fromkeys(("dots1", "glm4_moe", "solar_open"), HEAD | DEEPSEEK),
    **dict.fromkeys(("minimax_m2", "minimax_m3_vl_text"), HEAD | LOCAL_EXPERTS),
    "afmoe": HEAD | SLIDING | EXPERTS | {"num_dense_layers": 1},
    "aria_text": ONE_KV | MOON,
    "dbrx": DBRX,
    "ernie4_5_moe": ONE_KV | MOON | {"moe_intermediate_size": 16},
    "exaone_moe": HEAD | SLIDING | EXPERTS | {"first_k_dense_replace": 1, "num_shared_experts": 1},
    "flint": HEAD | SLIDING | EXPERTS | SHARED_EXPERT,
    "gpt_oss": HEAD | SLIDING | LOCAL_EXPERTS,
    "hunyuan_v1_moe": HEAD | MOON | {"num_experts": 4},
    "kolibri1": HEAD | SLIDING | DEEPSEEK,
    "laguna": HEAD | EXPERTS | SHARED_EXPERT,
    "mimo_v2_flash": HEAD | SLIDING | DEEPSEEK | {"v_head_dim": 16, "swa_head_dim": 16},
    "qwen2_moe": ONE_KV | EXPERTS | SHARED_EXPERT,
    # latent attention
    **dict.fromkeys(("minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("axk1", "deepseek_v3", "glm4_moe_lite"), LATENT | DEEPSEEK),
    "deepseek_v2": LATENT | DEEPSEEK | {"topk_method": "greedy"},
    # hybrids: their first layer has a recurrent state
    "qwen3_5_text": HEAD | DELTA_NET,
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_next"), HEAD | DELTA_NET | EXPERTS | SHARED_EXPERT),
    "lfm2": ONE_KV | CONV,
    "lfm2_moe": ONE_KV | CONV | EXPERTS | {"num_dense_layers": 1},
    "granitemoehybrid": GRANITE_H | LOCAL_EXPERTS,
    "granitemoehybrid dense": GRANITE_H | {"num_local_experts": 0},
}
# Attention and FFN run side by side, so that there is no stream between them.
SIDE_BY_SIDE = {
    **dict.fromkeys(("cohere", "phi"), ONE_KV),
    "cohere2": HEAD | SLIDING,
    "cohere2_moe": HEAD | SLIDING | EXPERTS,
    "falcon": {},
    "falcon new": {"new_decoder_architecture": True, "num_kv_heads": 1},
    "gpt_neox": {"use_parallel_residual": True},
    "stablelm parallel": ONE_KV | {"use_parallel_residual": True},
}
SOME_KINDS = {
    **{name: (fields, {"kv", "block"}) for name, fields in SIDE_BY_SIDE.items()},
    # More follows in the layer after the FFN.
    "gemma4_text": (GEMMA4 | PER_LAYER | {"num_kv_shared_layers": 0}, {"kv", "block", "attn"}),
    "gemma4_unified_text": (GEMMA4, {"kv", "block", "attn"}),
    # The scale of a query depends on its place among the rows that are computed.
    "llama4_text": (HEAD | LOCAL_EXPERTS | {"intermediate_size_mlp": 48}, {"kv", "ffn"}),
    # Each layer has a recurrent state beside its attention.
    "falcon_h1": (ONE_KV | MAMBA, {"kv", "ffn"}),
}
REFUSED = {
    "of the type linear_attention": (
        "bailing_hybrid falcon_mamba kimi_linear mamba mamba2 olmo_hybrid recurrent_gemma zamba "
        "zamba2"
    ),
    "of the type hybrid": "zaya",
    "of the type conv": "lfm3",
    "has no mlp": "biogpt opt xglm",
    "of the type indexed_attention": "axk2 deepseek_v32 dots3_note_text glm_moe_dsa",
    "computes something else": "bamba",
    "only one token at a time": "jamba",
    "several streams": "deepseek_v4 hy_v4",
    "more than one residual stream": "gemma3n_text inkling2_text",
    "convolutions": "inkling_text",
    "does not use transformers' interface": "codegen gpt_neo gpt_neox_japanese gptj",
    "two attentions": "longcat_flash",
    "residual stream is normed": "minimax",
    "scale the residual stream": "beam doge",
    "has no self_attn": "cpmant jetmoe modernbert-decoder",
    "takes no hidden_states": "ctrl openai-gpt rwkv xlstm",
    "layers were not found": "blt fuyu hrm_text",
}
# These are encoders, or decoders of models that have both.
WITH_ENCODER = set(
    "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert "
    "data2vec-text electra ernie git marian mbart megatron-bert mvp pegasus plbart prophetnet "
    "reformer rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm "
    "xlm-roberta xlm-roberta-xl xlnet xmod".split()
)
# These are models of more than text, whose text model is taken out (test_text_model.py), other
# names of the types above, types whose configuration is not of a model by itself, or hybrids whose
# layers are others than here (test_hybrids.py).
OTHERS = set(
    "cohere_compass_text dots3_note emu3 gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified "
    "gemma4_unified_assistant got_ocr2 gpt-sw3 llama4 mllama moshi "
    "moss_transcribe_diarize musicgen musicgen_melody nemotron_h phi4_multimodal qwen3_5 "
    "qwen3_5_moe qwen4_exp qwen4_exp_text".split()
)
SUPPORTED = {name: (fields, {"kv", "block", "attn", "ffn"}) for name, fields in ALL_KINDS.items()}
SUPPORTED |= SOME_KINDS
# Layers to route; of a layer that cannot have a kind, the tests leave out the kind.
UNITS = {"kv": [1], "block": [3], "attn": [2], "ffn": [0, 2]}
LAYER_UNITS = [(layer, kind) for layer in (1, 3) for kind in UNITS]


def build(name, fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **BASIC | fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", SUPPORTED)
def test_units_of_the_kinds_that_a_model_type_has(name):
    fields, kinds = SUPPORTED[name]
    plain = build(name, fields)
    parts = architectures.decoder_layers(plain)
    with torch.inference_mode():
        expected = plain(IDS).logits
    assert {kind for kind in UNITS if not all(part.lacks(kind) for part in parts)} == kinds
    shape = ModelShape.of(plain)
    assert min(shape.heads, shape.heads_kv, shape.head_size, shape.ff, shape.in_layer) > 0
    assert of_norms(parts[1]) <= {architectures.norm_eps(plain)}
    check_roles(plain)
    new_lora_changes_nothing(plain, expected)
    costs_are_measured(plain, {unit for unit in LAYER_UNITS if not parts[unit[0]].lacks(unit[1])})
    model = tiny.wrap(plain, tiny.config({k: UNITS[k] for k in kinds}, n_layer=N_LAYER), IDS)
    with torch.inference_mode():
        forms_agree(model, expected)
    relaxed_gradients_reach_routers(model)
    heads_decide_apart(plain, kinds, expected)
    if "block" in kinds:
        with torch.inference_mode():
            inactive_block_is_no_layer(plain, parts[3])


def heads_decide_apart(plain, kinds, expected):
    """They are the K/V heads in the model's own cache, where the model has several."""
    heads = architectures.kv_heads(plain)
    if heads == 1 or "kv" not in kinds:
        return
    model = tiny.wrap(plain, tiny.config({"kv": UNITS["kv"]}, N_LAYER, heads=heads), IDS)
    with torch.inference_mode():
        forms_agree(model, expected)
        model.detach()
        cache = plain(IDS, use_cache=True).past_key_values
    assert {cache.layers[layer].keys.shape[1] for layer in UNITS["kv"]} == {heads}


def of_norms(part):
    """The epsilons of the norms right in a layer."""
    norms = [
        module for name, module in part.layer.named_children() if "norm" in name or "ln_" in name
    ]
    found = {getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in norms}
    return found - {None}


@torch.no_grad()
def new_lora_changes_nothing(plain, expected):
    assert inject_lora(plain, rank=2, alpha=4)
    assert torch.equal(plain(IDS).logits, expected)
    merge_lora(plain)
    assert torch.equal(plain(IDS).logits, expected)


def costs_are_measured(plain, units):
    wanted = {unit: [DEFAULT_SCORES[unit[1]]] for unit in units}
    measured = dict(CostMeter(plain, windows=(4,)).measure(IDS[0], wanted))
    assert set(measured) == units
    for _, costs in measured.values():
        (cost,) = costs.values()
        assert cost.isfinite().all() and cost.any()


def forms_agree(model, expected):
    model.force = "active"
    assert torch.equal(model(IDS), expected)
    model.force = None
    dense, trace = model(IDS, trace=True)
    assert (dense - expected).abs().max() > 1e-3  # the decisions matter to the result
    logits, active, _ = tiny.in_pieces(model, IDS, 11)
    assert torch.equal(active, trace.active)
    torch.testing.assert_close(logits, dense, atol=5e-5, rtol=0)


def relaxed_gradients_reach_routers(model):
    with relaxed_attention(model.base):
        logits = model(IDS, strategy=RelaxedDecisions(Relaxation(noise=False)))
        F.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
    for unit in model.config.routed():
        gradient = model.router(unit).weight.grad
        assert gradient.isfinite().all() and gradient.any(), unit


def inactive_block_is_no_layer(plain, part):
    model = tiny.wrap(plain, tiny.config({"block": [3]}, n_layer=N_LAYER))
    model.force = "inactive"
    dense, sparse = model(IDS), model.step(IDS, model.new_cache())
    model.detach()
    pair = part.returns_tuple
    part.layer.forward = lambda h, *_, **__: (h, None) if pair else h
    expected = plain(IDS).logits
    assert torch.equal(dense, expected)
    torch.testing.assert_close(sparse, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "name, reason", [(name, reason) for reason, names in REFUSED.items() for name in names.split()]
)
def test_other_model_types_are_refused_with_the_reason(name, reason):
    with pytest.raises(UserError, match=f"unsupported architecture {name}: .*{reason}"):
        architectures.decoder_layers(on_meta(name))


def test_falcon_with_alibi_is_refused():
    with pytest.raises(UserError, match="unsupported architecture falcon: .*ALiBi"):
        architectures.decoder_layers(build("falcon", {"alibi": True}))


def on_meta(name):
    """Return a model without weights, small where its configuration has the usual fields."""
    for fields in (BASIC | ONE_KV, BASIC, {"vocab_size": N_VOCAB, "pad_token_id": 0}, {}):
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields))
        except Exception as error:
            last = error
    raise last


def test_every_model_type_is_named():
    named = {name.split()[0] for name in SUPPORTED}
    refused = {name for names in REFUSED.values() for name in names.split()}
    others = WITH_ENCODER | OTHERS
    assert not named & refused and not (named | refused) & others
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= named | refused | others
