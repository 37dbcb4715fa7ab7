"""No damaged directory gives a traceback: MoD models, adapters and their bases, with a fixed seed.

python -m tests.slow.test_mutated_directories 1000      # more of them
"""

import shutil
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from mod_export import adapter
from mod_export.export import read_directory
from mod_export.model import loading
from mod_export.model.mod_model import MoDModel
from tests.support import tiny_adapter
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.mutated_directory import mutate
from tests.support.mutation_run import FAULT, FINE, REFUSED, Outcome, outcome

COUNT, SEED = 150, 0
IDS = torch.arange(3, 27)[None]


@torch.inference_mode()
def use_mod(path: Path) -> str:
    """Export, evaluate and chat read a directory so."""
    read_directory(path)
    model = MoDModel.load(path)
    model.generate(IDS, max_new_tokens=2)
    model.tokenizer("Hello")
    return ""


@torch.inference_mode()
def use_base(path: Path) -> str:
    """Convert reads a directory so."""
    base, tokenizer = loading.load(path)
    base(IDS)
    tokenizer("Hello")
    return ""


@torch.inference_mode()
def use_adapter(path: Path) -> str:
    """Convert and export read an adapter so."""
    found = adapter.load(path)
    adapter.apply(found, tiny.base(), tiny_adapter.TOKENIZER)(IDS)
    return ""


def originals(folder: Path) -> dict:
    """Write the directories, and return name -> (path, use)."""
    tiny.save_small(folder / "mod", {"kv": [2, 3], "ffn": [4]})
    base = tiny.base()
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    tiny_adapter.saved(folder / "adapter")
    uses = {"mod": use_mod, "base": use_base, "adapter": use_adapter}
    return {name: (folder / name, use) for name, use in uses.items()}


def run(count: int, seed: int, folder: Path):
    """Yield (what was done, outcome) of each mutation."""
    made = originals(folder)
    for name, (path, use) in made.items():
        assert outcome(partial(use, path)) == Outcome(FINE), name
    for number in range(count):
        name = list(made)[number % len(made)]
        path, use = made[name]
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        done = mutate(copy, seed + number)
        yield f"{name} {seed + number}: {done}", outcome(partial(use, copy))


def test_mutations_are_accepted_or_refused(tmp_path):
    counts, faults = Counter(), []
    for done, found in run(COUNT, SEED, tmp_path):
        counts[found.result] += 1
        if found.result == FAULT:
            faults.append(f"{done}\n{found.words}")
    assert not faults, "\n".join(faults[:10])
    assert counts[FINE] > COUNT // 10 and counts[REFUSED] > COUNT // 4, counts


if __name__ == "__main__":
    totals: Counter = Counter()
    with tempfile.TemporaryDirectory() as name:
        for what, result in run(int(sys.argv[1]), SEED + 10000, Path(name)):
            totals[what.split()[0], result.result] += 1
            if result.result == FAULT:
                print(what, result.words, sep="\n", flush=True)
    print(dict(totals))
