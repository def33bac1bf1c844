"""The name under which PEFT knows Bone. PEFT 0.19 took BONE out of its own enumeration; hash and equality are the string's."""

from enum import StrEnum


class BonePeftType(StrEnum):
    """`peft_type` of a `BoneConfig`; equal to the "BONE" of an adapter_config.json."""

    BONE = "BONE"
