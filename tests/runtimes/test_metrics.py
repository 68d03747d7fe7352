"""Metrics against arbitrary-precision arithmetic, hand-computed cases and numpy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError, UsageError, VerificationError
from runtimes import metrics
from runtimes.metrics import (
    Comparison,
    ComparisonAccumulator,
    Perplexity,
    Protocol,
    kl_divergence,
    token_nll,
    windows,
)


def exact_log_softmax(row: torch.Tensor) -> list[Decimal]:
    """log softmax with 60 digits."""
    values = [Decimal(value) for value in row.tolist()]
    normalizer = sum(value.exp() for value in values).ln()
    return [value - normalizer for value in values]


def exact_nll(row: torch.Tensor, target: int) -> float:
    with localcontext(prec=60):
        return float(-exact_log_softmax(row)[target])


def exact_kl(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    with localcontext(prec=60):
        pairs = zip(exact_log_softmax(reference), exact_log_softmax(candidate), strict=True)
        return float(sum(p.exp() * (p - q) for p, q in pairs))


def random_logits(seed: int, tokens: int, vocabulary: int, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, vocabulary, generator=generator)


def random_targets(seed: int, tokens: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))


class TestWindows:
    def test_llama_perplexity_scores_what_llama_perplexity_scores(self) -> None:
        stream, context, bos = list(range(100, 131)), 8, 7
        published = []  # (tokens seen, token predicted), by the loops of tools/perplexity
        for start in range(0, len(stream) // context * context, context):
            chunk = [bos, *stream[start + 1 : start + context]]
            published += [
                (chunk[: position + 1], stream[start + position + 1])
                for position in range(context // 2, context - 1)
            ]
        protocol = Protocol.llama_perplexity(context)
        ours = [
            (window[: position + 1].tolist(), window[position + 1].item())
            for window in windows(stream, protocol, bos)
            for position in range(protocol.first, context - 1)
        ]
        assert ours == published
        assert len(ours) == 3 * protocol.scored

    def test_llama_perplexity_scores_255_of_512(self) -> None:
        protocol = Protocol.llama_perplexity()
        assert (protocol.context, protocol.first, protocol.scored) == (512, 256, 255)

    def test_gptq_windows_keep_the_first_token_and_score_all(self) -> None:
        protocol = Protocol.gptq_windows(4)
        cut = windows([1, 2, 3, 4, 5, 6, 7, 8, 9], protocol, bos_id=0)
        assert cut.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert cut.dtype == torch.int64
        assert (protocol.first, protocol.scored) == (0, 3)
        assert Protocol.gptq_windows().context == 2048

    def test_no_bos_leaves_the_text_alone(self) -> None:
        cut = windows([5, 6, 7, 8], Protocol.llama_perplexity(4), bos_id=None)
        assert cut.tolist() == [[5, 6, 7, 8]]

    def test_limit_takes_the_first_windows(self) -> None:
        stream = list(range(1, 13))
        protocol = Protocol.llama_perplexity(4)
        assert windows(stream, protocol, 0, limit=2).tolist() == [[0, 2, 3, 4], [0, 6, 7, 8]]
        assert len(windows(stream, protocol, 0, limit=99)) == 3
        assert stream == list(range(1, 13))

    def test_short_text_says_how_many_tokens_are_needed(self) -> None:
        with pytest.raises(InputError, match=r"has 511 tokens, one window needs 512"):
            windows([1] * 511, Protocol.llama_perplexity(), 0)

    def test_senseless_values_are_refused(self) -> None:
        with pytest.raises(UsageError, match="nothing to score"):
            Protocol.llama_perplexity(2)
        with pytest.raises(UsageError, match="limit 0"):
            windows([1] * 8, Protocol.gptq_windows(4), None, limit=0)


class TestTokenNll:
    def test_by_hand(self) -> None:
        logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]], dtype=torch.float64)
        nll = token_nll(logits, torch.tensor([0, 1]))
        assert nll.tolist() == pytest.approx([math.log(4), math.log(4 / 3)], rel=1e-15)

    @pytest.mark.parametrize("scale", [1e-3, 4.0, 80.0, 1e4])
    def test_float64_accuracy(self, scale: float) -> None:
        logits = random_logits(1, 12, 50, scale)
        targets = random_targets(2, 12, 50)
        expected = [exact_nll(*pair) for pair in zip(logits, targets.tolist(), strict=True)]
        nll = token_nll(logits, targets)
        assert nll.dtype == torch.float64
        assert nll.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-15 * scale)

    def test_block_size_does_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits, targets = random_logits(3, 23, 17), random_targets(4, 23, 17)
        whole = token_nll(logits, targets)
        monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 5 * 17)
        assert torch.equal(token_nll(logits, targets), whole)
        monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 1)
        assert torch.equal(token_nll(logits, targets), whole)

    def test_no_tokens(self) -> None:
        empty = token_nll(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
        assert empty.shape == (0,)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, bad: float) -> None:
        logits = random_logits(5, 4, 6)
        logits[2, 3] = bad
        with pytest.raises(VerificationError, match="not finite"):
            token_nll(logits, random_targets(6, 4, 6))

    @pytest.mark.parametrize("bad", [-1, 6])
    def test_target_outside_the_vocabulary(self, bad: int) -> None:
        with pytest.raises(InputError, match="outside the vocabulary"):
            token_nll(random_logits(7, 2, 6), torch.tensor([0, bad]))

    def test_wrong_shape(self) -> None:
        with pytest.raises(VerificationError, match="do not fit"):
            token_nll(random_logits(8, 3, 6), torch.tensor([0, 1]))


class TestKlDivergence:
    def test_by_hand(self) -> None:
        quarters = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
        halves = torch.zeros(1, 2)
        forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
        backward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
        assert kl_divergence(quarters, halves).item() == pytest.approx(forward, rel=1e-14)
        assert kl_divergence(halves, quarters).item() == pytest.approx(backward, rel=1e-14)

    @pytest.mark.parametrize(("noise", "rel"), [(1e-5, 1e-4), (1e-2, 1e-10), (3.0, 1e-12)])
    def test_accuracy_down_to_parity(self, noise: float, rel: float) -> None:
        reference = random_logits(11, 8, 40).double()
        candidate = reference + noise * random_logits(12, 8, 40, 1.0).double()
        expected = [exact_kl(*pair) for pair in zip(reference, candidate, strict=True)]
        assert kl_divergence(reference, candidate).tolist() == pytest.approx(expected, rel=rel)

    def test_ignores_a_shift_and_is_zero_on_itself(self) -> None:
        logits = random_logits(13, 6, 30).double()
        assert torch.equal(kl_divergence(logits, logits), torch.zeros(6, dtype=torch.float64))
        assert kl_divergence(logits, logits + 5).max() < 1e-14

    def test_stays_finite_where_a_probability_vanishes(self) -> None:
        peaked = torch.tensor([[2000.0, 0.0]])
        flat = torch.zeros(1, 2)
        assert kl_divergence(peaked, flat).item() == pytest.approx(math.log(2))
        assert kl_divergence(flat, peaked).item() == pytest.approx(1000 - math.log(2))

    def test_vocabularies_must_agree(self) -> None:
        with pytest.raises(VerificationError, match="different shapes"):
            kl_divergence(torch.zeros(2, 5), torch.zeros(2, 6))


class TestPerplexity:
    def test_standard_error_is_that_of_llama_perplexity(self) -> None:
        nll = random_logits(21, 1, 500).abs().double()[0]
        count = nll.numel()
        mean = sum(nll.tolist()) / count
        variance = sum(value * value for value in nll.tolist()) / count - mean * mean
        result = Perplexity.from_nll(nll)
        assert result.ppl == pytest.approx(math.exp(mean))
        assert result.mean_nll == pytest.approx(mean)
        assert result.stderr == pytest.approx(
            math.exp(mean) * math.sqrt(variance / (count - 1)), rel=1e-9
        )
        assert result.tokens == count

    def test_one_token_has_no_error_estimate(self) -> None:
        assert math.isnan(Perplexity.from_nll(torch.tensor([1.0]).double()).stderr)

    def test_a_broken_model_overflows_to_infinity(self) -> None:
        assert Perplexity.from_nll(torch.tensor([800.0, 800.0]).double()).ppl == math.inf


def accumulate(
    pieces: list[slice], reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor
) -> Comparison:
    accumulator = ComparisonAccumulator(tokens_per_window=7)
    for piece in pieces:
        accumulator.update(reference[piece], candidate[piece], targets[piece])
    return accumulator.result()


class TestComparisonAccumulator:
    TOKENS, VOCABULARY = 40, 30

    @pytest.fixture
    def data(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        reference = random_logits(31, self.TOKENS, self.VOCABULARY)
        candidate = reference + random_logits(32, self.TOKENS, self.VOCABULARY, 0.7)
        return reference, candidate, random_targets(33, self.TOKENS, self.VOCABULARY)

    def test_against_numpy(self, data: tuple[torch.Tensor, ...]) -> None:
        reference, candidate, targets = data
        result = accumulate([slice(None)], reference, candidate, targets)
        log_p, log_q = (
            (x := logits.numpy().astype(np.float64)) - np.log(np.exp(x).sum(1, keepdims=True))
            for logits in (reference, candidate)
        )
        rows = np.arange(self.TOKENS)
        nll_p, nll_q = -log_p[rows, targets], -log_q[rows, targets]
        kld = (np.exp(log_p) * (log_p - log_q)).sum(1)
        delta = nll_q - nll_p
        sums = [(delta[i : i + 7] - delta.mean()).sum() for i in range(0, self.TOKENS, 7)]
        clusters = len(sums)
        clustered = math.sqrt(clusters / (clusters - 1) * np.square(sums).sum()) / self.TOKENS
        assert result.reference.ppl == pytest.approx(np.exp(nll_p.mean()))
        assert result.candidate.ppl == pytest.approx(np.exp(nll_q.mean()))
        assert result.delta_nll == pytest.approx(delta.mean())
        assert result.delta_nll == pytest.approx(
            math.log(result.candidate.ppl / result.reference.ppl)
        )
        assert result.delta_stderr == pytest.approx(clustered)
        assert result.delta_stderr_tokens == pytest.approx(
            delta.std(ddof=1) / math.sqrt(self.TOKENS)
        )
        assert result.kld_mean == pytest.approx(kld.mean())
        assert result.kld_p999 == pytest.approx(np.quantile(kld, 0.999))
        assert result.kld_max == pytest.approx(kld.max())
        agreement = (log_p.argmax(1) == log_q.argmax(1)).mean()
        assert 0 < agreement < 1
        assert result.top1_agreement == pytest.approx(agreement)
        apart = (reference - candidate).abs().max().item()
        assert result.logit_difference == pytest.approx(apart)
        assert result.windows == clusters == 6

    @settings(max_examples=40, deadline=None)
    @given(cuts=st.sets(st.integers(1, 39)))
    def test_pieces_do_not_matter(self, cuts: set[int]) -> None:
        reference = random_logits(34, 40, 9)
        candidate, targets = random_logits(35, 40, 9), random_targets(36, 40, 9)
        bounds = [0, *sorted(cuts), 40]
        pieces = [slice(*pair) for pair in itertools.pairwise(bounds)]
        whole = accumulate([slice(None)], reference, candidate, targets)
        split = accumulate(pieces, reference, candidate, targets)
        assert split == whole

    def test_block_size_does_not_matter(
        self, data: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = accumulate([slice(None)], *data)
        monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 3 * self.VOCABULARY)
        assert accumulate([slice(None)], *data) == whole

    def test_clustered_error_of_repeated_values_is_that_of_the_distinct_ones(self) -> None:
        reference, candidate = random_logits(37, 12, 8), random_logits(38, 12, 8)
        targets = random_targets(39, 12, 8)
        single = ComparisonAccumulator()
        single.update(reference, candidate, targets)
        repeated = ComparisonAccumulator(tokens_per_window=5)
        repeated.update(*(x.repeat_interleave(5, 0) for x in (reference, candidate, targets)))
        assert repeated.result().delta_stderr == pytest.approx(single.result().delta_stderr)
        assert repeated.result().delta_stderr_tokens < 0.5 * single.result().delta_stderr
        assert single.result().delta_stderr == pytest.approx(single.result().delta_stderr_tokens)

    def test_clustered_error_covers_what_the_independent_one_misses(self) -> None:
        """Means of windows with a common shift: their spread is the truth both must predict."""
        generator = torch.Generator().manual_seed(40)
        runs, count, size = 300, 40, 16
        shift = torch.randn(runs, count, 1, generator=generator)
        values = (shift + torch.randn(runs, count, size, generator=generator)).flatten(1).double()
        truth = values.mean(1).std().item()
        clustered = np.mean([metrics._clustered_standard_error(run, size) for run in values])
        independent = np.mean([metrics._standard_error(run) for run in values])
        assert clustered == pytest.approx(truth, rel=0.1)
        assert independent < 0.5 * truth

    def test_one_window_has_no_clustered_error(self, data: tuple[torch.Tensor, ...]) -> None:
        accumulator = ComparisonAccumulator(tokens_per_window=self.TOKENS)
        accumulator.update(*data)
        assert math.isnan(accumulator.result().delta_stderr)
        assert math.isnan(accumulator.result().kld_stderr)
        assert accumulator.result().delta_stderr_tokens > 0

    def test_quantile_of_more_values_than_torch_takes(self) -> None:
        values = torch.arange(2**24 + 1, dtype=torch.float64)
        assert metrics._quantile(values, 0.999) == pytest.approx(0.999 * 2**24)

    def test_keeps_scalars_only(self) -> None:
        accumulator = ComparisonAccumulator()
        for _ in range(3):
            accumulator.update(torch.zeros(5, 9000), torch.zeros(5, 9000), torch.arange(5))
        stored = sum(part.untyped_storage().nbytes() for part in accumulator._scalars)
        assert stored == 3 * 5 * 5 * 8

    def test_result_is_plain_data(self, data: tuple[torch.Tensor, ...]) -> None:
        result = accumulate([slice(None)], *data)
        assert json.loads(json.dumps(dataclasses.asdict(result)))["windows"] == 6

    def test_nothing_added(self) -> None:
        with pytest.raises(InputError, match="nothing to compare"):
            ComparisonAccumulator().result()
        accumulator = ComparisonAccumulator()
        accumulator.update(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
        with pytest.raises(InputError, match="nothing to compare"):
            accumulator.result()

    def test_says_which_side_is_broken(self) -> None:
        good, bad = torch.zeros(2, 4), torch.full((2, 4), math.nan)
        targets = torch.tensor([0, 1])
        with pytest.raises(VerificationError, match="candidate logits are not finite"):
            ComparisonAccumulator().update(good, bad, targets)
        with pytest.raises(VerificationError, match="reference logits are not finite"):
            ComparisonAccumulator().update(bad, good, targets)
        with pytest.raises(VerificationError, match="different shapes"):
            ComparisonAccumulator().update(good, torch.zeros(2, 5), targets)
        with pytest.raises(InputError, match="outside the vocabulary"):
            ComparisonAccumulator().update(good, good, torch.tensor([0, 4]))
        with pytest.raises(UsageError, match="at least 1"):
            ComparisonAccumulator(tokens_per_window=0)
