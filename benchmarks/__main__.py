"""Benchmarks: ``python -m benchmarks [NAME ...]``, by default all quick ones. Each prints ratios to a limit.

What follows the name of one that is not quick are its own arguments (``... seven_b --help``); ``seed_search`` alone
takes ``--full``.
"""

from __future__ import annotations

import sys

from benchmarks import (
    anytime,
    cluster,
    kills,
    large_dictionary,
    memory,
    merges,
    peers,
    presence,
    resume,
    scaling,
    seed_search,
    seven_b,
    start_up,
)
from benchmarks.evidence import command as evidence
from benchmarks.recipes import command as recipes

QUICK = {
    "memory": memory.run,
    "merges": merges.run,
    "presence": presence.run,
    "seed_search": seed_search.run,
    "start_up": start_up.run,
}
WITH_ARGUMENTS = {
    "anytime": anytime.run,
    "cluster": cluster.run,
    "evidence": evidence.run,
    "kills": kills.run,
    "large_dictionary": large_dictionary.run,
    "peers": peers.run,
    "recipes": recipes.run,
    "scaling": scaling.run,
    "seven_b": seven_b.run,
}
BENCHMARKS = {**QUICK, "resume": resume.run, **WITH_ARGUMENTS}


def main(names: list[str]) -> int:
    if names and names[0] in WITH_ARGUMENTS:
        return 0 if WITH_ARGUMENTS[names[0]](names[1:]) else 1
    if names == ["seed_search", "--full"]:
        return 0 if seed_search.run(full=True) else 1
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.stderr.write(f"error: unknown benchmark {unknown[0]!r}; expected one of {', '.join(BENCHMARKS)}\n")
        return 2
    met = [BENCHMARKS[name]() for name in names or QUICK]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
