"""Five algorithms on one frozen base: SFT and a reward model, then DPO, GRPO and PPO, each on top of the same frozen
SFT adapter.

`python benchmarks/algorithms.py [--out DIR]` runs the preset tiny-rlhf (SFT, reward model, PPO) and on its SFT adapter
the second stages of tiny-preference (DPO) and tiny-rlvr (GRPO), and prints a table; what stands in DIR is not run
again. `--picture FILE.svg` draws the curves. Exact and pass@8 are of the same 200 held-out problems. KL is exact, over
the whole vocabulary, on one answer of the trained policy to each of these: to its reference, in nats a token. Seconds
are of the optimizer steps with their rollouts, without evaluation and preparation.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import torch

from lowrank_tune import Chain, Recipe, run, runner
from lowrank_tune.batch import Batch
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.training.stage import Stage
from lowrank_tune.training.trainer import Trainer
from lowrank_tune.ui.formatting import percent
from lowrank_tune.ui.report.curves import metric_series
from lowrank_tune.ui.report.run_log import RunLog, read_run_log
from lowrank_tune.ui.svg import HEIGHT, WIDTH, line_chart

FOLDERS = {"sft": "rlhf/1-sft", "reward": "rlhf/2-reward", "dpo": "dpo", "grpo": "grpo", "ppo": "rlhf/3-ppo"}
TITLES = {"sft": "SFT", "reward": "Reward model", "dpo": "DPO", "grpo": "GRPO", "ppo": "PPO"}
LATER = {"dpo": "tiny-preference", "grpo": "tiny-rlvr"}  # their second stages, on the SFT adapter of tiny-rlhf
AT_ONCE = 50  # answers, for the KL


class Meter:
    """Seconds of a run's optimizer steps, and its KL at the end, by the name of the run; kept in a file beside the
    runs."""

    def __init__(self, file: Path) -> None:
        self.file, self.wall, self.cpu = file, 0.0, 0.0
        self.found: dict[str, dict[str, Any]] = json.loads(file.read_bytes()) if file.exists() else {}
        step, final_folder = Trainer._step, runner.final_folder

        def timed(loop: Trainer) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            step(loop)
            self.wall, self.cpu = self.wall + time.perf_counter() - wall, self.cpu + time.process_time() - cpu

        def leave(stage: Stage) -> Any:  # the trained adapter is there, and nothing has been released yet
            self.take(stage)
            return final_folder(stage)

        Trainer._step, runner.final_folder = timed, leave  # type: ignore[method-assign]

    def take(self, stage: Stage) -> None:
        """A run has ended: its figures go to the file."""
        recipe = stage.recipe
        drawn = (
            stage.built.steps * recipe.train.prompts_per_step * recipe.rollout.num_generations
            if recipe.algorithm in ("grpo", "ppo")
            else 0
        )
        self.found[recipe.name] = {
            "wall": self.wall,
            "cpu": self.cpu,
            "steps": stage.trainer.state.step,
            "drawn": drawn,
            "below": stage.reference_name,
            "kl": kl_of(stage) if stage.evaluator.is_generative else None,
            "load": os.getloadavg()[0],
        }
        self.wall = self.cpu = 0.0
        self.file.write_text(json.dumps(self.found, indent=2))


def kl_of(stage: Stage) -> float:
    """KL(policy || reference) on one answer of the policy to each held-out problem, nats a token."""
    built, prompts = stage.built, [question.prompt_ids for question in stage.evaluator.questions]
    sampling = SamplingParams(stage.recipe.evaluate.max_new_tokens, built.stop_ids, 1.0, stage.recipe.seed)
    answers = [
        (prompts[one.prompt], one.token_ids)
        for one in Engine(built.roles, "policy", 256).generate(prompts, 1, sampling)
    ]
    total = count = 0.0
    for first in range(0, len(answers), AT_ONCE):
        batch = _batch(answers[first : first + AT_ONCE]).to(built.base.device)
        total += float(built.roles.full_vocab_kl("policy", "reference", batch).sum())
        count += int(batch.loss_mask.sum())
    return total / count


def _batch(answers: Sequence[tuple[list[int], list[int]]]) -> Batch:
    shape = (len(answers), max(len(prompt) + len(completion) for prompt, completion in answers))
    batch = Batch(
        torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    )
    for row, (prompt, completion) in enumerate(answers):
        end = len(prompt) + len(completion)
        batch.input_ids[row, :end] = torch.tensor(prompt + completion)
        batch.attention_mask[row, :end] = batch.completion_mask[row, len(prompt) : end] = True
    return batch


def recipes(tiny: bool) -> tuple[Chain, dict[str, Chain]]:
    """The chain of three stages, and the two whose first stage is the same."""
    rlhf = Chain.load("tiny-rlhf", *(_few("sft", "reward", "ppo") if tiny else ()))
    later = {name: Chain.load(preset, *(_few("sft", name) if tiny else ())) for name, preset in LATER.items()}
    assert all(each.stages[0] == rlhf.stages[0] for each in later.values()), (
        "these presets do not begin with the same SFT"
    )
    return rlhf, later


PAIRS, EVALUATION = (
    "data.train=[{dataset: builtin:arithmetic-preferences, max_samples: 40}]",
    ("evaluate.num_prompts=4", "evaluate.num_samples=2"),
)
ONLINE = (
    "data.train=[{dataset: builtin:arithmetic, max_samples: 20}]",
    "train.prompts_per_step=2",
    "rewards=[{name: answer}, {name: length, target_tokens: 9}]",
)
REDUCED = {
    "sft": EVALUATION,
    "reward": (PAIRS, "data.validation=[{dataset: builtin:arithmetic-preferences, split: heldout, max_samples: 10}]"),
    "dpo": (PAIRS, *EVALUATION),
    "grpo": (*ONLINE, *EVALUATION),
    "ppo": (*ONLINE[:2], *EVALUATION),
}


def _few(*stages: str) -> list[str]:
    return [f"stages.{name}.{setting}" for name in stages for setting in ("train.max_steps=2", *REDUCED[name])]


def run_all(out: Path, tiny: bool) -> dict[str, dict[str, Any]]:
    """The runs that are missing; what the meter saw of all of them."""
    out.mkdir(parents=True, exist_ok=True)
    meter = Meter(out / "figures.json")
    rlhf, later = recipes(tiny)
    missing: dict[str, Callable[[], Chain | Recipe]] = {"ppo": lambda: rlhf}
    missing |= {name: partial(each.recipe_of, 1, {"sft": str(out / FOLDERS["sft"])}) for name, each in later.items()}
    for name, recipe in missing.items():
        if (
            name not in meter.found
            and run(recipe(), out=out / ("rlhf" if name == "ppo" else name), ui="plain").status != "done"
        ):
            raise SystemExit(f"interrupted; the same command goes on (with --out {out})")
    return meter.found


def summary_of(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / FOLDERS[name] / "summary.json").read_bytes())
    return found


def table(out: Path, found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| algorithm | on top of | exact before | exact after | pass@k | KL | steps | s, wall | s, CPU | completions "
        "drawn | load |",
        "|" + "---|" * 11,
    ]
    for name in FOLDERS:
        seen, summary = found[name], summary_of(out, name)
        if name == "reward":
            cells = [seen["below"], "", f"pairs correct: {percent(summary['heldout_pairs']['accuracy'])}", "", ""]
        else:
            details = summary["heldout_details"]
            after = details[name]
            pass_at = next(value for key, value in after.items() if key.startswith("pass_at_"))
            cells = [
                seen["below"],
                percent(details[seen["below"]]["accuracy"]),
                percent(after["accuracy"]),
                percent(pass_at),
                f"{seen['kl']:.3f}",
            ]
        cells += [
            f"{seen['steps']:,}",
            f"{seen['wall']:.0f}",
            f"{seen['cpu']:.0f}",
            f"{seen['drawn']:,}",
            f"{seen['load']:.1f}",
        ]
        lines.append("| " + " | ".join([TITLES[name], *cells]) + " |")
    return "\n".join(lines)


# --- the picture ------------------------------------------------------------------------------------------------------

CURVES = {
    "sft": ("loss", "", "loss, nats a token"),
    "reward": ("accuracy", "eval_accuracy", "pairs the right way round"),
    "dpo": ("rewards/margins", "eval_rewards/margins", "margin of chosen over rejected"),
    "grpo": ("reward", "heldout/accuracy", "reward"),
    "ppo": ("reward", "heldout/accuracy", "learned reward"),
}
"""Of each algorithm the statistic of the steps, that of the held-out checks, and what the first one is called."""
CHECKS = {"heldout/accuracy": "held-out exact, pass@1", "eval_accuracy": "held out", "eval_rewards/margins": "held out"}
CARD, BAR_HEIGHT, BAR_GAP = 290, 168, 14
STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu "
    "Sans',sans-serif;fill:#14171c}.soft{fill:#5d6673;font-size:11px}"
    ".title{font-size:14px;font-weight:650}.grid{stroke:#e3e6eb}.tick{fill:#5d6673;font-size:21px}path{fill:none;stroke-linejoin:round}"
    ".raw{stroke:#a9c3f7;stroke-width:2}.smooth{stroke:#2f6fed;stroke-width:4}circle.check{fill:#e2711d;stroke:none}.cross{display:none}.chart{overflow:visible}"
    ".check{stroke:#e2711d;stroke-width:3;stroke-dasharray:8 "
    "6}.card{fill:#fff;stroke:#e3e6eb}.fill{fill:#2f6fed}.track{fill:#eceff3}"
)


def picture(out: Path) -> str:
    """Five small charts and the held-out results, as one SVG with its own style and a light ground."""
    width, height = 3 * CARD + 4 * BAR_GAP, 2 * BAR_HEIGHT + 3 * BAR_GAP
    cards = [_chart_card(name, read_run_log(out / FOLDERS[name])) for name in FOLDERS] + [_results(out)]
    placed = [
        f'<g transform="translate({BAR_GAP + place % 3 * (CARD + BAR_GAP)} '
        f'{BAR_GAP + place // 3 * (BAR_HEIGHT + BAR_GAP)})">'
        f'<rect class="card" width="{CARD}" height="{BAR_HEIGHT}" rx="10"/>{card}</g>'
        for place, card in enumerate(cards)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">'
        f"<title>Five algorithms on one frozen base</title><style>{STYLE}</style>"
        f'<rect width="{width}" height="{height}" fill="#f6f7f9"/>{"".join(placed)}</svg>\n'
    )


def _chart_card(name: str, record: RunLog) -> str:
    statistic, check, words = CURVES[name]
    held_out = record.checks.get(check) or record.series.get(check) or {}
    lines = metric_series(statistic, record.series.get(statistic, {}), held_out, CHECKS.get(check, ""))
    inner = str(line_chart(lines)).replace(
        "<svg ", f'<svg x="8" y="44" width="{CARD - 16}" height="{(CARD - 16) * HEIGHT / WIDTH:.0f}" ', 1
    )
    legend = f'<tspan fill="#2f6fed">{escape(words)}</tspan>'
    if held_out:
        legend += f' <tspan dx="6" fill="#e2711d">{escape(CHECKS[check])}</tspan>'
    return (
        f'<text class="title" x="14" y="22">{TITLES[name]}</text><text class="soft" x="{CARD - 14}" y="22" '
        f'text-anchor="end">'
        f'{record.step:,} steps</text><text class="soft" x="14" y="38">{legend}</text>{inner}'
    )


def _results(out: Path) -> str:
    details = summary_of(out, "sft")["heldout_details"]
    shares = {"base": details["base"]["accuracy"]} | {
        TITLES[name]: summary_of(out, name)["heldout_details"][name]["accuracy"]
        for name in ("sft", "dpo", "grpo", "ppo")
    }
    parts = ['<text class="title" x="14" y="22">Exact answers, held out</text>']
    for place, (name, share) in enumerate(shares.items()):
        y = 42 + 24 * place
        parts.append(
            f'<text class="soft" x="14" y="{y + 10}">{name}</text><rect class="track" x="60" y="{y}" width="160" '
            f'height="12" rx="3"/>'
            f'<rect class="fill" x="60" y="{y}" width="{160 * share:.1f}" height="12" rx="3"/>'
            f'<text class="soft" x="{CARD - 14}" y="{y + 10}" text-anchor="end">{percent(share)}</text>'
        )
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the runs stay; by default they do not")
    parser.add_argument("--picture", type=Path, help="an SVG of the five curves")
    parser.add_argument("--tiny", action="store_true", help="two steps each: that it runs, not what it says")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        found = run_all(out, arguments.tiny)
        print(table(out, found))
        if arguments.picture is not None:
            arguments.picture.write_text(picture(out), encoding="utf-8")


if __name__ == "__main__":
    main()
