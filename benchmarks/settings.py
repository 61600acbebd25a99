"""What every section is given, and what it returns."""

import dataclasses
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much to measure and where to write."""

    tiny: bool = False  # sizes that only show that everything runs
    spectral_density: Path | None = None  # a checkout of google/spectral-density
    results: Path = RESULTS

    def choose(self, full, tiny):
        return tiny if self.tiny else full

    def problem(self, name: str):
        """(loss, parameters, batch); a few examples only where nothing but running is to be shown."""
        from benchmarks import problems

        return problems.get(name, self.choose(None, 4))


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure of this run beside what it should be."""

    what: str
    measured: float
    bound: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def row(self) -> str:
        sign = "≥" if self.at_least else "≤"
        outcome = "met" if self.met else "missed"
        bound = f"{sign} {self.bound:g}{self.unit}"
        return f"| {self.what} | {self.measured:.3g}{self.unit} | {bound} | {outcome} |"


@dataclasses.dataclass
class Report:
    """Lines of Markdown, and goals with the figures of this run."""

    lines: list[str]
    goals: list[Goal] = dataclasses.field(default_factory=list)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
