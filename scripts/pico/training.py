"""One training run: its batches, its plan of steps, the optimizer, checkpoints and exports.

A run is a function of the corpus, the seed and the plan. How its result is described is not
known here.
"""

from __future__ import annotations

import argparse
import datetime
import io
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pico import Tokens
from pico.corpus import Corpus
from pico.export import export_weights, write_atomically
from pico.model import Pico, PicoConfig, stream_losses

TOKENS_PER_STEP = 4096
LEARNING_RATE = 2e-3
WARMUP_STEPS = 150
WEIGHT_DECAY = 0.1
GRADIENT_NORM_MAX = 1.0
CHECKPOINT_TOKENS = 32769  # of the held-out text, to choose which checkpoint is exported

# Sequence length of each part of training, and its share of the time. The last part is as long as
# the context, so that every position has been trained.
PHASES = ((512, 0.75), (2048, 0.25))


class WindowSampler:
    """Batches as a pure function of (seed, phase, step), so a resumed run sees the same ones.

    Each pass shuffles the documents, joins them, cuts the stream into windows and shuffles those.
    """

    def __init__(self, documents: list[Tokens], seed: int, phase: int, length: int) -> None:
        self._documents = documents
        self._key = [seed, phase]
        self._length = length
        self._batch = TOKENS_PER_STEP // length
        total = sum(len(document) for document in documents)
        self._batches_per_pass = (total - 1) // length // self._batch
        self._pass = -1
        self._windows: Tokens = np.empty((0, length + 1), dtype=np.int64)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step: two int64 tensors [batch, length]."""
        number, index = divmod(step, self._batches_per_pass)
        if number != self._pass:
            self._cut(number)
        rows = torch.from_numpy(self._windows[index * self._batch : (index + 1) * self._batch])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _cut(self, number: int) -> None:
        rng = np.random.default_rng([*self._key, number])
        order = rng.permutation(len(self._documents))
        stream = np.concatenate([self._documents[i] for i in order])
        stream = np.roll(stream, int(rng.integers(len(stream))))
        starts = np.arange((len(stream) - 1) // self._length) * self._length
        starts = rng.permutation(starts)
        self._windows = stream[starts[:, None] + np.arange(self._length + 1)]
        self._pass = number


@dataclass(frozen=True)
class Plan:
    """How many steps each phase has; the learning rate is a function of the step."""

    steps: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.steps)

    def phase(self, step: int) -> tuple[int, int]:
        """(phase, step inside it)."""
        assert 0 <= step < self.total
        for phase, steps in enumerate(self.steps):
            if step < steps:
                return phase, step
            step -= steps
        raise AssertionError

    def learning_rate(self, step: int) -> float:
        """A linear warm-up, then a cosine down to 1% of the peak."""
        if step < WARMUP_STEPS:
            return LEARNING_RATE * (step + 1) / WARMUP_STEPS
        progress = (step - WARMUP_STEPS) / max(1, self.total - WARMUP_STEPS)
        return LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


class Trainer:
    """bf16 weights for the arithmetic, float32 copies for AdamW; it owns both."""

    def __init__(self, config: PicoConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Pico(config)
        self._masters = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.model.bfloat16()
        self.model.compile_layers()
        matrices = [master for master in self._masters if master.ndim == 2]
        vectors = [master for master in self._masters if master.ndim == 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )

    def gradients(self, inputs: Tensor, targets: Tensor) -> float:
        """Leaves the gradients in the bf16 parameters and gives the loss."""
        loss = self.model.mean_loss(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float) -> float:
        loss = self.gradients(inputs, targets)
        for parameter, master in zip(self.model.parameters(), self._masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self._masters, GRADIENT_NORM_MAX)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.copy_masters()
        self.clear_gradients()
        return loss

    @torch.no_grad()
    def copy_masters(self) -> None:
        for parameter, master in zip(self.model.parameters(), self._masters, strict=True):
            parameter.copy_(master)

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        state = {**extra, "masters": self._masters, "optimizer": self._optimizer.state_dict()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())

    def restore(self, path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        for master, saved in zip(self._masters, state.pop("masters"), strict=True):
            master.copy_(saved)
        self._optimizer.load_state_dict(state.pop("optimizer"))
        self.copy_masters()
        return state


def plan_from_minutes(trainer: Trainer, samplers: list[WindowSampler], minutes: float) -> Plan:
    """Time each phase's step and fill 95% of the minutes."""
    steps = []
    for sampler, (length, share) in zip(samplers, PHASES, strict=True):
        batch = sampler.batch(0)
        trainer.gradients(*batch)
        start = time.perf_counter()
        for _ in range(6):
            trainer.gradients(*batch)
        seconds = (time.perf_counter() - start) / 6 + 0.03  # the optimizer's part
        trainer.clear_gradients()
        log(f"length {length}: {TOKENS_PER_STEP / seconds:.0f} tokens/s")
        steps.append(max(1, round(0.95 * minutes * 60 * share / seconds)))
    return Plan(tuple(steps))


