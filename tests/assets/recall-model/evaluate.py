"""Prints how often the recall model answers exactly right, on names and values it never saw.

    python tests/assets/recall-model/evaluate.py [--model FOLDER] [--examples N] [--seed N] [--vllm]

An answer is exact if greedy decoding gives the whole expected text and then stops. Without --vllm
one forward pass of transformers over prompt and expected answer decides it: greedy decoding emits
exactly these tokens if and only if each of them is the most likely one after those before it. With
--vllm the answers are really generated, by the server's engine.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from facts import PLACEMENTS, Example, evaluation_example, statement_example
from torch import Tensor
from tqdm import tqdm

LENGTHS = (64, 128, 256, 512, 1024, 2048)
KINDS_UP_TO = 1024  # tokens of prompt; longer ones count by length only
STATEMENT_SHARE = 0.1


def make_examples(num_examples: int, seed: int, lengths: Sequence[int] = LENGTHS) -> Iterator[Example]:
    """Every placement equally often, two of three questions known, first and third person in turn."""
    rng = random.Random(f"evaluation {seed}")
    for index in range(num_examples):
        length = lengths[index % len(lengths)]
        index //= len(lengths)
        if rng.random() < STATEMENT_SHARE:
            yield statement_example(rng, length)
        else:
            known, first = index // 3 % 3 != 2, index // 9 % 2 == 0
            yield evaluation_example(rng, length, PLACEMENTS[index % 3], known=known, first=first)


def is_exact(logits_of: Callable[[Tensor], Tensor], prompt: list[int], answer: list[int]) -> bool:
    """Whether greedy decoding after ``prompt`` gives ``answer``; logits are [1, length, vocab]."""
    with torch.inference_mode():
        logits = logits_of(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    return logits.argmax(dim=-1).tolist() == answer


class TransformersModel:
    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def check(self, examples: Sequence[Example], prompts: Sequence[list[int]]) -> list[bool]:
        end = self.tokenizer.eos_token
        answers = [self.tokenizer(example.answer + end, add_special_tokens=False).input_ids for example in examples]
        return [
            is_exact(lambda ids: self.model(ids).logits, prompt, answer)
            for prompt, answer in tqdm(zip(prompts, answers, strict=True), total=len(prompts), unit="answer")
        ]


class VllmModel:
    def __init__(self, folder: Path):
        from vllm import LLM

        self.engine = LLM(
            str(folder), enforce_eager=True, max_model_len=4096, kv_cache_memory_bytes=268_435_456, max_num_seqs=16
        )
        self.tokenizer = self.engine.get_tokenizer()

    def check(self, examples: Sequence[Example], prompts: Sequence[list[int]]) -> list[bool]:
        from vllm import SamplingParams

        conversations = [example.messages for example in examples]
        outputs = self.engine.chat(conversations, SamplingParams(temperature=0.0, max_tokens=128))
        for output, prompt in zip(outputs, prompts, strict=True):
            assert output.prompt_token_ids == prompt, "vLLM and transformers read the chat template differently"
        return [
            output.outputs[0].text == example.answer and output.outputs[0].finish_reason == "stop"
            for output, example in zip(outputs, examples, strict=True)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent, help="folder of the model")
    parser.add_argument("--examples", type=int, default=1800, help="number of questions and statements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm", action="store_true", help="generate with vLLM")
    args = parser.parse_args()

    model = VllmModel(args.model) if args.vllm else TransformersModel(args.model)
    examples = list(make_examples(args.examples, args.seed))
    prompts = [
        model.tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, return_dict=False)
        for example in examples
    ]
    results = model.check(examples, prompts)

    groups: dict[str, list[bool]] = defaultdict(list)
    for example, prompt, exact in zip(examples, prompts, results, strict=True):
        bucket = next((f"up to {length:4}" for length in LENGTHS if len(prompt) <= length), f"more than {LENGTHS[-1]}")
        groups[f"{bucket} prompt tokens"].append(exact)
        if len(prompt) <= KINDS_UP_TO:
            for label in (*example.labels, "all"):
                groups[f"up to {KINDS_UP_TO}: {label}"].append(exact)
    print(f"{'':36}{'exact':>8}{'of':>7}{'share':>9}")
    for label in sorted(groups, key=lambda label: ("prompt" not in label, "more" in label, label)):
        print(f"{label:36}{sum(groups[label]):8}{len(groups[label]):7}{sum(groups[label]) / len(groups[label]):9.2%}")
    print(f"{'all, of any length':36}{sum(results):8}{len(results):7}{sum(results) / len(results):9.2%}")


if __name__ == "__main__":
    main()
