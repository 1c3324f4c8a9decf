"""Seconds, CPU seconds and memory of a command and all its processes, such as `cozyrag passages`.

    python benchmarks/preparing.py cozyrag passages IN... --output FILE

Memory is sampled five times a second over the whole tree of processes: RSS counts pages that they share once for each of
them, PSS once in all. Linux only.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in tree(int(child)))]


def memory(pid: int) -> dict[str, int]:
    """Kilobytes of a process, by kind."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("Rss", "Pss:"))}


def main() -> None:
    """Run the command and print one JSON object."""
    started, peak = time.perf_counter(), {"Rss": 0, "Pss": 0}
    process = subprocess.Popen(sys.argv[1:])
    while process.poll() is None:
        found = [memory(pid) for pid in tree(process.pid)]
        for kind in peak:
            peak[kind] = max(peak[kind], sum(each.get(kind, 0) for each in found))
        time.sleep(0.2)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = {f"peak_{kind.lower()}_mb": round(kilobytes / 1024) for kind, kilobytes in peak.items()}
    facts |= {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
    }
    print(json.dumps(facts | {"cores": os.cpu_count(), "exit_code": process.returncode}))


if __name__ == "__main__":
    main()
