"""Batched sampling and scoring behind a shared prompt, whose keys and values are computed once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from everlearn.errors import InvalidArgument

BATCH = 64

Tick = Callable[[int], None]


class Prompt:
    """A text that many continuations share: its cache is computed at the first use and kept.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        text: the shared beginning, as text or as token ids [n]; not empty.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | Tensor) -> None:
        self.ids = encode(tokenizer, text) if isinstance(text, str) else text
        if not len(self.ids):
            raise InvalidArgument("text: got an empty prompt, expected at least one token")
        self.model = model
        self.tokenizer = tokenizer
        self._filled: DynamicCache | None = None

    @torch.no_grad()
    def _cache(self, batch: int) -> DynamicCache:
        if self._filled is None:
            filled = DynamicCache()
            self.model(input_ids=self.ids[None], past_key_values=filled, use_cache=True, logits_to_keep=1)
            self._filled = filled
        cache = copy.deepcopy(self._filled)
        cache.batch_repeat_interleave(batch)
        return cache

    @torch.no_grad()
    def sample(
        self,
        tails: Sequence[str | Tensor],
        *,
        max_new_tokens: int,
        generator: torch.Generator,
        temperature: float = 0.7,
        top_p: float = 0.95,
        stop: str | None = "\n",
        tick: Tick | None = None,
    ) -> list[str]:
        """Continue the prompt followed by each of ``tails``; a continuation ends before the first ``stop``.

        A special token, such as the end of a turn, ends it too. ``temperature`` 0 takes the likeliest token.
        ``tick`` is told how many tails are done.
        """
        rows = self._encoded(tails)
        results: list[str] = []
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), BATCH):
            part = [rows[i] for i in order[start : start + BATCH]]
            results += self._sample(part, max_new_tokens, generator, temperature, top_p, stop)
            if tick is not None:
                tick(len(part))
        back = sorted(range(len(order)), key=order.__getitem__)
        return [results[i] for i in back]

    def _sample(
        self,
        tails: Sequence[Tensor],
        max_new_tokens: int,
        generator: torch.Generator,
        temperature: float,
        top_p: float,
        stop: str | None,
    ) -> list[str]:
        ids, mask = pad_left(tails, self._pad)
        seen, positions = self._seen(mask)
        cache = self._cache(len(tails))
        ends = stop_tokens(self.tokenizer, stop, self.model.config.get_text_config().vocab_size)
        made: list[list[int]] = [[] for _ in tails]
        rows = torch.arange(len(tails))  # which tail each row of the batch continues; rows that ended are dropped
        for _ in range(max_new_tokens):
            logits = self.model(
                input_ids=ids,
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            new = choose(logits, generator, temperature, top_p)
            going = ~ends[new]
            for row, token, goes in zip(rows.tolist(), new.tolist(), going.tolist()):
                if goes:
                    made[row].append(token)
            if not going.any():
                break
            if not going.all():
                rows, new, seen, positions = rows[going], new[going], seen[going], positions[going]
                cache.batch_select_indices(going.nonzero()[:, 0])
            ids = new[:, None]
            seen = torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return [str(self.tokenizer.decode(tokens)).split(stop or "\0")[0].strip() for tokens in made]

    @torch.no_grad()
    def log_likelihood(self, tails: Sequence[str | Tensor], targets: Sequence[str | Tensor]) -> list[Tensor]:
        """Return the log probability of each token of each target, read after the prompt and its tail (not empty)."""
        heads, wanted = self._encoded(tails), self._encoded(targets)
        results: list[Tensor] = [torch.empty(0)] * len(heads)
        order = sorted(range(len(heads)), key=lambda i: len(heads[i]) + len(wanted[i]))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            ids, mask = pad_left([heads[i] for i in part], self._pad)
            after = pad_right([wanted[i] for i in part], self._pad)
            seen, positions = self._seen(torch.cat([mask, torch.ones_like(after)], dim=1))
            logits = self.model(
                input_ids=torch.cat([ids, after], dim=1),
                attention_mask=seen,
                position_ids=positions,
                past_key_values=self._cache(len(part)),
                use_cache=True,
                logits_to_keep=after.shape[1] + 1,
            ).logits
            chances = logits[:, :-1].log_softmax(-1).gather(2, after[..., None])[..., 0]
            for i, row in zip(part, chances):
                results[i] = row[: len(wanted[i])]
        return results

    def _encoded(self, texts: Sequence[str | Tensor]) -> list[Tensor]:
        return [encode(self.tokenizer, text) if isinstance(text, str) else text for text in texts]

    def _seen(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention mask, prompt included, and the positions of left-padded tails with ``mask`` [n, T]."""
        seen = torch.cat([mask.new_ones(len(mask), len(self.ids)), mask], dim=1)
        return seen, (seen.cumsum(1) - 1).clamp(min=0)[:, len(self.ids) :]

    @property
    def _pad(self) -> int:
        return pad_token(self.tokenizer)


def common_start(rows: Sequence[Tensor]) -> int:
    """Return how many leading tokens all ``rows`` share, leaving each at least one of its own."""
    shortest = min(len(row) for row in rows) - 1
    stacked = torch.stack([row[:shortest] for row in rows])
    differs = (stacked != stacked[0]).any(0).nonzero()
    return int(differs[0]) if len(differs) else shortest


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the token ids of ``text``, [n], as they are: no begin or end token is added."""
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with, whichever the tokenizer has."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def pad_right(rows: Sequence[Tensor], pad: int) -> Tensor:
    """Stack rows of different lengths into [n, longest], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)


def pad_left(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths, padded on the left; return ids and attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def choose(logits: Tensor, generator: torch.Generator, temperature: float, top_p: float) -> Tensor:
    """Choose a token for each row of ``logits`` [n, vocab]: the likeliest, or by nucleus sampling."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = torch.softmax(logits.float() / temperature, -1).topk(min(256, logits.shape[-1]))
    probabilities[(probabilities.cumsum(-1) - probabilities) > top_p] = 0
    return tokens.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


@functools.lru_cache(maxsize=16)
def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: str | None, vocab_size: int) -> Tensor:
    """Return a mask over the vocabulary: the tokens that contain ``stop``, and the special ones."""
    mask = torch.zeros(max(vocab_size, len(tokenizer)), dtype=torch.bool)
    mask[tokenizer.all_special_ids] = True
    if stop is None:
        return mask
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    mask[[token for token, text in enumerate(texts) if stop in text]] = True
    return mask
