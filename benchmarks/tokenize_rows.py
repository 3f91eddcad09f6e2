"""Rows and tokens a second of tokenizing with the mask, against the bare `tokenizers` batch call on the same finished
texts.

    PYTHONPATH=. python benchmarks/tokenize_rows.py --tokenizer DIR --alpaca FILE  # target: 60 % of the bare rate
    PYTHONPATH=. python benchmarks/tokenize_rows.py --quick                        # tutor rows and a made-up tokenizer

`encode`: `ChatTemplate.encode_many`, rendering and mask included, from conversations in memory. `load`: the whole door,
from the file: parsing, shape, conversation, `encode`, duplicates, the store on disk. `bare`: `encode_batch` of the
texts that the template renders, already rendered. CPU time would hide that the bare call uses all cores, so the figures
are wall time; `--threads 1` makes both use one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHUNK = 2048


def made_up_tokenizer() -> Any:
    """Byte-level BPE learned from the tutor's rows, with ChatML marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for row in tutor_rows(300) for text in row.values() if isinstance(text, str)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def tutor_rows(count: int) -> list[dict[str, Any]]:
    from lowrank_tune.toy import problems

    return [dict(row) for row in problems.rows(count, 0, heldout=False)]


def alpaca_rows(path: str, count: int) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else Path(path).open(encoding="utf-8") as file:
        rows = [row for row in json.load(file) if row.get("output")]
    return (rows * (count // len(rows) + 1))[:count]


def best(repeats: int, jobs: dict[str, Callable[[int], None]]) -> dict[str, list[float]]:
    """Seconds of each job in turns. A job is told which turn it is."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats):
        for name, job in jobs.items():
            started = time.perf_counter()
            job(repeat)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(name: str, rows: list[dict[str, Any]], tokenizer: Any, repeats: int) -> float:
    """Prints one table; returns the rate of `encode` as a share of the bare one."""
    from lowrank_tune.config import DataConfig, SourceConfig
    from lowrank_tune.data import ChatTemplate, InvalidRow, detect_format, load, to_conversation

    conversations = [to_conversation(row, detect_format(row, {}), {}, "auto").messages for row in rows]
    texts = [
        tokenizer.apply_chat_template([{"role": m.role, "content": m.content} for m in conversation], tokenize=False)
        for conversation in conversations
    ]
    bare = tokenizer.backend_tokenizer
    template = ChatTemplate.from_tokenizer(tokenizer)
    made = [row for row in template.encode_many(conversations) if not isinstance(row, InvalidRow)]
    tokens, bare_tokens = (
        sum(len(row.input_ids) for row in made),
        sum(len(one.ids) for one in bare.encode_batch(texts, add_special_tokens=False)),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = DataConfig(train=(SourceConfig(dataset=str(file)),), eval_fraction=0.0, max_length=4096)

        def encode(_: int) -> None:
            for start in range(0, len(conversations), CHUNK):
                template.encode_many(conversations[start : start + CHUNK])

        def bare_batch(_: int) -> None:
            for start in range(0, len(texts), CHUNK):
                [one.ids for one in bare.encode_batch(texts[start : start + CHUNK], add_special_tokens=False)]

        def whole(repeat: int) -> None:
            load(data, template, 0, lambda event: None, Path(folder) / f"cache{repeat}")

        def again(repeat: int) -> None:
            load(data, template, 0, lambda event: None, Path(folder) / f"cache{repeat}")

        seconds = best(repeats, {"bare": bare_batch, "encode": encode, "load": whole, "load, cached": again})
    print(f"{name}: {len(rows):,} rows, {len(made):,} used, {tokens:,} tokens (the texts as they are: {bare_tokens:,})")
    share = {}
    for job, times in seconds.items():
        share[job] = statistics.median(b / t for b, t in zip(seconds["bare"], times, strict=True))
        rate = min(times)
        print(
            f"  {job:<14}{len(rows) / rate:>12,.0f} rows/s{tokens / rate:>14,.0f} tokens/s{share[job]:>8.0%} of the "
            f"bare rate"
        )
    return share["encode"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="a folder with a ChatML tokenizer; a made-up one where it is not given"
    )
    parser.add_argument("--alpaca", metavar="FILE", help="a JSON array of Alpaca rows, .gz too")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of each kind; a smaller file is repeated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="threads of the tokenizer, ours and the bare one")
    parser.add_argument("--quick", action="store_true", help="1,000 rows, 3 turns")
    options = parser.parse_args(arguments)
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="true" if options.threads > 1 else "false",
        RAYON_NUM_THREADS=str(options.threads),
    )
    from transformers import AutoTokenizer

    count, repeats = (1_000, 3) if options.quick else (options.rows, options.repeats)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else made_up_tokenizer()
    compare("builtin:arithmetic", tutor_rows(count), tokenizer, repeats)
    if options.alpaca:
        compare("alpaca", alpaca_rows(options.alpaca, count), tokenizer, repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
