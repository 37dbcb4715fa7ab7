"""RULER's prompts: a reader that works by rule answers them from the text alone."""

import re
from collections import Counter

import pytest

from mod_export.cli.eval import RULER_TASKS
from mod_export.errors import UserError
from mod_export.evaluation.ruler import made_up, sources
from mod_export.evaluation.ruler.made_up import Library, Question
from mod_export.evaluation.ruler.sources import Sources
from mod_export.evaluation.ruler.tasks import TASKS, Sample, make_samples, stand_ins
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer, with_bos

LENGTH = 2048
NEEDLES = {  # needles in the context, of which some are asked for
    "niah_single_1": (1, 1),
    "niah_single_2": (1, 1),
    "niah_single_3": (1, 1),
    "niah_multikey_1": (4, 1),
    "niah_multivalue": (4, 4),
    "niah_multiquery": (4, 4),
}


@pytest.fixture(scope="module")
def read():
    """Samples of a task with the packaged texts, and their parts as text."""
    tokenizer, given = tiny.tokenizer(), sources.read()

    def samples(task: str, **options) -> list[tuple[Sample, str, str]]:
        made = make_samples(tokenizer, given, [task], [LENGTH], **options)
        return [
            (sample, *(tokenizer.decode(ids) for ids in (sample.context, sample.question)))
            for sample in made
        ]

    return samples


def by_rule(context: str, question: str) -> list[str]:
    """The answers, read from the text as a reader without error would."""
    if "VAR" in context:
        value = re.search(r"value (\d+)", question)[1]
        values = {}
        for name, other in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", context):
            values[name] = values.get(other, other)
        return [name for name, found in values.items() if found == value and len(name) == 5]
    if "numbered list" in context:
        words = re.findall(r"\d+\. ([a-z]+)", context.rpartition("numbered list")[2])
        return [word for word, _ in Counter(words).most_common(10)]
    if "coded text" in context:
        words = context.partition("coded words. ")[2].split()
        return [word for word, _ in Counter(words).most_common(4) if word != "..."]
    asked = re.search(r"special magic \w+ for (.+?) mentioned", question)[1]
    found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", context)
    return [value for key, value in found if key in asked.replace("and ", "").split(", ")]


@pytest.mark.parametrize("task", [task for task in TASKS if not task.startswith("qa")])
def test_a_reader_by_rule_is_right(read, task):
    for sample, context, question in read(task, n=3):
        found = by_rule(context, question)
        assert sorted(found) == sorted(sample.answers)
        assert sample.score(f"They are: {', '.join(found).upper()}.") == 1
        assert sample.score("") == sample.score("I do not know.") == 0
        if len(found) > 1:
            assert sample.score(found[0]) == 1 / len(found)
        if task in NEEDLES:
            hidden, asked = NEEDLES[task]
            assert context.count("One of the special magic") == hidden and len(found) == asked


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions_have_their_documents(read, task):
    library = {"qa_1": made_up.single_hop, "qa_2": made_up.two_hops}[task]()
    for sample, context, question in read(task, n=3):
        (asked,) = [one for one in library.questions if f"Question: {one.text}" in question]
        assert all(library.documents[number] in context for number in asked.own)
        assert any(asked.answers[0] in library.documents[number] for number in asked.own)
        assert (sample.score(f" {asked.answers[0]}."), sample.score("")) == (1, 0)
        assert context.count("Document ") > 20 and asked.text not in context


@pytest.mark.parametrize("task", TASKS)
def test_samples_fill_their_length_and_are_the_same_each_time(read, task):
    first, second = (sample for sample, *_ in read(task, n=2))
    for sample in (first, second):
        assert 0.97 * LENGTH < sample.n_tokens <= LENGTH
    assert first.context != second.context
    assert [sample for sample, *_ in read(task, n=1)] == [first]
    ((other, *_),) = read(task, n=1, seed=1)
    assert other.context != first.context


def test_the_question_comes_after_the_context(read):
    ((sample, context, question),) = read("niah_single_2", n=1)
    key = re.search(r"number for (\S+) mentioned", question)[1]
    assert context.count(key) == 1, "the context has the needle alone"
    assert question.endswith(
        f"The special magic number for {key} mentioned in the provided text is"
    )
    assert "<|im_end|>\n<|im_start|>assistant\n" in question and "<|im_end|>" not in context[-50:]


def test_a_model_without_chat_format_gets_plain_text_and_one_beginning():
    tokenizer = with_bos(byte_tokenizer())
    (sample,) = make_samples(tokenizer, sources.read(), ["qa_1"], [2048], n=1)
    assert sample.context[0] == tokenizer.bos_token_id
    assert (sample.context + sample.question).count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(sample.question).endswith("? Answer:")


def test_a_question_whose_documents_do_not_fit_gives_way():
    documents = ["short " * 5, "long " * 5000]
    library = Library(documents, [Question(f"{n}?", ("x",), (n,)) for n in (0, 1)])
    given = Sources("essay", library, Library(documents, library.questions[1:]), {})
    for sample in make_samples(byte_tokenizer(), given, ["qa_1"], [1000], n=4):
        assert "0?" in byte_tokenizer().decode(sample.question)
    with pytest.raises(UserError, match=r"qa_2 does not fit into 1000 tokens; use 25\d\d\d or"):
        make_samples(byte_tokenizer(), given, ["qa_2"], [1000], n=1)


def test_short_essays_are_repeated():
    given = Sources("One word. Two words.", made_up.single_hop(), made_up.two_hops(), {})
    (sample,) = make_samples(byte_tokenizer(), given, ["niah_single_2"], [2048], n=1)
    text = byte_tokenizer().decode(sample.context)
    assert text.count("One word. Two words.") > 40 and sample.answers[0] in text


def test_stand_ins_are_named_for_the_tasks_that_use_them():
    given = sources.read()
    assert set(stand_ins(given, TASKS)) == {"words", "essays", "squad", "hotpotqa"}
    assert set(stand_ins(given, ["niah_multikey_3", "vt", "fwe"])) == set()
    assert set(stand_ins(given, ["niah_single_1", "qa_1"])) == {"words", "squad"}


def test_the_command_knows_all_tasks():
    assert tuple(TASKS) == RULER_TASKS and len(TASKS) == 13
