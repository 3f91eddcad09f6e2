"""Plain text rows, `{"text": ...}`, for continued pretraining: a row is a document.

    BOS, if the tokenizer adds one to a text | ids of the text | EOS of the tokenizer

Control tokens in the text are plain characters. Every token is trained; the first one of a row is never predicted. A
document longer than `data.max_length` is cut into consecutive rows of that length, the last one shorter, so that no
token is lost and only the last row ends with EOS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowrank_tune.batch import Row
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.row_values import Columns, InvalidRow, RawRow, RawRowOrFault, text_of
from lowrank_tune.data.store_writer import Entry, document_hash
from lowrank_tune.data.templates.chat_template import ChatTemplate

COLUMN = "text"


def text_of_row(row: RawRowOrFault, columns: Columns) -> str:
    """Returns the text of a row. Raises InvalidRow."""
    if isinstance(row, InvalidRow):
        raise row
    name = columns.get(COLUMN, COLUMN)
    if name not in row:
        raise InvalidRow(f"no column `{name}`")
    if row[name] is None:
        raise InvalidRow(f"column `{name}` is null")
    text = text_of(row[name], COLUMN)
    if not text.strip():
        raise InvalidRow("empty text")
    return text


def encode_documents(
    rows: Sequence[RawRowOrFault],
    columns: Columns,
    max_length: int,
    template: ChatTemplate,
    report: SourceReport,
) -> Iterator[Entry | InvalidRow]:
    """Yields for every row, in order, its document or its fault. `report` counts the longest document."""
    texts = [_text_or_fault(row, columns) for row in rows]
    encoded = iter(template.encode_texts([text for text in texts if isinstance(text, str)]))
    for text in texts:
        if isinstance(text, InvalidRow):
            yield text
            continue
        ids = next(encoded)
        report.longest = max(report.longest, len(ids))
        yield _entry(text, ids, max_length)


def _text_or_fault(row: RawRow | InvalidRow, columns: Columns) -> str | InvalidRow:
    try:
        return text_of_row(row, columns)
    except InvalidRow as fault:
        return fault


def _entry(
    text: str,
    ids: Sequence[int],
    max_length: int,
) -> Entry:
    pieces = cut_document(ids, max_length)
    hashes = [document_hash(text, number) for number in range(len(pieces))]
    return Entry(tuple(pieces), tuple(hashes))


def cut_document(ids: Sequence[int], max_length: int) -> list[Row]:
    """Returns the rows of a document: consecutive pieces of `max_length` tokens, all of them trained.

    A last piece of one token, which nothing would predict, gets a second one from the piece before it.
    """
    starts = list(range(0, len(ids), max_length))
    if len(starts) > 1 and len(ids) - starts[-1] == 1:
        starts[-1] -= 1
    ends = [*starts[1:], len(ids)]
    pieces = []
    for start, end in zip(starts, ends, strict=True):
        piece = ids[start:end]
        pieces.append(Row(piece, [True] * len(piece)))
    return pieces
