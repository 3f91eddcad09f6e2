"""Data: from rows of any known shape to token ids with the mask of what the assistant says."""

from lowrank_tune.data.asked import Asked, AskedOrder, AskedReport, AskedSet, asked_order, load_asked
from lowrank_tune.data.batches import collate, collate_units
from lowrank_tune.data.census import Census, census
from lowrank_tune.data.chat import Template
from lowrank_tune.data.formats import Conversation, RowFault, detect, to_conversation
from lowrank_tune.data.load import Prepared, Prompt, load, prompts
from lowrank_tune.data.mixture import Order
from lowrank_tune.data.pairs import Pair, to_pair
from lowrank_tune.data.report import Report, SourceReport
from lowrank_tune.data.sources import Place, Rows, read
from lowrank_tune.data.store import TokenStore

__all__ = [
    "Asked",
    "AskedOrder",
    "AskedReport",
    "AskedSet",
    "Census",
    "Conversation",
    "Order",
    "Pair",
    "Place",
    "Prepared",
    "Prompt",
    "Report",
    "RowFault",
    "Rows",
    "SourceReport",
    "Template",
    "TokenStore",
    "asked_order",
    "census",
    "collate",
    "collate_units",
    "detect",
    "load",
    "load_asked",
    "prompts",
    "read",
    "to_conversation",
    "to_pair",
]
