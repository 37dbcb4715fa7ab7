"""Large pages for torch's tensors: the effect itself, in page faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TENSORS = """
import resource
from mod_export.common.system import use_large_pages
{call}
import torch
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(32 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


def faults(call: str) -> int:
    code = TENSORS.format(call=call)
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_large_tensors_make_few_page_faults():
    if not SETTING.is_file() or "[never]" in SETTING.read_text():
        pytest.skip("the system has no large pages")
    assert faults("use_large_pages()") < faults("") / 4
