"""The processor of this machine."""

import platform
from functools import cache
from pathlib import Path


@cache
def processor_name() -> str:
    """What Linux calls the processor; elsewhere, what Python knows."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
