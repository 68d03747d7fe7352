"""Perplexity, KL divergence and their errors: pure functions on logits and token ids.

Sums over a vocabulary are taken in float64, a few rows at a time. Of a whole evaluation only
per-token scalars are kept, never logits: 40 windows of a 150k vocabulary would need 6 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import InputError, UsageError, VerificationError

BLOCK_ELEMENTS = 2**22
"""Logits converted to float64 at a time; a block and its temporaries take about 128 MB."""


@dataclass(frozen=True)
class Protocol:
    """How a text is cut into windows, and which predictions count.

    Perplexities are comparable only under one protocol: the same model on the same text differs
    by tens of percent between the two below.

    Attributes:
        name: Goes with every reported number.
        context: Tokens in a window.
        first: First position whose next-token prediction is scored; the last one is `context - 2`.
        first_token_is_bos: The first token of each window is overwritten with BOS, if the model
            wants one.
    """

    name: str
    context: int
    first: int
    first_token_is_bos: bool

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.context - 2:
            raise UsageError(
                f"protocol {self.name}: nothing to score",
                why=f"first scored position {self.first} in a window of {self.context} tokens",
                fix="use a context of at least 4 tokens",
            )

    @classmethod
    def llama_perplexity(cls, context: int = 512) -> Protocol:
        """llama.cpp's llama-perplexity: BOS first, only the second half of a window scored."""
        return cls(f"llama-perplexity ctx {context}", context, context // 2, True)

    @classmethod
    def gptq_windows(cls, context: int = 2048) -> Protocol:
        """The GPTQ papers: non-overlapping windows, every prediction inside them scored."""
        return cls(f"gptq windows ctx {context}", context, 0, False)

    @property
    def scored(self) -> int:
        """Predictions scored in each window."""
        return self.context - 1 - self.first


def windows(
    token_ids: Sequence[int], protocol: Protocol, bos_id: int | None, limit: int | None = None
) -> Tensor:
    """Cuts a tokenized text into the non-overlapping windows of a protocol.

    Args:
        token_ids: The whole text, encoded once, with the tokenizer's special tokens.
        protocol: The windows wanted.
        bos_id: BOS, or None if the tokenizer does not add one.
        limit: At most this many windows, from the start; None for all.

    Returns:
        int64 [windows, context]; the incomplete last window is dropped.

    Raises:
        InputError: The text is shorter than one window.
        UsageError: `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"window limit {limit}: must be at least 1")
    count = len(token_ids) // protocol.context
    if count == 0:
        raise InputError(
            f"text too short for {protocol.name}",
            why=f"it has {len(token_ids)} tokens, one window needs {protocol.context}",
            fix="use a longer text or a smaller context",
        )
    count = min(count, limit or count)
    ids = torch.tensor(token_ids[: count * protocol.context], dtype=torch.int64)
    result = ids.view(count, protocol.context)
    if protocol.first_token_is_bos and bos_id is not None:
        result[:, 0] = bos_id
    return result


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with its sampling error.

    Attributes:
        ppl: `exp(mean_nll)`.
        mean_nll: Mean negative log-likelihood in nats per token, ln(ppl).
        mean_nll_stderr: Its standard error, tokens taken as independent: population standard
            deviation over sqrt(tokens - 1); nan for a single token.
        tokens: Scored predictions.
    """

    ppl: float
    mean_nll: float
    mean_nll_stderr: float
    tokens: int

    @classmethod
    def from_nll(cls, nll: Tensor) -> Perplexity:
        """Summarizes per-token negative log-likelihoods, float64 [tokens]."""
        mean = nll.mean().item()
        return cls(_exp(mean), mean, _standard_error(nll), nll.numel())

    @property
    def stderr(self) -> float:
        """Standard error of `ppl` to first order: the figure that llama-perplexity prints."""
        return self.ppl * self.mean_nll_stderr


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats.

    Args:
        logits: [tokens, vocabulary], any float type.
        targets: Token ids that follow, int64 [tokens].

    Returns:
        float64 [tokens].

    Raises:
        InputError: A target is outside the vocabulary.
        VerificationError: A logit is not finite, or the shapes do not match.
    """
    _check_targets(logits, targets, "logits")
    blocks = [_nll(_log_probabilities(logits[rows]), targets[rows]) for rows in _blocks(logits)]
    return torch.cat(blocks)


def kl_divergence(reference_logits: Tensor, candidate_logits: Tensor) -> Tensor:
    """KL(reference || candidate) of each next-token distribution in nats.

    Args:
        reference_logits: [tokens, vocabulary].
        candidate_logits: [tokens, vocabulary].

    Returns:
        float64 [tokens], none negative.

    Raises:
        VerificationError: A logit is not finite, or the shapes differ.
    """
    _check_shapes(reference_logits, candidate_logits)
    blocks = [
        _kl(_log_probabilities(reference_logits[rows]), _log_probabilities(candidate_logits[rows]))
        for rows in _blocks(reference_logits)
    ]
    return torch.cat(blocks)


@dataclass(frozen=True)
class Comparison:
    """A candidate's next-token distributions against a reference's, on the same tokens.

    The difference of the mean NLLs is paired: most of the sampling error of two perplexities is
    common to both and cancels. `delta_stderr` is clustered by window, because tokens of a window
    share their context and so part of the damage: it stays valid when neighbours are correlated,
    and is itself rough below some 20 windows. `delta_stderr_tokens` takes tokens as independent,
    which is what llama-perplexity prints.

    Attributes:
        reference: Perplexity of the reference.
        candidate: Perplexity of the candidate.
        delta_nll: ln(ppl candidate / ppl reference), the mean paired difference in nats.
        delta_stderr: Its standard error, clustered by window; nan for a single window.
        delta_stderr_tokens: Its standard error, independent tokens; nan for a single token.
        kld_mean: Mean KL(reference || candidate) in nats per token.
        kld_stderr: Standard error of `kld_mean`, clustered by window.
        kld_p999: 99.9 % quantile, linearly interpolated.
        kld_max: Largest.
        top1_agreement: Share of positions where both rank the same token first.
        windows: Clusters behind the standard errors.
    """

    reference: Perplexity
    candidate: Perplexity
    delta_nll: float
    delta_stderr: float
    delta_stderr_tokens: float
    kld_mean: float
    kld_stderr: float
    kld_p999: float
    kld_max: float
    top1_agreement: float
    logit_difference: float
    windows: int


class ComparisonAccumulator:
    """Builds a `Comparison` from logits that arrive in pieces of any size.

    Args:
        tokens_per_window: Scored predictions in a window: the clusters of the standard errors.
            With 1, tokens count as independent.
    """

    def __init__(self, tokens_per_window: int = 1) -> None:
        if tokens_per_window < 1:
            raise UsageError(f"{tokens_per_window} tokens per window: must be at least 1")
        self._tokens_per_window = tokens_per_window
        self._scalars: list[Tensor] = []

    def update(self, reference_logits: Tensor, candidate_logits: Tensor, targets: Tensor) -> None:
        """Adds the next tokens, in order.

        Args:
            reference_logits: [tokens, vocabulary]; its device does the work.
            candidate_logits: [tokens, vocabulary].
            targets: Token ids that follow, int64 [tokens].

        Raises:
            InputError: A target is outside the vocabulary.
            VerificationError: A logit is not finite, or the shapes differ.
        """
        _check_shapes(reference_logits, candidate_logits)
        _check_targets(reference_logits, targets, "reference logits")
        targets = targets.to(reference_logits.device)
        for rows in _blocks(reference_logits):
            reference = _log_probabilities(reference_logits[rows], "reference logits")
            candidate = candidate_logits[rows].to(reference.device)
            candidate = _log_probabilities(candidate, "candidate logits")
            agree = reference.argmax(-1) == candidate.argmax(-1)
            apart = reference_logits[rows] - candidate_logits[rows].to(reference.device)
            scalars = (
                _nll(reference, targets[rows]),
                _nll(candidate, targets[rows]),
                _kl(reference, candidate),
                agree.double(),
                apart.abs().amax(-1).double(),
            )
            self._scalars.append(torch.stack(scalars).cpu())

    def result(self) -> Comparison:
        """Everything so far.

        Raises:
            InputError: No token was added.
        """
        if not any(part.numel() for part in self._scalars):
            raise InputError("nothing to compare", why="no token was evaluated")
        reference, candidate, kld, agree, apart = torch.cat(self._scalars, dim=1)
        delta = candidate - reference
        size = self._tokens_per_window
        return Comparison(
            reference=Perplexity.from_nll(reference),
            candidate=Perplexity.from_nll(candidate),
            delta_nll=delta.mean().item(),
            delta_stderr=_clustered_standard_error(delta, size),
            delta_stderr_tokens=_standard_error(delta),
            kld_mean=kld.mean().item(),
            kld_stderr=_clustered_standard_error(kld, size),
            kld_p999=_quantile(kld, 0.999),
            kld_max=kld.max().item(),
            top1_agreement=agree.mean().item(),
            logit_difference=apart.max().item(),
            windows=math.ceil(kld.numel() / size),
        )


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits) or 1, rows))


def _log_probabilities(logits: Tensor, name: str = "logits") -> Tensor:
    """log softmax, float64 [tokens, vocabulary]."""
    if not logits.isfinite().all():
        raise VerificationError(
            f"{name} are not finite",
            why=f"{(~logits.isfinite()).sum().item()} infinite or NaN values in a window",
            fix="look for corrupt weights, overflowing scales, or a broken kernel of the runtime",
        )
    return torch.log_softmax(logits.double(), dim=-1)


def _nll(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets[:, None]).squeeze(-1)


def _kl(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL from log-probabilities; rounding (1e-15) may not make it negative."""
    return (reference.exp() * (reference - candidate)).sum(-1).clamp_min(0.0)


def _standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values; nan for one value."""
    if values.numel() < 2:
        return math.nan
    return (values.std(correction=0) / math.sqrt(values.numel() - 1)).item()


def _clustered_standard_error(values: Tensor, size: int) -> float:
    """Standard error of the mean with correlation inside consecutive clusters of `size` values.

    Cluster-robust variance of a mean: G / (G - 1) * sum_g (sum_i in g (v_i - mean))^2 / n^2
    (Liang and Zeger 1986; Cameron and Miller 2015, section II). With clusters of one value it is
    `_standard_error`.
    """
    clusters = math.ceil(values.numel() / size)
    if clusters < 2:
        return math.nan
    sums = torch.stack([part.sum() for part in (values - values.mean()).split(size)])
    return math.sqrt(clusters / (clusters - 1)) * sums.norm().item() / values.numel()


def _quantile(values: Tensor, fraction: float) -> float:
    """Linearly interpolated quantile; `torch.quantile` refuses more than 2^24 values."""
    ordered = values.sort().values
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below).item()


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _check_shapes(reference: Tensor, candidate: Tensor) -> None:
    if reference.shape != candidate.shape:
        raise VerificationError(
            "reference and candidate logits have different shapes",
            why=f"{list(reference.shape)} against {list(candidate.shape)}",
            fix="compare the same tokens, and models of the same vocabulary",
        )


def _check_targets(logits: Tensor, targets: Tensor, name: str) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise VerificationError(
            f"{name} {list(logits.shape)} do not fit targets {list(targets.shape)}",
            fix="logits are [tokens, vocabulary], targets [tokens]",
        )
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise InputError(
            "token id outside the vocabulary",
            why=f"ids {targets.min().item()} .. {targets.max().item()}, {name} of "
            f"{logits.shape[1]} tokens",
            fix="use the tokenizer that belongs to the model",
        )
