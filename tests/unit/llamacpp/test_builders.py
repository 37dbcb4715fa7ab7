"""The graph builders of the pinned source keep the rules by which the library cuts graphs."""

import json

import pytest

from scripts.patches import builders

# A builder as upstream writes them, shortened.
GOOD = """
llama_model_any::graph::graph(const llama_model & model) {
    ggml_tensor * inpL = build_inp_embd(model.tok_embd);
    for (int il = 0; il < n_layer; ++il) {
        ggml_tensor * inpSA = inpL;
        cur = build_norm(inpL, model.layers[il].attn_norm, NULL, LLM_NORM_RMS, il);
        cur = build_attn(inp_attn, cur, il);
        ggml_tensor * ffn_inp = ggml_add(ctx0, cur, inpSA);
        cb(ffn_inp, "ffn_inp", il);
        cur = ggml_add(ctx0, build_ffn(ffn_inp, il), ffn_inp);
        cur = build_cvec(cur, il);
        cb(cur, "l_out", il);

        // the next layer reads it
        inpL = cur;
    }
}
"""


def test_the_builders_are_those_of_the_list(tmp_path):
    """A bump of the pinned source that changes a builder shows here; look at it before --write."""
    found = builders.table(builders.patched(tmp_path))
    known = json.loads(builders.TABLE.read_text(encoding="utf-8"))
    assert not set(known["keep"]) - set(found["keep"])
    assert found == known, "run `python -m scripts.patches.builders --write`"


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("", "", None),
        ("il < n_layer;", "il < n_layer - 1;", "no loop"),
        ("        cur = build_cvec(cur, il);\n", "", "0 calls of build_cvec"),
        ("inpL = cur;", "inpL = ggml_scale(ctx0, cur, 2);", "changes behind build_cvec"),
        ('"ffn_inp", il);', '"middle", il);', "has no name"),
        ("cb(ffn_inp,", "cb(cur,", "not named once"),
        ("inpSA = inpL;", "inpSA = ggml_add(ctx0, inpL, first);", "used in it: first"),
    ],
)
def test_a_broken_rule_is_named(old, new, rule):
    code = GOOD.replace(old, new)
    if "first" in new:
        code = code.replace("    for (", "    ggml_tensor * first = inpL;\n    for (")
    found = builders.check("any", code)
    assert found == [] if rule is None else rule in found[0]
