"""The one-process reference: the same model and sampler in a plain loop, with a cold cache and no
arena, scheduler or store. What every policy, crash and batch is compared with, bit for bit.

    python -m services.engine.reference < requests.jsonl > tokens.jsonl

Each input line: {"id", "token_ids" or "text", "max_tokens", "temperature", "top_p", "top_k", "min_p",
"seed", "ignore_eos"}; each output line: {"id", "token_ids", "text"}.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from services.engine.backend import Rows
from services.engine.identity import identify
from services.engine.load import load_backend
from services.engine.model import ModelConfig
from services.engine.sampling import SamplingParams, sample
from services.kv.heap import HeapPages
from services.kv.layout import blocks_for


class Reference:
    """One model, one sequence at a time: the whole prompt in one pass, then token by token.

    With a `prefill_device` the prompt goes through that device's backend, as in a cluster with one.
    """

    def __init__(self, model: str, kv_dtype: str = "auto", prefill_device: str = "cpu") -> None:
        identity = identify(
            model, kv_dtype=kv_dtype, layers_per_group=1_000_000, prefill_device="cpu",
            decode_device="cpu",
        )  # fmt: skip
        self.config: ModelConfig = identity.config
        self.tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        layout = identity.layout
        self._pages = HeapPages(layout, blocks_for(self.config.max_context) * layout.groups)
        self._decode = load_backend("cpu", model, self.config, self._pages)
        self._prefill = self._decode
        if prefill_device != "cpu":
            self._prefill = load_backend(prefill_device, model, self.config, self._pages)

    def generate(
        self, prompt: list[int], params: SamplingParams, max_tokens: int, stops: set[int]
    ) -> list[int]:
        """The tokens after `prompt`, a stop token included."""
        tokens: list[int] = []
        fresh = list(prompt)
        at = 0
        while len(tokens) < max_tokens and not (tokens and tokens[-1] in stops):
            positions = np.arange(at, at + len(fresh), dtype=np.int32)
            zeros = np.zeros(len(fresh), np.int32)
            backend = self._decode if tokens else self._prefill
            backend.begin(Rows(np.array(fresh, np.int32), positions, zeros, self._pages.table))
            for group in range(self._pages.layout.groups):
                backend.run_group(group)
            at += len(fresh)
            logits = backend.logits(np.array([len(fresh) - 1], np.int32))[0]
            token, _ = sample(logits, params, at)
            tokens.append(token)
            fresh = [token]
        return tokens

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One line of the program's input."""
        ids = request.get("token_ids")
        if ids is None:
            ids = self.tokenizer.encode(request["text"], add_special_tokens=False).ids
        params = SamplingParams(
            temperature=request.get("temperature", 0.0), top_p=request.get("top_p", 1.0),
            top_k=request.get("top_k", 0), min_p=request.get("min_p", 0.0),
            seed=request.get("seed", 0),
        )  # fmt: skip
        stops = set() if request.get("ignore_eos") else set(self.config.eos_token_ids)
        tokens = self.generate(list(ids), params, int(request["max_tokens"]), stops)
        text = self.tokenizer.decode(tokens)
        return {"id": request.get("id"), "token_ids": tokens, "text": text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/pico")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--prefill-device", default="cpu", help="cpu, or a torch device")
    arguments = parser.parse_args()
    reference = Reference(arguments.model, arguments.kv_dtype, arguments.prefill_device)
    for line in sys.stdin:
        print(json.dumps(reference.answer(json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
