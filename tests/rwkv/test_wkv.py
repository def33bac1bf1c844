"""The operators by chunks against the papers' recurrences in float64, and their gradients against autograd's."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bonetune.rwkv import wkv as dispatch
from bonetune.rwkv import wkv6, wkv7
from bonetune.rwkv.scan import scan
from bonetune.rwkv.sequences import Sequences

OPERATORS = {"x060": wkv6, "x070": wkv7}
SLOWEST = -np.exp(-0.5)  # the least logarithm that RWKV-7's decay has


def sequences(*lengths):
    return Sequences(lengths, torch.device("cpu"))


def inputs(version, tokens, heads=2, n=8, dtype=torch.float64, seed=0, decay=None, number=1):
    """r, k, v, decay (a, b), u of x060, state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    r, k, v = (draw(tokens, heads, n) for _ in range(3))
    state = draw(number, heads, n, n)
    if version == "x060":
        log = -draw(tokens, heads, n).exp() if decay is None else torch.full((tokens, heads, n), decay, dtype=torch.float64)
        made = (r, k, v, log, draw(heads, n), state)
    else:
        log = SLOWEST * draw(tokens, heads, n).sigmoid()
        log = log if decay is None else torch.full_like(log, decay)
        kk = torch.nn.functional.normalize(draw(tokens, heads, n), dim=-1)
        made = (r, k, v, log, -kk, kk * draw(tokens, heads, n).sigmoid(), state)
    return tuple(tensor.to(dtype) for tensor in made)


def expected(version, tensors, lengths):
    """The papers' equations with numpy, in their own orientation (x070 writes the state as V x K)."""
    *rows, last = (tensor.double().numpy() for tensor in tensors)
    rows, u = (rows[:-1], rows[-1]) if version == "x060" else (rows, None)
    y, states, start = np.zeros_like(rows[0]), [], 0
    for number, length in enumerate(lengths):
        final = np.array(last[number])
        for h in range(final.shape[0]):
            S = final[h].copy() if version == "x060" else final[h].T.copy()
            for t in range(start, start + length):
                r, k, v, w, *ab = (row[t, h] for row in rows)
                if version == "x060":
                    y[t, h] = r @ (S + np.outer(u[h] * k, v))
                    S = np.diag(np.exp(w)) @ S + np.outer(k, v)
                else:
                    a, b = ab
                    S = S @ (np.diag(np.exp(w)) + np.outer(a, b)) + np.outer(v, k)
                    y[t, h] = S @ r
            final[h] = S if version == "x060" else S.T
        states.append(final)
        start += length
    return torch.from_numpy(y), torch.from_numpy(np.stack(states))


@pytest.mark.parametrize("lengths", [(1,), (16,), (70,), (33, 1, 64), (5, 0, 40)])
@pytest.mark.parametrize("version", OPERATORS)
def test_chunks_are_the_recurrence(version, lengths):
    tensors = inputs(version, sum(lengths), number=len(lengths))
    y, state = OPERATORS[version].chunked(*tensors, sequences(*lengths))
    wanted_y, wanted_state = expected(version, tensors, lengths)
    torch.testing.assert_close(y, wanted_y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, wanted_state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("version", OPERATORS)
def test_the_naive_recurrence_is_the_papers(version):
    tensors = inputs(version, 9)
    rows, fixed = (tensors[:4], tensors[4:]) if version == "x060" else (tensors[:6], tensors[6:])
    y, state = OPERATORS[version].recurrence(*(row[None] for row in rows), *fixed)
    wanted_y, wanted_state = expected(version, tensors, (9,))
    torch.testing.assert_close(y[0], wanted_y)
    torch.testing.assert_close(state, wanted_state)


@pytest.mark.parametrize("size", [1, 7, 16, 32, 64])
@pytest.mark.parametrize("version", OPERATORS)
def test_the_size_of_a_chunk_changes_nothing(version, size):
    tensors = inputs(version, 50)
    y, state = OPERATORS[version].chunked(*tensors, sequences(50), size=size)
    wanted_y, wanted_state = expected(version, tensors, (50,))
    torch.testing.assert_close(y, wanted_y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, wanted_state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("version", "decay"),
    [*(("x060", decay) for decay in (0.0, -1e-7, -5.0, -80.0, -1e4, -1e30)), ("x070", 0.0), ("x070", -1e-7), ("x070", SLOWEST)],
)
def test_extreme_decays_in_float32(version, decay):
    tensors = inputs(version, 100, n=16, dtype=torch.float32, decay=decay)
    rows = len(tensors) - (2 if version == "x060" else 1)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    y, state = OPERATORS[version].chunked(*leaves, sequences(100))
    wanted_y, wanted_state = expected(version, [leaf.detach() for leaf in leaves], (100,))
    for got, wanted in ((y, wanted_y), (state, wanted_state)):
        assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6
    gradients = torch.autograd.grad(y.sum() + state.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert len(gradients) > rows


@pytest.mark.parametrize("most", [-30.0, -1e4, -1e30])
def test_a_token_that_forgets_all_costs_those_after_it_no_digits(most):
    tensors = inputs("x060", 64, n=16, dtype=torch.float32, decay=-0.01)
    tensors[3][::9] = most
    y, state = wkv6.chunked(*tensors, sequences(64))
    wanted_y, wanted_state = expected("x060", tensors, (64,))
    assert (y.double() - wanted_y).norm() <= 1e-6 * wanted_y.norm()
    assert (state.double() - wanted_state).norm() <= 1e-6 * wanted_state.norm()


@pytest.mark.parametrize("version", OPERATORS)
def test_gradients_in_float32_are_the_recurrence_s(version):
    tensors = [tensor.requires_grad_() for tensor in inputs(version, 75, n=16, dtype=torch.float32)]
    rows, fixed = (tensors[:4], tensors[4:]) if version == "x060" else (tensors[:6], tensors[6:])
    naive = OPERATORS[version].recurrence(*(row[None] for row in rows), *fixed)
    chunked = OPERATORS[version].chunked(*tensors, sequences(75))
    generator = torch.Generator().manual_seed(1)
    dy, dS = torch.randn(chunked[0].shape, generator=generator), torch.randn(chunked[1].shape, generator=generator)
    wanted = torch.autograd.grad((naive[0][0] * dy).sum() + (naive[1] * dS).sum(), tensors)
    got = torch.autograd.grad((chunked[0] * dy).sum() + (chunked[1] * dS).sum(), tensors)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("version", OPERATORS)
def test_gradcheck(version):
    tensors = tuple(tensor.requires_grad_() for tensor in inputs(version, 9, heads=1, n=3, number=2))
    layout = sequences(6, 3)
    assert torch.autograd.gradcheck(lambda *leaves: OPERATORS[version].chunked(*leaves, layout, size=4), tensors)


def test_the_scan_passes_gradcheck_with_matrices_and_with_diagonals():
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 2, 3, 3), (5, 2, 3)):
        T, D, S = (
            torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
            for size in (shape, (5, 2, 3, 4), (3, 2, 3, 4))
        )
        assert torch.autograd.gradcheck(lambda *leaves: scan(*leaves, (3, 0, 2)), (T, D, S))


