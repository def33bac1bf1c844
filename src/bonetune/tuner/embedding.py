"""The adapted embedding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bonetune.errors import TargetError
from bonetune.ops import Update
from bonetune.ops.lookup import looked_up
from bonetune.tuner.frozen import base_weight
from bonetune.tuner.layer import BoneLayer


class BoneEmbedding(BoneLayer):
    """An `nn.Embedding` with adapters of the Bone family. ids (...) -> (..., embedding_dim).

    The stored matrix (num_embeddings, embedding_dim) is adapted as the Linear's weight that a tied head would have: shards run
    along embedding_dim, and each id has numbers of its own (`bone`: r of them, in every shard). See `bonetune.ops.lookup`.
    As in `nn.Embedding`, the row of `padding_idx` gets no gradient.
    """

    @classmethod
    def sides(cls, module: Any, name: str = "weight") -> tuple[int, int]:
        if module.max_norm is not None:
            raise TargetError(
                f"An embedding with max_norm={module.max_norm} changes its weight whenever it is called, so it cannot be "
                "adapted: train it whole through `modules_to_save`."
            )
        return module.num_embeddings, module.embedding_dim

    def adapted(self, x: Tensor, updates: Sequence[Update], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        W, scale, padding = base_weight(self), self._get_embed_scale(), getattr(self.get_base_layer(), "padding_idx", None)
        for update in updates:
            change = looked_up(x, W, update)
            if padding is not None and change.requires_grad:
                padded = torch.eq(update.selected(x), int(padding)).unsqueeze(-1)
                change = torch.where(padded, change.detach(), change)
            y = update.added_to(y, change if scale is None else change * scale)
        return y
