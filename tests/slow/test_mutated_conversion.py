"""No damaged GGUF file gives a traceback where `convert` reads it, with a fixed seed."""

from collections import Counter
from functools import partial

import torch

from mod_export.convert import refuse_mod
from mod_export.model import loading
from tests.support import mutated_gguf, tiny_vocab
from tests.support.mutation_run import FAULT, FINE, REFUSED, outcome

COUNT, SEED = 84, 9000


@torch.inference_mode()
def use(path) -> str:
    """Convert reads a file so."""
    refuse_mod(str(path))
    base, tokenizer = loading.load(path)
    base(torch.arange(3, 27)[None])
    tokenizer("Hello the low 12 \n")
    return ""


def test_mutations_are_accepted_or_refused(tmp_path):
    originals = {}
    for name, make in tiny_vocab.MODELS.items():
        model = make()
        model.routers = {}
        path = model.write(tmp_path / f"{name}.gguf")
        originals[name] = path.read_bytes()
        use(path)  # in this process, which has imported everything when it forks
    counts, faults = Counter(), []
    kinds, names = list(mutated_gguf.KINDS), list(originals)
    path = tmp_path / "mutated.gguf"
    for number in range(COUNT):
        name, kind = names[number // len(kinds) % len(names)], kinds[number % len(kinds)]
        path.write_bytes(mutated_gguf.mutate(originals[name], kind, SEED + number))
        found = outcome(partial(use, path))
        counts[found.result] += 1
        if found.result == FAULT:
            faults.append(f"{name} {kind} {SEED + number}\n{found.words}")
    assert not faults, "\n".join(faults[:10])
    assert counts[FINE] > COUNT // 10 and counts[REFUSED] > COUNT // 4, counts
