"""The name under which PEFT knows Bone. PEFT 0.19 took BONE out of its own enumeration; hash and equality are the string's."""

from enum import Enum


class BonePeftType(str, Enum):  # noqa: UP042  (PEFT reads its own types' names after the dot of str(), which StrEnum has none of)
    """`peft_type` of a `BoneConfig`; equal to the "BONE" of an adapter_config.json."""

    BONE = "BONE"
