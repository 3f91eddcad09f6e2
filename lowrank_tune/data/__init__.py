"""Data: from rows of any known format to token ids, with the mask of the trained tokens.

A row passes `sources` (with `files` and `hub`), `formats` (with `ground_truth`) or `preference_pairs` (with
`scored_responses`), both with `messages`, `tool_calls` and `row_values`, then `encode` (with `templates`) and
`store_writer`; `tokenize` and `load` call them, `report` counts the rows. `sampler` draws the rows of each step,
`collate` pads them. `prompts` reads rows whose answers are generated.
"""

from lowrank_tune.data.collate import collate, collate_rows, collate_units
from lowrank_tune.data.formats import (
    Conversation,
    InvalidRow,
    detect_format,
    to_conversation,
)
from lowrank_tune.data.load import (
    Prompt,
    TokenizedSplits,
    accepted_prompts,
    load,
    load_heldout_prompts,
    recipe_heldout_prompts,
)
from lowrank_tune.data.preference_pairs import PreferencePair, to_pair
from lowrank_tune.data.prompts import (
    PromptDataset,
    PromptExample,
    PromptReport,
    PromptSampler,
    load_prompts,
)
from lowrank_tune.data.report import Report, SourceReport
from lowrank_tune.data.sampler import BatchSampler
from lowrank_tune.data.sources import RowLocation, read_source
from lowrank_tune.data.stats import TokenStats, compute_token_stats
from lowrank_tune.data.templates.chat_template import ChatTemplate
from lowrank_tune.data.token_store import TokenizedDataset

__all__ = [
    "PromptExample",
    "PromptSampler",
    "PromptReport",
    "PromptDataset",
    "TokenStats",
    "Conversation",
    "BatchSampler",
    "PreferencePair",
    "RowLocation",
    "TokenizedSplits",
    "Prompt",
    "Report",
    "InvalidRow",
    "SourceReport",
    "ChatTemplate",
    "TokenizedDataset",
    "accepted_prompts",
    "compute_token_stats",
    "collate",
    "collate_rows",
    "collate_units",
    "detect_format",
    "load",
    "load_prompts",
    "load_heldout_prompts",
    "recipe_heldout_prompts",
    "read_source",
    "to_conversation",
    "to_pair",
]
