"""Models of which one layer is in memory at a time give what whole models give, to the bit."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mod_export.adapter import base_identity
from mod_export.calibration.calibrate import calibrate
from mod_export.calibration.measuring import CalibrationPlan
from mod_export.errors import UserError
from mod_export.formats import hf_directory
from mod_export.formats.gguf import GGUFFile
from mod_export.model import architectures, devices, gguf_reading, layer_walk, loading, streaming
from mod_export.model.layer_walk import LayerWalk
from mod_export.model.mod_model import MoDModel
from mod_export.model.safetensors_weights import CannotStream
from tests.support import tiny_torch as tiny
from tests.support import tiny_types
from tests.support.byte_tokenizer import TEXT, byte_tokenizer
from tests.support.tiny_gguf import Tiny
from tests.unit.model.test_architectures import SUPPORTED, build

IDS = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(3))
# Llama's layers, tied embeddings, windows, K/V that later layers read, joined experts
NAMES = ("llama", "tied", "gemma3_text", "gemma4_text", "mixtral")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Name -> directory of a tiny model in several files."""
    found = {}
    for name in NAMES:
        found[name] = tmp_path_factory.mktemp("streaming") / name
        base = tiny.base(tied=True) if name == "tied" else tiny_types.base(name)
        base.save_pretrained(found[name], max_shard_size="100KB")
        byte_tokenizer().save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_streamed_model_is_the_whole_one(directories, name):
    """Its forward, its residual streams layer by layer, and what is in memory meanwhile."""
    whole, _ = loading.load(directories[name])
    base, _ = loading.open_streamed(directories[name])
    expected = whole(IDS, output_hidden_states=True)
    assert torch.equal(base(IDS).logits, expected.logits)
    layers = [part.layer for part in architectures.decoder_layers(base)]
    walk = LayerWalk(base, list(IDS))
    for layer in walk.layers():
        held = [not any(p.is_meta for p in module.parameters()) for module in layers]
        assert [number for number, here in enumerate(held) if here] == [layer]
        for number in range(2):
            seen = expected.hidden_states[layer][number]
            torch.testing.assert_close(walk.h(number)[0], seen, atol=1e-5, rtol=1e-5)
            walk.pass_layer(number)
    assert all(p.is_meta for module in layers for p in module.parameters())
    torch.testing.assert_close(walk.logits(1, slice(9, 12)), expected.logits[1, 9:12])
    assert base.get_input_embeddings().weight.isnan().all()  # a stand-in of no size
    rows = whole.get_input_embeddings().weight[[5, 3]]
    assert base_identity(base, None, "x") == base_identity(whole, None, "x")
    assert torch.equal(streaming.embedding_rows(base, [5, 3]), rows)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "dbrx", "gpt_oss", "deepseek_v3", "phi3"])
@torch.no_grad()
def test_weights_that_files_have_otherwise(tmp_path, name):
    """Transposed, joined from several tensors, or under other names."""
    base = build(name, SUPPORTED[name][0])
    base.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    streamed, _ = loading.open_streamed(tmp_path)
    ids = IDS % base.config.vocab_size
    torch.testing.assert_close(streamed(ids).logits, base(ids).logits, atol=1e-5, rtol=0)


def routers_of(base, tokenizer) -> tuple:
    layers = architectures.unit_layers(base, "kv", None)
    plan = CalibrationPlan({"kv": layers}, 0.4, 16, text=TEXT, tokens=2048, rounds=2)
    return calibrate(base, tokenizer, plan)


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_model_gets_the_same_routers(directories, name, tmp_path, monkeypatch):
    """Residual streams may lie in a file. What is saved is the same model again."""
    config, routers = routers_of(*loading.load(directories[name]))
    monkeypatch.setattr(layer_walk, "KEPT_BYTES", 1000)
    base, tokenizer = loading.open_streamed(directories[name])
    found = routers_of(base, tokenizer)
    assert found[0] == config and all(
        torch.equal(a, b)
        for unit in routers
        for a, b in zip(routers[unit], found[1][unit], strict=True)
    )
    MoDModel.from_base(base, tokenizer, *found).save(tmp_path / "mod")
    plain = hf_directory.tensor_index(hf_directory.tensor_files(directories[name]))
    written = hf_directory.tensor_index(hf_directory.tensor_files(tmp_path / "mod"))
    assert set(plain) < set(written) and all("mod_kv" in name for name in set(written) - set(plain))
    index = json.loads((tmp_path / "mod" / hf_directory.WEIGHTS_INDEX).read_text())
    theirs = json.loads((directories[name] / hf_directory.WEIGHTS_INDEX).read_text())
    assert index.keys() == theirs.keys() and len(set(index["weight_map"].values())) > 1
    assert index["weight_map"] == {key: path.name for key, path in written.items()}
    whole, _ = loading.load(directories[name])
    expected = MoDModel.from_base(whole, None, config, routers)
    with torch.inference_mode():
        assert torch.equal(MoDModel.load(tmp_path / "mod")(IDS), expected(IDS))