def log(message: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", flush=True)


@dataclass
class Progress:
    """What a checkpoint keeps besides the weights."""

    plan: Plan
    step: int = 0
    seconds: float = 0.0
    best: dict[int, float] = field(default_factory=dict)  # sequence length -> perplexity

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.plan.steps),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Progress:
        plan = Plan(tuple(raw["steps"]))
        return cls(plan, raw["step"], raw["seconds"], raw["best"])


class Run:
    """One training run: steps, and now and then a checkpoint and an export."""

    def __init__(self, options: argparse.Namespace, config: PicoConfig, corpus: Corpus) -> None:
        self._out: Path = options.out
        self._state: Path = options.state
        self._every: int = options.export_every
        self._corpus = corpus
        self._config = config
        self._trainer = Trainer(config, options.seed)
        self._samplers = [
            WindowSampler(corpus.train_documents, options.seed, phase, length)
            for phase, (length, _) in enumerate(PHASES)
        ]
        self.progress = self._start(options)

    def _start(self, options: argparse.Namespace) -> Progress:
        if options.resume:
            return Progress.from_dict(self._trainer.restore(self._state))
        if options.steps:
            return Progress(Plan(tuple(options.steps)))
        return Progress(plan_from_minutes(self._trainer, self._samplers, options.minutes))

    def train(self) -> None:
        plan, progress = self.progress.plan, self.progress
        log(f"steps {plan.steps}, {TOKENS_PER_STEP} tokens each; at step {progress.step}")
        losses: list[float] = []
        while progress.step < plan.total:
            start = time.perf_counter()
            phase, index = plan.phase(progress.step)
            batch = self._samplers[phase].batch(index)
            losses.append(self._trainer.step(*batch, plan.learning_rate(progress.step)))
            progress.step += 1
            progress.seconds += time.perf_counter() - start
            if progress.step % 50 == 0:
                rate = progress.step * TOKENS_PER_STEP / progress.seconds
                log(f"step {progress.step} loss {np.mean(losses):.4f} {rate:.0f} tokens/s")
                losses.clear()
            if progress.step % self._every == 0 or progress.step == plan.total:
                self._checkpoint()

    def _checkpoint(self) -> None:
        """Save the state; export when the held-out text says that it is the best so far.

        The windows are as long as the phase's sequences: a model that has seen 512 positions is
        measured on 512, and the first checkpoint of a longer phase is exported whatever it says.
        """
        start = time.perf_counter()
        candidate = Pico(self._config)
        candidate.load_state_dict(self._trainer.model.state_dict())
        length = PHASES[self.progress.plan.phase(self.progress.step - 1)[0]][0]
        losses = stream_losses(candidate.eval(), self._corpus.held_out[:CHECKPOINT_TOKENS], length)
        perplexity = math.exp(float(losses.mean()))
        log(f"step {self.progress.step} held-out perplexity {perplexity:.3f} at length {length}")
        if perplexity < self.progress.best.get(length, math.inf):
            self.progress.best[length] = perplexity
            export_weights(self._out, candidate)
        self.progress.seconds += time.perf_counter() - start
        self._trainer.save(self._state, self.progress.to_dict())
