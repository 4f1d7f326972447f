"""Hard mixes: small weights, siblings of strangers, two checkpoints of a run, dictionaries of up to 256 atoms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.evidence.bench import Bench
from benchmarks.evidence.material import every_name
from benchmarks.evidence.mixes import HARD, Mix, hard_mixes
from benchmarks.evidence.peers import ask_model_dna, said_by_model_dna, said_by_paper
from benchmarks.evidence.report import Check, Report, Table, percent
from benchmarks.evidence.rows import Answer, Row, describe
from benchmarks.evidence.scoring import (
    BINS,
    CLEAR,
    LEVELS,
    TARGET_RATE,
    Rule,
    Share,
    accused_targets,
    claimed,
    contradicted,
    detection,
    exceedance,
    named,
    score,
    share,
    split,
    undecided,
)
from unmerge.experiment.mergekit import METHODS

ABOUT = """\
Drawn by a generator: up to three atoms at weights from 0.02 to 0.9, log-uniform, and up to two fine-tunes that the
dictionary does not have, at 0.2 to 0.9; three in five of those have a sibling in the dictionary, that is a fine-tune
for the same task of another seed. Ranks, learning rates, data and lengths of training differ. A twin is another
checkpoint of one run; twins are counted apart. Weights are effective ones: those of linear and TIES merges are
divided by their sum, as mergekit does, so some are below 0.02. For TIES and DARE (density 0.5) they are the
recipe's. One rule of the test was made after a run of these very mixes, in which one absent sibling of 3,788 was
accused: an atom is not called present if the solver gives neither it nor a version of it anything."""
PEER_SAMPLE = 24
"""Targets with the smallest dictionary that modelDNA takes apart too."""
KINDS = ("sibling", "other", "twin")
PEER_VERDICT = "modelDNA"


def plan(seed: int) -> list[Mix]:
    """Return the targets."""
    return hard_mixes(every_name(), seed)


def measure(bench: Bench, mix: Mix, merged: Path) -> Row:
    """Take one target apart, and have modelDNA do it too if it is one of the sample."""
    result = bench.examine(merged, mix)
    opinion = ask_model_dna(bench.material, mix, merged) if _in_sample(mix.name) else None
    if opinion is None:
        return describe(mix, result)
    return describe(mix, result, other_tool=opinion.weights, words={PEER_VERDICT: opinion.verdict})


def _in_sample(name: str) -> bool:
    size, number, _ = name.split("-")
    return int(size) == min(HARD) and int(number) < PEER_SAMPLE


def report(rows: Sequence[Row]) -> Report:
    """Report detection, accusations, calibration and the same of others."""
    tables = [
        _detection_table(rows),
        _accusation_table(rows),
        _target_table(rows),
        _missed_table(rows),
        _calibration_table(rows),
        _rules_table(rows),
        _peer_table(rows),
        _verdict_table(rows),
    ]
    return Report("Hard mixes", ABOUT, [table for table in tables if table.rows], _checks(rows))


def _sizes(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    by_size = [(f"{size} atoms", [row for row in rows if row.size == size]) for size in HARD]
    return [*by_size, ("all", list(rows))]


def _detection_table(rows: Sequence[Row]) -> Table:
    cells = []
    for label, own in _sizes(rows):
        for method in (*METHODS, "all"):
            shares = detection((row for row in own if method in (row.method, "all")), named)
            cells.append((f"{label}, {method}", *(str(one) if one.total else "" for one in shares)))
    header = ("dictionary, method", *(f"{low:g} to {min(high, 1.0):g}" for low, high in BINS))
    return Table(
        "Atoms detected, themselves or as one of a group of versions, of those inside; by effective weight.",
        header,
        cells,
    )


def _accusation_table(rows: Sequence[Row]) -> Table:
    cells = []
    for label, own in _sizes(rows):
        for kind in KINDS:
            answers = [answer for row in own for answer in row.answers if answer.kind == kind]
            accused, cannot = share(answers), undecided(answers)
            by_paper = percent(share(answers, said_by_paper))
            cells.append((f"{label}, {kind}", str(accused.total), str(accused.count), str(cannot), by_paper))
    header = ("dictionary, absent atom", "tested", "accused", "cannot tell", "accused by the paper's rule")
    return Table("Absent atoms accused, by how they are related to an ingredient.", header, cells)


def _target_table(rows: Sequence[Row]) -> Table:
    cells = []
    for label, own in _sizes(rows):
        targets, atoms = accused_targets(own), score(own).accused
        low, high = targets.within()
        between = f"{low:.4f} to {high:.4f}" if targets.total else ""
        by_paper = percent(accused_targets(own, said_by_paper))
        cells.append((label, percent(targets), between, f"{TARGET_RATE:g}", percent(atoms), by_paper))
    header = ("dictionary", "targets", "95 % interval", "stated", "atoms", "targets, paper's rule")
    return Table("False accusations against the stated rate, twins aside.", header, cells)


def _missed_table(rows: Sequence[Row]) -> Table:
    cells = []
    for label, own in _sizes(rows):
        inside, _ = split(own)
        missed = [answer for answer in inside if not claimed(answer)]
        broken = contradicted(inside)
        cells.append((label, str(len(inside)), str(len(missed)), str(undecided(missed)), str(broken)))
    header = ("dictionary", "inside", "missed", "of these cannot tell", "missed over the weight said to be detectable")
    return Table("Atoms missed, and how many of them the test said that it would have found.", header, cells)


def _calibration_table(rows: Sequence[Row]) -> Table:
    _, outside = split(rows)
    kinds = {"all": outside} | {kind: [one for one in outside if one.kind == kind] for kind in KINDS[:2]}
    cells = [
        (f"{level:g}", *(_exceedance_cell(exceedance(answers, level)) for answers in kinds.values()))
        for level in LEVELS
    ]
    header = ("p below", *(f"absent, {kind}" for kind in kinds))
    title = "Calibration: of the absent atoms that were tested, twins aside, those whose p-value is below a level."
    return Table(title, header, cells)


def _exceedance_cell(found: Share) -> str:
    return "" if found.value is None else f"{found.value:.5f} ({found})"


def _rules_table(rows: Sequence[Row]) -> Table:
    rules: dict[str, Rule] = {"the test": claimed, "coefficient over 0.01": said_by_paper}
    cells = [_rule_cells(name, rows, rule) for name, rule in rules.items()] if rows else []
    return Table("The test and the paper's rule on all hard mixes.", _RULE_HEADER, cells)


def _peer_table(rows: Sequence[Row]) -> Table:
    own = [row for row in rows if PEER_VERDICT in row.words]
    rules: dict[str, Rule] = {
        "the test": claimed,
        "coefficient over 0.01": said_by_paper,
        "modelDNA's weight over 0.01": said_by_model_dna,
    }
    cells = [_rule_cells(name, own, rule) for name, rule in rules.items()] if own else []
    return Table(f"The same beside modelDNA, on {len(own)} mixes with 8 atoms.", _RULE_HEADER, cells)


_RULE_HEADER = (
    "rule",
    "precision",
    "recall",
    f"from {CLEAR:g} on",
    "or its group",
    "no twin about",
    "absent accused",
    "targets with one",
)


def _rule_cells(name: str, rows: Sequence[Row], rule: Rule) -> tuple[str, ...]:
    found = score(rows, rule)
    return (
        name,
        percent(found.precision),
        percent(found.recall),
        percent(share(_clear(rows), rule)),
        percent(share(_clear(rows), named if rule is claimed else rule)),
        percent(share(_clear(rows, twins=False), rule)),
        percent(found.accused),
        percent(accused_targets(rows, rule)),
    )


def _clear(rows: Iterable[Row], *, twins: bool = True) -> list[Answer]:
    """Return the answers about atoms that are inside with a weight that must be found."""
    inside, _ = split(rows)
    return [answer for answer in inside if answer.truth >= CLEAR and (twins or not answer.has_twin)]


def _verdict_table(rows: Sequence[Row]) -> Table:
    own = [row for row in rows if PEER_VERDICT in row.words]
    counts = Counter((row.words[PEER_VERDICT], len(row.ingredients)) for row in own)
    verdicts = sorted({verdict for verdict, _ in counts})
    most = sorted({count for _, count in counts})
    cells = [(verdict, *(str(counts[verdict, count] or "") for count in most)) for verdict in verdicts]
    return Table("modelDNA's verdicts, by the number of fine-tunes in the merge.", ("verdict", *map(str, most)), cells)


def _checks(rows: Sequence[Row]) -> list[Check]:
    siblings = [answer for row in rows for answer in row.answers if answer.kind == "sibling"]
    return [
        Check("absent siblings accused", float(share(siblings).count) if siblings else None, high=0.0),
        Check(f"recall from {CLEAR:g} on, itself or its group", share(_clear(rows), named).value, low=0.95),
    ]
