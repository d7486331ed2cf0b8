"""Scores of candidate answers: the prompt runs once, and its candidates continue from its KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mir_lightning.probing.choices.items import ChoiceItem
from mir_lightning.probing.choices.probe import ChoiceProbe, EncodedChoices, common_prefix, valid_rows
from mir_lightning.vlm import compute_dtype, execution_device

Score = Literal["logit", "logprob"]
Forward = Callable[..., Any]


class CandidateScorer:
    """Mean scores of candidates' tokens under a model.

    Args:
        model: a Hugging Face model.
        probe: its items are scored.
        score: what each token gets: its raw ``"logit"``, or ``"logprob"``.
        forward: called with a forward's inputs; it reaches the model.
        in_step: run the same number of forwards for every batch, as sharded models need.
    """

    def __init__(
        self, model: PreTrainedModel, probe: ChoiceProbe, score: Score, forward: Forward, in_step: bool
    ) -> None:
        self.model = model
        self.probe = probe
        self.score = score
        self.forward = forward
        self.in_step = in_step
        self.device = execution_device(model)
        self.dtype = compute_dtype(model)
        self.pad = probe.processor.tokenizer.pad_token_id
        self.accepted = inspect.signature(model.forward).parameters
        self.keeps_deltas = any(hasattr(module, "rope_deltas") for module in model.modules())
        self._logits_dtype = torch.float32

    def shared(self, items: Sequence[ChoiceItem]) -> list[Tensor]:
        """Scores ``[candidates]`` by item: one forward for the prompts, one for the rest of all candidates.

        Raises:
            ValueError: if the model gives no cache that holds the prompt.
        """
        encoded = self.probe.encode(items)
        lengths = encoded.shared()
        with _decoder_positions(self.model) as seen:
            first = self._run(**self._prefixes(encoded, lengths), use_cache=True, **self._last_logits(1))
        cache = first.past_key_values
        width = max(lengths)
        if not isinstance(cache, Cache) or cache.get_seq_length() != width:
            raise ValueError(f"{type(self.model).__name__} gave no cache of the {width} prompt tokens.")
        owner = [i for i, candidates in enumerate(encoded.candidates) for _ in candidates]
        rows = [candidate for candidates in encoded.candidates for candidate in candidates]
        rest = [row.ids[lengths[i] :] for i, row in zip(owner, rows, strict=True)]
        logits = first.logits[:, -1:][owner]  # [N, 1, V], of the first token of each rest
        if self.in_step or max(map(len, rest)) > 1:
            tails = _pad([tokens[:-1] or tokens for tokens in rest], "right", self.pad)
            valid = _pad([[1] * len(tokens[:-1] or tokens) for tokens in rest], "right")
            cache.batch_select_indices(torch.tensor(owner, device=self.device))
            prefix = _pad([[1] * length for length in lengths], "left")[owner]
            output = self._run(
                input_ids=tails,
                attention_mask=torch.cat([prefix, valid], dim=1),
                past_key_values=cache,
                use_cache=True,
                **self._next_positions(seen, owner, width, tails.shape[1]),
            )
            logits = torch.cat([logits, output.logits], dim=1)
        starts = [row.start - lengths[i] for i, row in zip(owner, rows, strict=True)]
        return self._by_item(encoded, self._means(logits, rest, starts))

    def whole(self, items: Sequence[ChoiceItem]) -> list[Tensor]:
        """Scores ``[candidates]`` by item: one forward in which each candidate has its prompt before it."""
        encoded = self.probe.encode(items)
        first, logits = self._whole_logits(items, encoded)
        rows = [candidate for candidates in encoded.candidates for candidate in candidates]
        rest = [row.ids[first + 1 :] for row in rows]
        return self._by_item(encoded, self._means(logits, rest, [row.start - first - 1 for row in rows]))

    def _whole_logits(self, items: Sequence[ChoiceItem], encoded: EncodedChoices) -> tuple[int, Tensor]:
        """Logits ``[N, T, V]`` of all candidates with their prompts, from the first position that any needs on."""
        inputs = self.probe.repeat(items)
        ids = [candidate.ids for candidates in encoded.candidates for candidate in candidates]
        prompts = valid_rows(inputs, inputs["input_ids"])
        kept = [common_prefix(prompt, row) for prompt, row in zip(prompts, ids, strict=True)]
        sequences = {
            key: _pad([v[:k] + [0] * (len(row) - k) for v, k, row in zip(values, kept, ids, strict=True)], "right")
            for key, values in _token_values(inputs).items()
        }
        sequences["input_ids"] = _pad(ids, "right", self.pad)
        sequences["attention_mask"] = _pad([[1] * len(row) for row in ids], "right")
        first = min(encoded.shared()) - 1
        width = sequences["input_ids"].shape[1]
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self.accepted else {}
        output = self._run(**{**inputs, **sequences}, **options, **self._last_logits(width - first))
        return first, output.logits[:, first - width :]

    def greedy(self, items: Sequence[ChoiceItem], count: int) -> list[list[int]]:
        """By item, the ``count`` token ids that follow its prompt, the most likely one at each step."""
        encoded = self.probe.encode(items)
        lengths = [len(prompt) for prompt in encoded.prompts]
        with _decoder_positions(self.model) as seen:
            output = self._run(**self._prefixes(encoded, lengths), use_cache=True, **self._last_logits(1))
        mask = _pad([[1] * length for length in lengths], "left")
        made = [output.logits[:, -1].argmax(dim=-1)]
        while len(made) < count:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = self._next_positions(seen, range(len(items)), max(lengths), len(made))
            output = self._run(
                input_ids=made[-1][:, None],
                attention_mask=mask,
                past_key_values=output.past_key_values,
                use_cache=True,
                **{key: value[..., -1:] for key, value in positions.items()},
            )
            made.append(output.logits[:, -1].argmax(dim=-1))
        return torch.stack(made, dim=1).tolist()

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
        cut = {
            key: _pad([v[:length] for v, length in zip(values, lengths, strict=True)], "left")
            for key, values in _token_values(encoded.inputs).items()
        }
        cut["input_ids"] = _pad(
            [p[:length] for p, length in zip(encoded.prompts, lengths, strict=True)], "left", self.pad
        )
        cut["attention_mask"] = _pad([[1] * length for length in lengths], "left")
        return {**encoded.inputs, **cut}

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

    def _means(self, logits: Tensor, rest: Sequence[list[int]], starts: Sequence[int]) -> Tensor:
        """Mean scores ``[N]`` of tokens ``rest[n][starts[n]:]``; ``logits[n, t]`` predict ``rest[n][t]``."""
        targets = _pad(rest, "right").to(logits.device)
        logits = logits[:, : targets.shape[1]].float()
        scores = logits.gather(2, targets[:, :, None])[:, :, 0].double()
        if self.score == "logprob":
            scores = scores - logits.logsumexp(dim=2).double()
        means = [row[start : len(ids)].mean() for row, start, ids in zip(scores, starts, rest, strict=True)]
        return torch.stack(means).cpu()

    def _by_item(self, encoded: EncodedChoices, scores: Tensor) -> list[Tensor]:
        return list(scores.split([len(candidates) for candidates in encoded.candidates]))


def _token_values(inputs: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """Inputs that have a value a token, ``[B, S]``, without padding."""
    shape = inputs["input_ids"].shape
    return {
        key: valid_rows(dict(inputs), value)
        for key, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == shape
    }


def _pad(rows: Sequence[list[int]], side: Literal["left", "right"], value: int = 0) -> Tensor:
    """Rows as an integer tensor, ``value`` where a row is shorter."""
    width = max(map(len, rows))
    gaps = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([row + gap if side == "right" else gap + row for row, gap in zip(rows, gaps, strict=True)])


@contextmanager
def _decoder_positions(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The position ids that the text decoder is called with meanwhile, if it is given any."""
    seen: list[Tensor] = []

    def look(_module: Any, _arguments: Any, options: Mapping[str, Any]) -> None:
        if isinstance(given := options.get("position_ids"), Tensor):
            seen.append(given)

    handle = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
