"""Checks the sources of a recipe by their first rows: existence, columns, and use for the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from lowrank_tune.assembly import ONLINE_ALGORITHMS
from lowrank_tune.assembly.rl import make_row_check
from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.config.raw_settings import Finding
from lowrank_tune.config.yaml_nodes import Path
from lowrank_tune.data import InvalidRow, PromptExample, RowLocation, SourceReport
from lowrank_tune.data.encode import conversation_of, pair_of
from lowrank_tune.data.formats import RawRow
from lowrank_tune.data.head import read_head
from lowrank_tune.data.hub import HubUnreachable, hub_columns
from lowrank_tune.data.load import to_heldout_prompt
from lowrank_tune.data.prompts import MISSING_ANSWER
from lowrank_tune.data.sources import BUILTIN_DATASETS, HEAD_ROWS, is_hub_dataset
from lowrank_tune.data.tokenize import NamedRows, format_of
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage

MAX_COLUMNS = 12  # names of columns that a sentence lists
MISSING_HELDOUT_ANSWER = "no gold answer to compare with"
RowCheck = Callable[[RawRow, str], str | None]
"""Why a row of a format cannot be used; None where it can."""


def sources_of(recipe: RecipeConfig) -> Iterator[tuple[Path, SourceConfig]]:
    """Yields every source of a recipe with the path of its setting."""
    for index, source in enumerate(recipe.data.train):
        yield ("data", "train", index), source
    if recipe.algorithm not in ONLINE_ALGORITHMS:
        for index, source in enumerate(recipe.data.validation):
            yield ("data", "validation", index), source
    if recipe.evaluate.eval_dataset is not None:
        yield ("evaluate", "eval_dataset"), recipe.evaluate.eval_dataset


class DataCheck:
    """Checks the sources of recipes. After the hub did not answer once, no further request is sent."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.hub_answers = True

    def findings(self, recipe: RecipeConfig) -> Iterator[Finding]:
        """Sources that are not there, or hold nothing that the recipe could use."""
        rejection = _rejection_by_rewards(recipe)
        for path, source in sources_of(recipe):
            is_heldout = path[0] == "evaluate"
            pairs = None if is_heldout else recipe.uses_pairs
            try:
                if source.dataset in BUILTIN_DATASETS or not is_hub_dataset(source.dataset):
                    head = read_head(source, recipe.seed)
                    if is_heldout:
                        check = _heldout_check(source, recipe)
                    else:
                        check = _row_check(source, recipe, rejection)
                    # a row that cannot be used ends such a run
                    is_strict = not is_heldout and source.max_samples is None and not recipe.data.max_invalid_fraction
                    self._check_rows(source, head, format_of(source, head, pairs), check, is_strict)
                else:
                    self._check_hub(source, pairs)
            except UserError as error:
                if source.columns and "column" in str(error):
                    key = "columns"
                else:
                    key = "dataset"
                yield (*path, key), str(error)

    def _check_rows(
        self,
        source: SourceConfig,
        head: NamedRows,
        format_name: str,
        check: RowCheck,
        is_strict: bool,
    ) -> None:
        """Raises UserError where none of the first rows can be used and these are all rows, or lack a column, or
        `is_strict`. Else logs a warning, as the rows after them may be usable. Reads up to the first usable row."""
        report = SourceReport(head.name, format_name)
        columns: dict[str, None] = {}
        for location, row in head:
            reason = row.reason if isinstance(row, InvalidRow) else check(row, format_name)
            if reason is None:
                return
            report.read += 1
            report.count_dropped(reason, str(location))
            columns |= {} if isinstance(row, InvalidRow) else dict.fromkeys(map(str, row))
        is_whole = report.read < HEAD_ROWS
        if is_whole:
            rows = f"its {report.read:,} rows"
        else:
            rows = f"its first {report.read:,} rows"
        message = f"{head.name}: none of {rows} can be used: {report.reasons()}{_cure(report, sorted(columns))}"
        if is_whole or is_strict or _lacks_column(source, report, columns):
            raise UserError(message)
        later = "the rows after them are checked when the run loads its data"
        self.emit(LogMessage(message=f"{message}; {later}", level="warning"))

    def _check_hub(self, source: SourceConfig, pairs: bool | None) -> None:
        """Raises UserError for a data set of the hub that cannot be had, or lacks columns by its description."""
        try:
            columns = hub_columns(source) if self.hub_answers else None
        except HubUnreachable:
            self.hub_answers = False
            columns = None
            self.emit(
                LogMessage(
                    message=f"{source.dataset}: not checked before the run, as the hub does not answer; the "
                    "cached copy is used if there is one",
                    level="warning",
                )
            )
        if columns is None:
            return
        format_of(source, ColumnNames(source.dataset, columns), pairs)
        if absent := [name for name in source.columns.values() if name not in columns]:
            raise UserError(f"{source.dataset}: has no column `{absent[0]}`; it has {_listed(columns)}")


