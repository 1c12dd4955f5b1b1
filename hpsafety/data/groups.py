"""Prompt groups: K responses to one prompt in one ragged row of tokens, the prompt once, nothing padded.

T tokens, S segments, N response tokens, R responses.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """One prompt and its responses, as token ids; checked when packed.

    prompt     at least one token
    responses  at least one response of at least one token each
    train      per response one bool per token: is it trained on; None trains on all of them
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    train: Sequence[Sequence[bool]] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed row of groups; all tensors contiguous, on one device. Made by `pack`."""

    tokens: torch.Tensor  # (T,) int64: each prompt, then its responses, group after group
    positions: torch.Tensor  # (T,) int32: rotary position; every response starts at len(prompt)
    segments: (
        torch.Tensor
    )  # (S, 4) int32: start, end, prefix_start, prefix_end; equal prefix ends mean no prefix
    predict_rows: torch.Tensor  # (N,) int64: the row of `hidden` that predicts response token n
    targets: torch.Tensor  # (N,) int64: that token
    train_mask: torch.Tensor  # (N,) bool: is it trained on
    trained: torch.Tensor  # (num_trained,) int64: the places of train_mask's ones, so that no device is asked
    cu_responses: torch.Tensor  # (R+1,) int32: offsets of the responses in N; order: group, response, token
    last_rows: torch.Tensor  # (R,) int64: the row of each response's last token
    group_of: torch.Tensor  # (R,) int32: the group of each response
    tokens_equiv: int  # tokens with the prompt counted once per response
    num_trained: int  # sum of train_mask, known on the host without a device sync
    groups: tuple[PromptGroup, ...] = ()  # what was packed, in order: a loss finds margins and labels there

    @property
    def tokens_computed(self) -> int:
        """T: tokens that pass through the layers; a shared prompt counts once per group."""
        return self.tokens.numel()

    def to(self, device) -> "Batch":
        """The same batch with its tensors on `device`: copies only where they are elsewhere, and waits for no GPU."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is torch.Tensor}
        if torch.device(device).type == "cuda" and torch.cuda.is_available():
            tensors = {name: t.pin_memory() if t.device.type == "cpu" else t for name, t in tensors.items()}
        return replace(
            self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        )


def pack(groups: Sequence[PromptGroup], join_single: bool = True) -> Batch:
    """Pack groups into one ragged row without padding (fields: see `Batch`).

    A prompt with a single response is one attention segment; with more, the prompt is a segment and every
    response is one that also sees the prompt. No groups give an empty batch.
    join_single  False keeps a single response apart from its prompt too: it then has the same bits as among others
    Raises ValueError, naming the group, for an empty prompt or response, no responses, a `train` that does
    not match the responses, and a negative token id; TypeError for tokens that are not integers.
    """
    groups = list(groups)
    for index, group in enumerate(groups):
        _check_group(index, group)
    num_responses = np.array([len(group.responses) for group in groups], dtype=np.int64)
    # A piece is a prompt or a response, in the order of the row.
    lengths = np.array([len(piece) for group in groups for piece in _pieces(group)], dtype=np.int64)
    tokens = _flatten(groups)
    _check_token_ids(tokens, np.repeat(np.arange(len(groups)), num_responses + 1), lengths)

    ends = np.cumsum(lengths)
    starts = ends - lengths
    is_prompt = np.zeros(len(lengths), dtype=bool)
    is_prompt[np.cumsum(num_responses + 1) - (num_responses + 1)] = True
    prompt_start = np.repeat(starts[is_prompt], num_responses + 1)  # of each piece's group
    prompt_end = np.repeat(ends[is_prompt], num_responses + 1)
    first_position = np.where(is_prompt, 0, prompt_end - prompt_start)
    positions = np.arange(len(tokens)) + np.repeat(first_position - starts, lengths)

    joined = np.repeat((num_responses == 1) & join_single, num_responses + 1)

    response = ~is_prompt
    response_lengths = lengths[response]
    cu_responses = np.concatenate([[0], np.cumsum(response_lengths)])
    within = np.arange(cu_responses[-1]) - np.repeat(cu_responses[:-1], response_lengths)
    rows = np.repeat(starts[response], response_lengths) + within
    # A response's first token is predicted by the prompt's last row, every other by the row before it.
    predict_rows = np.where(within == 0, np.repeat(prompt_end[response], response_lengths), rows) - 1
    train_mask = _train_mask(groups, int(cu_responses[-1]))
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=_tensor(positions, np.int32),
        segments=_tensor(_segments(starts, ends, prompt_start, prompt_end, is_prompt, joined), np.int32),
        predict_rows=_tensor(predict_rows, np.int64),
        targets=_tensor(tokens[rows], np.int64),
        train_mask=torch.from_numpy(train_mask),
        trained=torch.from_numpy(np.flatnonzero(train_mask)),
        cu_responses=_tensor(cu_responses, np.int32),
        last_rows=_tensor(ends[response] - 1, np.int64),
        group_of=_tensor(np.repeat(np.arange(len(groups)), num_responses), np.int32),
        tokens_equiv=int((prompt_end - prompt_start)[response].sum() + response_lengths.sum()),
        num_trained=int(train_mask.sum()),
        groups=tuple(groups),
    )


