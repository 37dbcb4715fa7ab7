"""Training data without a cache of its own."""

import pytest

from mod_export.data.packing import open_data


@pytest.fixture
def opened(tmp_path):
    """opened(tokenizer, paths, length, ...) -> PackedData with a cache of the test's own."""

    def open_(tokenizer, *args, **kwargs):
        return open_data(tokenizer, *args, **{"cache": tmp_path / "cache"} | kwargs)

    return open_
