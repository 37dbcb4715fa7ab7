"""What a container may use of its machine, from the files that Linux shows a process."""

import os
import subprocess
import sys

import pytest

from mod_export.common import cgroup, system

MOUNT_V1 = "33 31 0:30 {root} {mount} rw,relatime shared:9 - cgroup cgroup rw,{controller}\n"
MOUNT_V2 = "41 31 0:38 {root} {mount} rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Make the files of one or several groups."""

    def make(cgroups: str, mounts: str, **files: str):
        (tmp_path / "cgroup").write_text(cgroups)
        (tmp_path / "mountinfo").write_text(mounts)
        monkeypatch.setattr(cgroup, "CGROUP_FILE", tmp_path / "cgroup")
        monkeypatch.setattr(cgroup, "MOUNTS_FILE", tmp_path / "mountinfo")
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


def test_version_2_the_least_of_all_groups_holds(tmp_path, group):
    mounts = MOUNT_V2.format(root="/", mount=tmp_path / "fs")
    group(
        "0::/pod/box\n",
        mounts,
        **{
            "fs/pod/cpu.max": "150000 100000\n",
            "fs/pod/box/cpu.max": "max 100000\n",
            "fs/pod/box/memory.max": "2000\n",
            "fs/pod/box/memory.current": "1500\n",
            "fs/pod/box/memory.stat": "anon 900\ninactive_file 400\n",
            "fs/pod/memory.max": "3000\n",
            "fs/pod/memory.current": "2950\n",
        },
    )
    assert cgroup.cpu_quota() == 1.5 and system.usable_cpus() == 1
    assert cgroup.memory_limit() == 2000 == system.total_memory()
    # 2000 - (1500 - 400) of the box, 3000 - 2950 of the pod
    assert cgroup.memory_left() == 50 == system.free_memory()
    assert system.available_memory() == 45


def test_version_1_in_a_container_whose_group_is_the_root_of_the_mount(tmp_path, group):
    mounts = MOUNT_V1.format(
        root="/docker/abc", mount=tmp_path / "cpu", controller="cpu"
    ) + MOUNT_V1.format(root="/docker/abc", mount=tmp_path / "memory", controller="memory")
    group(
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n2:cpuset:/\n",
        mounts,
        **{
            "cpu/cpu.cfs_quota_us": "50000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "4096\n",
            "memory/memory.usage_in_bytes": "96\n",
        },
    )
    assert cgroup.cpu_quota() == 0.5 and system.usable_cpus() == 1
    assert cgroup.memory_limit() == 4096 and cgroup.memory_left() == 4000


def test_no_limits(tmp_path, group):
    group(
        "3:cpu:/\n0::/\n",
        MOUNT_V1.format(root="/", mount=tmp_path / "cpu", controller="cpu"),
        **{"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
    )
    assert cgroup.cpu_quota() is None and cgroup.memory_limit() is None
    assert system.usable_cpus() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("text", ["", "garbage", "3:cpu", "a:b:c\n0::relative\n"])
def test_files_of_another_form_are_no_limit(text, group):
    group(text, text)
    assert cgroup.cpu_quota() is None and cgroup.memory_left() is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_commands_that_use_torch_bound_spinning_unless_the_user_chose(given, expected):
    code = (
        "import os; from mod_export.cli import cli\n"
        "cli.main(['verify', '--help'], standalone_mode=False)\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == expected, result.stderr