def _segments(starts, ends, prompt_start, prompt_end, is_prompt, joined) -> np.ndarray:
    """(S, 4) start, end, prefix_start, prefix_end; in a joined group the only response is part of the prompt's.

    joined  bool per piece: is its group of one response, in one segment
    """
    ends = np.where(is_prompt & joined, np.append(ends[1:], 0), ends)
    prefix_start = np.where(is_prompt, starts, prompt_start)
    prefix_end = np.where(is_prompt, starts, prompt_end)
    return np.stack([starts, ends, prefix_start, prefix_end], axis=1)[is_prompt | ~joined]


def _pieces(group: PromptGroup):
    return chain((group.prompt,), group.responses)


def _flatten(groups) -> np.ndarray:
    # array refuses floats, which numpy would cut to integers; one call is faster than one a piece.
    flat = array("q", list(chain.from_iterable(piece for group in groups for piece in _pieces(group))))
    return np.frombuffer(flat, dtype=np.int64) if flat else np.zeros(0, dtype=np.int64)


def _train_mask(groups, num_targets: int) -> np.ndarray:
    mask = np.ones(num_targets, dtype=bool)
    offset = 0
    for group in groups:
        for index, response in enumerate(group.responses):
            if group.train is not None:
                mask[offset : offset + len(response)] = group.train[index]
            offset += len(response)
    return mask


def _check_group(index: int, group: PromptGroup) -> None:
    if len(group.prompt) == 0:
        raise ValueError(f"group {index}: the prompt is empty; a prompt needs at least one token")
    if len(group.responses) == 0:
        raise ValueError(f"group {index}: no responses; a group needs at least one")
    for k, response in enumerate(group.responses):
        if len(response) == 0:
            raise ValueError(f"group {index}: response {k} is empty; end it with its end-of-turn token")
    if group.train is None:
        return
    if len(group.train) != len(group.responses):
        raise ValueError(
            f"group {index}: train has {len(group.train)} lists for {len(group.responses)} responses"
        )
    for k, (mask, response) in enumerate(zip(group.train, group.responses, strict=True)):
        if len(mask) != len(response):
            raise ValueError(
                f"group {index}: train[{k}] has {len(mask)} flags for {len(response)} response tokens"
            )


def _check_token_ids(tokens: np.ndarray, group_of_piece: np.ndarray, lengths: np.ndarray) -> None:
    if tokens.size and tokens.min() < 0:
        row = int(np.argmax(tokens < 0))
        index = group_of_piece[np.searchsorted(np.cumsum(lengths), row, side="right")]
        raise ValueError(f"group {index}: token id {tokens[row]} is negative; token ids start at 0")


def _tensor(values: np.ndarray, dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
