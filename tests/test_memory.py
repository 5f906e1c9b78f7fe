"""Whose process it is decides whether the allocator may be told anything."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_COUNTED = """
import ctypes, sys
from pcn_deploy import memory

calls = []
real = memory._glibc()
class Glibc:
    def mallopt(self, *given):
        calls.append(given)
        return real.mallopt(*given)
    malloc_trim = real.malloc_trim
memory._glibc = Glibc
if sys.argv[1] == "command":
    import pcn_deploy.cli.main
with memory.large_blocks_returned():
    pass
print(len(calls))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.parametrize(("owner", "calls"), [("command", "3"), ("library", "0")])
def test_only_the_command_sets_its_allocator(owner: str, calls: str) -> None:
    found = subprocess.run([sys.executable, "-c", _COUNTED, owner], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == calls
