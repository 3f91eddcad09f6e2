"""Checks the sources of a recipe by their first rows: existence, columns, and use for the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from lowrank_tune.assembly.rl import make_row_check
from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.config.base import Finding
from lowrank_tune.config.schema import HELDOUT
from lowrank_tune.data import (
    InvalidRow,
    PromptExample,
    RowLocation,
    SourceReport,
)
from lowrank_tune.data.encode import conversation_of, pair_of
from lowrank_tune.data.formats import RawRow
from lowrank_tune.data.head import read_head
from lowrank_tune.data.hub import HubUnreachable, hub_columns
from lowrank_tune.data.labeled_rows import labeled_answers
from lowrank_tune.data.load import to_heldout_prompt
from lowrank_tune.data.prompts import RowFault, check_rewardable
from lowrank_tune.data.scored_responses import may_have_scored_responses
from lowrank_tune.data.sources import (
    BUILTIN_DATASETS,
    HEAD_ROWS,
    LocatedRow,
    is_hub_dataset,
)
from lowrank_tune.data.text_rows import text_of_row
from lowrank_tune.data.tokenize import NamedRows, format_of
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, warning

MAX_COLUMNS = 12
"""Names of columns that a sentence lists."""
MISSING_HELDOUT_ANSWER = "no gold answer to compare with"
RowCheck = Callable[[RawRow, str], None]
"""Raises InvalidRow if a row of a format cannot be used."""


class DataCheck:
    """Checks the sources of recipes. If the hub did not answer once, no further request is sent."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.hub_answers = True

    def findings(self, recipe: RecipeConfig) -> Iterator[Finding]:
        """Yields the sources that are missing, or contain nothing that the recipe could use."""
        row_fault = _row_fault(recipe)
        for path, source in recipe.sources():
            try:
                if path == HELDOUT:
                    self._check_source(
                        source,
                        recipe,
                        _heldout_check(source, recipe),
                        pairs=None,
                        is_strict=False,
                        labels=False,
                        accepts_text=False,
                    )
                else:
                    check = _row_check(source, recipe, row_fault)
                    # One row that cannot be used ends such a run.
                    is_strict = source.max_samples is None and not recipe.data.max_invalid_fraction
                    self._check_source(
                        source,
                        recipe,
                        check,
                        recipe.uses_pairs,
                        is_strict,
                        recipe.uses_labels,
                        accepts_text=recipe.algorithm == "sft",
                    )
            except UserError as error:
                is_about_columns = source.columns and "column" in str(error)
                yield (*path, "columns" if is_about_columns else "dataset"), str(error)

    def _check_source(
        self,
        source: SourceConfig,
        recipe: RecipeConfig,
        check: RowCheck,
        pairs: bool | None,
        is_strict: bool,
        labels: bool,
        accepts_text: bool,
    ) -> None:
        if source.dataset not in BUILTIN_DATASETS and is_hub_dataset(source.dataset):
            self._check_hub(source, pairs, labels, accepts_text)
            return
        head = read_head(source, recipe.seed)
        self._check_rows(
            source,
            head,
            format_of(
                source,
                head,
                pairs,
                labels,
                accepts_text,
            ),
            check,
            is_strict,
        )

    def _check_rows(
        self,
        source: SourceConfig,
        head: NamedRows,
        format_name: str,
        check: RowCheck,
        is_strict: bool,
    ) -> None:
        """Reads up to the first row that can be used.

        Without one, raises UserError if these are all rows, or lack a column, or `is_strict`. Else logs a warning, as
        the rows after them may be usable.
        """
        report = SourceReport(head.name, format_name)
        # A dict, because it keeps the order of the columns.
        columns: dict[str, None] = {}
        for location, row in head:
            try:
                if isinstance(row, InvalidRow):
                    raise row
                columns |= dict.fromkeys(map(str, row))
                check(row, format_name)
                return
            except InvalidRow as fault:
                report.read += 1
                report.count_dropped(fault.reason, str(location))
        is_whole = report.read < HEAD_ROWS
        rows = f"its {report.read:,} rows" if is_whole else f"its first {report.read:,} rows"
        message = f"{head.name}: none of {rows} can be used: {report.reasons()}{_cure(report, sorted(columns))}"
        if is_whole or is_strict or _lacks_column(source, report, columns):
            raise UserError(message)
        later = "the rows after them are checked when the run loads its data"
        self.emit(warning(f"{message}; {later}"))

    def _check_hub(
        self,
        source: SourceConfig,
        pairs: bool | None,
        labels: bool,
        accepts_text: bool,
    ) -> None:
        """Raises UserError for a data set of the hub that is missing, or lacks columns by its description."""
        columns = self._hub_columns(source)
        if columns is None:
            return
        if not ((pairs or labels) and may_have_scored_responses(columns, source.columns)):
            format_of(
                source,
                ColumnNames(source.dataset, columns),
                pairs,
                labels,
                accepts_text,
            )
        absent = [name for name in source.columns.values() if name not in columns]
        if absent:
            raise UserError(f"{source.dataset}: has no column `{absent[0]}`; it has {_listed(columns)}")

    def _hub_columns(self, source: SourceConfig) -> list[str] | None:
        if not self.hub_answers:
            return None
        try:
            return hub_columns(source)
        except HubUnreachable:
            self.hub_answers = False
            message = f"{source.dataset}: not checked before the run, as the hub does not answer; "
            self.emit(warning(f"{message}the cached copy is used if present"))
            return None


