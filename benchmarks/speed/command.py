"""How much time and memory does a command need, with all its processes? For example `cozyrag passages`.

    python -m benchmarks.speed.command cozyrag passages IN... --output FILE

Prints seconds, CPU seconds, and peak memory of the process tree, sampled five times a second. RSS counts shared pages
once for each process, PSS counts them once. Linux only. Left out: GPU memory.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def tree(pid: int) -> list[int]:
    """The ids of a process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in tree(int(child)))]


def memory(pid: int) -> dict[str, int]:
    """Kilobytes of a process, as RSS and PSS; {} if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n")
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("Rss", "Pss:"))}


def main() -> None:
    """Run the command and print one JSON object."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    started, peak = time.perf_counter(), {"Rss": 0, "Pss": 0}
    process = subprocess.Popen(sys.argv[1:])
    while process.poll() is None:
        found = [memory(pid) for pid in tree(process.pid)]
        for kind in peak:
            peak[kind] = max(peak[kind], sum(each.get(kind, 0) for each in found))
        time.sleep(0.2)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts: dict[str, float | int | None] = {
        f"peak_{kind.lower()}_mb": round(kilobytes / 1024) for kind, kilobytes in peak.items()
    }
    facts |= {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "cores": os.cpu_count(),
        "exit_code": process.returncode,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
