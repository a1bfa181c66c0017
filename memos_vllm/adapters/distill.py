"""Context distillation: what a model answers with a memory in its prompt, an adapter teaches it without.

The model with the memory in context is the teacher, the same model with a LoRA adapter and without
the memory is the student; the loss is KL(teacher || student) over the tokens of the teacher's own
answers (Snell, Klein and Zhong, "Learning by Distilling Context", arXiv 2209.15189). Beside the
questions about the memory, the adapter is trained to change nothing on controls, in-context facts of
others among them, for which teacher and student have the same prompt.

    lessons    the teacher's greedy answers and log-probabilities; what it cannot answer itself is left out
    train      batches of facts and controls in turn
    evaluate   facts without the memory, and controls that were not trained on, in the dtype that serves

``Evaluation.refusal`` says why an adapter must not be published.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm

from memos_vllm.adapters.distill_settings import Settings
from memos_vllm.adapters.questions import Control, controls

Message = dict[str, Any]
Assemble = Callable[[Sequence[Message], Sequence[str]], list[Message]]
"""Puts memory into messages, as the server does."""

SYSTEM_PROMPTS = (None, "You are a helpful assistant.")
"""Of the requests without the memory. An adapter that knew only one of them would forget under the other."""


ANSWERS_AT_A_TIME = 64


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to be known without context."""

    memory_id: str
    statement: str
    question: str
    value: str | None
    """What a right answer contains; None: the teacher's answer, word for word."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the adapter does, measured in the dtype that serves it. Shares from 0 to 1."""

    facts: int
    answered: float
    answered_before: float
    """The same questions without memory and adapter."""

    controls: int
    control_score: float
    control_score_before: float
    missed: tuple[str, ...] = ()
    """Questions that are not answered."""

    left_out: tuple[str, ...] = ()
    """Questions that the model does not answer with the memory in its prompt either; not distilled."""

    def refusal(self, settings: Settings) -> str | None:
        """Why the adapter is not published; None if it may be."""
        if not self.facts:
            return "no question is answered by the model with the memory in its prompt, so there is nothing to distil"
        if self.answered < settings.min_answered:
            return (
                f"the adapter answers {self.answered:.1%} of {self.facts} facts without the memory, less than the bar "
                f"of {settings.min_answered:.1%}; more steps or a higher rank may help"
            )
        if (loss := self.control_score_before - self.control_score) > settings.max_control_loss + 1e-9:
            return (
                f"the adapter harms the control set: {self.control_score:.1%} of {self.controls} answers are right, "
                f"{self.control_score_before:.1%} without it; at most {settings.max_control_loss:.1%} may be lost "
                f"({loss:.1%} are); fewer steps or a lower learning rate may help"
            )
        return None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Lesson:
    """One answer to learn.

    Attributes:
        prompts: token ids of the student's prompts, one per system prompt.
        answer: token ids of the teacher's answer and its end.
        logprobs: the teacher's, float16 [len(answer), vocab].
    """

    prompts: list[list[int]]
    answer: list[int]
    logprobs: Tensor


