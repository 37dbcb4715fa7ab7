"""Essays, SQuAD and HotpotQA in the forms in which they are published."""

import json

import pytest

from mod_export.errors import UserError
from mod_export.evaluation.ruler import sources

SQUAD = {
    "data": [
        {
            "title": "Lamps",
            "paragraphs": [
                {
                    "context": "A keeper lit it.",
                    "qas": [
                        {
                            "question": "Who?",
                            "is_impossible": False,
                            "answers": [
                                {"text": "A keeper"},
                                {"text": "keeper"},
                                {"text": "keeper"},
                            ],
                        },
                        {"question": "Why?", "is_impossible": True, "answers": []},
                    ],
                },
                {"context": "It burnt oil.", "qas": []},
            ],
        },
        {
            "title": "Ships",
            "paragraphs": [
                {
                    "context": "Ships sail.",
                    "qas": [{"question": "What?", "answers": [{"text": "Ships"}]}],
                }
            ],
        },
    ]
}
HOTPOTQA = [
    {
        "question": "Which oil?",
        "answer": "whale oil",
        "context": [["Lamp", ["It burns.", " Whale oil."]], ["Ship", ["It sails."]]],
    }
]


@pytest.fixture
def write(tmp_path):
    def write(name: str, raw) -> str:
        path = tmp_path / name
        path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
        return str(path)

    return write


def test_squad(write):
    """Versions 1.1 and 2.0: paragraphs of the same article come first beside the own one."""
    library = sources.read(squad=write("squad.json", SQUAD)).squad
    first, second = library.questions
    assert (first.text, first.answers) == ("Who?", ("A keeper", "keeper"))
    assert [library.documents[number] for number in first.own] == ["A keeper lit it."]
    assert [library.documents[number] for number in first.more] == ["It burnt oil."]
    assert second.text == "What?" and second.more == () and len(library.documents) == 3


def test_hotpotqa(write):
    library = sources.read(hotpotqa=write("hotpot.json", HOTPOTQA)).hotpotqa
    (question,) = library.questions
    assert question.answers == ("whale oil",)
    assert [library.documents[number] for number in question.own] == [
        "Lamp\nIt burns. Whale oil.",
        "Ship\nIt sails.",
    ]


def test_essays_as_text_and_as_json(write):
    for path in (write("essays.json", {"text": "An essay."}), write("essays.txt", "An essay.")):
        given = sources.read(essays=path)
        assert given.essay_words == ["An", "essay."]
        assert set(given.stand_ins) == {"words", "squad", "hotpotqa"}


@pytest.mark.parametrize(
    ("option", "name", "raw", "told"),
    [
        ("squad", "squad.json", HOTPOTQA, "is no file of SQuAD; give the JSON in which SQuAD"),
        ("squad", "squad.json", {"data": []}, "is no file of SQuAD"),
        ("squad", "squad.json", "{", "is no file of SQuAD"),
        ("hotpotqa", "hotpot.json", SQUAD, "is no file of HotpotQA"),
        ("hotpotqa", "hotpot.json", [{**HOTPOTQA[0], "answer": " "}], "is no file of HotpotQA"),
        ("essays", "essays.json", {"texts": ""}, "is no file of essays"),
        ("essays", "essays.json", {"text": 3}, "has no text"),
        ("essays", "essays.txt", "\n", "has no text; give essays as text, or as JSON"),
    ],
)
def test_files_of_another_form(write, option, name, raw, told):
    with pytest.raises(UserError, match=told):
        sources.read(**{option: write(name, raw)})
