"""Random operations on a context's KV memory.

The operations make sense in the state that kv_reference.Reference tells. An operation is a tuple:
its name, then arguments of plain Python types, so that a log of operations can be replayed.
"""

import numpy as np

from tests.support.kv_reference import Reference

N_VOCAB = 96


def next_operation(rng: np.random.Generator, ref: Reference) -> tuple:
    name = pick(rng, {name: weight for name, (weight, _) in OPERATIONS.items()})
    return (name, *OPERATIONS[name][1](rng, ref))


def pick(rng, weights: dict):
    """Return a key, as often as its weight says."""
    w = np.array(list(weights.values()), float)
    return list(weights)[rng.choice(len(w), p=w / w.sum())]


def a_sequence(rng, ref) -> int:
    return int(rng.integers(len(ref.seqs)))


def a_sharing_sequence(rng, ref) -> int:
    """Return a sequence that shares tokens with another, or any sequence if none does.

    Less is to be expected of sequences that share tokens.
    """
    n = range(len(ref.seqs))
    found = [a for a in n if any(ref.shares(a, b) for b in n if b != a)]
    return int(rng.choice(found or n))


def a_range(rng, ref, seq: int) -> tuple[int, int]:
    """Return a and b, where 0 <= a <= b <= the end of the sequence."""
    a, b = sorted(rng.integers(0, ref.pos_max(seq) + 2, 2).tolist())
    return a, b


def decode(rng, ref) -> tuple:
    """Return a batch, its outputs, whether to compare logits, and where the decode stops.

    The batch is ((sequence, token), ...). The decode stops after a number of nodes, or not for
    None.
    """
    seqs = rng.choice(len(ref.seqs), rng.integers(1, len(ref.seqs) + 1), replace=False)
    size = 1 if rng.random() < 0.5 else int(rng.integers(2, 60))
    order = rng.permutation(
        np.repeat(seqs, [1 if size == 1 else rng.integers(1, size) for _ in seqs])
    )[:48]
    batch = tuple((int(s), int(rng.integers(N_VOCAB))) for s in order)
    stop = int(rng.exponential(300)) if rng.random() < 0.1 else None
    return batch, pick(rng, {"all": 1, "last": 1, "none": 1}), bool(rng.random() < 0.3), stop


def remove(rng, ref) -> tuple:
    """Return a part of a sequence to remove.

    The part is a tail, what follows a gap, all, a piece in the middle or shortly before the end,
    all tails, or nothing.
    """
    seq = a_sequence(rng, ref)
    end, (a, b) = ref.pos_max(seq) + 1, a_range(rng, ref, seq)
    back, near = (max(0, end - int(rng.choice([1, 2, 3, 8, 20, 50]))) for _ in range(2))
    held = ref.positions(seq)
    after_gap = max((p for p in held if p - 1 not in held), default=0)
    return pick(
        rng,
        {
            (seq, back, -1): 35,
            (seq, after_gap, -1): 20 * (after_gap > 0),
            (seq, a, -1): 10,
            (seq, a, b): 7,
            (seq, min(a, near), near): 20,
            (-1, back, -1): 4,
            (seq, end, -1): 3,
            (seq, 0, -1): 10,
        },
    )


def copy(rng, ref) -> tuple:
    src, dst = a_sequence(rng, ref), a_sequence(rng, ref)
    a, b = a_range(rng, ref, src)
    return src, dst, *pick(rng, {(-1, -1): 4, (0, b): 4, (a, b): 1, (a, -1): 1})


def shift(rng, ref) -> tuple:
    """Return a shift of a sequence.

    The whole text moves on, or its start moves below position 0, or its end moves on.
    """
    seq = a_sharing_sequence(rng, ref)
    a, by = a_range(rng, ref, seq)[0], int(rng.integers(1, 20))
    return seq, *pick(rng, {(0, -1, by): 2, (0, -1, -a): 1, (a, -1, by): 1})


def close_gap(rng, ref) -> tuple:
    """Return the operation with which a full context makes room."""
    seq = a_sharing_sequence(rng, ref)
    return seq, *a_range(rng, ref, seq)


def back(rng, ref) -> tuple:
    """Return a slot of a checkpoint and a sequence, or -1 for the one that it was made of."""
    return int(rng.integers(3)), pick(rng, {-1: 6, a_sequence(rng, ref): 1})


def way(rng, ref) -> tuple:
    """Return a slot of a checkpoint, a sequence and tokens to read before the way back."""
    tokens = rng.integers(N_VOCAB, size=rng.integers(1, 48)).tolist()
    return int(rng.integers(3)), a_sequence(rng, ref), tuple(tokens)


def draft(rng, ref) -> tuple:
    """Return a sequence, tokens to read, and how many of them are taken back."""
    tokens = rng.integers(N_VOCAB, size=rng.integers(1, 10)).tolist()
    return a_sequence(rng, ref), tuple(tokens), int(rng.integers(len(tokens) + 1))


def setting(rng, _ref) -> tuple:
    name = pick(rng, {"shift": 1, "kv_rollback": 1, "force": 1})
    values = {"shift": [-0.7, 0.0, 0.7], "kv_rollback": [0, 0, 2, 8, 24]}
    values["force"] = ["none", "none", "active", "inactive"]
    return name, values[name][rng.integers(len(values[name]))]


OPERATIONS = {
    "decode": (45, decode),
    "remove": (20, remove),
    "copy": (9, copy),
    "shift": (4, shift),
    "close_gap": (3, close_gap),
    "save": (
        4,
        lambda rng, ref: (int(rng.integers(3)), int(rng.integers(-1, len(ref.seqs)))),
    ),  # slot, sequence or all
    "load": (
        5,
        lambda rng, ref: (int(rng.integers(3)), a_sequence(rng, ref)),
    ),  # slot, to which sequence
    "mark": (5, lambda rng, ref: (int(rng.integers(3)), a_sequence(rng, ref))),  # slot, sequence
    "go_back": (6, back),
    "way": (5, way),
    "draft": (8, draft),
    "set": (7, setting),
    "gap": (1, lambda rng, ref: (a_sequence(rng, ref),)),
    "keep": (1, lambda rng, ref: (a_sequence(rng, ref),)),
    "clear": (1, lambda rng, ref: (bool(rng.integers(2)),)),
}
