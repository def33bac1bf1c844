"""`BoneConfig`: what PEFT reads from and writes to adapter_config.json."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from bonetune.errors import InputError
from bonetune.spec import VARIANTS, ShardSpec, parse_variant
from bonetune.tuner.peft_type import BonePeftType

Bias = Literal["none", "all", "bone_only"]

# Names of modules, parameters or layers; some may be one name or a regular expression.
_NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters", "trainable_parameters")
_TEXTS = ("base_model_name_or_path", "revision", "task_type")

# Fields that the last PEFT with a Bone of its own (0.18) does not know. They are written only where they differ from their
# defaults, so that it reads files of `bone` and `bat` without having to ignore anything but `variant`.
_NEWER_DEFAULTS: dict[str, Any] = {
    "mini_r": 1,
    "bone_dropout": 0.0,
    "rank_pattern": {},
    "exact_update": False,
    "target_parameters": None,
    "trainable_token_indices": None,
    "trainable_parameters": None,
    "ensure_weight_tying": False,
}


@dataclass
class BoneConfig(PeftConfig):
    """Settings of a Bone, MiSS or BAT adapter (arXiv 2409.15371; formulas in `bonetune.spec`).

    Args:
        r: shard size ("rank"). The trainable tensor of a Linear (out, in) has r * out elements for `bone`, `bat` and
            `bat-left`, r * in for `bat-row`, r * r for `bat-free`, r * mini_r for `mini`.
        variant: "bone", "mini", "bat", "bat-row", "bat-free" or "bat-left". The BAT variants need r to divide both sides
            of each adapted weight.
        init_weights: True starts at zero, so that the model is unchanged at first; False starts at random values (for
            tests). A variant's name is the same as naming it in `variant`: old scripts and files do that.
        mini_r: width of the trainable tensor for `mini`; must divide out.
        target_modules: names (suffixes) of the modules to adapt, a regular expression, or "all-linear"; None takes PEFT's
            default for the architecture.
        exclude_modules: names or a regular expression of modules to leave alone.
        bone_dropout: dropout on what enters the update; what enters the frozen weight is never dropped. For `bat` and
            `bat-left` it costs one more product with W.
        exact_update: for the BAT variants, compute the update as a product of its own, which costs one more product with W in
            the forward pass. Without it the update is rounded together with what it is added to: over a bfloat16 base,
            parts of it below about 1/256 of that are lost in the forward pass (never in gradients). It needs a plain Linear
            and one kind of adapter at a time, and works without dropout only: else the frozen product is rounded already.
        rank_pattern: r for some modules: {name or regular expression: r}.
        layers_to_transform: indices of the layers to adapt; None adapts all.
        layers_pattern: name of the list of layers, if it is an unusual one.
        bias: which biases train: "none", "all" or "bone_only" (those of adapted layers).
        modules_to_save: modules that are trained and saved whole, a classifier's head for instance.
        target_parameters: names (ends of names) of parameters to adapt that no Linear holds, such as the stacked weights of a
            mixture's experts: (number, out, in) or (out, in), each matrix with a tensor of its own. Without dropout.
        trainable_parameters: names (ends of names, at a dot) of parameters that are trained and saved whole, such as
            `att.x_r` or `norm.weight`, or a regular expression of whole names. The base keeps its own: they are back where the
            adapter is not active. With `target_modules=[]` nothing else is trained.
        trainable_token_indices: ids whose embeddings are trained, or {embedding's name: ids}; the rest of it stays frozen.
        ensure_weight_tying: where the embedding or the head tied to it is targeted (or in `modules_to_save`), adapt (or save)
            both by one tensor, so that they stay tied.

    Raises:
        InputError: unknown variant, sizes that are not positive integers, unknown `bias`, two different variants named,
            what is no regular expression, or `layers_to_transform` together with one.

    Example:
        >>> config = BoneConfig(r=64, variant="bat-row", target_modules="all-linear", task_type="CAUSAL_LM")
        >>> model = peft.get_peft_model(model, config)
    """

    r: int = field(default=64, metadata={"help": "Shard size."})
    variant: str | None = field(default=None, metadata={"help": f"One of {', '.join(VARIANTS)}."})
    init_weights: bool | str = field(default=True, metadata={"help": "True: zeros. False: random. Or a variant's name."})
    mini_r: int = field(default=1, metadata={"help": "Width of the trainable tensor of variant 'mini'."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave alone."}
    )
    bone_dropout: float = field(default=0.0, metadata={"help": "Dropout on what enters the update."})
    exact_update: bool = field(default=False, metadata={"help": "BAT variants: multiply the update on its own."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Name or regular expression to r."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'bone_only'."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to adapt, by ends of names."})
    trainable_parameters: list[str] | str | None = field(
        default=None, metadata={"help": "Parameters trained whole: ends of names, or a regular expression."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Ids whose embeddings are trained."}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Adapt tied embeddings by one tensor."})

    def __post_init__(self) -> None:
        self._check_types()
        super().__post_init__()
        self.peft_type = BonePeftType.BONE
        # A file without a variant's name may be of November 2024, when `init_weights: true` meant bat; see `tuner.model`.
        self.variant_was_named = self.variant is not None or isinstance(self.init_weights, str)
        self.variant = self._resolve_variant()
        self.init_weights = bool(self.init_weights)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if not isinstance(self.trainable_parameters, str | None):
            self.trainable_parameters = sorted(set(self.trainable_parameters))
        self.trainable_parameters = self.trainable_parameters or None
        if self.bias not in ("none", "all", "bone_only"):
            raise InputError(f"Unknown bias {self.bias!r}: choose 'none', 'all' or 'bone_only'.")
        if not 0 <= self.bone_dropout < 1:
            raise InputError(f"`bone_dropout` should be at least 0 and less than 1, got {self.bone_dropout!r}.")
        if not isinstance(self.exact_update, bool):
            raise InputError(f"`exact_update` should be true or false, got {self.exact_update!r}.")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise InputError(f"`{name}` cannot be used when `target_modules` is a str. List the modules' names instead.")
        indices = self.layers_to_transform
        if not isinstance(indices, int | None) and not _are_indices(indices):
            raise InputError(f"`layers_to_transform` should be a number or a list of numbers, got {indices!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        for name in ("target_modules", "exclude_modules", "trainable_parameters"):
            _check_regular_expression(name, getattr(self, name))
        for pattern in self.rank_pattern:
            _check_regular_expression("rank_pattern", pattern)
        for r in (self.r, *self.rank_pattern.values()):
            ShardSpec(parse_variant(self.variant), r, self.mini_r)

    def _check_types(self) -> None:
        """Raise `InputError` for values that only a broken file holds."""
        for name in _NAMES:
            value = getattr(self, name)
            listed = isinstance(value, list | set | tuple) and all(isinstance(item, str) for item in value)
            if not (listed or value is None or isinstance(value, str)):
                raise InputError(f"`{name}` should be a name or a list of names, got {value!r}.")
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"`{name}` should be a text, got {getattr(self, name)!r}.")
        tokens = self.trainable_token_indices
        by_name = isinstance(tokens, dict) and all(isinstance(name, str) and _are_indices(tokens[name]) for name in tokens)
        if tokens is not None and not by_name and not _are_indices(tokens):
            raise InputError(f"`trainable_token_indices` should be ids, or ids by name, got {tokens!r}.")
        if not isinstance(self.init_weights, bool | str):
            raise InputError(f"`init_weights` should be true, false or a variant's name, got {self.init_weights!r}.")
        if isinstance(self.bone_dropout, bool) or not isinstance(self.bone_dropout, int | float):
            raise InputError(f"`bone_dropout` should be a number, got {self.bone_dropout!r}.")
        if not isinstance(self.rank_pattern, dict):
            raise InputError(f"`rank_pattern` should be r by name, got {self.rank_pattern!r}.")

    def _resolve_variant(self) -> str:
        alias = self.init_weights if isinstance(self.init_weights, str) else None
        if alias is not None and self.variant is not None and alias != self.variant:
            raise InputError(f"init_weights={alias!r} and variant={self.variant!r} name two variants: keep one.")
        return parse_variant(alias or self.variant or "bone")

    @property
    def adapts_layers(self) -> bool:
        """Whether it puts tensors of the Bone family anywhere, and does not train whole parameters alone."""
        named = self.target_modules is None or self.target_modules or self.target_parameters
        return bool(named or not self.trainable_parameters)

    def spec(self, module_name: str = "") -> ShardSpec:
        """The `ShardSpec` of the adapter on the module of that name, after `rank_pattern`."""
        return ShardSpec(parse_variant(str(self.variant)), by_pattern(self.rank_pattern, module_name, self.r), self.mini_r)

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds: as PEFT 0.14-0.18 wrote it for `bone` (`init_weights: true`) and `bat` (`"bat"`).

        The other variants put their names there, so that an old PEFT stops at the tensors' shapes instead of computing
        something else. `variant` always stands beside it.
        """
        content = super().to_dict()
        content["init_weights"] = True if self.variant == "bone" else self.variant
        for name in ("target_modules", "exclude_modules"):
            if isinstance(content[name], set):
                content[name] = sorted(content[name])
        return {key: value for key, value in content.items() if key not in _NEWER_DEFAULTS or value != _NEWER_DEFAULTS[key]}


def _are_indices(value: Any) -> bool:
    return isinstance(value, list | set | tuple) and all(type(item) is int for item in value)


def by_pattern(patterns: Mapping[str, int], module_name: str, default: int) -> int:
    """The value of the first name or regular expression that ends the module's name, as PEFT matches them; else the default."""
    return patterns.get(get_pattern_key(list(patterns), module_name), default)


def _check_regular_expression(name: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"`{name}`={value!r} is not a regular expression: {error}.") from error
