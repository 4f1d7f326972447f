"""Benchmarks: ``python -m benchmarks [NAME ...]``, by default all quick ones. Each prints ratios to a limit."""

from __future__ import annotations

import sys

from benchmarks import memory, merges, resume, start_up

QUICK = {"memory": memory.run, "merges": merges.run, "start_up": start_up.run}
BENCHMARKS = {**QUICK, "resume": resume.run}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.stderr.write(f"error: unknown benchmark {unknown[0]!r}; expected one of {', '.join(BENCHMARKS)}\n")
        return 2
    met = [BENCHMARKS[name]() for name in names or QUICK]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
