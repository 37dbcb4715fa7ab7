"""Loading models and finding their layers, on several architectures."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Glm4Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeSharedConfig,
    MistralConfig,
    Olmo2Config,
    PhiConfig,
    Qwen3Config,
    StableLmConfig,
)

from mod_export.errors import UserError
from mod_export.formats import hub
from mod_export.model import loading
from mod_export.model.mod_model import MoDModel
from mod_export.model.routing import DecisionStrategy
from tests.support import tiny_torch as tiny

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
IDS = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(7))
ARCHITECTURES = {
    "mistral, sliding window": MistralConfig(**SMALL, sliding_window=16),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma2, norms on outputs": Gemma2Config(
        **SMALL, head_dim=16, sliding_window=16, query_pre_attn_scalar=16
    ),
    "olmo2, norms on outputs only": Olmo2Config(**SMALL),
    "cohere, parallel": CohereConfig(**SMALL),
    "phi, parallel": PhiConfig(**SMALL),
    "stablelm, parallel": StableLmConfig(**SMALL, use_parallel_residual=True),
    "glm4, norms on outputs": Glm4Config(**SMALL, head_dim=16),
    "granite, factor of outputs": GraniteConfig(**SMALL, residual_multiplier=0.3),
    "granite moe, two modules in the FFN": GraniteMoeSharedConfig(
        **SMALL, residual_multiplier=0.3, shared_intermediate_size=48, num_local_experts=4
    ),
    "gpt_neox": GPTNeoXConfig(**SMALL, use_parallel_residual=False),
}


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
@torch.inference_mode()
def test_architectures_need_no_code_of_their_own(config):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    expected = plain(IDS).logits
    units = {"kv": [1, 3], "block": [3], "attn": [1, 2], "ffn": [0, 1]}
    model = tiny.wrap(plain, tiny.config(units, n_layer=4), IDS)
    model.force = "active"
    assert torch.equal(model(IDS), expected)
    model.force = None
    dense, trace = model(IDS, trace=True)
    assert (dense - expected).abs().max() > 1e-2 * expected.abs().max()
    cache = model.new_cache()
    steps = [model.step(IDS[:, i : i + 9], cache, trace=True) for i in range(0, 40, 9)]
    assert torch.equal(torch.cat([t.active for _, t in steps], 1), trace.active)
    torch.testing.assert_close(torch.cat([x for x, _ in steps], 1), dense, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_units_read_and_feed_the_residual_stream(name):
    """What attention and FFN add makes the next layer's input; the FFN reads what attention left,
    or the same h.
    """
    torch.manual_seed(0)
    model = MoDModel.from_base(AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval(), None)
    on = torch.ones(1, 40, dtype=torch.bool)
    seen = {}
    units = [(1, "attn"), (1, "ffn"), (2, "block")]
    model(
        IDS,
        decisions=dict.fromkeys(units, on),
        strategy=DecisionStrategy(lambda unit, h, delta: seen.update({unit: (h, delta)})),
    )
    (h, attn), (h_ffn, ffn), (after, _) = (seen[unit] for unit in units)
    torch.testing.assert_close(h_ffn, h if "parallel" in name else h + attn, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, h + attn + ffn, atol=1e-5, rtol=1e-5)


def test_unsupported_architectures_are_refused_untouched():
    for model in (
        AutoModelForCausalLM.from_config(
            GPTJConfig(n_embd=32, n_layer=2, n_head=2, rotary_dim=8, vocab_size=50)
        ),
        AutoModelForCausalLM.from_config(
            BloomConfig(
                hidden_size=32,
                n_head=2,
                vocab_size=50,
                apply_residual_connection_post_layernorm=True,
            )
        ),
    ):
        with pytest.raises(UserError, match=f"unsupported architecture {model.config.model_type}"):
            MoDModel.from_base(model, None)
        assert all("forward" not in vars(module) for module in model.modules())


def test_bad_models_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "torn.gguf").write_bytes(hub.embedded_gguf().read_bytes()[:5000])
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    ).save_pretrained(tmp_path / "bert")
    small = tiny.base(n_layer=2)
    small.save_pretrained(tmp_path / "bare")
    small.save_pretrained(tmp_path / "part", max_shard_size="100KB")
    shards = sorted((tmp_path / "part").glob("model-*.safetensors"))
    shards[1].unlink()
    config = json.loads((tmp_path / "bare/config.json").read_text())
    (tmp_path / "zebra").mkdir()
    (tmp_path / "zebra/config.json").write_text(json.dumps(config | {"model_type": "zebra"}))
    cases = {
        "bare": "bare has no tokenizer; get its files",
        "part": f"part lacks 1 of its {len(shards)} files of weights: {shards[1].name}; get",
        "zebra": "zebra is of the model type 'zebra', which transformers .* does not know; update",
        "nowhere": "no such model",
        "empty": "config.json",
        "text.gguf": "not a GGUF",
        "torn.gguf": "torn.gguf",
    }
    for name, message in {**cases, "bert": "not a causal"}.items():
        with pytest.raises(UserError, match=message) as error:
            loading.load(tmp_path / name)
        assert "\n" not in str(error.value)
