"""The table of architectures: every row says what works, or why not."""

import pytest

from mod_export.errors import UserError
from mod_export.formats import architectures
from mod_export.units import UNIT_KINDS


def test_each_row_has_all_kinds_or_a_reason():
    rows = architectures.table()
    assert rows["llama"].kinds == tuple(UNIT_KINDS)
    for name, row in rows.items():
        assert set(row.kinds) <= set(UNIT_KINDS), name
        assert bool(row.reason) == (len(row.kinds) < len(UNIT_KINDS)), name


def test_check():
    architectures.check("llama", UNIT_KINDS)
    with pytest.raises(UserError, match="'llada' cannot have routers: .*; choose a model"):
        architectures.check("llada", {"kv"})
    with pytest.raises(UserError, match="'nonesuch' cannot have routers: .* does not know it"):
        architectures.check("nonesuch", {"kv"})
