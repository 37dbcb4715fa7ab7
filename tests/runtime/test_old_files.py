"""GGUF files that version 0.1 wrote run as they did with version 0.1.

tests/fixtures/v0.1/README.md lists the files.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest

from mod_export.runtime import MoDLlama, bindings

pytestmark = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
FOLDER = Path(__file__).parent.parent / "fixtures" / "v0.1"
EXPECTED = np.load(FOLDER / "expected.npz")
F32 = gguf.GGMLQuantizationType.F32


# q8_0: CPUs round the activations differently
@pytest.mark.parametrize(("name", "tolerance"), [("mod-f32", 1e-4), ("mod-q8_0", 0.02)])
def test_gguf(name, tolerance):
    path = FOLDER / f"{name}.gguf"
    llm = MoDLlama(path, n_ctx=256, threads=1, logits_all=True, type_k=F32, type_v=F32)
    with llm.recording() as batches:
        llm.eval(EXPECTED["ids"].tolist())
    active, score = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert np.array_equal(active.astype(bool), EXPECTED[f"{name}.active"])
    assert np.allclose(score, EXPECTED[f"{name}.score"], atol=tolerance)
    logits = llm.scores[: llm.n_tokens][7::8]
    assert np.allclose(logits, EXPECTED[f"{name}.logits"], atol=tolerance)


def test_runtime_and_torch_agreed_and_agree():
    """The expected values of the f32 file are those of its directory."""
    assert np.array_equal(EXPECTED["mod.active"], EXPECTED["mod-f32.active"])
    assert np.allclose(EXPECTED["mod.logits"], EXPECTED["mod-f32.logits"], atol=1e-3)
