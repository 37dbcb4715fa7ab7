"""Tasks of lm-evaluation-harness from the packaged texts, for a machine that reaches no hub.

    python -m scripts.studies.lm_eval_tasks tasks/ --count 60
    mod-export lm-eval model.gguf -- --tasks mod_next,mod_bits,mod_copy --include_path tasks/

Each task asks in another way: mod_next for log likelihoods of choices (which sentence comes next,
after a page of text), mod_bits for that of a whole text, mod_copy for greedy answers (the second
half of a line that stood before).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from mod_export.common.files import atomic_file
from mod_export.data.text import default_texts

N_CHOICES = 4
PAGE_WORDS = 400  # more tokens than windows and sinks hold, so that K/V are dropped
COPY_LINES = 12
LINE_WORDS = 16

TASKS = {
    "mod_next": """output_type: multiple_choice
doc_to_text: "{{page}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "mod_bits": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    "mod_copy": """output_type: generate_until
doc_to_text: "{{lines}}"
doc_to_target: "{{rest}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 40, do_sample: false}
filter_list:
  - name: strip
    filter:
      - {function: remove_whitespace}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
metadata: {{version: 1}}
"""


def sentences(text: str) -> list[str]:
    """The sentences of a text, with single spaces; headings and lists are left out."""
    plain = " ".join(text.split())
    return [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", plain) if len(s.split()) > 4]


def items(count: int, seed: int) -> list[dict]:
    """So many pages, spread evenly over the texts, each with what the tasks ask of it."""
    rng = random.Random(seed)
    everything = sentences("\n".join(default_texts()))
    begins = [i for i in range(len(everything)) if len(_page(everything, i)[0]) >= PAGE_WORDS]
    return [_item(everything, begins[i * len(begins) // count], rng) for i in range(count)]


def _page(everything: list[str], begin: int) -> tuple[list[str], int]:
    """The words of the sentences from `begin` on, and the number of the sentence after them."""
    words: list[str] = []
    end = begin
    while len(words) < PAGE_WORDS and end < len(everything) - 1:
        words += everything[end].split()
        end += 1
    return words, end


def _item(everything: list[str], begin: int, rng: random.Random) -> dict:
    words, end = _page(everything, begin)
    others = [s for i, s in enumerate(everything) if not begin <= i <= end]
    choices = [everything[end], *rng.sample(others, N_CHOICES - 1)]
    rng.shuffle(choices)
    beginnings = [" ".join(s.split()[:LINE_WORDS]) for s in everything[begin:end]]
    lines = rng.sample(beginnings, min(COPY_LINES, len(beginnings)))
    asked = rng.choice(lines).split()
    half = len(asked) // 2
    return {
        "page": " ".join(words),
        "choices": choices,
        "answer": choices.index(everything[end]),
        "lines": "\n".join([*lines, " ".join(asked[:half])]),
        "rest": " ".join(asked[half:]),
    }


def write(folder: Path, count: int, seed: int = 0) -> None:
    """Write the items and a YAML file for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.resolve() / "items.jsonl"
    with atomic_file(file, force=True) as tmp:
        tmp.write_text("".join(json.dumps(item) + "\n" for item in items(count, seed)))
    for name, body in TASKS.items():
        with atomic_file(folder / f"{name}.yaml", force=True) as tmp:
            tmp.write_text(HEAD.format(name=name, file=json.dumps(str(file))) + body)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=60, help="items of each task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, args.count, args.seed)


if __name__ == "__main__":
    main()
