"""Held-out loss and accuracy, whole and by how much context a token has. Sums are float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Loss of the targets with `start <= context < stop` earlier tokens in their segment.

    Attributes:
      start: Least context, in tokens.
      stop: First context beyond the bucket.
      tokens: Targets in the bucket.
      nats_per_token: Their mean loss; NaN if there are none.
      standard_error: Of that mean; documents, not tokens, count as independent draws. NaN with
        fewer than two documents.
      accuracy: Share of the targets that are the likeliest token; NaN if there are none.
    """

    start: int
    stop: int
    tokens: int
    nats_per_token: float
    standard_error: float
    accuracy: float = math.nan  # Absent from reports of earlier versions.


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """Loss on held-out text.

    The end-of-document target of every document is predicted like any other token: its nats and
    the token count. It stands for no byte, so bits per byte is the length, per byte of text, of a
    code for the text that also says where documents end.

    Attributes:
      documents: Documents with at least one target.
      tokens: Targets, ends of documents included.
      bytes: UTF-8 bytes of the text.
      nats_per_token: Mean loss.
      standard_error: Of `nats_per_token`, documents being the independent draws.
      perplexity: exp(nats_per_token).
      bits_per_byte: Sum of the losses / (ln 2 * bytes); NaN without bytes.
      buckets: Loss by context, ascending.
      accuracy: Share of the targets that are the likeliest token.
    """

    documents: int
    tokens: int
    bytes: int
    nats_per_token: float
    standard_error: float
    perplexity: float
    bits_per_byte: float
    buckets: tuple[Bucket, ...]
    accuracy: float = math.nan


def bucket_edges(
    seq_len: int, num_buckets: int, inner: Sequence[int] = ()
) -> Int[np.ndarray, " n"]:
    """Returns the edges 0 < ... < seq_len of buckets of context.

    Args:
      seq_len: Every context is below it.
      num_buckets: Most buckets, each double the last: the upper half of all contexts, the upper
        half of the rest, and so on.
      inner: Edges to use instead of these; those that are not below `seq_len` are left out.
    """
    inner = inner or [math.ceil(seq_len / 2**i) for i in range(num_buckets)]
    return np.array(sorted({0, *(edge for edge in inner if edge < seq_len), seq_len}))


class LossTally:
    """Sums of losses and counts by document and context.

    Args:
      byte_lengths: UTF-8 bytes that each token id stands for, `[vocab]`.
      edges: Of the context buckets, ascending from 0; contexts beyond the last are an error.
      num_documents: Document ids are below it.
    """

    def __init__(
        self,
        byte_lengths: Int[np.ndarray, " vocab"],
        edges: Int[np.ndarray, " n"],
        num_documents: int,
    ):
        self._byte_lengths = byte_lengths
        self._edges = edges
        self._nats = np.zeros((num_documents, len(edges) - 1))
        self._tokens = np.zeros((num_documents, len(edges) - 1), np.int64)
        self._likeliest = np.zeros(len(edges) - 1, np.int64)
        self._bytes = 0

    def add(
        self,
        batch: Mapping[str, np.ndarray],
        nats: Float[np.ndarray, "B T"],
        likeliest: Bool[np.ndarray, "B T"],
    ) -> None:
        """Counts the tokens of a batch whose `loss_mask` is not 0.

        Args:
          batch: `targets`, `positions`, `document_ids` and `loss_mask`, each `[B, T]`.
          nats: Loss of every target, `[B, T]`.
          likeliest: Whether it is the likeliest token, `[B, T]`.

        Raises:
          ValueError: A position lies beyond the last edge.
        """
        counted = batch["loss_mask"] > 0
        context = batch["positions"][counted]
        if context.size and context.max() >= self._edges[-1]:
            raise ValueError(
                f"positions reach {context.max()}; expected all below the last edge "
                f"{self._edges[-1]}"
            )
        bucket = np.searchsorted(self._edges, context, side="right") - 1
        cell = batch["document_ids"][counted] * self._nats.shape[1] + bucket
        size = self._nats.size
        losses = nats[counted].astype(np.float64)
        self._nats += np.bincount(cell, losses, size).reshape(self._nats.shape)
        self._tokens += np.bincount(cell, minlength=size).reshape(self._nats.shape)
        self._likeliest += np.bincount(bucket[likeliest[counted]], minlength=self._nats.shape[1])
        self._bytes += int(self._byte_lengths[batch["targets"][counted]].sum(dtype=np.int64))

    def result(self, num_bytes: int | None = None) -> HeldOutLoss:
        """Returns the losses of everything counted so far.

        Args:
          num_bytes: UTF-8 bytes of the text that was counted; None: what its tokens stand for.

        Raises:
          ValueError: Nothing was counted.
        """
        if not self._tokens.any():
            raise ValueError("no target was counted; expected at least one held-out token")
        nats, tokens = self._nats.sum(1), self._tokens.sum(1)
        mean, standard_error = _ratio(nats, tokens)
        buckets = []
        for i, (start, stop) in enumerate(zip(self._edges[:-1], self._edges[1:], strict=True)):
            bucket_mean, bucket_error = _ratio(self._nats[:, i], self._tokens[:, i])
            count = int(self._tokens[:, i].sum())
            accuracy = float(self._likeliest[i] / count) if count else math.nan
            buckets.append(
                Bucket(int(start), int(stop), count, bucket_mean, bucket_error, accuracy)
            )
        bits = float(nats.sum()) / math.log(2)
        num_bytes = self._bytes if num_bytes is None else num_bytes
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(mean))
        return HeldOutLoss(
            documents=int((tokens > 0).sum()),
            tokens=int(tokens.sum()),
            bytes=num_bytes,
            nats_per_token=mean,
            standard_error=standard_error,
            perplexity=perplexity,
            bits_per_byte=bits / num_bytes if num_bytes else math.nan,
            buckets=tuple(buckets),
            accuracy=float(self._likeliest.sum() / tokens.sum()),
        )


def _ratio(
    nats: Float64[np.ndarray, " documents"], tokens: Int[np.ndarray, " documents"]
) -> tuple[float, float]:
    """Mean loss and its standard error, by the ratio estimator over documents."""
    present = tokens > 0
    nats, tokens = nats[present], tokens[present]
    if not len(tokens):
        return math.nan, math.nan
    mean = nats.sum() / tokens.sum()
    if len(tokens) < 2:
        return float(mean), math.nan
    residual = nats - mean * tokens
    variance = len(tokens) / (len(tokens) - 1) * (residual**2).sum()
    return float(mean), float(np.sqrt(variance) / tokens.sum())
