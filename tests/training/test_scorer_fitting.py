"""A fitted scorer keeps what questions attend to, as far as one can know before they are asked.

ROUNDING: float32 sums of a few layers in another order.
"""

from __future__ import annotations

import pytest
import torch
from support.models import make_compressor
from support.training import ASKED, asked
from torch import Tensor

from sac_rag.compressors.anchor_selection import eager_attention, top_anchors
from sac_rag.compressors.sac import SAC
from sac_rag.kv import AnchorKV
from sac_rag.lm.generator import Generator
from sac_rag.prompts.format import SPANS
from sac_rag.training.anchor_oracle import compare_anchors
from sac_rag.training.fit_scorer import fit_scorer
from sac_rag.training.objective import Objective
from sac_rag.training.rows import RowMaker, Source

ROUNDING = 1e-4


def test_attention_is_what_the_frozen_lm_gives_when_it_reads_the_text(llama: Generator) -> None:
    maker = RowMaker(llama, SPANS)
    row = maker.ask(*asked(0))
    *shared, source = row.parts
    assert isinstance(source, Source)
    before = [*maker.prefix_ids, *(i for part in shared for i in part)]  # type: ignore[union-attr]
    # Behind all that stands before it, a chunk is read as it is in the prompt.
    compressor = make_compressor(llama, "full", sink=llama.tokenizer.decode(before))
    assert compressor.sink_ids == before
    ((kv, attention),) = Objective(compressor, maker.prefix_ids).attention(row)
    ids = torch.tensor([[*before, *source.ids, *row.targets[0].ids]])
    with torch.no_grad(), eager_attention(llama.model):
        layers = llama.model(ids, output_attentions=True).attentions
    begin, end = len(before), len(before) + kv.num_tokens
    received = [layer[0, :, end:, begin:end].amax(1) for layer in layers]
    wanted = torch.stack(received).unflatten(1, (llama.kv_shape[1], -1)).amax(2)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(attention, wanted, atol=ROUNDING, rtol=0)


def chunks_read(compressor: SAC, *, times: int = 1) -> list[tuple[AnchorKV, Tensor]]:
    """What questions look at in each of the texts."""
    maker = RowMaker(compressor.generator, SPANS)
    objective = Objective(compressor, maker.prefix_ids)
    return [
        pair for i in range(len(ASKED)) for pair in objective.attention(maker.ask(*asked(i)))
    ] * times


@pytest.mark.parametrize("width", [0, 8])
def test_a_fitted_scorer_keeps_what_is_attended_to(own: Generator, width: int) -> None:
    compressor = make_compressor(own, "learned", scorer_width=width)
    assert isinstance(compressor, SAC)
    for name in compressor.fitted:
        compressor.weights[name].data.zero_()
    seen: list[int] = []
    chunks = chunks_read(compressor, times=20)

    def share_kept() -> float:
        kept = best = 0.0
        for kv, attention in chunks[: len(ASKED)]:
            keys, values, _ = kv.by_head()
            chosen = compressor.scores(torch.arange(kv.num_tokens), keys, values).detach()
            kept += float(attention.gather(2, top_anchors(chosen, 3)).sum())
            best += float(attention.gather(2, top_anchors(attention, 3)).sum())
        return kept / best

    before = share_kept()
    others = {n: w.clone() for n, w in compressor.weights.items() if n not in compressor.fitted}
    told = fit_scorer(compressor, chunks, on_progress=seen.append)
    assert seen == [1] * len(chunks)
    assert share_kept() > before + 0.1
    # The held-out chunks are copies of those learned from.
    assert told == pytest.approx(share_kept(), abs=0.05)
    assert all(torch.equal(compressor.weights[name], weight) for name, weight in others.items())


def test_a_scorer_is_fitted_further_from_its_weights(own: Generator) -> None:
    compressor = make_compressor(own, "learned")
    assert isinstance(compressor, SAC)
    features = torch.randn(
        *chunks_read(compressor)[0][1].shape[:1], 7, compressor.scorer.linear.shape[-1]
    )
    mean, scale = torch.randn(features[:, 0].shape), torch.rand(features[:, 0].shape) + 0.5
    before = compressor.scorer(features).detach()
    compressor.scorer.fold_normalization(-mean / scale, 1 / scale)
    inside = compressor.scorer((features - mean[:, None]) / scale[:, None]).detach()
    # A constant of each head chooses nothing.
    shift = (inside - before).mean(-1, keepdim=True)
    torch.testing.assert_close(inside - shift, before, atol=1e-4, rtol=1e-4)
    compressor.scorer.fold_normalization(mean, scale)
    torch.testing.assert_close(compressor.scorer(features).detach(), before, atol=1e-4, rtol=1e-4)


def test_a_score_depends_on_what_follows_and_on_nothing_far_away(own: Generator) -> None:
    compressor = make_compressor(own, "learned")
    assert isinstance(compressor, SAC)
    features = torch.randn(own.kv_shape[0], 20, compressor.scorer.linear.shape[-1])
    changed = features.clone()
    changed[:, 10] += 1
    differs = (compressor.scorer(changed) != compressor.scorer(features)).any(0).any(0)
    assert differs.nonzero().flatten().tolist() == list(range(6, 15))


def test_only_learned_anchors_have_a_scorer_and_it_needs_texts(own: Generator) -> None:
    uniform = make_compressor(own, "sac")
    with pytest.raises(ValueError, match="anchors='learned' has a scorer, was: anchors='uniform'"):
        fit_scorer(uniform, [])  # type: ignore[arg-type]
    learned = make_compressor(own, "learned")
    assert isinstance(learned, SAC)
    with pytest.raises(ValueError, match="at least one chunk"):
        fit_scorer(learned, [])
    # One is enough to go through everything.
    assert 0 < fit_scorer(learned, chunks_read(learned)[:1]) <= 1


def test_no_choice_keeps_more_than_one_that_knows_the_questions(own: Generator) -> None:
    compressor = make_compressor(own, "learned")
    maker = RowMaker(own, SPANS)
    objective = Objective(compressor, maker.prefix_ids)
    rows = [maker.ask(*asked(number)) for number in range(3)]
    figures = compare_anchors(objective, rows, [1, 4])
    of = {(row.anchors, row.ratio): row for row in figures}
    assert len(of) == 2 * 4
    for name in ("scorer", "read again", "uniform", "these questions"):
        # Where all is kept, all choices are one.
        assert of[name, 1].attention_kept == pytest.approx(1)
        assert of[name, 1].loss == pytest.approx(of["scorer", 1].loss, abs=ROUNDING)
        assert of[name, 4].attention_kept < 1 or name == "these questions"
    predicted = [objective.predict([row], 4) for row in rows]
    labels = sum(len(one.labels) for one in predicted)
    loss = sum(float(one.loss) * len(one.labels) for one in predicted) / labels
    assert of["scorer", 4].loss == pytest.approx(loss, abs=ROUNDING)
    with pytest.raises(ValueError, match=r"anchors must be .learned. to be compared"):
        compare_anchors(Objective(make_compressor(own, "full"), maker.prefix_ids), rows, [4])
