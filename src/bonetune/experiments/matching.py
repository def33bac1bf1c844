"""The shard size or rank at which a method's trainable parameters come nearest to the reference's."""

import copy
import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import get_peft_model

from bonetune.errors import SpecError
from bonetune.experiments.settings import Comparison
from bonetune.models.skeleton import skeleton
from bonetune.spec import ShardSpec
from bonetune.training import baselines
from bonetune.training.config import RunConfig
from bonetune.training.ingredients import adapter_config, model_options, read_data, tokenizer_of
from bonetune.tuner import BoneLayer

_NOWHERE = Path("matching")
_ADAPTER = "default"
_AS_LORA = ("lora", "rslora", "lora+", "pissa", "olora", "lora-ga", "milora")


@dataclass(frozen=True)
class Sized:
    """A method with its size.

    Args:
        name: the method's.
        r: shard size or rank; None for full fine-tuning.
        trainable_parameters: with it.
        matched: whether r was looked for, and not given.
    """

    name: str
    r: int | None
    trainable_parameters: int
    matched: bool


def sized(comparison: Comparison) -> dict[str, Sized]:
    """Every method of a comparison with its size. No weights are loaded.

    Raises `InputError` if a method's settings do not fit the model, or no reference can be told.
    """
    counting = _Counting(comparison)
    methods = {name: counting.config(name, None) for name in comparison.methods}
    reference = reference_of(comparison)
    given = {name: methods[name].r for name in comparison.methods if _says_r(comparison, name) or name == reference}
    given |= {name: config.r for name, config in methods.items() if config.baseline is None and config.variant == "mini"}
    found = {}
    for name in comparison.methods:
        if methods[name].baseline == "full":
            found[name] = Sized(name, None, counting.of(name, None), matched=False)
            continue
        assert reference is not None
        r = given[name] if name in given else counting.nearest(name, counting.of(reference, given[reference]))
        found[name] = Sized(name, r, counting.of(name, r), matched=name not in given)
    return found


def reference_of(comparison: Comparison) -> str | None:
    """The method that the others are matched to: the one named, the first with an r of its own, or the first adapter.

    `mini` has few parameters on purpose, and is it only where there is no other; None: there is no adapter.
    """
    adapted = [name for name in comparison.methods if comparison.run(name, None, 1e-4, 0, _NOWHERE).baseline != "full"]
    said = [name for name in adapted if _says_r(comparison, name)]
    large = [name for name in adapted if comparison.methods[name].settings.get("variant") != "mini"]
    return next((name for name in (comparison.match, *said, *large, *adapted) if name is not None), None)


def _says_r(comparison: Comparison, name: str) -> bool:
    return "r" in {**comparison.train, **comparison.methods[name].settings}


class _Counting:
    """Trainable parameters of a comparison's methods at any size, on a model without values."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.known: dict[str, int] = {}

    def config(self, name: str, r: int | None) -> RunConfig:
        return self.comparison.run(name, r, 1e-4, 0, _NOWHERE)

    @cached_property
    def base(self) -> Any:
        config = self.config(next(iter(self.comparison.methods)), None)
        classes = None
        if config.task_type == "SEQ_CLS":
            classes = len(read_data(config, tokenizer_of(config)).classes or ()) or 1
        return skeleton(config.model_name_or_path, config.dtype, **model_options(config), num_labels=classes)

    def adapted(self, config: RunConfig) -> Any:
        """The model as it is trained. Raises `InputError` if it cannot have the adapter."""
        base = copy.deepcopy(self.base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT says of a model without values is of no use here
            if config.baseline is not None:
                return baselines.as_in_training(config, base, without_values=True)
            return get_peft_model(base, adapter_config(config, base), low_cpu_mem_usage=True)

    def of(self, name: str, r: int | None) -> int:
        """Trainable parameters with the size `r`. Raises `InputError` if the model cannot have it."""
        config = self.config(name, r)
        # how LoRA's pairs begin does not change their number
        same = config.model_copy(update={"baseline": "lora", "baseline_kwargs": {}}) if config.baseline in _AS_LORA else config
        key = same.model_dump_json()
        if key not in self.known:
            self.known[key] = _trainable(self.adapted(same))
        return self.known[key]

    def nearest(self, name: str, target: int) -> int:
        """The size at which the count comes nearest to `target`, the smaller one of two that do alike.

        A baseline may have any rank, but PEFT's BAT, and shards have to fit the layers: only sizes that do are tried.
        """
        config = self.config(name, 1)
        if config.baseline == "miss-bat":
            layers = [layer for layer in self.adapted(config).modules() if hasattr(layer, "miss_block")]
            largest = math.gcd(*(side for layer in layers for side in (layer.in_features, layer.out_features)))
            return min((r for r in range(1, largest + 1) if not largest % r), key=lambda r: abs(self.of(name, r) - target))
        if config.baseline is not None:
            one, two = self.of(name, 1), self.of(name, 2)
            if one == two:
                return self.config(name, None).r  # each layer has a rank of its own
            ideal = 1 + (target - one) / (two - one)  # a count is a + b r
            return min(sorted({max(1, math.floor(ideal)), max(1, math.ceil(ideal))}), key=lambda r: abs(r - ideal))
        model = self.adapted(config)
        layers = [layer for layer in model.modules() if isinstance(layer, BoneLayer)]
        own = [layer for layer in layers if layer.bone_spec[_ADAPTER].r == 1]  # the others have one by rank_pattern
        if not own:
            return self.config(name, None).r
        rest = _trainable(model) - sum(math.prod(layer.tensor_shape(config.spec)) for layer in own)
        counts = {}
        for r in range(1, 1 + max(layer.in_features for layer in own)):
            spec = replace(config.spec, r=r)
            if all(_fits(spec, layer) for layer in own):
                counts[r] = rest + sum(math.prod(layer.tensor_shape(spec)) for layer in own)
        return min(counts, key=lambda r: abs(counts[r] - target))


def _fits(spec: ShardSpec, layer: BoneLayer) -> bool:
    try:
        spec.check(layer.out_features, layer.in_features)
    except SpecError:
        return False
    return True


def _trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
