"""The loss in segments against a model that is run segment by segment by hand, and RWKV's penalty against its formula."""

import pytest
import rwkv_models
import torch
from adapted_models import adapted
from conftest import llama

import bonetune.losses.chunks
from bonetune.errors import InputError
from bonetune.losses import check_loss, completion_loss, segmented_loss

VERSIONS = rwkv_models.VERSIONS
LENGTH = 50


def batch():
    ids = torch.randint(97, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0  # ends in the second segment
    mask[2, 47:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def model_of(version):
    targets = ["receptance", "key", "value", "output"]
    return adapted(base=rwkv_models.model(version).double(), target_modules=targets).train()


def gradients(loss, model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, trained)


def by_hand(model, segment, penalty=0.0):
    """With torch's own cross-entropy, and states that are cut off by `detach`."""
    inputs = batch()
    labels, total, state = inputs.pop("labels"), 0, None
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for begin in range(0, LENGTH, segment):
        columns = slice(begin, begin + segment)
        output = model(**{name: value[:, columns] for name, value in inputs.items()}, state=state, use_cache=True)
        state = output.state.detached()
        wanted = targets[:, columns]
        total = total + torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        total = total + penalty / 2 * (output.logits.amax(-1).square() * (wanted >= 0)).sum()
    return total / (labels[:, 1:] >= 0).sum()


@pytest.mark.parametrize("segment", [1, 7, 16, LENGTH, 64])
@pytest.mark.parametrize("version", VERSIONS)
def test_segments_are_those_of_states_that_are_cut_off(version, segment, monkeypatch):
    monkeypatch.setattr(bonetune.losses.chunks, "_positions_at_once", lambda model: 6)
    model = model_of(version)
    loss = segmented_loss(model, **batch(), bptt_length=segment)
    expected = by_hand(model, segment)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(gradients(loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_segment_is_the_whole_and_several_have_its_value(version):
    model = model_of(version)
    whole = completion_loss(model, **batch())
    once, cut = segmented_loss(model, **batch(), bptt_length=LENGTH), segmented_loss(model, **batch(), bptt_length=16)
    torch.testing.assert_close(once, whole)
    torch.testing.assert_close(cut, whole)
    of_whole, of_once, of_cut = (gradients(loss, model) for loss in (whole, once, cut))
    for a, b in zip(of_once, of_whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert not all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(of_cut, of_whole, strict=True))


def test_without_gradients_there_is_the_value():
    model = model_of("x060")
    with torch.no_grad():
        assert segmented_loss(model, **batch(), bptt_length=16) == pytest.approx(completion_loss(model, **batch()).item())


def test_what_a_step_keeps_does_not_grow_with_the_length():
    """The segments are of one size: each one's tensors are gone when the next one's come."""
    model = model_of("x070")
    peaks = []
    for repeated in (2, 6):
        living, highest = 0, 0

        def pack(tensor):
            nonlocal living, highest
            living += tensor.nbytes
            highest = max(highest, living)
            return Kept(tensor)

        class Kept:
            def __init__(self, tensor):
                self.tensor = tensor

            def __del__(self):
                nonlocal living
                living -= self.tensor.nbytes

        ids = torch.arange(16 * repeated)[None] % 97
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            segmented_loss(model, input_ids=ids, labels=ids, bptt_length=16)
        peaks.append(highest)
    assert peaks[1] <= 1.05 * peaks[0]


def test_models_that_carry_no_state_are_refused():
    inputs = {name: value % 90 for name, value in batch().items() if name != "labels"}
    with pytest.raises(InputError, match="carries no state"):
        segmented_loss(llama(), **inputs, labels=inputs["input_ids"], bptt_length=8)


@pytest.mark.parametrize("at_once", [3, 1000])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_penalty_is_in_the_gradients_alone(version, at_once, monkeypatch):
    monkeypatch.setattr(bonetune.losses.chunks, "_positions_at_once", lambda model: at_once)
    model = model_of(version)
    assert check_loss(model, 97)
    plain = completion_loss(model, **batch())
    expected = gradients(by_hand(model, LENGTH, penalty=0.1), model)
    for penalized in (
        completion_loss(model, **batch(), penalty=0.1),
        segmented_loss(model, **batch(), penalty=0.1, bptt_length=99),
    ):
        torch.testing.assert_close(penalized, plain)
        for got, wanted in zip(gradients(penalized, model), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(expected[0], gradients(plain, model)[0], rtol=1e-3)


def test_the_penalty_of_models_that_make_all_logits_at_once():
    model = llama().double()
    ids = torch.arange(12)[None]
    bonetune.losses.completion._WHOLE.add(model)
    loss = completion_loss(model, input_ids=ids, labels=ids, penalty=0.1)
    logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]) + 0.05 * logits.amax(-1).square().mean()
    wanted = torch.autograd.grad(expected, model.lm_head.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, model.lm_head.weight)[0], wanted)
