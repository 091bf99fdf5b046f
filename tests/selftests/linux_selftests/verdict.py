# SPDX-License-Identifier: MIT OR Apache-2.0
"""The judgement of a script: its exit status is the least of it.

Thirteen of the scripts start their cases in the background and lose their status, so they end with 0 whatever
happened. What they print, what they leave behind and what the kernel says is therefore judged as well, for all
scripts alike.
"""

import re
from dataclasses import dataclass, field
from enum import Enum

from .expectations import Expectation
from .observation import Observation

SKIPPED = 4

# Said by the scripts, by kublk, or by a shell that was given nonsense to run. The misspelling is theirs.
_COMPLAINT = re.compile(
    r"\bfail(s|ed|ure|e)?\b|isn't|\bunexpected|\bassert\b|\bcan't\b|\bcannot\b|couldn't|\btime(d )?-?out\b"
    r"|\berrors?\b|\binvalid\b|no such|not found|not supported?\b|permission denied|run out|reordering|out_of_order"
    r"|only \d+ handled|duplicated|\bbad \w+|short rw|too many|segmentation|core dumped|Killed\b|\bAborted\b"
    r"|syntax error|unbound variable|integer expression|!= ",
    re.IGNORECASE,
)


class Kind(Enum):
    """Where a problem was seen."""

    STATUS = "status"
    OUTPUT = "output"
    RESIDUE = "left behind"
    KERNEL = "kernel log"
    HANG = "hang"
    MACHINE = "machine"
    VOID = "void"


@dataclass(frozen=True)
class Problem:
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.text}"


class Verdict(Enum):
    PASS = "pass"
    SKIP = "skip"
    FAIL = "fail"


@dataclass
class Judgement:
    """What came out, and whether that was to be expected."""

    observation: Observation
    verdict: Verdict
    problems: list[Problem] = field(default_factory=list)
    # The entry of the list of known outcomes that covers this one.
    known: Expectation | None = None
    # The entry that this one belies: it passed, although it is known not to.
    belied: Expectation | None = None

    @property
    def acceptable(self) -> bool:
        return self.verdict is Verdict.PASS or self.known is not None

    @property
    def label(self) -> str:
        """The word in the table."""
        if self.belied:
            return "pass, not expected"
        if self.known:
            return "known failure" if self.verdict is Verdict.FAIL else "known skip"
        return {Verdict.PASS: "pass", Verdict.SKIP: "SKIP", Verdict.FAIL: "FAIL"}[self.verdict]

    @property
    def reason(self) -> str:
        """One line on why it is not a plain pass."""
        said = self.problems[0].text if self.problems else ""
        if len(self.problems) > 1:
            said += f" (and {len(self.problems) - 1} more)"
        if self.known:
            return self.known.reason
        if self.belied:
            return f"expected was: {self.belied.reason}"
        if self.verdict is Verdict.SKIP:
            return _last_words(self.observation.output) or "it gives no reason"
        return said


def _last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def complaints(output: str, harmless: list[str]) -> list[str]:
    """Lines that say that something went wrong."""
    return [
        line.strip()
        for line in output.splitlines()
        if _COMPLAINT.search(line) and not any(re.search(expression, line) for expression in harmless)
    ]


def _problems(seen: Observation, harmless: list[str]) -> list[Problem]:
    if seen.machine:
        return [Problem(Kind.MACHINE, seen.machine)]
    found = []
    if seen.void:
        found.append(Problem(Kind.VOID, seen.void))
    if seen.blocked:
        found.append(Problem(Kind.HANG, f"no end within {seen.seconds:.0f} s"))
    elif seen.status is None:
        found.append(Problem(Kind.STATUS, "there is none"))
    elif seen.status not in (0, SKIPPED):
        found.append(Problem(Kind.STATUS, f"exit status {seen.status}"))
    said = complaints(seen.output, harmless)
    found += [Problem(Kind.OUTPUT, line) for line in said]
    if seen.status == 0 and "[PASS]" not in seen.output:
        found.append(Problem(Kind.OUTPUT, "exit status 0, but no word of [PASS]"))
    if seen.residue:
        found.append(Problem(Kind.RESIDUE, seen.residue))
    found += [Problem(Kind.KERNEL, line) for line in seen.kernel_trouble]
    return found


def judge(seen: Observation, known: Expectation | None, harmless: list[str]) -> Judgement:
    """`known` is the outcome on record for this script and driver; `harmless` are expressions for lines that
    this script prints when all is well."""
    problems = _problems(seen, harmless)
    clean = Verdict.SKIP if seen.status == SKIPPED else Verdict.PASS
    verdict = Verdict.FAIL if problems else clean
    judgement = Judgement(seen, verdict, problems)
    if known is None:
        return judgement
    if verdict is Verdict.PASS:
        judgement.belied = known
    elif verdict.value == known.verdict and all(problem.kind.value in known.kinds for problem in problems):
        judgement.known = known
    return judgement
