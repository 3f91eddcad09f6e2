"""Completions that no reward can be told for: a verifier's own error or timeout, which never trains as a 0.

Such a completion leaves its group: it has no reward and no advantage, and the step is as if it had never been drawn. It
is counted, told, and above a share of the run's completions the run stops: a broken verifier must not go on choosing
what is learned from.

An error comes again with the same completion. A timeout depends on the clock: a run that was stopped and continued
equals the straight one as long as the same completions time out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from lowrank_tune.errors import RunFailed
from lowrank_tune.types import Mean, Stats

FEW = 3
"""Failures that a run bears however few completions it has drawn, less one."""


@dataclass(frozen=True)
class Unscored:
    """What stands in place of a completion's values: which reward could not tell, and why."""

    reward: str
    verdict: Literal["error", "timeout"]
    reason: str


@dataclass
class Failures:
    """Counted over the whole run. `most`: the share of its completions that may be without a reward."""

    most: float = 0.01
    completions: int = 0
    errors: int = 0
    timeouts: int = 0

    def count(self, several: Sequence[Unscored | None]) -> None:
        """Counts a draw's completions. Raises RunFailed where too many could not be scored."""
        lost = [one for one in several if one is not None]
        self.completions += len(several)
        self.errors += sum(one.verdict == "error" for one in lost)
        self.timeouts += sum(one.verdict == "timeout" for one in lost)
        share = self.share
        if lost and self.errors + self.timeouts >= FEW and share > self.most:
            told = (
                f"{self.errors + self.timeouts} of {self.completions} completions ({share:.1%}) could not be "
                f"scored, more than"
            )
            raise RunFailed(
                f"rewards: {told} rollout.max_unscored_share, {self.most:.3g}; of the last ones {in_words(lost)}"
            )

    @property
    def share(self) -> float:
        return (self.errors + self.timeouts) / max(1, self.completions)

    def stats(self, lost: Sequence[Unscored]) -> Stats:
        """Of a step, from the run's first failure on."""
        kinds = {"error": self.errors, "timeout": self.timeouts}
        return {
            f"score_{kind}s": Mean(sum(one.verdict == kind for one in lost), 1) for kind, ever in kinds.items() if ever
        }

    def warnings(self, lost: Sequence[Unscored], completions: int) -> Iterator[str]:
        """One a reward; the loop tells each once."""
        for name in dict.fromkeys(one.reward for one in lost):
            mine = [one for one in lost if one.reward == name]
            yield (
                f"the reward `{name}` failed on completions, which leave their groups, {len(mine)} of {completions} "
                f"in this step; the "
                f"first: {mine[0].reason}"
            )

    def state(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "most"}

    def restore(self, state: Mapping[str, float]) -> None:
        self.completions, self.errors, self.timeouts = (
            int(state.get(name, 0)) for name in ("completions", "errors", "timeouts")
        )


def in_words(lost: Sequence[Unscored]) -> str:
    """Which rewards failed how often, and the first reason."""
    counts = Counter(one.reward for one in lost)
    return (
        f"{', '.join(f'`{name}` failed on {count}' for name, count in counts.most_common())}, the first: "
        f"{lost[0].reason}"
    )
