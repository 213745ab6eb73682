"""What the doctor finds, and the report of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that the doctor found. Only a problem makes the exit status 1."""

    level: Level
    text: str
    topic: str = ""


def ok(text: str) -> Finding:
    return Finding("ok", text)


def note(text: str) -> Finding:
    return Finding("note", text)


def problem(text: str) -> Finding:
    return Finding("problem", text)


Check = Callable[[], Iterable[Finding]]


class Examination:
    """Runs checks one after the other.

    Attributes:
      findings: of the checks that have run so far.
      running: the topic of the check that is running.
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.running = ""

    def run(self, topic: str, check: Check) -> None:
        """Adds the findings of `check`. An exception of `check` is a problem, too."""
        self.running = topic
        try:
            for finding in check():
                self.add(topic, finding)
        except Exception as error:
            self.add(topic, problem(f"{type(error).__name__}: {error}"))

    def add(self, topic: str, finding: Finding) -> None:
        self.findings.append(dataclasses.replace(finding, topic=topic))


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(finding) for finding in findings]


def from_json(findings: Iterable[dict[str, Any]]) -> list[Finding]:
    return [Finding(**finding) for finding in findings]


def report(by_process: Sequence[Sequence[Finding]]) -> str:
    """The findings as text. A finding that several processes have in common stands there once."""
    processes: dict[Finding, list[int]] = {}
    for process, findings in enumerate(by_process):
        for finding in findings:
            processes.setdefault(finding, []).append(process)
    topics = list(dict.fromkeys(finding.topic for finding in processes))
    lines = []
    for finding in sorted(processes, key=lambda finding: topics.index(finding.topic)):
        where = _where(processes[finding], len(by_process))
        first, *more = finding.text.split("\n")
        mark = finding.level.upper() if finding.level == "problem" else finding.level
        lines.append(f"{mark:8}{finding.topic:13}{where}{first}")
        lines += [f"{'':21}{line}" for line in more]
    num_problems = sum(finding.level == "problem" for finding in processes)
    verdict = f"not ready: {num_problems} problem(s)" if num_problems else "ready"
    return "\n".join([*lines, verdict])


def has_problem(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "problem" for finding in findings)


def _where(processes: list[int], num_processes: int) -> str:
    if len(processes) == num_processes:
        return ""
    return f"[process {', '.join(map(str, processes))}] "
