"""Damaged files do not end the process: 2,000 mutations with a fixed seed.

python -m tests.support.mutation_run --count 10000 --seed 1      # more of them, with a table
"""

import json
import subprocess
import sys
from collections import Counter

from tests.support import mutated_gguf
from tests.support.mutation_run import FAULT, FINE, REFUSED, table

COUNT, SEED = 2000, 0


def test_mutations_are_accepted_or_refused():
    """Each opens, tokenizes, chats and generates, or is a UserError: no signal and no hang.

    They run in a process of their own, which is small, so that its forks take little time.
    """
    command = [sys.executable, "-m", "tests.support.mutation_run", "--json"]
    command += ["--count", str(COUNT), "--seed", str(SEED)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    counts, faults = Counter(), []
    for kind, case, result, words in map(json.loads, done.stdout.splitlines()):
        counts[kind, result] += 1
        if result == FAULT:
            faults.append(f"{case}: {words}")
    assert not faults, "\n".join([*faults[:10], table(counts)])
    assert counts.total() == COUNT
    # The mutations reach the file: many are noticed, and many do no harm.
    for result in (FINE, REFUSED):
        assert sum(counts[kind, result] for kind in mutated_gguf.KINDS) > COUNT // 4, table(counts)
