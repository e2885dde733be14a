"""What glibc's allocator is told, so that the large buffers of training are neither returned to Linux nor lost in gaps."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

TUNABLES = "GLIBC_TUNABLES"
# Read once, before a program begins. torch asks for aligned memory, of which glibc puts the cuttings aside in each thread's
# cache: there they keep the hole of a freed buffer from ever becoming whole again, and no buffer of its size fits into it.
SETTINGS = "glibc.malloc.tcache_count=0"


def restart_with_settings() -> None:
    """Starts the running script anew, once, in the same process, with the settings that must be there before it begins.

    What the user sets wins, and a debugger or another program that runs the script within itself is left alone. The programs
    that the script starts do not inherit the settings.
    """
    if os.environ.get(TUNABLES) == SETTINGS:
        del os.environ[TUNABLES]  # glibc has read it
        return
    is_program = sys.orig_argv[-len(sys.argv) :] == sys.argv  # Python was started for it
    if TUNABLES in os.environ or sys.gettrace() is not None or not is_program or not sys.executable:
        return
    if not runs_on_glibc():
        return
    command = [sys.executable, *sys.orig_argv[1:]]
    with suppress(OSError):  # the settings save memory; without them the script does the same
        os.execve(sys.executable, command, {**os.environ, TUNABLES: SETTINGS})  # noqa: S606


def keep_freed_pages() -> None:
    """Tells glibc to keep big buffers instead of returning them: page faults were a quarter of the training time.

    All threads share one heap: with one for each worker, what one had freed was lost to the others, a fifth of a gigabyte.
    """
    if not runs_on_glibc():
        return
    m_trim_threshold, m_mmap_threshold, m_arena_max, never = -1, -3, -8, 2**30
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(m_mmap_threshold, never)
    libc.mallopt(m_trim_threshold, never)
    libc.mallopt(m_arena_max, 1)


def runs_on_glibc() -> bool:
    """False elsewhere, and on Linux with another C library."""
    try:
        return sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):  # musl knows no such name
        return False
