"""How much memory this process may still take."""

import os
from pathlib import Path

_UNKNOWN = 2 << 30


def free_memory() -> int:
    """Bytes that are free on this machine, or within what its container may use.

    Where the system does not tell, 2 GiB.
    """
    found = [known for known in (_of_machine(), _of_container()) if known is not None]
    return max(min(found, default=_UNKNOWN), 0)


def _of_machine() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        # Windows has no such call, and other systems do not know all names.
        return None


def _of_container() -> int | None:
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if not limit or not used or not limit[0].isdigit() or not used[0].isdigit():
        return None
    return int(limit[0]) - int(used[0])


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
