"""A run that watches itself: what the doctor would say of it, while it trains and once each."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from grpo_core.config import GRPOConfig
from grpo_core.doctor import findings, movement
from grpo_core.doctor.readlog import LEAST_LINES, Run

# By which the last LEAST_LINES steps are judged, and by which all steps: causes first, of which one line is enough.
OF_LATE = (findings.everything_truncated, findings.never_rewarded, findings.groups_alike)
OF_ALL = (movement.entropy_collapse,)


class Watch:
    """Told of every step; says a line when something is found that was not said before."""

    def __init__(self, config: GRPOConfig, folder: str) -> None:
        self.folder, self.config, self.said = folder, asdict(config), set[str]()
        self.lines: list[dict[str, Any]] = []

    def of(self, step: int, record: dict[str, Any]) -> str | None:
        """What is wrong, with the numbers and the flags to try; None in most steps: it looks at every tenth."""
        self.lines.append({"step": step, **record})
        if len(self.lines) % LEAST_LINES:
            return None
        late, run = (Run(self.folder, self.config, lines) for lines in (self.lines[-LEAST_LINES:], self.lines))
        found = [symptom(late) for symptom in OF_LATE] + [symptom(run) for symptom in OF_ALL]
        for finding in found:
            if finding:
                if finding.name in self.said:
                    return None  # what follows from it needs no line of its own
                self.said.add(finding.name)
                more = f"python -m grpo_core.doctor {self.folder}"
                return f"step {step}: {finding.what} {finding.evidence}. Try: {finding.advice}. More: {more}"
        return None
