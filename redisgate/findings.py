"""What `redisgate check` and `redisgate doctor` found: for people as text, for programs as JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Final

import redisgate

OK: Final = "ok"
NOTE: Final = "note"
"""Nothing is broken, but somebody should know."""
FAIL: Final = "fail"

_SHOWN: Final = {OK: "  ok    ", NOTE: "  note  ", FAIL: "  FAIL  "}
_INDENT: Final = "        "


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about one subject; `cure` is what to do about it."""

    subject: str
    level: str
    text: str
    cure: str = ""


@dataclass(slots=True)
class Report:
    """Findings in the order in which they were made, each about the subject that was named last."""

    findings: list[Finding] = field(default_factory=list)
    _subject: str = ""

    def about(self, subject: str) -> None:
        """What follows is about this."""
        self._subject = subject

    def ok(self, text: str) -> None:
        self.findings.append(Finding(self._subject, OK, text))

    def note(self, text: str, cure: str = "") -> None:
        self.findings.append(Finding(self._subject, NOTE, text, cure))

    def wrong(self, text: str, cure: str) -> None:
        self.findings.append(Finding(self._subject, FAIL, text, cure))

    def add(self, findings: Iterable[Finding]) -> None:
        """What somebody else found."""
        self.findings.extend(findings)

    @property
    def failed(self) -> bool:
        return any(finding.level == FAIL for finding in self.findings)

    def text(self) -> str:
        """For people; one paragraph per subject."""
        lines = []
        subject = None
        for finding in self.findings:
            if finding.subject != subject:
                subject = finding.subject
                lines.append(subject)
            lines.append(_SHOWN[finding.level] + finding.text)
            if finding.cure:
                lines.append(_INDENT + finding.cure)
        lines.append("Something has to be mended." if self.failed else "All is well.")
        return "\n".join(lines)

    def json(self) -> str:
        """For programs: one object."""
        found = [asdict(finding) for finding in self.findings]
        counts = {level: sum(finding.level == level for finding in self.findings) for level in (OK, NOTE, FAIL)}
        status = FAIL if self.failed else OK
        return json.dumps({"version": redisgate.__version__, "status": status, "counts": counts, "findings": found})
