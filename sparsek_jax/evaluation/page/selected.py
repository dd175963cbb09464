"""What was selected of a text: which tokens survive in which layer."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Float64

from sparsek_jax.evaluation.page.entries import Entry
from sparsek_jax.evaluation.page.records import plural
from sparsek_jax.evaluation.page.tables import key
from sparsek_jax.generation.explain.memory import Memory, explain
from sparsek_jax.generation.explain.page import page, token_pieces
from sparsek_jax.generation.loading import load_run
from sparsek_jax.training.checkpoint import CheckpointError
from sparsek_jax.training.config import ConfigError

# Survivors of a layer that are shown.
_SHOWN = 24
# Tokens before a survivor, which tell where it stands, and after it.
_BEFORE, _AFTER = 4, 2


def selected(entries: Sequence[Entry], text: str, max_tokens: int) -> str:
    """Has every trained model with SparseK layers read the text, and tells what it kept.

    Of several seeds the first run reads.

    Args:
      entries: The rows of the page.
      text: What is read.
      max_tokens: Most tokens, bos included; what is beyond is cut off.

    Returns:
      HTML, with what was left out.
    """
    out = []
    seen = set()
    for entry in entries:
        # Whatever else a run was evaluated as, it reads with the attention of training.
        directories = {record.directory for record in entry.records}
        if directories <= seen:
            continue
        seen |= directories
        record = entry.records[0]
        if "sparsek" not in record.kinds.split("+"):
            out.append(_left_out(entry, f"no layer of {record.kinds} has a scorer"))
            continue
        try:
            run = load_run(record.directory)
            whole = [run.tokenizer.bos_id, *run.tokenizer.encode(text).tolist()]
            tokens = np.array(whole[:max_tokens], np.int32)
            memory = explain(run.model, tokens)
        except (ConfigError, CheckpointError, OSError, ValueError) as error:
            logging.warning("%s: %s", record.directory, error)
            out.append(_left_out(entry, str(error)))
            continue
        name = record.directory.absolute().name
        cut = (
            f", the first {len(tokens):,} of {len(whole):,} tokens"
            if len(whole) > max_tokens
            else ""
        )
        title = f"{name}, step {run.step}"
        document = page(memory, run.tokenizer, tokens, title=title)
        pieces = token_pieces(run.tokenizer, tokens)
        out.append(
            f"<h3>{key(entry, entry.name)} <small>{html.escape(title + cut)}</small></h3>"
            + _survivors(memory, pieces)
            + "<details><summary>All of the text, token by token</summary>"
            f'<iframe loading="lazy" title="{html.escape(title)}" srcdoc="{html.escape(document)}">'
            "</iframe></details>"
        )
    return "".join(out)


def _left_out(entry: Entry, why: str) -> str:
    return f"<p>{key(entry, entry.name)}: left out, {html.escape(' '.join(why.split()))}</p>"


def _survivors(memory: Memory, pieces: Sequence[str]) -> str:
    """A table of the keys that every layer still selects at the end, with what stands around."""
    oldest = max(memory.length - memory.sliding_window, 0)
    heads = memory.held.shape[1]
    if not oldest:
        return f"<p>Nothing has left the window of {memory.sliding_window:,} tokens.</p>"
    rows = []
    for layer, held in zip(memory.layers, memory.held, strict=True):
        share = held[:, :oldest].mean(axis=0)
        kept = np.flatnonzero(share)
        # The most widely held; of those held alike the longest held, which are the oldest.
        chosen = np.sort(kept[np.argsort(-share[kept], kind="stable")][:_SHOWN])
        tokens = " ".join(_token(pieces, j, share[j], heads) for j in chosen)
        more = f" and {len(kept) - len(chosen):,} more" if len(kept) > len(chosen) else ""
        rows.append(
            f'<tr><th scope="row">{layer}</th><td class="strip">{_strip(share)}</td>'
            f'<td class="tokens">{tokens}{more}</td></tr>'
        )
    return (
        f"<p>Keys older than the window of {memory.sliding_window:,} that are held at the end, of "
        f"{oldest:,}; each head holds up to k = {memory.num_selected:,}. Darker: more of the "
        f"{plural(heads, 'head')}.</p>"
        '<div class="wide"><table class="survivors"><tr><th>layer</th><th>where in the text</th>'
        f"<th>survivors, the most widely held</th></tr>{''.join(rows)}</table></div>"
    )


def _strip(share: Float64[np.ndarray, " n"]) -> str:
    """Where in the text the survivors stand."""
    width = max(1, len(share) / 300)  # of a mark, so that it shows
    marks = "".join(
        f'<rect x="{j}" width="{width:.2f}" height="10" opacity="{share[j]:.2f}"/>'
        for j in np.flatnonzero(share)
    )
    box = f'viewBox="0 0 {len(share)} 10" preserveAspectRatio="none"'
    return f'<svg {box} aria-hidden="true">{marks}</svg>'


def _token(pieces: Sequence[str], at: int, share: float, heads: int) -> str:
    before = "".join(pieces[max(at - _BEFORE, 0) : at])
    after = "".join(pieces[at + 1 : at + 1 + _AFTER])
    title = f"token {at:,}, held by {share * heads:.0f} of {heads}"
    return (
        f'<span title="{title}">{_visible(before)}<b style="--a:{share:.2f}">'
        f"{_visible(pieces[at]) or '▯'}</b>{_visible(after)}</span>"
    )


def _visible(piece: str) -> str:
    """The text, with what would not show as a picture of it."""
    shown = piece.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return html.escape("".join(c if c.isprintable() else "�" for c in shown))
