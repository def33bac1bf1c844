"""The models against the official `rwkv` package, and what batches, states, dtypes and transformers make of them."""

import copy

import official_rwkv
import pytest
import rwkv_models
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bonetune.errors import InputError
from bonetune.models import compiled_layers
from bonetune.rwkv import RwkvConfig, from_pth, save_pth
from bonetune.rwkv import wkv as dispatch

VERSIONS = rwkv_models.VERSIONS


def tokens(*shape, seed=1):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_are_those_of_the_official_package(version, length, tmp_path):
    path = rwkv_models.file(tmp_path / "model.pth", version, hidden_size=64, head_size=16)
    ids = tokens(1, length)
    with torch.no_grad():
        got = from_pth(path)(ids).logits[0]
    wanted = official_rwkv.logits(path, ids[0].tolist(), tmp_path)
    assert got.abs().max() > 0.5
    assert (got - wanted).abs().max() <= 5e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_strong_decays_and_large_weights_are_those_of_the_official_package(version, tmp_path):
    model = rwkv_models.model(version, hidden_size=64, head_size=64, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("time_decay", ".w0")):
                parameter.copy_(8 * torch.randn(parameter.shape, generator=generator))  # from never to at once
            elif name.endswith("weight") and parameter.dim() == 2:
                parameter.mul_(3)
    save_pth(model, tmp_path / "model.pth")
    ids = tokens(1, 150)
    with torch.no_grad():
        got = model(ids).logits[0]
    wanted = official_rwkv.logits(tmp_path / "model.pth", ids[0].tolist(), tmp_path)
    assert (got - wanted).abs().max() <= 5e-5 * max(1, wanted.abs().max())


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_padding_and_packing_change_nothing(version):
    model = rwkv_models.model(version)
    lengths = (20, 1, 33, 7)
    rows = [tokens(1, length, seed=length) for length in lengths]
    alone = [model(row).logits[0] for row in rows]
    packed = model(torch.cat(rows, 1), cu_seq_lens_q=torch.tensor([0, 20, 21, 54, 61])).logits[0]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    assert torch.equal(model(torch.cat(rows, 1), position_ids=places).logits[0], packed)  # as DataCollatorWithFlattening has it
    for side in ("left", "right"):
        ids, mask = torch.full((4, 33), 5), torch.zeros(4, 33, dtype=torch.int64)
        for row, (content, length) in enumerate(zip(rows, lengths, strict=True)):
            place = slice(33 - length, 33) if side == "left" else slice(length)
            ids[row, place], mask[row, place] = content, 1
        logits = model(ids, attention_mask=mask).logits
        for row in range(len(lengths)):
            torch.testing.assert_close(logits[row][mask[row] == 1], alone[row], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_state_carries_the_text_so_far(version):
    model = rwkv_models.model(version)
    ids = tokens(3, 50)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0  # the second ends in the first part, the third in the middle of the second
    mask[2, 41:] = 0
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :33], attention_mask=mask[:, :33])
    second = model(ids[:, 33:], attention_mask=mask[:, 33:], state=first.state)
    got = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(got[mask == 1], whole[mask == 1], rtol=1e-4, atol=1e-5)
    # a sequence that had ended keeps its state
    for before, after in zip(first.state, second.state, strict=True):
        for name in ("att", "wkv", "ffn"):
            assert torch.equal(getattr(before, name)[1], getattr(after, name)[1])
            assert not torch.equal(getattr(before, name)[0], getattr(after, name)[0])


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_generation_is_the_recurrence_of_whole_forwards(version):
    model = rwkv_models.model(version)
    prompts = tokens(2, 12)
    mask = torch.ones_like(prompts)
    mask[1, :5] = 0
    expected = []
    for row in (prompts[:1], prompts[1:, 5:]):
        text = row
        for _ in range(9):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        expected.append(text[0, row.shape[1] :].tolist())
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    got = model.generate(prompts, attention_mask=mask, **settings)
    assert got[:, 12:].tolist() == expected
    without = model.generate(prompts, attention_mask=mask, use_cache=False, **settings)
    assert without[:, 12:].tolist() == expected
    beams = model.generate(prompts[:1], num_beams=3, **settings)
    assert beams.shape == (1, 21)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_the_state_does_not_grow(version):
    model = rwkv_models.model(version)
    short, long = (model(tokens(1, length)).state for length in (5, 500))
    for a, b in zip(short, long, strict=True):
        assert (a.att.shape, a.wkv.shape, a.ffn.shape) == (b.att.shape, b.wkv.shape, b.ffn.shape)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_parameter_that_is_read_gets_the_gradient_of_a_token_by_token_model(version, monkeypatch):
    def recurrent(version, inputs, u, state, sequences):
        outputs, states = [], []
        rows = [x.split(sequences.lengths) for x in inputs]
        fixed = () if u is None else (u,)
        operator = dispatch.wkv6 if version == "x060" else dispatch.wkv7
        for number, row in enumerate(zip(*rows, strict=True)):
            y, after = operator.recurrence(*(x[None] for x in row), *fixed, state[number : number + 1])
            outputs.append(y[0])
            states.append(after)
        return torch.cat(outputs), torch.cat(states)

    model = rwkv_models.model(version).double()
    ids = tokens(2, 40)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    got = gradients()
    monkeypatch.setattr("bonetune.rwkv.layers.wkv", recurrent)
    wanted = gradients()
    unread = {name for name, gradient in got.items() if gradient is None}
    assert unread == ({f"blocks.0.att.v{i}" for i in range(3)} if version == "x070" else set())
    for name in got.keys() - unread:
        assert wanted[name].norm() > 0, name
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_gradient_checkpointing_computes_the_same(version):
    model = rwkv_models.model(version).train()
    ids = tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, gradient in before.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_bfloat16_is_near_float32(version):
    model = rwkv_models.model(version)
    ids = tokens(1, 60)
    exact, rough = model(ids).logits, copy.deepcopy(model).to(torch.bfloat16)(ids).logits
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("version", VERSIONS)
def test_parameters_of_other_dtypes_are_cast_where_they_are_used(version):
    model = rwkv_models.model(version).to(torch.bfloat16)
    ids = tokens(1, 20)
    before = model(ids).logits
    for name, parameter in model.named_parameters():
        if not name.endswith((".receptance.weight", ".key.weight", ".value.weight", ".gate.weight", ".output.weight")):
            parameter.data = parameter.data.float()
    after = model(ids, labels=ids)
    assert after.logits.dtype == torch.float32  # the head's own
    torch.testing.assert_close(after.logits, before.float(), rtol=0.1, atol=0.05)
    after.loss.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_of_safetensors_is_the_same_model(version, tmp_path):
    model = rwkv_models.model(version)
    model.save_pretrained(tmp_path / "folder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert {name: tensor.tolist() for name, tensor in again.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    assert again.config.ranks == model.config.ranks


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_first_state_is_where_sequences_begin(version):
    model = rwkv_models.model(version, initial_state=True)
    ids = tokens(1, 20)
    carried = model(ids[:, :7])
    expected = model(ids[:, 7:], state=carried.state).logits
    # one that begins with what the first tokens left, and whose token shift is told nothing of them
    shifts = [type(layer)(torch.zeros_like(layer.att), layer.wkv, torch.zeros_like(layer.ffn)) for layer in carried.state]
    without_shift = model(ids[:, 7:], state=type(carried.state)(shifts)).logits
    for block, layer in zip(model.blocks, carried.state, strict=True):
        block.att.time_state.copy_(layer.wkv[0].mT)
    torch.testing.assert_close(model(ids[:, 7:]).logits, without_shift)
    assert not torch.allclose(expected, without_shift)


def test_wrong_inputs_are_named():
    model = rwkv_models.model("x070")
    ids = tokens(2, 6)
    with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(InputError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(InputError, match="cu_seq_lens_q"):
        model(ids[:1], cu_seq_lens_q=torch.tensor([0, 4]))
    with pytest.raises(InputError, match="state is of 3 blocks and 1 sequences"):
        model(ids, state=model(ids[:1]).state)
    with pytest.raises(InputError, match="head size"):
        RwkvConfig(hidden_size=30, head_size=8)
    with pytest.raises(InputError, match="x080"):
        RwkvConfig(version="x080")


@pytest.mark.parametrize("version", VERSIONS)
def test_trainer_trains_evaluates_and_predicts(tmp_path, version):
    model = rwkv_models.model(version)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12).tolist()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape == (8, 12, 97)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_state_goes_along_with_several_continuations(version):
    model = rwkv_models.model(version)
    text = tokens(2, 20)
    state = model(text[:, :12]).state
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": 3, "num_return_sequences": 2}
    whole = model.generate(text, **settings)
    rest = model.generate(text[:, 12:], state=state, **settings)
    assert whole[:, 20:].tolist() == rest[:, 8:].tolist()


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_batch_without_a_token_leaves_the_state(version):
    model = rwkv_models.model(version)
    state = model(tokens(2, 9)).state
    nothing = model(tokens(2, 4), attention_mask=torch.zeros(2, 4, dtype=torch.int64), state=state)
    assert not nothing.logits.isnan().any()
    for before, after in zip(state, nothing.state, strict=True):
        assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in ("att", "wkv", "ffn"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_compute_the_same():
    model = rwkv_models.model("x070").train()
    losses = []
    for enabled in (False, True):
        with compiled_layers(model, enabled):
            for number in (1, 2, 3):  # batches of other lengths
                ids = tokens(1, 10 * number)
                losses.append(model(ids, labels=ids).loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)
