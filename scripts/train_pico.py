#!/usr/bin/env python3
"""Train models/pico, the small Llama-architecture model that ships with the repository.

Text: the sources, docstrings and reference topics of the running interpreter's standard library.
The run is a function of that text, the seed and the number of steps; `--minutes` only chooses the
number of steps, from the throughput it measures. This is the command line; pico/ beside it does
the work. Neither knows anything about serving.

    python scripts/train_pico.py --out models/pico --minutes 75 --seed 1 --threads 1
    python scripts/train_pico.py --out models/pico --eval
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from pathlib import Path

import torch
from pico.card import evaluate, training_record, write_card
from pico.corpus import collect_documents, corpus_digest, tokenize_corpus, train_tokenizer
from pico.export import export_tokenizer, write_json
from pico.model import PicoConfig
from pico.training import PHASES, Run, log


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the model directory")
    parser.add_argument("--minutes", type=float, default=75.0, help="of training, about")
    parser.add_argument(
        "--steps", type=int, nargs=len(PHASES), help="of each phase, in place of --minutes"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--cpus", type=int, nargs="*", help="pin the process to these CPUs")
    parser.add_argument(
        "--state", type=Path, default=Path("/tmp/train_pico.pt"), help="checkpoint, not for export"
    )
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--export-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--eval", action="store_true", help="print held-out figures as JSON, stop")
    parser.add_argument("--card", action="store_true", help="write README.md again, stop")
    return parser.parse_args()


def set_up_process(options: argparse.Namespace) -> None:
    if options.cpus:
        os.sched_setaffinity(0, options.cpus)
    torch.set_num_threads(options.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Large tensors come and go each step; glibc would map and unmap them each time, and the page
    # faults cost a fifth of the step. Limits: no mmap, keep 2 GiB, grow by 256 MiB.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            libc.mallopt(option, value)


def train(options: argparse.Namespace) -> None:
    config = PicoConfig()
    documents = collect_documents()
    log(f"{len(documents)} documents, sha256 {corpus_digest(documents)}")
    texts = [document.text for document in documents if not document.held_out]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    export_tokenizer(options.out, tokenizer, config)
    corpus = tokenize_corpus(documents, tokenizer)
    log(f"{corpus.train_tokens} training tokens, {len(corpus.held_out)} held out")
    run = Run(options, config, corpus)
    run.train()
    record = training_record(options, run.progress)
    write_json(options.out / "training.json", {"run": record, "held_out": evaluate(options.out)})
    write_card(options.out)


def main() -> None:
    options = parse_options()
    set_up_process(options)
    if options.eval:
        print(json.dumps(evaluate(options.out)))
    elif options.card:
        write_card(options.out)
    else:
        train(options)


if __name__ == "__main__":
    main()