class Distillation:
    """
    Args:
        folder: the model, as transformers loads it.
        assemble: how the server puts memory into a prompt.
        device: ``cpu`` or a GPU's name.
        quiet: no progress bars.
    """

    def __init__(self, folder: Path, assemble: Assemble, *, device: str = "cpu", quiet: bool = False) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._assemble, self._quiet = assemble, quiet
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        # The dtype it is served in; training runs in float32 where that is the CPU.
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
        self._serving_dtype = self.model.dtype
        self._end_ids = _end_ids(self.model, self.tokenizer)
        self._pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self._end_ids)

    def run(
        self, facts: Sequence[Fact], settings: Settings, target: Path, control: Sequence[Control] = ()
    ) -> Evaluation:
        """Trains an adapter, writes it to ``target`` as PEFT does, and evaluates it.

        Args:
            control: further controls, evaluated beside those made by rules.
        """
        torch.manual_seed(settings.seed)
        asked = [fact.question for fact in facts]
        checks = [*controls(settings.num_controls, settings.seed + 1, asked), *control]
        taught, left_out = self._teachable(facts, settings)
        questions = [self._prompt(fact.question) for fact in taught]
        check_prompts = [self._prompt(check.text, check.memory) for check in checks]
        before, base = self._answers(questions, settings), self._answers(check_prompts, settings)
        lessons = [
            self._lesson([self._prompt(fact.question, system=s) for s in SYSTEM_PROMPTS], self._told(fact), answer)
            for fact, answer in self._bar(taught.items(), "teacher", "answer")
        ]
        model = self._with_adapter(settings)
        if lessons:
            self._train(model, lessons, self._anchors(settings, asked), settings)
        model.save_pretrained(str(target), safe_serialization=True)
        model.to(self._serving_dtype).eval()
        after, changed = self._answers(questions, settings), self._answers(check_prompts, settings)
        right = [self._is_right(*each) for each in zip(taught, after, taught.values(), strict=True)]
        was_right = [self._is_right(*each) for each in zip(taught, before, taught.values(), strict=True)]
        return Evaluation(
            facts=len(taught),
            answered=_share(right),
            answered_before=_share(was_right),
            controls=len(checks),
            control_score=_share([self._is_kept(*each) for each in zip(checks, changed, base, strict=True)]),
            control_score_before=_share([self._is_kept(*each) for each in zip(checks, base, base, strict=True)]),
            missed=tuple(fact.question for fact, ok in zip(taught, right, strict=True) if not ok),
            left_out=tuple(left_out),
        )

    # -- lessons --------------------------------------------------------------------------------

    def _teachable(self, facts: Sequence[Fact], settings: Settings) -> tuple[dict[Fact, list[int]], list[str]]:
        """The facts that the teacher answers, with its answer; the questions of the others."""
        told = self._answers([self._told(fact) for fact in facts], settings, "teacher")
        taught, left_out = {}, []
        for fact, answer in zip(facts, told, strict=True):
            if answer and self._is_right(fact, answer, answer):
                taught[fact] = answer
            else:
                left_out.append(fact.question)
        return taught, left_out

    def _anchors(self, settings: Settings, asked: Sequence[str]) -> list[_Lesson]:
        """Controls as lessons: teacher and student have the same prompt."""
        kept = list(controls(settings.num_controls, settings.seed, asked))
        prompts = [self._prompt(each.text, each.memory, system) for each in kept for system in SYSTEM_PROMPTS]
        answers = self._answers(prompts, settings, "controls")
        return [self._lesson([prompt], prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _prompt(self, question: str, memory: Sequence[str] = (), system: str | None = None) -> list[int]:
        messages = [{"role": "system", "content": system}] if system else []
        messages = self._assemble([*messages, {"role": "user", "content": question}], memory)
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def _told(self, fact: Fact) -> list[int]:
        """The teacher's prompt."""
        return self._prompt(fact.question, [fact.statement])

    @torch.inference_mode()
    def _lesson(self, prompts: list[list[int]], teacher_prompt: list[int], answer: list[int]) -> _Lesson:
        ids = torch.tensor([teacher_prompt + answer], device=self.model.device)
        logits = self.model(ids).logits[0, len(teacher_prompt) - 1 : -1]  # [len(answer), vocab]
        return _Lesson(prompts, answer, F.log_softmax(logits.float(), dim=-1).half())

    # -- training -------------------------------------------------------------------------------

    def _with_adapter(self, settings: Settings) -> Any:
        if self.model.device.type == "cpu":
            self.model.float()  # half precision is slow and coarse there
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(self.model, config)
        return self.model

    def _train(self, model: Any, lessons: list[_Lesson], anchors: list[_Lesson], settings: Settings) -> None:
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
        warm = max(1, settings.steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / warm, (settings.steps - step) / (0.5 * settings.steps))
        )
        facts, kept = _endless(lessons, settings.seed), _endless(anchors, settings.seed + 1)
        model.train()
        progress = tqdm(range(settings.steps), desc="distil", unit="step", disable=self._quiet)
        for _ in progress:
            batch = [next(facts) for _ in range(settings.facts_per_step)]
            batch += [next(kept) for _ in range(settings.controls_per_step if anchors else 0)]
            loss = self._loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.set_postfix(kl=f"{loss.item():.4f}")

    def _loss(self, model: Any, batch: Sequence[tuple[list[int], _Lesson]]) -> Tensor:
        """KL(teacher || student), per token of the answers."""
        rows = [prompt + lesson.answer for prompt, lesson in batch]
        ids, mask = self._padded(rows, left=False)
        logits = model(ids, attention_mask=mask).logits  # [rows, length, vocab]
        student = torch.cat(
            [logits[i, len(prompt) - 1 : len(rows[i]) - 1] for i, (prompt, _) in enumerate(batch)]
        ).float()  # [answer tokens, vocab]
        teacher = torch.cat([lesson.logprobs for _, lesson in batch]).float()
        return F.kl_div(F.log_softmax(student, dim=-1), teacher, reduction="batchmean", log_target=True)

    # -- answering ------------------------------------------------------------------------------

    @torch.inference_mode()
    def _answers(self, prompts: Sequence[list[int]], settings: Settings, what: str = "evaluate") -> list[list[int]]:
        """Greedy answers, with their end if there is one."""
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: dict[int, list[int]] = {}
        for start in self._bar(range(0, len(prompts), ANSWERS_AT_A_TIME), what, "batch"):
            part = by_length[start : start + ANSWERS_AT_A_TIME]
            ids, mask = self._padded([prompts[index] for index in part], left=True)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=settings.max_answer_tokens,
                pad_token_id=self._pad_id,
            )
            for index, row in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
                ends = [position for position, token in enumerate(row) if token in self._end_ids]
                answers[index] = row[: ends[0] + 1] if ends else row
        return [answers[index] for index in range(len(prompts))]

    def _padded(self, rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask, [rows, longest]."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[index, place], mask[index, place] = torch.tensor(row), 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def _is_right(self, fact: Fact, answer: list[int], taught: list[int]) -> bool:
        if fact.value is None:
            return answer == taught
        return fact.value.casefold() in self.text(answer).casefold()

    def _is_kept(self, control: Control, answer: list[int], base: list[int]) -> bool:
        if control.answer is None:
            return answer == base
        return control.answer.casefold() in self.text(answer).casefold()

    def text(self, answer: list[int]) -> str:
        return self.tokenizer.decode(answer, skip_special_tokens=True)

    def _bar(self, items: Any, what: str, unit: str) -> Any:
        return tqdm(items, desc=what, unit=unit, disable=self._quiet, leave=False)


def use_threads(number: int | None) -> None:
    """More threads than free cores are slower than one: torch's spin while they wait."""
    if number is not None:
        torch.set_num_threads(max(1, number))


def _endless(lessons: Sequence[_Lesson], seed: int) -> Iterator[tuple[list[int], _Lesson]]:
    """Every prompt of every lesson once, in random order, again and again."""
    rng = random.Random(seed)
    pairs = [(prompt, lesson) for lesson in lessons for prompt in lesson.prompts]
    while True:
        rng.shuffle(pairs)
        yield from pairs


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 1.0
