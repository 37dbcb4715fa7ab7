"""The text model of a checkpoint whose model also takes images or sound.

Such checkpoints have a class ...ForConditionalGeneration. Its decoder is that of a causal language
model, which is taken out: what remains takes text alone, and is saved as an ordinary directory.

    base = conditional_class("Gemma3ForConditionalGeneration", config).from_pretrained(directory)
    model = text_model(base)          # a Gemma3ForCausalLM with the same weights and logits
"""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from mod_export.errors import UserError
from mod_export.formats.hf_directory import read_json

# model_type of a text model -> that of the model for text alone which it is. The two differ in
# positions of images only: on text the three positions of a token are equal.
SAME_ON_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_omni_moe_text": "qwen3_moe",
}
# Fields of these that the model for text alone has to be told.
FIXED_FIELDS = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
# model_type of a whole model -> why its text model is no causal language model.
REFUSED = {"paligemma": "it reads its prompt in both directions"}
# Fields of the whole model's configuration that the text model keeps.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
CURE = "give a model of text alone"
CHAT_TEMPLATE = "chat_template.json"  # of a processor, where older checkpoints have the template


def is_conditional(architectures: list[str]) -> bool:
    """Return whether a configuration's class names are those of a model of more than text."""
    return any(name.endswith("ForConditionalGeneration") for name in architectures)


def conditional_class(name: str, config) -> type:
    """Return the class of transformers for a checkpoint, by the name in its configuration.

    Raises UserError where its text model cannot be taken out.
    """
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise UserError(f"transformers does not know {name}", f"update transformers, or {CURE}")
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder with a decoder, not a causal language model", CURE)
    text_class(config)
    return found


def text_class(config) -> type:
    """Return the class for the text model of a configuration.

    Raises UserError where transformers has none.
    """
    from transformers import AutoModelForCausalLM

    if reason := REFUSED.get(config.model_type):
        raise UserError(f"the text model of {config.model_type} is not causal: {reason}", CURE)
    text = config.get_text_config(decoder=True)
    model_type = SAME_ON_TEXT.get(text.model_type, text.model_type)
    for kind, found in AutoModelForCausalLM._model_mapping.items():
        if kind.model_type == model_type and text is not config and "CausalLM" in found.__name__:
            return found
    raise UserError(
        f"transformers has no class for text alone of {config.model_type} ({text.model_type})", CURE
    )


def text_model(base: nn.Module) -> nn.Module:
    """Return the causal language model of the decoder in `base`. The weights are shared.

    Raises UserError where there is none, or where its weights do not fit the class.
    """
    found = text_class(base.config)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    if decoder.get_output_embeddings() is not None:  # a causal language model inside the model
        decoder, head = decoder.get_decoder(), decoder.get_output_embeddings()
    config = text_config(base.config, found, _is_tied(decoder, head))
    prefix = found.base_model_prefix
    weights = {f"{prefix}.{name}": tensor for name, tensor in decoder.state_dict().items()}
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = head.weight
    dtype = head.weight.dtype
    model, info = found.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(info[kind]):
            raise UserError(
                f"the text model of {base.config.model_type} is no {found.__name__} ({wrong[0]})",
                CURE,
            )
    model.generation_config = base.generation_config
    model.config.name_or_path = base.config.name_or_path
    return model.eval()


def text_config(config, found: type, tied: bool):
    """Return the configuration of the text model of class `found`."""
    text = config.get_text_config(decoder=True)
    if isinstance(text, found.config_class):
        text = copy.deepcopy(text)
    else:
        fields = text.to_dict()
        for name in ("model_type", "architectures", "transformers_version"):
            fields.pop(name, None)
        rope = dict(fields.get("rope_parameters") or {})
        for name in [name for name in rope if name.startswith("mrope")]:
            del rope[name]
        if rope.get("rope_type") == "mrope":
            rope["rope_type"] = "default"
        fields |= {"rope_parameters": rope or None, **FIXED_FIELDS.get(text.model_type, {})}
        text = found.config_class(**fields)
    for name in SPECIAL_TOKENS:
        if (value := getattr(config, name, None)) is not None:
            setattr(text, name, value)
    text.architectures = [found.__name__]
    text.tie_word_embeddings = tied
    return text


def keep_chat_template(tokenizer, directory: Path) -> None:
    """Give a tokenizer without a chat template the one of the directory's processor, if any."""
    if not tokenizer.chat_template and (directory / CHAT_TEMPLATE).is_file():
        template = read_json(directory / CHAT_TEMPLATE, CURE).get("chat_template")
        if isinstance(template, str):
            tokenizer.chat_template = template


def _is_tied(decoder: nn.Module, head: nn.Module) -> bool:
    return head.weight is decoder.get_input_embeddings().weight
