"""Routers on a tiny random model of each architecture of llama.cpp, and the table that says so.

tests/support/architectures/ makes the models and holds the checks, which run in processes of their
own; a test here looks at the results of one check.
"""

import pytest

from mod_export.formats import architectures
from mod_export.units import FFN, KV, UNIT_KINDS
from scripts.docs import architectures as page
from tests.support.architectures import checks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return checks.prepare(tmp_path_factory.mktemp("architectures"))


@pytest.fixture(scope="module")
def results(files):
    return checks.run(files, "everything")


def wrong(results, check: str) -> dict[str, str]:
    """What a check found wrong, by the name of the file; refusals too."""
    return {name: found[check] for name, found in results.items() if found.get(check)}


def test_dense_files_give_what_the_stock_library_gives(results):
    assert len(results) > 140
    assert wrong(results, "dense") == {}


def test_all_kinds_in_one_file(results):
    """All active, cut in any way, as one graph, and the cells."""
    assert wrong(results, "routers") == {}


def test_kv_units_alone(results):
    assert wrong(results, "kv alone") == {}


def test_without_blocks_the_file_is_the_one_without_these_layers(results):
    assert wrong(results, "without") == {}


def test_what_is_refused_is_refused_by_name(results, files):
    for model in files:
        for kind in UNIT_KINDS:
            found = results[model.name][kind]
            assert found == "" or (
                found.startswith(checks.REFUSED)
                and f"architecture '{model.architecture}'" in found
                and page.reason_of(found) not in ("", found)
            ), f"{model.name}: {kind}: {found}"


def test_most_architectures_take_routers(results, files):
    complete, some, main = set(), set(), set()
    for model in files:
        kinds = [kind for kind in UNIT_KINDS if results[model.name][kind] == ""]
        if kinds:
            some.add(model.architecture)
        if {KV, FFN} <= set(kinds):
            main.add(model.architecture)
        if len(kinds) == len(UNIT_KINDS):
            complete.add(model.architecture)
    assert len(some) >= 103
    assert len(main) >= 95
    assert len(complete) >= 90


def test_the_table_is_that_of_the_library(results, files):
    """`python -m scripts.docs.architectures` writes it anew."""
    assert architectures.TABLE.read_text(encoding="utf-8") == page.as_json(
        page.rows(files, results)
    )


def test_the_page_is_that_of_the_table():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(architectures.table())