@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_a_gguf_file_is_streamed(tmp_path, mixed):
    """What is written has the file's own types where torch has them."""
    path = tmp_path / "tiny.gguf"
    Tiny(n_layer=3, n_embd=64).write(path)
    if mixed:
        path = in_types(path, tmp_path / "mixed.gguf", {"ffn_up": "Q8_0", "attn_q": "F16"})
    file = GGUFFile.open(path)
    whole = gguf_reading.read_model(file, torch.float32)
    base, source = gguf_reading.open_model(file, torch.float32)
    streaming.stream(base, source, torch.device("cpu"))
    ids = IDS % whole.config.vocab_size
    assert torch.equal(base(ids).logits, whole(ids).logits)
    MoDModel.from_base(base, None).save(tmp_path / "mod")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mod", dtype=torch.float32)
    assert torch.equal(again(ids).logits, whole(ids).logits)
    header = hf_directory.safetensors_header(tmp_path / "mod" / "model.safetensors")
    dtype = header["model.layers.1.self_attn.q_proj.weight"]["dtype"]
    assert dtype == ("F16" if mixed else "F32")


def in_types(path, target, types):
    """Write a file again, with tensors whose name has a word in `types` in another type."""
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        values = tensor.data
        for word, name in types.items():
            if word in tensor.name and values.ndim > 1:
                kind = gguf.GGMLQuantizationType[name]
                values = gguf.quantize(np.array(values), kind)
                writer.add_tensor(tensor.name, values, raw_dtype=kind)
                break
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    """A directory in bfloat16 is written in bfloat16, whatever the type it was computed in."""
    tiny.base().bfloat16().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for dtype in (torch.float32, torch.bfloat16):
        base, tokenizer = loading.open_streamed(tmp_path / "base", dtype)
        assert base.dtype == dtype
        config, routers = routers_of(base, tokenizer)
        assert config.calibration["activation"]["kv"] == pytest.approx(0.4, abs=0.02)
        model = MoDModel.from_base(base, tokenizer, config, routers)
        model.save(tmp_path / "mod", force=True)
        assert hf_directory.stored_type(tmp_path / "mod") == "bf16"
        assert json.loads((tmp_path / "mod" / "config.json").read_text())["dtype"] == "bfloat16"
        size = sum(path.stat().st_size for path in tmp_path.glob("base/*.safetensors"))
        written = sum(path.stat().st_size for path in tmp_path.glob("mod/*.safetensors"))
        assert size < written < size + 10_000


def test_damaged_files_are_one_line(directories, tmp_path):
    shutil.copytree(directories["llama"], tmp_path / "base")
    index = json.loads((tmp_path / "base" / hf_directory.WEIGHTS_INDEX).read_text())["weight_map"]
    name = "model.layers.3.mlp.up_proj.weight"
    file = tmp_path / "base" / index[name]
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{file.name} is damaged or truncated"):
        loading.open_streamed(tmp_path / "base")
    file.unlink()
    with pytest.raises(UserError, match=f"lacks 1 of its .* files of weights: {file.name}"):
        loading.open_streamed(tmp_path / "base")
    file.write_bytes(whole.replace(b"layers.3.mlp.up_proj", b"layers.3.mlp.no_proj"))
    with pytest.raises(UserError, match=f"lacks the weights {name}"):
        loading.open_streamed(tmp_path / "base")
    tensors = load_file(directories["llama"] / file.name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is of the type F8_E4M3, whose scale"):
        loading.open_streamed(tmp_path / "base")


def test_what_cannot_be_streamed_says_why(tmp_path):
    tiny.base().save_pretrained(tmp_path, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(tmp_path)
    for path in [*tmp_path.glob("*.safetensors"), tmp_path / hf_directory.WEIGHTS_INDEX]:
        path.unlink()
    torch.save(tiny.base().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CannotStream, match="no safetensors file"):
        loading.open_streamed(tmp_path)


def test_devices_and_types():
    cpu = devices.parse_device("cpu")
    assert devices.choose_dtype("auto", "f16", cpu) == torch.float32
    assert devices.choose_dtype("auto", "quantised", cpu) == torch.float32
    assert devices.choose_dtype("float16", "bf16", cpu) == torch.float16
    assert devices.choose_dtype("auto", "bf16", cpu) in (torch.float32, torch.bfloat16)
    for wrong in ("gpu", "cpu:0", "cuda:x", "mps:1", ""):
        with pytest.raises(UserError, match="unknown device"):
            devices.parse_device(wrong)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is no device cuda:3"):
            devices.parse_device("cuda:3")
