"""Continuous batching: finished sequences leave at once, waiting ones enter as pages and rows come free.

A prompt is computed once and its pages are shared by its k samples. A sample's own pages are reserved for all its new
tokens when it enters, so nothing is ever thrown out or computed twice, and bits never depend on the memory. Prompts
enter in the order they came, all samples of one before the next.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from hpsafety.errors import InputError, RunError
from hpsafety.rollout import graphs, passes
from hpsafety.rollout.kv_cache import make_cache, page_bytes
from hpsafety.rollout.sampler import Rollout, Settings, row_seed


class NotFinite(RunError):
    """A token whose logprob is not a number: damaged weights. prompt_index says where it came up first."""

    def __init__(self, message: str, prompt_index: int):
        super().__init__(message)
        self.prompt_index = prompt_index


@dataclass(frozen=True, slots=True)
class Request:
    """k responses to one prompt. prompt_index is part of the key of every draw, its own of each request, and global
    over ranks."""

    prompt: list[int]
    k: int
    prompt_index: int


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token; finish is None while the response goes on, then "stop" or "length"."""

    prompt_index: int
    sample_index: int
    token: int
    logprob: float
    finish: str | None


@dataclass(eq=False, slots=True)
class _Prompt:
    """A prompt in the cache. `hidden` (D,) predicts first tokens; it is kept until all samples have entered."""

    request: Request
    pages: list[int]
    entered: int = 0
    hidden: torch.Tensor | None = None


@dataclass(eq=False, slots=True)
class _Sequence:
    prompt: _Prompt
    sample_index: int
    pages: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