@dataclass(frozen=True)
class ColumnNames:
    """One row without values, for a data set whose description has its columns."""

    name: str
    columns: Sequence[str]

    def __iter__(self) -> Iterator[LocatedRow]:
        yield RowLocation(self.name, 1), dict.fromkeys(self.columns, "")


def _lacks_column(
    source: SourceConfig,
    report: SourceReport,
    columns: Collection[str],
) -> bool:
    """Returns whether rows cannot be used because none of them has a column that the source names or that its format
    must have. `columns` are those of the rows."""
    if any(column not in columns for column in source.columns.values()):
        return True
    return all(reason.startswith("no column ") for reason in report.dropped)


def _cure(report: SourceReport, columns: Sequence[str]) -> str:
    """Returns which setting may help, with a semicolon before it; else an empty string."""
    if not columns:
        return ""
    reasons = "; ".join(report.dropped)
    if "column" in reasons:
        return f"; the rows have {_listed(columns)}: name yours with `columns:`"
    if "gold answer" in reasons:
        return f"; the rows have {_listed(columns)}: name its place with `ground_truth:` or `columns: {{gold: ...}}`"
    return ""


def _row_check(
    source: SourceConfig,
    recipe: RecipeConfig,
    row_fault: RowFault,
) -> RowCheck:
    system = recipe.data.system_prompt

    def check_row(row: RawRow, format_name: str) -> None:
        if recipe.uses_pairs:
            pair_of(row, source, system)
        elif format_name == "text":
            text_of_row(row, source.columns)
        elif recipe.uses_labels:
            labeled_answers(
                row,
                source,
                format_name,
                system,
            )
        else:
            conversation_of(
                row,
                source,
                format_name,
                system,
            )

    def check_prompt(row: RawRow, format_name: str) -> None:
        conversation = conversation_of(
            row,
            source,
            format_name,
            system,
            require_answer=False,
        )
        question = conversation.prompt[-1].content
        example = PromptExample(
            (),
            question,
            conversation.ground_truth,
            row,
        )
        check_rewardable(example, recipe.needs_ground_truth, row_fault)

    return check_prompt if recipe.is_online else check_row


def _heldout_check(source: SourceConfig, recipe: RecipeConfig) -> RowCheck:
    def check(row: RawRow, format_name: str) -> None:
        prompt = to_heldout_prompt(
            row,
            source,
            format_name,
            recipe.data.system_prompt,
        )
        if prompt.ground_truth is None:
            raise InvalidRow(MISSING_HELDOUT_ANSWER)

    return check


def _row_fault(recipe: RecipeConfig) -> RowFault:
    """Returns the check whether the rewards of a recipe can score the completions of a row. Rewards that cannot be made
    are findings of their own (`reward_findings`), and then every row passes."""
    try:
        return make_row_check(recipe)
    except UserError:
        return _accept_all


def _accept_all(example: PromptExample) -> None:
    return None


def _listed(columns: Sequence[str]) -> str:
    names = ", ".join(columns[:MAX_COLUMNS]).encode("utf-8", "replace").decode()
    if len(columns) > MAX_COLUMNS:
        names += ", ..."
    return names
