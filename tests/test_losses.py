import pytest
import torch
from conftest import llama
from torch import nn

from bonetune.data.encoding import IGNORED
from bonetune.losses import completion_loss


def batch():
    ids = torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.clone()
    labels[0, :7] = labels[1, :4] = labels[2, :10] = labels[1, 9:] = IGNORED
    return ids, mask, labels


def test_equals_transformers_loss_and_its_gradient():
    ids, mask, labels = batch()
    results = []
    for ours in (True, False):
        model = llama().train()
        loss = completion_loss(model, ids, mask, labels) if ours else model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append((loss, model.model.layers[0].mlp.up_proj.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_batches_of_a_step_are_normalized_by_all_their_tokens():
    """Splitting a batch in two (gradient accumulation) changes nothing."""
    ids, mask, labels = batch()
    model = llama()
    count = (labels[:, 1:] != IGNORED).sum()
    parts = [completion_loss(model, ids[i : i + 1], mask[i : i + 1], labels[i : i + 1], count) for i in range(3)]
    torch.testing.assert_close(sum(parts), completion_loss(model, ids, mask, labels))


def test_a_model_without_the_option_gives_the_same():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    ids, mask, labels = batch()
    torch.testing.assert_close(completion_loss(Wrapper(), ids, mask, labels), completion_loss(llama(), ids, mask, labels))


def test_logits_are_computed_only_where_needed(monkeypatch):
    ids, mask, labels = batch()
    model, seen = llama(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    completion_loss(model, ids, mask, labels)
    assert seen == [(labels[:, 1:] != IGNORED).any(0).sum()]
    assert seen[0] < ids.shape[1] - 1


@pytest.mark.parametrize("padded", [0, 5])
def test_right_padding_changes_nothing(padded):
    ids, mask, labels = (t[:1] for t in batch())
    wide = [torch.cat([t, t.new_full((1, padded), v)], 1) for t, v in ((ids, 1), (mask, 0), (labels, IGNORED))]
    torch.testing.assert_close(completion_loss(llama(), *wide), completion_loss(llama(), ids, mask, labels))
