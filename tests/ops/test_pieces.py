"""Merging a weight's rows piece by piece is merging it whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bonetune import VARIANTS
from bonetune.ops import Update, for_rows, merge, merge_rows, pieces, row_pieces
from bonetune.spec import ShardSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def cases(draw):
    """A weight, updates of one to three variants, and a number of elements that a piece should have."""
    r = draw(st.integers(1, 4))
    out, inp = r * draw(st.integers(1, 6)) * 2, r * draw(st.integers(1, 6)) * 2
    stacked = draw(st.sampled_from([(), (), (3,)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    updates = []
    for variant in draw(st.lists(st.sampled_from(VARIANTS), min_size=1, max_size=3)):
        width = draw(st.sampled_from([n for n in range(1, r + 1) if r % n == 0])) if variant not in ("bone", "mini") else r
        halves = draw(st.sampled_from([n for n in range(1, out + 1) if out % n == 0]))
        ragged = draw(st.integers(1, inp)) if variant in ("bone", "mini") else width
        spec = ShardSpec(variant, ragged, halves)
        updates.append(Update(torch.randn(*stacked, *spec.shape(out, inp)), spec, draw(st.sampled_from([1.0, -0.3]))))
    return torch.randn(*stacked, out, inp), updates, draw(st.integers(1, 2 * out * inp))


@given(cases(), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=60)
def test_pieces_make_the_whole(case, dtype, target):
    weight, updates, elements = case
    weight = weight.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    whole = merge(weight.to(wide), updates)
    ranges = list(row_pieces(weight.shape[-2], weight.shape[-1], [u.spec for u in updates], elements))
    assert [i for rows in ranges for i in range(rows.start, rows.stop)] == list(range(weight.shape[-2]))
    exact = torch.cat([merge(weight[..., rows, :].to(wide), [for_rows(u, rows) for u in updates]) for rows in ranges], -2)
    torch.testing.assert_close(exact, whole, rtol=1e-6, atol=1e-6)
    written = torch.empty(weight.shape, dtype=target)
    bounds = [merge_rows(weight[..., rows, :], updates, rows.start, written[..., rows, :]) for rows in ranges]
    assert torch.equal(written, exact.to(target))
    assert min(low for low, _ in bounds) == exact.min()
    assert max(high for _, high in bounds) == exact.max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_usual_sizes_they_are_the_same_bit_for_bit(variant, monkeypatch):
    monkeypatch.setattr(pieces, "_ELEMENTS", 1 << 15)
    spec = ShardSpec(variant, 32, 24)
    torch.manual_seed(0)
    weight, update = torch.randn(384, 256), Update(torch.randn(spec.shape(384, 256)) * 0.1, spec, 0.7)
    written = torch.empty_like(weight)
    for rows in row_pieces(384, 256, [spec], 1 << 16):
        merge_rows(weight[rows], [update], rows.start, written[rows])
    assert torch.equal(written, merge(weight, [update]))


def test_pieces_are_of_about_the_size_that_was_asked_for_and_end_where_blocks_end():
    ranges = list(row_pieces(96, 10, [ShardSpec("bat", 8), ShardSpec("bone", 5), ShardSpec("bat-left", 12)], 300))
    assert [(rows.start, rows.stop) for rows in ranges] == [(0, 24), (24, 48), (48, 72), (72, 96)]
    assert len(list(row_pieces(96, 10, [ShardSpec("bone", 5)], 300))) == math.ceil(96 / 30)
    assert list(row_pieces(0, 10, [])) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_told(value):
    spec = ShardSpec("bone", 4)
    weight, theta = torch.randn(64, 8), torch.zeros(spec.shape(64, 8))
    weight[40, 3] = value
    lowest, highest = merge_rows(weight, [Update(theta, spec)], 0, torch.empty(64, 8))
    assert (math.isnan(lowest) and math.isnan(highest)) if math.isnan(value) else highest == math.inf
