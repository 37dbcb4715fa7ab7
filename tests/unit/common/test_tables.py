"""Tables as plain text and as Markdown."""

from mod_export.common.tables import format_table


def test_tables():
    rows = [["kv", 0.51234, 3], ["attn", None, 12]]
    plain = format_table(["kind", "share", "units"], rows).splitlines()
    assert plain == [
        "kind   share  units",
        "----  ------  -----",
        "kv    0.5123      3",
        "attn       -     12",
    ]
    assert (
        format_table(["kind", "share", "units"], rows, markdown=True).splitlines()[1]
        == "|------|-------:|------:|"
    )


def test_what_is_no_number_is_shown_as_nothing():
    assert format_table(["share"], [[float("nan")], [0.5]]).splitlines()[2:] == ["    -", "  0.5"]
