"""Makes peft_type "BONE" known to PEFT's own functions, through the mappings that PEFT looks types up in."""

from typing import Any

from bonetune.tuner.config import BoneConfig
from bonetune.tuner.model import BoneModel
from bonetune.tuner.peft_type import BonePeftType


def register() -> None:
    """Register Bone with PEFT. Calling it again changes nothing.

    `peft.utils.register_peft_method` takes only names of PEFT's own enumeration, hence the mappings themselves.

    Raises:
        ImportError: PEFT is older than 0.19 and has a Bone of its own, with which this one would collide.
    """
    import peft
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    if hasattr(peft.PeftType, "BONE"):
        raise ImportError(
            f"PEFT {peft.__version__} has a Bone of its own. Upgrade it (pip install -U 'peft>=0.21'), or stay with its Bone."
        )
    mappings: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, BoneConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, BoneModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, BoneModel.prefix),
    ]
    for mapping, value in mappings:
        mapping[BonePeftType.BONE] = value
