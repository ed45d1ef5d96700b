"""Sample from a checkpoint with a key-value cache, in torch alone.

The plain road that other implementations are compared with: no constraint, no hidden default. It
is slow and short on purpose; the product's own engine lives elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Preset:
    """How to draw: temperature 0 is greedy; the penalty sees prompt and answer; top-p is last."""

    temperature: float
    top_p: float = 1.0
    penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion without its stop token.

    `log` is the log-likelihood in nats of the drawn tokens, stop token included, at temperature 1.
    `stopped` is false where the budget ended first: such an answer counts as broken.
    """

    text: str
    log: float
    stopped: bool


class Checkpoint:
    """A model with its tokenizer; every id comes from the checkpoint, never from a constant."""

    def __init__(self, folder: Path) -> None:
        """Load float32 weights from a Hugging Face folder."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        """Encode the beginning of a document; the tokenizer puts `<bos>` before it."""
        encoded: list[int] = self.tokenizer(text)["input_ids"]
        return encoded

    def complete(
        self, prompts: Sequence[str], stop: str, *, budget: int, preset: Preset, seed: int
    ) -> list[Answer]:
        """Complete prompts of one common length in tokens, at most `budget` new tokens each."""
        encoded = torch.tensor([self.ids(prompt) for prompt in prompts])
        stop_id = self.tokenizer.convert_tokens_to_ids(stop)
        generator = torch.Generator().manual_seed(seed)
        drawn, logs = self._draw(encoded, stop_id, budget, preset, generator)
        answers = []
        for row, log in zip(drawn.tolist(), logs.tolist(), strict=True):
            stopped = stop_id in row
            kept = row[: row.index(stop_id)] if stopped else row
            text = self.tokenizer.decode(kept, skip_special_tokens=False)
            answers.append(Answer(text, log, stopped))
        return answers

    @torch.inference_mode()
    def _draw(
        self,
        prompts: torch.Tensor,
        stop_id: int,
        budget: int,
        preset: Preset,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids int64[batch, drawn] and log-likelihoods float64[batch]."""
        batch, length = prompts.shape
        cache = DynamicCache(config=self.model.config)
        seen, inputs = prompts, prompts
        logs = torch.zeros(batch, dtype=torch.float64)
        live = torch.ones(batch, dtype=torch.bool)
        for _ in range(budget):
            output = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1].float()
            inputs = choose(logits, seen, preset, generator)
            scores = logits.log_softmax(-1).gather(1, inputs)[:, 0]
            logs += torch.where(live, scores.double(), 0.0)
            seen = torch.cat([seen, inputs], 1)
            live &= inputs[:, 0] != stop_id
            if not live.any():
                break
        return seen[:, length:], logs

    @torch.inference_mode()
    def loss(self, pairs: Sequence[tuple[str, str]]) -> float:
        """Return nats per token of each answer given its prompt; the end of text counts."""
        total, tokens = 0.0, 0
        for prompt, answer in pairs:
            start = len(self.ids(prompt))
            whole = torch.tensor([[*self.ids(prompt + answer), self.tokenizer.eos_token_id]])
            logs = self.model(input_ids=whole).logits[0, :-1].log_softmax(-1)
            total -= logs.gather(1, whole[0, 1:, None])[start - 1 :].sum().item()
            tokens += whole.shape[1] - start
        return total / tokens


def choose(
    logits: torch.Tensor, seen: torch.Tensor, preset: Preset, generator: torch.Generator
) -> torch.Tensor:
    """Draw the next id, int64[batch, 1], from logits float32[batch, vocabulary]."""
    if preset.penalty != 1.0:
        scores = logits.gather(1, seen)
        weaker = torch.where(scores < 0, scores * preset.penalty, scores / preset.penalty)
        logits = logits.scatter(1, seen, weaker)
    if preset.temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    odds = (logits / preset.temperature).softmax(-1)
    if preset.top_p < 1.0:
        ordered, places = odds.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= preset.top_p] = 0.0
        odds = torch.zeros_like(odds).scatter_(1, places, ordered)
    return odds.multinomial(1, generator=generator)