class Engine:
    """Samples from `model`, whose weights are read in place at every step.

    capture  how decode steps become graphs (graphs.py): capture_cuda on a GPU; the tests give their own
    prefilled_tokens, decoded_tokens  what was computed so far
    Raises InputError when the memory holds not one page.
    """

    def __init__(self, model, settings: Settings, capture=None):
        self.model, self.settings = model, settings
        if model.embed.device.type == "cuda":
            capture = graphs.capture_cuda
        self.cache = make_cache(model, settings, spare=capture is not None)
        self.own_pages = self.cache.pages_for(settings.max_new_tokens - 1)  # the last token is never fed
        self.graphs = None  # on a CPU a step's kernels are called one by one
        if capture is not None:
            sequential, last = settings.batch_invariant, self.cache.num_pages
            self.graphs = graphs.DecodeGraphs(model, self.cache, self.own_pages, sequential, last, capture)
        self.prefilled_tokens = self.decoded_tokens = 0
        self._waiting: deque[Request] = deque()
        self._source: Iterator[Request] = iter(())  # of more requests, pulled when none waits
        self._entering: _Prompt | None = None  # in the cache, with samples that have not entered yet
        self._running: list[_Sequence] = []
        self._tokens = self._tables = None  # the running sequences' last tokens (B,), and their tables

    def check(self, prompt_tokens: int) -> None:
        """ValueError: a prompt of so many tokens is empty or too long. InputError: the memory is too small for it."""
        new, context = self.settings.max_new_tokens, self.model.config.max_positions
        if prompt_tokens < 1:
            raise ValueError("is empty; give it at least one token")
        if prompt_tokens + new > context:
            raise ValueError(
                f"has {prompt_tokens} tokens, which with {new} new ones exceed the context of {context}; "
                "shorten it or lower max_new_tokens"
            )
        need, have = self.cache.pages_for(prompt_tokens) + self.own_pages, self.cache.num_pages
        if need > have:
            each = page_bytes(self.model.config, self.cache.page_size, self.cache.k.dtype)
            raise InputError(
                f"the key-value cache is too small for one sequence: a prompt of {prompt_tokens} tokens with {new} new "
                f"ones needs {need * each:,} bytes and {have * each:,} are there; raise --kv-memory to "
                f"{math.ceil(need * each / 2**20)}MB or lower --max-new-tokens"
            )

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue. Raises as `check` does, naming the prompt; ValueError for k < 1."""
        if request.k < 1:
            raise ValueError(f"generate: k must be at least 1, got {request.k}")
        try:
            self.check(len(request.prompt))
        except ValueError as error:
            raise ValueError(f"generate: prompt {request.prompt_index} {error}") from None
        self._waiting.append(request)

    def step(self) -> list[Token]:
        """Lets in what fits, then samples one token for every running sequence; [] when there is nothing left to do.

        Raises NotFinite, naming the prompt, when a token's logprob is not a number.
        """
        return [
            Token(s.prompt.request.prompt_index, s.sample_index, s.tokens[-1], s.logprobs[-1], s.finish)
            for s in self._step()
        ]

    def rollouts(self, requests: Iterable[Request]) -> Iterator[Rollout]:
        """Every response as it finishes. Requests are pulled one at a time, when none waits and a row is free."""
        self._source = iter(requests)
        while stepped := self._step():
            for s in stepped:
                if s.finish:
                    key = s.prompt.request.prompt_index, s.sample_index
                    yield Rollout(*key, s.tokens, s.logprobs, s.finish)

    def groups(self, requests: Iterable[Request]) -> Iterator[tuple[int, list[Rollout]]]:
        """(prompt_index, its k responses in order) as the last of them finishes."""
        sizes: dict[int, int] = {}
        parts: dict[int, list[Rollout]] = {}

        def noted():
            for request in requests:
                sizes[request.prompt_index] = request.k
                yield request

        for rollout in self.rollouts(noted()):
            index = rollout.prompt_index
            parts.setdefault(index, []).append(rollout)
            if len(parts[index]) == sizes[index]:
                del sizes[index]
                yield index, sorted(parts.pop(index), key=lambda r: r.sample_index)

    # ---- a step ----

    def _step(self) -> list[_Sequence]:
        """The sequences that got a token; each has it as its last."""
        hidden = []
        entered = self._admit()
        if self._running:
            hidden.append(self._decode())
            self.decoded_tokens += len(self._running)
        if entered:
            hidden.append(torch.stack([s.prompt.hidden for s in entered]))
            self._running += entered
            self._make_tables()
        if not hidden:
            return []
        for s in entered:
            if s.prompt is not self._entering:
                s.prompt.hidden = None
        tables = self._tables
        tokens, logprobs = passes.draw(
            self.model, torch.cat(hidden), self.settings, tables.seeds, tables.made.long()
        )
        tables.made += 1
        stepped = self._running
        for s, token, logprob in zip(stepped, tokens.tolist(), logprobs.tolist(), strict=True):
            self._keep(s, token, logprob)
        self._tokens = tokens
        if any(s.finish for s in stepped):
            self._leave()
        return stepped

    def _decode(self) -> torch.Tensor:
        if self.graphs is not None:
            return self.graphs.decode(self._tokens, self._tables)
        sequential = self.settings.batch_invariant
        return passes.decode(self.model, self._tokens, self._tables, self.cache, sequential)

    def _admit(self) -> list[_Sequence]:
        """Lets samples in while rows and pages last; their prompts are computed here, as one packed row."""
        entered: list[_Sequence] = []
        prompts: list[_Prompt] = []
        while len(self._running) + len(entered) < self.settings.max_batch:
            if self._entering is None:
                budget = self.settings.prefill_tokens - sum(len(p.request.prompt) for p in prompts)
                self._entering = self._next_prompt(budget if prompts else None)
                if self._entering is None:
                    break
                prompts.append(self._entering)
            if self.cache.num_free < self.own_pages:
                break
            entered.append(self._enter(self._entering))
        if prompts:
            self._prefill(prompts)
        return entered

    def _next_prompt(self, budget: int | None) -> _Prompt | None:
        """The next request with its pages; None where there is none, or no room for it and one sample.

        budget  prompt tokens that may still be computed in this step; None for any number
        """
        if not self._waiting:
            request = next(self._source, None)
            if request is None:
                return None
            self.add(request)
        prompt = self._waiting[0].prompt
        need = self.cache.pages_for(len(prompt))
        if self.cache.num_free < need + self.own_pages or (budget is not None and len(prompt) > budget):
            return None
        return _Prompt(self._waiting.popleft(), self.cache.take(need))

    def _enter(self, prompt: _Prompt) -> _Sequence:
        request, index = prompt.request, prompt.entered
        prompt.entered += 1
        if prompt.entered < request.k:
            self.cache.hold(prompt.pages)  # the engine's own hold passes to the last sample
        else:
            self._entering = None
        seed = row_seed(self.settings.seed, request.prompt_index, index)
        return _Sequence(prompt, index, self.cache.take(self.own_pages), seed)

    def _prefill(self, prompts: list[_Prompt]) -> None:
        tokens = [p.request.prompt for p in prompts]
        rows = passes.prefill(self.model, tokens, [p.pages for p in prompts], self.cache)
        for prompt, row in zip(prompts, rows, strict=True):
            prompt.hidden = row
        self.prefilled_tokens += sum(map(len, tokens))

    def _keep(self, s: _Sequence, token: int, logprob: float) -> None:
        if math.isnan(logprob):
            index = s.prompt.request.prompt_index
            where = f"prompt {index}, sample {s.sample_index}: the logits of new token {len(s.tokens)} are not finite"
            raise NotFinite(f"{where} (all count from 0); the model's weights are damaged", index)
        s.tokens.append(token)
        s.logprobs.append(logprob)
        if token in self.settings.stop:
            s.finish = "stop"
        elif len(s.tokens) == self.settings.max_new_tokens:
            s.finish = "length"

    def _leave(self) -> None:
        """Takes the finished sequences out and gives their pages back."""
        for s in self._running:
            if s.finish:
                self.cache.release(s.pages)
                self.cache.release(s.prompt.pages)
        rows = [row for row, s in enumerate(self._running) if not s.finish]
        self._running = [self._running[row] for row in rows]
        if rows:
            self._tokens = self._tokens[torch.tensor(rows, device=self._tokens.device)]
            self._make_tables()

    def _make_tables(self) -> None:
        prompts = list(dict.fromkeys(s.prompt for s in self._running))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        running = self._running
        self._tables = passes.make_tables(
            [len(s.tokens) for s in running], [s.pages for s in running], [place[s.prompt] for s in running],
            [p.pages for p in prompts], [len(p.request.prompt) for p in prompts], [s.seed for s in running],
            self.model.embed.device,
        )  # fmt: skip
