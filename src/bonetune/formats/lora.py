"""PEFT's LoRA: what LoRA servers load. Bone and mini become one exactly, the BAT variants by truncated singular values.

LoRA adds `alpha / rank * B @ A`, A (rank, in), B (out, rank). A bone update repeats D (r, out) in every column shard, which is
`B = D.T` and A the identity repeated along the columns, `A[j, b*r + j] = 1`, with rank = alpha = r; see docs/math.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor

from bonetune.errors import AdapterFileError, InputError
from bonetune.formats.fitting import Fitted
from bonetune.formats.peft_folder import COMMON, Folder, bone_config, read_folder, write_folder
from bonetune.formats.state import AdapterState, rank_settings
from bonetune.tuner import BoneConv, BoneEmbedding, BoneLayer, BoneLinear, by_pattern

NAME = "lora"
_SUFFIXES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_BIASES = {"none": "none", "all": "all", "lora_only": "bone_only"}
# The smallest side of a weight up to which all its singular values are computed; beyond, those of the rank and some more.
_MOST_EXACT, _OVERSAMPLED, _ITERATIONS = 2048, 16, 4
# Settings of LoRA under which its update is not `alpha / rank * B @ A`, or not of the frozen weight.
_OTHER_UPDATES = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "target_parameters",
    "lora_bias",
    "layer_replication",
    "kasa_config",
)


@dataclass(frozen=True)
class Factors:
    """Delta(W) of one layer as B @ A.

    Args:
        A: (rank, in).
        B: (out, rank).
        error: ||Delta(W) - B @ A|| / ||Delta(W)||, Frobenius norms; 0 where the factors are exact.
        error_by_rank: what that would be at other ranks; none where the factors are exact.
    """

    A: Tensor
    B: Tensor
    error: float = 0.0
    error_by_rank: Mapping[int, float] | None = None

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.B.shape[1]

    def without_tensors(self) -> "Factors":
        """Rank and errors alone, with nothing of the tensors kept in memory."""
        return replace(self, A=self.A.new_empty(self.rank, 0), B=self.B.new_empty(0, self.rank))


def factors(fitted: Fitted, layer: str, rank: int | None = None) -> Factors:
    """Delta(W) of a layer as a product of two factors, in the dtype of the adapter's tensor.

    Args:
        fitted: the adapter on its base model; a BAT variant reads the layer's weight from there.
        layer: its name.
        rank: of the factors, for the BAT variants; None: r. At most the smaller side of W. Bone and mini have rank r.

    Raises:
        InputError: a layer that LoRA's factors are not defined for.
    """
    bone, theta, spec = fitted.layers[layer], fitted.state.tensors[layer], fitted.state.spec(layer)
    if not isinstance(bone, BoneLinear | BoneEmbedding | BoneConv) or bone.number_of_matrices is not None:
        raise InputError(
            f"{layer} does not become LoRA: adapters on Linear layers, embeddings and convolutions with kernels of one offset "
            "do. Merge the adapter instead."
        )
    if isinstance(bone, BoneConv) and cast(Any, bone.get_base_layer()).groups > 1:
        raise InputError(
            f"{layer} does not become LoRA: PEFT has none of this shape for convolutions in groups. Merge the adapter."
        )
    if spec.blockwise:
        return _truncated(fitted.delta(layer), rank or spec.r, theta.dtype)
    repeats = -(-bone.in_features // spec.r)
    A = torch.eye(spec.r, dtype=theta.dtype).repeat(1, repeats)[:, : bone.in_features].contiguous()
    return Factors(A, theta.T.repeat(bone.out_features // theta.shape[1], 1))


def write(fitted: Fitted, path: Path, rank: int | None = None) -> dict[str, Factors]:
    """Write an adapter folder that PEFT loads as LoRA.

    Args:
        fitted: the adapter on its base model.
        path: the folder.
        rank: as for `factors`.

    Returns:
        What was written for each layer, without its tensors.

    Raises:
        InputError: a layer or a setting that LoRA does not have.
    """
    config = fitted.state.config
    tensors: dict[str, Tensor] = {}
    made: dict[str, Factors] = {}
    for layer in fitted:
        found = factors(fitted, layer, rank)
        tensors |= _named(layer, found, fitted.layers[layer])
        made[layer] = found.without_tensors()
    ranks = {layer: found.rank for layer, found in made.items()}
    most, others = rank_settings(ranks)
    settings: dict[str, Any] = {name: getattr(config, name) for name in COMMON}
    settings["target_modules"] = config.target_modules or sorted(ranks)
    lora = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_dropout=config.bone_dropout,
        fan_in_fan_out=any(getattr(layer, "_transposed", False) for layer in fitted.layers.values()),
        bias=next(name for name, ours in _BIASES.items() if ours == config.bias),  # pyright: ignore[reportArgumentType]  (PEFT's own Literal)
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        **settings,
    )
    write_folder(path, lora, tensors, fitted.state)
    return made


def read(path: Path) -> AdapterState:
    """Read a LoRA folder whose update is one of bone: every A is the repeated identity, as `write` makes it.

    Raises:
        AdapterFileError: it is no LoRA, or a LoRA that no bone adapter is equal to.
    """
    folder, pairs = _read_pairs(path)
    tensors = {layer: _as_bone(path, layer, pair) for layer, pair in pairs.items()}
    ranks = {layer: pair.rank for layer, pair in pairs.items()}
    most, others = rank_settings(ranks)
    given = {
        "r": most,
        "variant": "bone",
        "init_weights": True,
        "rank_pattern": others,
        "bias": _BIASES.get(str(folder.config.get("bias", "none")), "none"),
    }
    known = {name: value for name, value in folder.config.items() if name in _KEPT}
    config, notes = bone_config(replace(folder, config=known), {"lora_dropout": "bone_dropout"}, given)
    notes.append("every A is the repeated identity, so this LoRA is the bone adapter D = B.T")
    return AdapterState(config, tensors, folder.whole, folder.source, tuple(notes)).check()


def read_factors(path: Path) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """What any LoRA folder holds: factors by the layer's name, for weights (out, in), and the tensors that were trained whole.

    alpha / rank is multiplied into B.

    Raises:
        AdapterFileError: it is no LoRA, or one whose update is not B @ A alone.
    """
    folder, pairs = _read_pairs(path)
    return pairs, folder.whole


# What of a LoraConfig means the same for an adapter of this family.
_KEPT = ("peft_type", *COMMON, "lora_dropout", "trainable_token_indices", "ensure_weight_tying")


def _truncated(delta: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """The best factors of that rank in the Frobenius norm, and what others would cost.

    From the eigenvectors of the smaller Gram matrix, in float64; of large weights by subspace iteration, in float32, which
    costs a few products and knows the errors of ranks up to this one.
    """
    rank, norm = min(rank, *delta.shape), float(delta.double().norm())
    if not norm:
        return Factors(delta.new_zeros(rank, delta.shape[1], dtype=dtype), delta.new_zeros(delta.shape[0], rank, dtype=dtype))
    if min(delta.shape) <= _MOST_EXACT:
        wide = delta.double()
        tall = wide.shape[0] > wide.shape[1]
        energies, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
        energies, basis = energies.flip(0).clamp_min(0), vectors.flip(1)[:, :rank]
        A, B = (basis.T, wide @ basis) if tall else (basis.T @ wide, basis)
        left = energies.sum() - energies.cumsum(0)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            basis, values, _ = torch.svd_lowrank(delta, q=min(rank + _OVERSAMPLED, *delta.shape), niter=_ITERATIONS)
        B = basis[:, :rank]
        A, left = B.T @ delta, norm**2 - values[:rank].double().square().cumsum(0)
    A, B = A.to(dtype).contiguous(), B.to(dtype).contiguous()
    error = float((delta.double() - B.double() @ A.double()).norm()) / norm
    by_rank = {k: math.sqrt(max(float(left[k - 1]), 0.0)) / norm for k in _ranks(len(left))}
    return Factors(A, B, error, by_rank)


def _ranks(most: int) -> list[int]:
    return sorted({min(1 << power, most) for power in range(most.bit_length() + 1)})


def _named(layer: str, found: Factors, bone: BoneLayer) -> dict[str, Tensor]:
    """The factors under PEFT's names and in its layouts: an embedding's are those of its transposed weight."""
    if isinstance(bone, BoneEmbedding):
        return {f"{layer}.lora_embedding_A": found.B.T.contiguous(), f"{layer}.lora_embedding_B": found.A.T.contiguous()}
    A, B = found.A, found.B
    if isinstance(bone, BoneConv):
        kernel: Any = bone.get_base_layer().weight
        ones = [1] * (kernel.dim() - 2)
        A, B = A.reshape(*A.shape, *ones), B.reshape(*B.shape, *ones)
    return {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}


def _read_pairs(path: Path) -> tuple[Folder, dict[str, Factors]]:
    folder = read_folder(path, NAME, "LORA", _SUFFIXES)
    for name in _OTHER_UPDATES:
        if folder.config.get(name):
            raise AdapterFileError(f"{path} has {name}={folder.config[name]!r}: its update is not B @ A alone.")
    named: dict[str, dict[str, Tensor]] = {}
    for name, tensor in folder.tensors.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        named.setdefault(layer, {})[factor] = tensor
    if not named:
        raise AdapterFileError(f"{path} holds no LoRA factors.")
    return folder, {layer: _pair(path, layer, pair, _scale(path, folder.config, layer)) for layer, pair in named.items()}


def _pair(path: Path, layer: str, pair: Mapping[str, Tensor], scale: float) -> Factors:
    if {"lora_A", "lora_B"} <= pair.keys():
        A, B = pair["lora_A"], pair["lora_B"]
        if min(A.dim(), B.dim()) < 2 or math.prod(A.shape[2:]) != 1:
            raise AdapterFileError(f"{path} has factors of {layer} that are no matrices, or of a kernel of several offsets.")
        A, B = A.flatten(1), B.flatten(1)
    elif {"lora_embedding_A", "lora_embedding_B"} <= pair.keys():
        A, B = pair["lora_embedding_B"].T, pair["lora_embedding_A"].T
    else:
        raise AdapterFileError(f"{path} has only {', '.join(sorted(pair))} of the two factors of {layer}.")
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise AdapterFileError(f"{path} has factors of {layer} that do not match: {tuple(A.shape)} and {tuple(B.shape)}.")
    return Factors(A, B * scale if scale != 1 else B)


def _scale(path: Path, config: Mapping[str, Any], layer: str) -> float:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        rank, alpha = by_pattern(ranks, layer, config.get("r", 8)), by_pattern(alphas, layer, config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise AdapterFileError(f"{path} has no rank and alpha that a scale could be made of: {error}") from error


def _as_bone(path: Path, layer: str, pair: Factors) -> Tensor:
    """D of the bone adapter whose update is B @ A."""
    columns = pair.A.shape[1]
    identity = torch.eye(pair.rank, dtype=pair.A.dtype).repeat(1, -(-columns // pair.rank))[:, :columns]
    if not torch.equal(pair.A, identity):
        raise AdapterFileError(
            f"{path} is a LoRA that no bone adapter is equal to: the A of {layer} is not the repeated identity. LoRA in "
            "general is no member of this family; merge it with PEFT instead."
        )
    return pair.B.T.contiguous()
