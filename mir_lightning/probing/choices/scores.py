"""Scores of candidate answers: the prompt runs once, and its candidates continue from its KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel

from mir_lightning.probing.choices.items import ChoiceItem
from mir_lightning.probing.choices.probe import ChoiceProbe, EncodedChoices, common_prefix, valid_rows
from mir_lightning.vlm import compute_dtype, execution_device

Score = Literal["logit", "logprob"]
Side = Literal["left", "right"]
Forward = Callable[..., Any]


@dataclass(eq=False)
class CandidateScorer:
    """Mean scores of candidates' tokens under a model."""

    model: PreTrainedModel
    probe: ChoiceProbe  # its items are scored
    score: Score  # what each token gets
    forward: Forward  # called with a forward's inputs; it reaches the model
    in_step: bool  # run the same number of forwards for every batch, as sharded models need

    def __post_init__(self) -> None:
        self.device = execution_device(self.model)
        self.dtype = compute_dtype(self.model)
        self.pad = self.probe.processor.tokenizer.pad_token_id
        self.accepted = inspect.signature(self.model.forward).parameters
        self.keeps_deltas = any(hasattr(module, "rope_deltas") for module in self.model.modules())
        self._logits_dtype = torch.float32

    def shared(self, items: Sequence[ChoiceItem]) -> list[Tensor]:
        """Scores ``[candidates]`` by item: one forward for the prompts, one for the rest of all candidates."""
        encoded = self.probe.encode(items)
        lengths = encoded.shared()
        width = max(lengths)
        with _decoder_positions(self.model) as seen:
            first = self._run(**self._prefixes(encoded, lengths), use_cache=True, **self._last_logits(1))
        cache = first.past_key_values
        if not isinstance(cache, Cache) or cache.get_seq_length() != width:
            raise ValueError(f"{type(self.model).__name__} gave no cache of the {width} prompt tokens.")
        owner = [i for i, candidates in enumerate(encoded.candidates) for _ in candidates]
        used = [lengths[i] for i in owner]
        rest = [row.ids[length:] for row, length in zip(encoded.rows, used, strict=True)]
        logits = first.logits[:, -1:][owner]  # [N, 1, V], of the first token of each rest
        if self.in_step or max(map(len, rest)) > 1:
            tails = [tokens[:-1] or tokens for tokens in rest]
            cache.batch_select_indices(torch.tensor(owner, device=self.device))
            mask = torch.cat([_valid(lengths, "left")[owner], _valid(map(len, tails), "right")], dim=1)
            positions = self._next_positions(seen, owner, width, max(map(len, tails)))
            output = self._go_on(cache, _pad(tails, "right", self.pad), mask, positions)
            logits = torch.cat([logits, output.logits], dim=1)
        return self._means(encoded, logits, used)

    def whole(self, items: Sequence[ChoiceItem]) -> list[Tensor]:
        """Scores ``[candidates]`` by item: one forward in which each candidate has its prompt before it."""
        encoded = self.probe.encode(items)
        first, logits = self._whole_logits(items, encoded)
        return self._means(encoded, logits, [first + 1] * len(encoded.rows))

    def _whole_logits(self, items: Sequence[ChoiceItem], encoded: EncodedChoices) -> tuple[int, Tensor]:
        """Logits ``[N, T, V]`` of all candidates with their prompts, from the first position that any needs on."""
        inputs = self.probe.repeat(items)
        ids = [row.ids for row in encoded.rows]
        prompts = valid_rows(inputs, inputs["input_ids"])
        kept = [common_prefix(prompt, row) for prompt, row in zip(prompts, ids, strict=True)]
        first, width = min(encoded.shared()) - 1, max(map(len, ids))
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self.accepted else {}
        sequences = self._padded(inputs, ids, kept, "right")
        output = self._run(**sequences, **options, **self._last_logits(width - first))
        return first, output.logits[:, first - width :]

    def greedy(self, items: Sequence[ChoiceItem], count: int) -> list[list[int]]:
        """By item, the ``count`` token ids that follow its prompt, the most likely one at each step."""
        encoded = self.probe.encode(items)
        lengths = [len(prompt) for prompt in encoded.prompts]
        with _decoder_positions(self.model) as seen:
            output = self._run(**self._prefixes(encoded, lengths), use_cache=True, **self._last_logits(1))
        mask = _valid(lengths, "left")
        made = [output.logits[:, -1].argmax(dim=-1)]
        while len(made) < count:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = self._next_positions(seen, range(len(items)), max(lengths), len(made))
            last = {key: value[..., -1:] for key, value in positions.items()}
            output = self._go_on(output.past_key_values, made[-1][:, None], mask, last)
            made.append(output.logits[:, -1].argmax(dim=-1))
        return torch.stack(made, dim=1).tolist()

    def _go_on(self, cache: Cache, ids: Tensor, mask: Tensor, positions: Mapping[str, Tensor]) -> Any:
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, **positions}
        return self._run(**inputs, use_cache=True)

    def can_share(self, items: Sequence[ChoiceItem]) -> bool:
        """Whether candidates may continue from a shared cache: it scores ``items`` as whole forwards do.

        Asked of the model itself, because what its cache holds, and how it counts positions after it, differ by
        family. The tolerance is that of its arithmetic. Where a prompt sees what follows it (prefix language
        models), whole forwards would let it see the answer, and continuing is the only right way.

        Args:
            items: with one candidate each.
        """
        try:
            shared = torch.cat(self.shared(items))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a family does not support; a real fault shows in the whole forwards too
            return False
        return self._close(shared, torch.cat(self.whole(items))) or self._sees_ahead(items)

    def _sees_ahead(self, items: Sequence[ChoiceItem]) -> bool:
        """Whether the logits at a prompt's end change with what follows."""
        encoded = self.probe.encode(items)
        lengths = encoded.shared()
        alone = self._run(**self._prefixes(encoded, lengths), **self._last_logits(1)).logits[:, -1]
        first, logits = self._whole_logits(items, encoded)
        followed = torch.stack([row[length - 1 - first] for row, length in zip(logits, lengths, strict=True)])
        return bool(alone.isfinite().all()) and not self._close(followed, alone)

    def _close(self, found: Tensor, wanted: Tensor) -> bool:
        tolerance = torch.finfo(self._logits_dtype).eps ** 0.5
        return bool(((found - wanted).abs() <= tolerance * wanted.abs().clamp(min=1)).all())

    def _prefixes(self, encoded: EncodedChoices, lengths: Sequence[int]) -> dict[str, Any]:
        """Inputs of the shared part of each prompt, padded on the left so that the candidates follow at once."""
        ids = [prompt[:length] for prompt, length in zip(encoded.prompts, lengths, strict=True)]
        return self._padded(encoded.inputs, ids, lengths, "left")

    def _padded(self, inputs: dict[str, Any], ids: list[list[int]], kept: Sequence[int], side: Side) -> dict:
        """Inputs with other token ids; what else has a value a token keeps that of the first ``kept`` of a row."""
        of_tokens = {
            key: [
                v[:k] + [0] * (len(row) - k)
                for v, k, row in zip(valid_rows(inputs, value), kept, ids, strict=True)
            ]
            for key, value in inputs.items()
            if isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape
        }
        padded = {key: _pad(rows, side) for key, rows in of_tokens.items()}
        valid = _valid(map(len, ids), side)
        return {**inputs, **padded, "input_ids": _pad(ids, side, self.pad), "attention_mask": valid}

    def _next_positions(
        self, seen: Sequence[Tensor], owner: Sequence[int], width: int, count: int
    ) -> dict[str, Tensor]:
        """Position ids of ``count`` tokens after prompts whose own were ``seen``, ``[B, S]`` or ``[D, B, S]``.

        M-RoPE models are given positions in D dimensions, and text goes on after the largest of them. Without
        images they count columns, but go on from the offset kept since some batch with images: so they are told.
        Other models that are given none count on from their cache.
        """
        if not seen:
            columns = torch.arange(width, width + count).expand(len(owner), -1)
            return {"position_ids": columns} if self.keeps_deltas else {}
        positions = seen[-1] if seen[-1].ndim == 3 else seen[-1][None]
        largest = positions.amax(dim=(0, 2))  # [B], or [1] for all
        rows = largest[list(owner)] if len(largest) > 1 else largest.expand(len(owner))
        following = rows[:, None] + 1 + torch.arange(count, device=rows.device)
        return {"position_ids": following.expand(len(seen[-1]), -1, -1) if seen[-1].ndim == 3 else following}

    def _last_logits(self, count: int) -> dict[str, int]:
        return {"logits_to_keep": count} if "logits_to_keep" in self.accepted else {}

    def _run(self, **inputs: Any) -> Any:
        moved = {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor)
            else value
            for key, value in inputs.items()
        }
        output = self.forward(**moved)
        self._logits_dtype = output.logits.dtype
        return output

    def _means(self, encoded: EncodedChoices, logits: Tensor, used: Sequence[int]) -> list[Tensor]:
        """By item, mean scores of its candidates; ``logits[n, t]`` predict token ``used[n] + t`` of the n-th."""
        rest = [row.ids[length:] for row, length in zip(encoded.rows, used, strict=True)]
        targets = _pad(rest, "right").to(logits.device)
        logits = logits[:, : targets.shape[1]].float()
        scores = logits.gather(2, targets[:, :, None])[:, :, 0].double()
        if self.score == "logprob":
            scores = scores - logits.logsumexp(dim=2).double()
        parts = [s[c.start - n : len(c.ids) - n] for s, c, n in zip(scores, encoded.rows, used, strict=True)]
        means = torch.stack([part.mean() for part in parts])
        return list(means.cpu().split([len(candidates) for candidates in encoded.candidates]))


def _pad(rows: Sequence[list[int]], side: Side, value: int = 0) -> Tensor:
    """Rows as an integer tensor, ``value`` where a row is shorter."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value, side)


def _valid(lengths: Iterable[int], side: Side) -> Tensor:
    """The mask of rows of these lengths."""
    return _pad([[1] * length for length in lengths], side)


@contextmanager
def _decoder_positions(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The position ids that the text decoder is called with meanwhile, if it is given any."""
    seen: list[Tensor] = []

    def look(_module: Any, _arguments: Any, options: Mapping[str, Any]) -> None:
        if isinstance(given := options.get("position_ids"), Tensor):
            seen.append(given)

    with model.get_decoder().register_forward_pre_hook(look, with_kwargs=True):
        yield seen