@dataclass(frozen=True)
class ColumnNames:
    """One row without values, for a data set whose description names its columns."""

    name: str
    columns: Sequence[str]

    def __iter__(self) -> Iterator[tuple[RowLocation, RawRow | InvalidRow]]:
        yield RowLocation(self.name, 1), dict.fromkeys(self.columns, "")


def _lacks_column(source: SourceConfig, report: SourceReport, columns: Collection[str]) -> bool:
    """Whether rows of these columns cannot be used because none of them has a column that the source names or that its
    format must have."""
    return not set(source.columns.values()) <= set(columns) or all(
        reason.startswith("no column ") for reason in report.dropped
    )


def _cure(report: SourceReport, columns: Sequence[str]) -> str:
    if not columns:
        return ""
    if any("column" in reason for reason in report.dropped):
        return f"; the rows have {_listed(columns)}: name yours with `columns:`"
    if any("gold answer" in reason for reason in report.dropped):
        return f"; the rows have {_listed(columns)}: name its place with `ground_truth:` or `columns: {{gold: ...}}`"
    return ""


def _row_check(
    source: SourceConfig,
    recipe: RecipeConfig,
    rejection: Callable[[PromptExample], str | None],
) -> RowCheck:
    system = recipe.data.system_prompt

    def check_pair(row: RawRow, format_name: str) -> str | None:
        return _reason(pair_of(row, source, system))

    def check_row(row: RawRow, format_name: str) -> str | None:
        return _reason(conversation_of(row, source, format_name, system))

    def check_prompt(row: RawRow, format_name: str) -> str | None:
        chat = conversation_of(row, source, format_name, system, require_answer=False)
        if isinstance(chat, InvalidRow):
            return chat.reason
        if recipe.needs_ground_truth and chat.ground_truth is None:
            return MISSING_ANSWER
        last = next(message for message in reversed(chat.messages) if message.role != "assistant")
        return rejection(PromptExample((), last.content, chat.ground_truth, row))

    if recipe.algorithm in ONLINE_ALGORITHMS:
        return check_prompt
    return check_pair if recipe.uses_pairs else check_row


def _heldout_check(source: SourceConfig, recipe: RecipeConfig) -> RowCheck:
    def check(row: RawRow, format_name: str) -> str | None:
        prompt = to_heldout_prompt(row, source, format_name, recipe.data.system_prompt)
        if isinstance(prompt, InvalidRow):
            return prompt.reason
        if prompt.ground_truth is None:
            return MISSING_HELDOUT_ANSWER
        return None

    return check


def _rejection_by_rewards(recipe: RecipeConfig) -> Callable[[PromptExample], str | None]:
    """Why the rewards of a recipe could not score the completions of a row. Rewards that cannot be made are findings of
    their own (`reward_findings`), and reject no row."""
    try:
        return make_row_check(recipe)
    except UserError:
        return _accept_all


def _reason(result: object) -> str | None:
    if isinstance(result, InvalidRow):
        return result.reason
    return None


def _accept_all(example: PromptExample) -> None:
    return None


def _listed(columns: Sequence[str]) -> str:
    more = ", ..." if len(columns) > MAX_COLUMNS else ""
    return ", ".join(columns[:MAX_COLUMNS]).encode("utf-8", "replace").decode() + more
