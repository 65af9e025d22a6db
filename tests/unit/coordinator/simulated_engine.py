"""A worker whose next token depends on what the block tables make visible, and an engine around it."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from tests.support.tokenizers import EOS as EOS_TEXT
from tests.support.tokenizers import letters_tokenizer
from tprt.coordinator.grammar import GrammarCompiler
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.result import StepResult
from tprt.coordinator.scheduler import Scheduler
from tprt.messages import AddRequest, FinishReason, SamplingParams, ScoredStepOutput, StepInput, StepOutput
from tprt.sharding import Range
from tprt.worker.adjustment_input import make_adjustments

VOCAB_SIZE = 13
EOS = 7
DRAWN_SEED = 99
TOKENIZER = letters_tokenizer([*"abcdefg", EOS_TEXT, *"hijkl"])


def kv_value(previous: int, token_id: int, position: int) -> int:
    """Stand in for the KV of one token, which depends on all tokens before it."""
    return zlib.crc32(np.array([previous, token_id, position], np.int64).tobytes())


def logits_of(values: np.ndarray, seed: int) -> np.ndarray:
    """Stand in for model and noise: a logit for each token `[V]`, which depends on every visible KV value."""
    digest = blake2b(
        values.astype(np.int64).tobytes(), key=seed.to_bytes(8, "little"), digest_size=2 * VOCAB_SIZE
    )
    return np.frombuffer(digest.digest(), np.uint16) / 2**14 - 2.0


def next_token(values: np.ndarray, seed: int) -> int:
    """Return the token of a request that wants nothing done to its logits."""
    return int(logits_of(values, seed).argmax())


def score_of(value: int, token_id: int) -> float:
    """Stand in for the log-probability of the token after the one with this KV."""
    return -float(kv_value(value, token_id, -1) % 2**20)


def expected_scores(request: AddRequest) -> list[float]:
    """Score all tokens of a prompt but the first where that is wanted."""
    if request.sampling.prompt_logprobs is None:
        return []
    value, scores = 0, []
    prompt = request.prompt_token_ids.tolist()
    for position, (token_id, following) in enumerate(itertools.pairwise(prompt)):
        value = kv_value(value, token_id, position)
        scores.append(score_of(value, following))
    return scores


def adjusted(
    logits: np.ndarray, request: AddRequest, output: list[int], matcher: LLMatcher | None
) -> np.ndarray:
    """Do to `logits` what the request wants, from its whole history and by the definitions."""
    sampling, logits = request.sampling, logits.copy()
    ends = {EOS, *sampling.stop_token_ids} if len(output) < sampling.min_tokens else set()
    for token_id, bias in sampling.logit_bias:
        logits[token_id] += bias
    for token_id in {*request.prompt_token_ids.tolist(), *output}:
        divides = logits[token_id] > 0
        logits[token_id] *= sampling.repetition_penalty ** (-1 if divides else 1)
    for token_id in set(output):
        logits[token_id] -= sampling.frequency_penalty * output.count(token_id) + sampling.presence_penalty
    allowed = set(range(VOCAB_SIZE)) if matcher is None else allowed_by(matcher)
    possible = [token_id in (allowed - ends or allowed) for token_id in range(VOCAB_SIZE)]
    return np.where(possible, logits, -np.inf)


def allowed_by(matcher: LLMatcher) -> set[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


@cache
def make_ll_tokenizer() -> LLTokenizer:
    return LLTokenizer(TOKENIZER, eos_token=EOS)


def matcher_after(regex: str, output: list[int]) -> LLMatcher:
    """Return a matcher that has seen `output`, and nothing of another one."""
    matcher = LLMatcher(make_ll_tokenizer(), LLMatcher.grammar_from_regex(regex))
    for token_id in output:
        if not matcher.is_stopped():
            assert matcher.consume_token(token_id)
    return matcher


def expected_output(request: AddRequest, limits: SchedulerLimits) -> tuple[list[int], FinishReason]:
    """Generate without blocks, batches and limits other than those of the request."""
    sampling = request.sampling
    seed = DRAWN_SEED if sampling.seed is None else sampling.seed
    values: list[int] = []
    grammar = sampling.grammar
    for position, token_id in enumerate(request.prompt_token_ids.tolist()):
        values.append(kv_value(values[-1] if values else 0, token_id, position))
    output: list[int] = []
    while True:
        matcher = None if grammar is None else matcher_after(grammar.source, output)
        token_id = int(adjusted(logits_of(np.array(values), seed), request, output, matcher).argmax())
        output.append(token_id)
        if token_id in sampling.stop_token_ids or (token_id == EOS and not sampling.ignore_eos):
            return output, FinishReason.STOP
        total = len(request.prompt_token_ids) + len(output)
        if len(output) == sampling.max_tokens or total == limits.max_sequence_len:
            return output, FinishReason.LENGTH
        values.append(kv_value(values[-1], token_id, len(values)))


class SimulatedWorker:
    """KV blocks of numbers; checks every `StepInput` and computes from its blocks and nothing else."""

    def __init__(self, limits: SchedulerLimits, epoch: int) -> None:
        self._limits = limits
        self._epoch = epoch
        self._next_step = 0
        self._last_tokens: dict[int, int] = {}
        # What was there before must not matter: fill it with what is surely wrong.
        self._values = np.full(limits.num_blocks * limits.block_size, -7, np.int64)

    def run(self, step: StepInput) -> StepOutput:
        self._check(step)
        tokens = np.split(step.token_ids, np.cumsum(step.query_lens)[:-1])
        num_blocks = -(-step.context_lens // self._limits.block_size)
        tables = np.split(step.block_ids, np.cumsum(num_blocks)[:-1])
        logits, values = [], []
        for row, (row_tokens, table) in enumerate(zip(tokens, tables, strict=True)):
            context_len, slot = int(step.context_lens[row]), int(step.seq_slots[row])
            slots = self._slot_mapping(table, context_len)
            known = [token if token >= 0 else self._last_tokens[slot] for token in row_tokens.tolist()]
            self._write(slots, known, context_len)
            values += self._values[slots][-len(known) :].tolist()
            if step.samples[row]:
                logits.append(logits_of(self._values[slots], int(step.seeds[row])))
        sampled = self._sample(step, np.array(logits).reshape(-1, VOCAB_SIZE))
        self._last_tokens.update(zip(step.seq_slots[step.samples == 1].tolist(), sampled, strict=True))
        targets = step.prompt_row_targets.tolist()
        scored = zip(step.prompt_rows.tolist(), targets, strict=True)
        return ScoredStepOutput(
            epoch=step.epoch,
            step=step.step,
            token_ids=np.array(sampled, np.int32),
            prompt_logprobs=np.array([score_of(values[row], target) for row, target in scored], np.float32),
            prompt_top_token_ids=np.repeat(step.prompt_row_targets, step.num_prompt_top),
            prompt_top_logprobs=np.zeros(len(targets) * step.num_prompt_top, np.float32),
            num_prompt_top=step.num_prompt_top,
        )

    def _sample(self, step: StepInput, logits: np.ndarray) -> list[int]:
        """Do what a rank does to logits `[n, V]`, from the step alone."""
        rows = np.flatnonzero(step.samples)
        adjustments = make_adjustments(step, rows, Range(0, VOCAB_SIZE), torch.from_numpy)
        if adjustments is not None:
            logits = adjustments.apply(torch.from_numpy(logits)).numpy()
        tokens: list[int] = logits.argmax(axis=1).tolist()
        return tokens

    def _slot_mapping(self, table: np.ndarray, context_len: int) -> np.ndarray:
        positions, size = np.arange(context_len), self._limits.block_size
        return table[positions // size] * size + positions % size

    def _write(self, slots: np.ndarray, token_ids: list[int], context_len: int) -> None:
        for offset, token_id in enumerate(token_ids):
            position = context_len - len(token_ids) + offset
            previous = int(self._values[slots[position - 1]]) if position else 0
            self._values[slots[position]] = kv_value(previous, token_id, position)

    def _check(self, step: StepInput) -> None:
        num_rows = len(step.seq_slots)
        assert (step.epoch, step.step) == (self._epoch, self._next_step)
        self._next_step += 1
        assert 1 <= num_rows <= self._limits.max_num_seqs
        assert len(set(step.seq_slots.tolist())) == num_rows
        assert 0 <= step.seq_slots.min() <= step.seq_slots.max() < self._limits.max_num_seqs
        assert step.query_lens.min() >= 1
        assert len(step.token_ids) == step.query_lens.sum() <= self._limits.max_num_batched_tokens
        assert (step.query_lens <= step.context_lens).all()
        assert len(step.block_ids) == (-(-step.context_lens // self._limits.block_size)).sum()
        assert 0 <= step.block_ids.min() <= step.block_ids.max() < self._limits.num_blocks
        assert -1 <= step.token_ids.min() <= step.token_ids.max() < VOCAB_SIZE
        is_decode = (step.query_lens == 1) & (step.samples == 1)
        assert is_decode[: step.num_decodes].all()
        assert not is_decode[step.num_decodes :].any()
        assert (np.diff(step.prompt_rows) > 0).all()
        assert step.num_decodes <= step.prompt_rows.min(initial=step.num_decodes)
        self._check_writes_are_private(step)

    def _check_writes_are_private(self, step: StepInput) -> None:
        """No two rows write one block, and nobody writes a block that another row reads."""
        size = self._limits.block_size
        num_blocks = -(-step.context_lens // size)
        first_written = (step.context_lens - step.query_lens) // size
        tables = np.split(step.block_ids, np.cumsum(num_blocks)[:-1])
        for row, table in enumerate(tables):
            assert len(set(table.tolist())) == len(table)
            others = [block for index, other in enumerate(tables) if index != row for block in other.tolist()]
            assert not set(table[first_written[row] :].tolist()) & set(others)


@dataclass
class Tracked:
    """A request as its client sees it."""

    request: AddRequest
    token_ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    reason: FinishReason = FinishReason.NONE
    aborted: bool = False


class Engine:
    """A scheduler, a simulated worker, and the clients' view of every request."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        grammars = GrammarCompiler(lambda: TOKENIZER, (EOS,), VOCAB_SIZE)
        self.scheduler = Scheduler(limits, (EOS,), VOCAB_SIZE, draw_seed=lambda: DRAWN_SEED, grammars=grammars)
        self.worker = SimulatedWorker(limits, 0)
        self.epoch = 0
        self.requests: dict[int, Tracked] = {}
        self.output: StepOutput | None = None
        self.ahead: StepOutput | None = None
        self.num_ahead = 0
        self._ids = itertools.count()

    def add(self, prompt: list[int], sampling: SamplingParams) -> int:
        key = next(self._ids)
        request = AddRequest(key + 1000, np.array(prompt, np.int32), sampling)
        self.scheduler.add(key, request)
        self.requests[key] = Tracked(request)
        return key

    def abort(self, key: int) -> None:
        self.scheduler.abort(key)
        if self.requests[key].reason == FinishReason.NONE:
            self.requests[key].aborted = True

    def schedule(self) -> StepInput | None:
        step = self.scheduler.schedule()
        self.output = None if step is None else self.worker.run(step)
        return step

    def schedule_ahead(self) -> None:
        """Put a second step in flight if the scheduler has one."""
        assert self.output is not None
        if self.ahead is None and (step := self.scheduler.schedule_ahead()) is not None:
            self.ahead = self.worker.run(step)
            self.num_ahead += 1

    def update(self) -> StepResult:
        assert self.output is not None
        result = self.scheduler.update(self.output)
        self.output, self.ahead = self.ahead, None
        self._take_scores(result)
        rows = zip(result.keys.tolist(), result.token_ids.tolist(), result.finish_reasons.tolist(), strict=True)
        for row, (key, token_id, reason) in enumerate(rows):
            tracked = self.requests[key]
            assert not tracked.aborted, "an aborted request got a token"
            assert tracked.reason == FinishReason.NONE, "a request got a token after its end"
            assert result.request_ids[row] == tracked.request.request_id
            assert 0 <= result.num_cached_tokens[row] < len(tracked.request.prompt_token_ids)
            tracked.token_ids.append(token_id)
            tracked.reason = FinishReason(reason)
        return result

    def _take_scores(self, result: StepResult) -> None:
        for key, news in result.prompt_logprobs:
            tracked = self.requests[key]
            wanted = tracked.request.sampling.prompt_logprobs
            assert not tracked.aborted, "an aborted request got log-probabilities"
            assert not tracked.token_ids, "log-probabilities of a prompt came after a token of its output"
            assert news.request_id == tracked.request.request_id
            assert (news.num_top, len(news.top_logprobs)) == (wanted, wanted * len(news.logprobs))
            first = len(tracked.scores) + 1
            targets = tracked.request.prompt_token_ids[first : first + len(news.logprobs)]
            assert news.top_token_ids.tolist() == np.repeat(targets, wanted).tolist()
            tracked.scores += news.logprobs.tolist()

    def replace_worker(self) -> None:
        self.epoch += 1
        self.worker = SimulatedWorker(self.limits, self.epoch)
        self.output = self.ahead = None
        self.scheduler.reset_for_epoch(self.epoch)

    def finish(self) -> None:
        """Run until nothing is left, and compare every output with the unconstrained one."""
        # Every step computes something, and preemption cannot undo more than all the rest.
        for _ in range(20000):
            if self.output is None and self.schedule() is None:
                break
            self.schedule_ahead()
            self.update()
            self.scheduler.check()
        assert not self.scheduler.has_unfinished
        assert self.scheduler.num_free_blocks == self.limits.num_blocks
        for tracked in self.requests.values():
            tokens, reason = expected_output(tracked.request, self.limits)
            scores = expected_scores(tracked.request)
            assert tracked.scores == (scores[: len(tracked.scores)] if tracked.aborted else scores)
            if tracked.aborted:
                assert tracked.token_ids == tokens[: len(tracked.token_ids)]
            else:
                assert (tracked.token_ids, tracked.reason) == (tokens, reason)
