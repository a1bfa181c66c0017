"""Trains the recall model: tokenizer, weights and configuration, from nothing but this folder.

python tests/assets/recall-model/train.py [--output FOLDER] [--seed N]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evaluate import is_exact, make_examples
from facts import Example, render, training_text
from model import Geometry, RecallModel
from tokenizer import END, PAD, START, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: each step draws one of ``lengths`` and fills the batch with such rows."""

    num_steps: int
    lengths: tuple[int, ...]
    context_weight: float  # of a token outside the answers, in the loss
    listed_attributes: float  # share of attributes from the list; the others are made up


STAGES = (
    Stage(num_steps=500, lengths=(256,), context_weight=0.1, listed_attributes=0.75),
    Stage(num_steps=500, lengths=(256, 512), context_weight=0.05, listed_attributes=0.75),
    Stage(num_steps=400, lengths=(256, 512), context_weight=0.02, listed_attributes=0.5),
    Stage(num_steps=800, lengths=(256, 1024), context_weight=0.01, listed_attributes=0.5),
    Stage(num_steps=250, lengths=(256, 1024, 1024), context_weight=0.01, listed_attributes=0.5),
)
NUM_STEPS = sum(stage.num_steps for stage in STAGES)
TOKENS_PER_STEP = 4096
MATRIX_LEARNING_RATE = 0.02  # Muon's, of the layers' matrices
OTHER_LEARNING_RATE = 3e-3  # of embeddings and norms
# (step, factor of the learning rates)
SCHEDULE = ((0, 0.01), (100, 1.0), (1000, 1.0), (1750, 0.25), (2200, 0.1375), (NUM_STEPS, 0.0))
CHECK_STEPS = 500
CHECK_EXAMPLES = 60
CHECK_LENGTHS = (64, 256, 1024)


class Batches(IterableDataset):
    """Token ids and loss weights, both [rows, length + 1], for one stage after the other."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.tokenizer = tokenizer
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = random.Random(self.seed)
        for stage in STAGES:
            for _ in range(stage.num_steps):
                length = rng.choice(stage.lengths)
                ids = np.stack([self._row(rng, stage, length + 1) for _ in range(TOKENS_PER_STEP // length)])
                weights = np.stack([loss_weights(row, self.tokenizer, stage.context_weight) for row in ids])
                yield torch.from_numpy(ids), torch.from_numpy(weights)

    def _row(self, rng: random.Random, stage: Stage, length: int) -> np.ndarray:
        """The start of one conversation; one that came out too short is thrown away."""
        while len(ids := self.tokenizer.encode(training_text(rng, length, stage.listed_attributes)).ids) < length:
            pass
        return np.array(ids[:length])


def loss_weights(ids: np.ndarray, tokenizer: Tokenizer, context_weight: float) -> np.ndarray:
    """1 for the tokens of answers and their ends, ``context_weight`` for all others."""
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    assistant = tokenizer.encode("assistant\n").ids
    weights = np.full(len(ids), context_weight, dtype=np.float32)
    for position in np.flatnonzero(ids == start):
        first = position + 1 + len(assistant)
        if list(ids[position + 1 : first]) == assistant:
            ends = np.flatnonzero(ids[first:] == end)
            weights[first : first + ends[0] + 1 if len(ends) else None] = 1.0
    return weights


def learning_rate_factor(step: int) -> float:
    """Linear between the points of SCHEDULE."""
    return float(np.interp(step, *zip(*SCHEDULE, strict=True)))


def share_exact(model: RecallModel, tokenizer: Tokenizer, examples: Sequence[Example]) -> float:
    """The share of examples that the model answers exactly, in the arithmetic it is trained in."""
    with torch.autocast("cpu", torch.bfloat16):
        exact = [
            is_exact(
                model,
                tokenizer.encode(render(example.messages, add_generation_prompt=True)).ids,
                tokenizer.encode(example.answer + END).ids,
            )
            for example in examples
        ]
    return sum(exact) / len(exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    tokenizer = train_tokenizer(args.output, args.seed)
    model = RecallModel(Geometry(vocab_size=tokenizer.get_vocab_size()))
    matrices = [parameter for parameter in model.layers.parameters() if parameter.dim() == 2]
    others = [model.embed_tokens.weight, *(parameter for parameter in model.parameters() if parameter.dim() == 1)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor) for optimizer in optimizers]
    forward = torch.compile(model, dynamic=False)
    check_examples = list(make_examples(CHECK_EXAMPLES, seed=1, lengths=CHECK_LENGTHS))
    batches = DataLoader(Batches(tokenizer, args.seed), batch_size=None, num_workers=1, prefetch_factor=8)

    progress = tqdm(batches, total=NUM_STEPS, unit="step")
    for step, (ids, weights) in enumerate(progress, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(ids[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        ((losses * weights).sum() / weights.sum()).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if step % CHECK_STEPS == 0 or step == NUM_STEPS:
            answer_loss = losses[weights == 1].mean().item()
            exact = share_exact(model, tokenizer, check_examples)
            progress.write(f"step {step}: loss of answer tokens {answer_loss:.4f}, exact answers {exact:.1%}")
            model.save(args.output, end_id=tokenizer.token_to_id(END), pad_id=tokenizer.token_to_id(PAD))


if __name__ == "__main__":
    main()
