"""Small RWKV weights and adapter files by name, as RWKV-PEFT writes them, and what its merge makes of them, block by block."""

import torch

C, F, VOCABULARY = 64, 224, 32
SHAPES = {
    "att.receptance": (C, C),
    "att.key": (C, C),
    "ffn.key": (F, C),
    "ffn.value": (C, F),
}


def base(dtype=torch.float32, blocks=2):
    generator = torch.Generator().manual_seed(0)

    def values(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    content = {"emb.weight": values(VOCABULARY, C)}
    for i in range(blocks):
        content |= {f"blocks.{i}.{end}": values(C) for end in ("ln1.weight", "ln1.bias")}
        content[f"blocks.{i}.att.time_maa_x"] = values(1, 1, C)
        content |= {f"blocks.{i}.{layer}.weight": values(*shape) for layer, shape in SHAPES.items()}
    return content | {"head.weight": values(VOCABULARY, C)}


def adapter(kind, r, layers=tuple(SHAPES), end="disha", dtype=torch.float32, whole=True, blocks=2):
    """`kind`: bone (r, out), bat-row (in/r, r, r), bat (out/r, r, r), old (out, r)."""
    generator = torch.Generator().manual_seed(1)
    content = {}
    for i in range(blocks):
        for layer in layers:
            out, in_features = SHAPES[layer]
            shape = {"bone": (r, out), "bat-row": (in_features // r, r, r), "bat": (out // r, r, r), "old": (out, r)}[kind]
            content[f"blocks.{i}.{layer}.{end}"] = (torch.randn(shape, generator=generator) / 3).to(dtype)
        if whole:
            content[f"blocks.{i}.ln1.weight"] = torch.randn(C, generator=generator).to(dtype)
    return content


def merged(weight, tensor, kind):
    """W' (out, in) in float64, a block at a time."""
    W, T = weight.double(), tensor.double()
    if kind == "old":
        T, kind = T.unflatten(0, (-1, T.shape[1])), "bat"
    r = T.shape[0] if kind == "bone" else T.shape[-1]
    result = W.clone()
    if kind == "bone":
        for column in range(W.shape[1]):
            result[:, column] += T[column % r]
        return result
    for a in range(0, W.shape[0], r):
        for b in range(0, W.shape[1], r):
            block = T[(b if kind == "bat-row" else a) // r]
            result[a : a + r, b : b + r] += W[a : a + r, b : b + r] @ block + block
    return result
