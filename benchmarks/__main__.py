"""Every benchmark in turn: ``python -m benchmarks [NAME ...]``. Each line is a ratio to a limit, and its parts."""

from __future__ import annotations

import sys

from benchmarks import memory, merges, start_up

BENCHMARKS = {"memory": memory.run, "merges": merges.run, "start_up": start_up.run}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.stderr.write(f"error: unknown benchmark {unknown[0]!r}; expected one of {', '.join(BENCHMARKS)}\n")
        return 2
    met = [BENCHMARKS[name]() for name in names or BENCHMARKS]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
