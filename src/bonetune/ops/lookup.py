"""Embeddings: the stored matrix W (num_embeddings, embedding_dim) is adapted like a Linear's weight, and rows of W' looked up.

So shards run along embedding_dim, and a head tied to the embedding would have the same update. Only the rows that are looked
up are ever transformed. With a = id // r and i = id % r:

* bone, mini   Delta(W)[id] is D[:, id], or D[:, id % mini_r], in every shard.
* bat          Delta(W)[id]_b = W[id]_b B[a] + B[a][i]; bat-row and bat-free have B[b] and B[0] in its place.
* bat-left     Delta(W)[id] = sum_k B[a][k, i] W[a * r + k] + B[a][:, i] in every shard: r rows of W, weighted and added.
"""

import torch
from torch import Tensor
from torch.nn import functional

from bonetune.ops.reference import Update


def looked_up(ids: Tensor, W: Tensor, update: Update) -> Tensor:
    """Rows `ids` of scale * Delta(W), for the update's rows of the batch, after its dropout.

    ids (...) of integers, W (num_embeddings, embedding_dim) -> (..., embedding_dim), in the dtype that W and the adapter's
    tensor promote to. Dropout drops what an id adds as a whole: ids are one-hot vectors, and that is what enters the update.
    """
    ids, theta, spec = update.selected(ids), update.theta, update.spec
    dim, r = W.shape[1], spec.r
    flat = ids.flatten()
    if not spec.blockwise:
        narrow = functional.embedding(flat % theta.shape[1], theta.T)
        change = narrow.repeat(1, -(-dim // r))[:, :dim]
    else:
        B = theta.to(torch.promote_types(W.dtype, theta.dtype))
        block, row = flat // r, flat % r
        if spec.variant == "bat-left":
            weights = B[block, :, row]
            whole = functional.embedding_bag(
                block.unsqueeze(1) * r + torch.arange(r, device=flat.device),
                W,
                per_sample_weights=weights.to(W.dtype),
                mode="sum",
            )
            change = whole + weights.repeat(1, dim // r)
        else:
            shards = functional.embedding(flat, W).to(B.dtype).unflatten(1, (-1, r))  # (n, dim/r, r)
            if spec.variant == "bat":
                own = B[block]  # (n, r, r)
                moved = shards @ own + own[torch.arange(len(flat), device=flat.device), row].unsqueeze(1)
            else:
                moved = (shards.transpose(0, 1) @ B).transpose(0, 1) + B[:, row].transpose(0, 1)
            change = moved.flatten(1)
    change = change if update.scale == 1 else update.scale * change
    if update.dropout is not None:
        change = change * update.dropout(change.new_ones(len(flat), 1))
    return change.view(*ids.shape, dim)