@pytest.mark.parametrize("version", OPERATORS)
def test_what_sequences_hold_does_not_reach_others(version):
    tensors = inputs(version, 60, number=2)
    whole = sequences(35, 25)
    y, _ = OPERATORS[version].chunked(*tensors, whole)
    changed = [tensor.clone() for tensor in tensors]
    changed[1][:35] += 1
    again, _ = OPERATORS[version].chunked(*changed, whole)
    assert torch.equal(y[35:], again[35:])
    assert not torch.equal(y[:35], again[:35])


@pytest.mark.parametrize("version", OPERATORS)
def test_a_state_carries_over(version):
    tensors = inputs(version, 60)
    y, state = OPERATORS[version].chunked(*tensors, sequences(60))
    rest = tensors[4:-1] if version == "x060" else ()
    rows = tensors[:4] if version == "x060" else tensors[:6]
    first, between = OPERATORS[version].chunked(*(row[:23] for row in rows), *rest, tensors[-1], sequences(23))
    second, after = OPERATORS[version].chunked(*(row[23:] for row in rows), *rest, between, sequences(37))
    torch.testing.assert_close(torch.cat([first, second]), y)
    torch.testing.assert_close(after, state)


@pytest.mark.parametrize("version", OPERATORS)
def test_half_precision_is_computed_in_float32(version):
    tensors = inputs(version, 20, dtype=torch.bfloat16)
    u = tensors[4] if version == "x060" else None
    rows = tensors[:4] if version == "x060" else tensors[:6]
    y, state = dispatch.wkv(version, rows, u, tensors[-1], sequences(20))
    wanted, _ = expected(version, tensors, (20,))
    assert (y.dtype, state.dtype) == (torch.float32, torch.float32)
    assert (y.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("version", OPERATORS)
def test_one_token_of_each_sequence_is_one_step(version, monkeypatch):
    tensors = inputs(version, 3, number=3)
    monkeypatch.setattr(OPERATORS[version], "chunked", None)
    u = tensors[4] if version == "x060" else None
    rows = tensors[:4] if version == "x060" else tensors[:6]
    y, state = dispatch.wkv(version, rows, u, tensors[-1], sequences(1, 1, 1))
    wanted_y, wanted_state = expected(version, tensors, (1, 1, 1))
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(state, wanted_state)


@pytest.mark.parametrize("version", OPERATORS)
def test_kernels_are_called_as_they_document_it(version, monkeypatch):
    """Stand-ins with fla-core's documented arguments: [B, T, H, N], logarithms of decays, states [N, H, K, V], boundaries."""
    lengths = (7, 4)

    def as_documented(r, k, v, decay, others, scale, initial_state, output_final_state, cu_seqlens):
        assert output_final_state
        assert (decay.dtype, cu_seqlens.dtype, cu_seqlens.tolist()) == (torch.float32, torch.int64, [0, 7, 11])
        rows = [row.squeeze(0) for row in (r * scale, k, v, decay, *others)] if version == "x070" else None
        rows = rows or [*(row.squeeze(0) for row in (r * scale, k, v, decay)), *others]
        y, state = expected(version, (*rows, initial_state), lengths)
        return y.unsqueeze(0), state

    def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
        scale = r.shape[-1] ** -0.5 if scale is None else scale
        return as_documented(r, k, v, w, (u,), scale, initial_state, output_final_state, cu_seqlens)

    def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None):
        return as_documented(r, k, v, w, (a, b), scale, initial_state, output_final_state, cu_seqlens)

    for name, kernel in (("rwkv6", chunk_rwkv6), ("rwkv7", chunk_rwkv7)):
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", SimpleNamespace(**{f"chunk_{name}": kernel}))
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.ops", SimpleNamespace())
    tensors = inputs(version, 11, dtype=torch.float32, number=2)
    rows, rest = (tensors[:4], tensors[4:]) if version == "x060" else (tensors[:6], tensors[6:])
    y, state = dispatch.by_kernels(version, rows, *rest, sequences(*lengths))
    wanted_y, wanted_state = expected(version, tensors, lengths)
    torch.testing.assert_close(y.double(), wanted_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), wanted_state, rtol=1e-5, atol=1e-5)
