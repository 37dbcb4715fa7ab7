"""Damaged files do not end the process: 2,000 mutations with a fixed seed.

python -m tests.support.mutation_run --count 10000 --seed 1      # more of them, with a table
"""

from collections import Counter

from tests.support import mutated_gguf
from tests.support.mutation_run import FAULT, FINE, REFUSED, cases, run, table

COUNT, SEED = 2000, 0


def test_mutations_are_accepted_or_refused(tmp_path):
    """Each opens, tokenizes, chats and generates, or is a UserError: no signal and no hang."""
    counts, faults = Counter(), []
    for case, outcome in run(cases(COUNT, SEED), tmp_path):
        counts[case.kind, outcome.result] += 1
        if outcome.result == FAULT:
            faults.append(f"{case}: {outcome.words}")
    assert not faults, "\n".join([*faults[:10], table(counts)])
    # The mutations reach the file: many are noticed, and many do no harm.
    for result in (FINE, REFUSED):
        assert sum(counts[kind, result] for kind in mutated_gguf.KINDS) > COUNT // 4, table(counts)
