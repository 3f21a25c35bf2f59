"""How many runs a machine gets by default, and the limits of its cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.config.capacity import (
    CgroupLimits,
    cgroup_limits,
    default_capacity,
    machine_capacity,
)
from runrecovery_service.config.settings import Settings


@given(cores=st.integers(1, 4096), memory_bytes=st.integers(0, 2**50))
def test_the_default_capacity_is_two_runs_per_core_and_one_per_gib_but_at_least_one(
    cores: int, memory_bytes: int
) -> None:
    capacity = default_capacity(cores, memory_bytes)

    assert 1 <= capacity <= 2 * cores
    assert capacity == 1 or capacity * 1024**3 <= memory_bytes
    assert capacity == 2 * cores or (capacity + 1) * 1024**3 > memory_bytes


def test_max_concurrent_overrides_the_capacity_of_the_machine() -> None:
    assert Settings(max_concurrent=7).capacity == 7
    assert machine_capacity() == Settings().capacity >= 1


def test_the_tightest_limit_of_a_cgroup_and_its_parents_counts(tmp_path: Path) -> None:
    leaf = tmp_path / "system.slice" / "app.service"
    leaf.mkdir(parents=True)
    (leaf / "memory.max").write_text("max\n")
    (leaf / "cpu.max").write_text("150000 100000\n")
    (leaf.parent / "memory.max").write_text("1048576\n")
    (leaf.parent / "cpu.max").write_text("max 100000\n")

    limits = cgroup_limits("0::/system.slice/app.service\n", tmp_path)

    assert CgroupLimits(cores=2, memory_bytes=1048576) == limits


@pytest.mark.parametrize("membership", ["", "0::/\n", "3:memory:/a\n", "0::/gone\n", "0::/../..\n"])
def test_a_cgroup_without_limits_limits_nothing(tmp_path: Path, membership: str) -> None:
    assert CgroupLimits(cores=None, memory_bytes=None) == cgroup_limits(membership, tmp_path)
