"""A merge of models in memory: of every method and every way of storing weights, at the price of holding the model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bonetune.certificates import TOLERANCE, Certificate, Witness, certify, witness
from bonetune.data.formats import TaskName
from bonetune.errors import AdapterFileError, BonetuneError, InputError, RunError, first_line
from bonetune.files import read_run
from bonetune.models import Loaded, end_tokens, load_base, load_model, parse_dtype
from bonetune.tuner import BoneLayer
from bonetune.tuner.dequantize import dequantize_layers, forget_quantization


class NotBuilt(InputError):  # noqa: N818  (what cannot be made may still be merged file by file)
    """PEFT does not make the adapted model of these adapters, all together and scaled as asked for."""


class Adapted:
    """Adapters on their base model, as they were trained; loaded when it is asked for, one model at a time.

    Args:
        adapters: their folders.
        base: the base model, if it is not where they say.
        scales: a factor of the update for each.
        dtype: of the base model's weights; `auto` is its own.
        into: for adapters that were trained on quantized weights, over which weights they are: `trained` or `original`.
        prompts: on which the model is a witness.
        trust_remote_code: run code that comes with the model or the adapters.
    """

    def __init__(
        self,
        adapters: Sequence[str],
        base: str | None,
        scales: Sequence[float],
        dtype: str,
        into: str,
        prompts: Sequence[str],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.adapters, self.base, self.scales = adapters, base, scales
        # the trained model: in the base's own dtype, or wider where a wider result is asked for
        self.dtype, self.into, self.prompts = "float32" if dtype == "float32" else "auto", into, list(prompts)
        self.quantized = any(read_run(Path(adapter)).get("quantization") is not None for adapter in adapters)
        self.trusted = trust_remote_code

    def load(self, into: str | None = None, dtype: str | None = None) -> Loaded:
        """The adapted model; over quantized weights, with the values that they stand for, and products that are not rounded."""
        quantized, dtype = self.quantized and (into or self.into) == "trained", dtype or self.dtype
        loaded = self._with_adapters("auto" if quantized else dtype, quantized)
        _check_finite(loaded.model, self.adapters)
        self._scale(loaded.model)
        if quantized:
            said = witness(loaded.model, loaded.tokenizer, self.prompts)
            plain = dequantize_layers(loaded.model)
            forget_quantization(loaded.model)
            if dtype == "float32" or len({layer.weight.dtype for layer in plain} | {loaded.model.dtype}) > 1:
                loaded.model.float()  # backends that dequantize to float32 leave the rest as it was
            difference = certify(loaded.model, said)
            if not difference.error <= TOLERANCE["bfloat16"] * difference.size:  # products with codes are no more exact
                raise RunError(
                    f"The values read from the quantized weights are not those that {self.adapters[0]} was trained on. "
                    f"{difference}."
                )
        return loaded

    def witness(self) -> Witness:
        """What the adapted model says."""
        loaded = self.load()
        return witness(loaded.model, loaded.tokenizer, self.prompts)

    def save_merged(self, folder: Path, dtype: str, check_space: Callable[[int], None]) -> tuple[Witness, TaskName]:
        """Write the merged model with its tokenizer; what the adapted one said, and what it is for.

        Args:
            folder: an empty one.
            dtype: of the merged weights; `auto` keeps the base's.
            check_space: called with what the weights take, before they are written.
        """
        target = parse_dtype(dtype)
        loaded = self.load(dtype=self._exact(target))
        expected = witness(loaded.model, loaded.tokenizer, self.prompts)
        ends = end_tokens(loaded.model, loaded.tokenizer) if loaded.model.can_generate() else []
        options: dict[str, Any] = {"dequantize": True} if self.quantized and self.into == "trained" else {}
        if len(self.adapters) > 1:
            options["adapter_names"] = self._names
        merged = loaded.model.merge_and_unload(**options)
        if ends:
            merged.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        if target != "auto":
            merged = merged.to(target)
        _check_merged(merged)
        check_space(sum(parameter.numel() * parameter.element_size() for parameter in merged.parameters()))
        merged.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        return expected, loaded.task_type

    def other_choice(self, merged: str, task_type: TaskName, expected: Witness) -> Certificate:
        """How the model over the original weights compares with the trained one, whichever of them was merged."""
        if self.into == "trained":
            return certify(self.load("original").model, expected)
        trained = self.load("trained")
        said = witness(trained.model, trained.tokenizer, self.prompts)
        del trained
        return certify(load_base(merged, task_type=task_type, trust_remote_code=self.trusted).model, said)

    def _exact(self, target: torch.dtype | str) -> str:
        """Another dtype than the base's is rounded to once: from float32."""
        from transformers import AutoConfig

        if target == "auto" or self.quantized:
            return self.dtype
        base = self.base or read_base_name(self.adapters[0])
        config = AutoConfig.from_pretrained(base, trust_remote_code=self.trusted) if base else None
        return "auto" if config is not None and config.dtype == target else "float32"

    def _with_adapters(self, dtype: str, quantized: bool) -> Loaded:
        loaded = load_model(self.adapters[0], dtype, self.base, quantized=quantized, trust_remote_code=self.trusted)
        if len(self.adapters) == 1:
            return loaded
        for name, adapter in list(zip(self._names, self.adapters, strict=True))[1:]:
            try:
                loaded.model.load_adapter(adapter, name)
            except BonetuneError:
                raise
            except (KeyError, OSError, RuntimeError, ValueError, TypeError) as error:
                raise NotBuilt(f"Adapter {adapter} cannot be loaded beside {self.adapters[0]}: {first_line(error)}") from error
        loaded.model.base_model.set_adapter(self._names)
        return Loaded(loaded.model.eval(), *(getattr(loaded, key) for key in ("tokenizer", "base", "adapter", "task_type")))

    @property
    def _names(self) -> list[str]:
        return ["default", *(f"adapter{number}" for number in range(1, len(self.adapters)))]

    def _scale(self, model: Any) -> None:
        if all(scale == 1 for scale in self.scales):
            return
        layers = [module for module in model.modules() if isinstance(module, BoneLayer)]
        if not layers:
            raise NotBuilt("--scale needs an adapter of the Bone family, and this one is of another method.")
        for layer in layers:
            for name, scale in zip(self._names, self.scales, strict=True):
                layer.set_scale(name, scale)


def read_base_name(adapter: str) -> str | None:
    """The base model that an adapter names."""
    import json

    return json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")


def _check_finite(model: Any, adapters: Sequence[str]) -> None:
    bad = [name for name, p in model.named_parameters() if "bone_block" in name and not p.isfinite().all()]
    if bad:
        raise AdapterFileError(
            f"Adapter {', '.join(adapters)} holds values that are not finite, in {len(bad)} tensors: {bad[0]}, ..."
        )


def _check_merged(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RunError(f"The merged {name} would have values that are not finite.")
