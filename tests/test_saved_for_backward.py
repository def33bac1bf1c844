"""What a training step keeps for backward, counted on a Llama-shaped model by storage."""

import pytest
import torch
from adapted_models import config
from conftest import llama
from peft import get_peft_model

from bonetune import VARIANTS, BoneLayer

IDS = torch.arange(4 * 64).reshape(4, 64) % 300 + 2


def shaped(dtype):
    """SmolLM2-135M's proportions: hidden 576 with 9 heads and 3 for keys and values, 1536 inside; fewer layers and words."""
    return llama(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, initializer_range=0.02
    ).to(dtype)


def saved_by_a_step(model):
    """Storages kept for backward that are no parameter's: {address: bytes}, and the tensors on them."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, tensors = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return sum(kept.values()), tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_for_backward(variant, dtype):
    frozen = shaped(dtype).train().requires_grad_(False)
    frozen.enable_input_require_grads()  # gradients flow through, as under any adapter, and nothing else is trained
    floor, _ = saved_by_a_step(frozen)
    model = get_peft_model(shaped(dtype), config(variant, r=64, mini_r=64, init_weights=True)).train()
    model.enable_input_require_grads()
    kept, tensors = saved_by_a_step(model)
    if variant in ("bone", "mini"):
        assert kept <= 1.08 * floor
    weights = {(m.out_features, m.in_features, m.bone_spec["default"].r) for m in model.modules() if isinstance(m, BoneLayer)}
    for tensor in tensors:
        for out, inp, r in weights:
            assert tensor.shape not in {(out, inp), (inp, out)}, f"{variant} keeps a tensor of W's shape"
            assert sorted(tensor.shape) != sorted((out // r, inp // r, r, r)), f"{variant} keeps W in blocks"
            assert tensor.numel() != out * inp or tensor.shape[0] == IDS.shape[0], f"{variant} keeps a tensor of W's size"
