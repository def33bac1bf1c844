"""Proofs that an artifact computes what the adapted model computes."""

from bonetune.certificates.exports import (
    ROUNDING,
    TRUNCATION,
    TensorsCertificate,
    UpdatesCertificate,
    WeightsCertificate,
    same_tensors,
    same_updates,
)
from bonetune.certificates.layers import LAYER_TOLERANCE, LayerCheck, LayersCertificate, check_layer, random_inputs
from bonetune.certificates.logits import TOLERANCE, Certificate, Witness, certify, witness
from bonetune.certificates.prompts import prompts_of
from bonetune.certificates.record import Proof, hashes, record

__all__ = [
    "LAYER_TOLERANCE",
    "ROUNDING",
    "TOLERANCE",
    "TRUNCATION",
    "Certificate",
    "LayerCheck",
    "LayersCertificate",
    "Proof",
    "TensorsCertificate",
    "UpdatesCertificate",
    "WeightsCertificate",
    "Witness",
    "certify",
    "check_layer",
    "hashes",
    "prompts_of",
    "random_inputs",
    "record",
    "same_tensors",
    "same_updates",
    "witness",
]
