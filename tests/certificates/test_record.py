"""What certificate.json says besides the comparison."""

import hashlib
import json
from importlib.metadata import version

from bonetune.certificates import LayersCertificate, hashes, record


def test_hashes_are_of_every_file_but_the_certificate(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_bytes(b"one")
    (tmp_path / "b.txt").write_bytes(b"two")
    (tmp_path / "certificate.json").write_text("{}")
    found = hashes(tmp_path, {"b.txt": "known", "gone.txt": "known"})
    assert found == {"deep/a.txt": hashlib.sha256(b"one").hexdigest(), "b.txt": "known"}


def test_record():
    certificate = LayersCertificate((), unchanged=1)
    content = json.loads(
        json.dumps(record(certificate, {"b": "2", "a": "1"}, base_fingerprint="f", adapters=[{"adapter_model": "3"}]))
    )
    assert content.items() >= certificate.to_dict().items()
    assert (content["files"], content["base_fingerprint"]) == ({"a": "1", "b": "2"}, "f")
    assert content["adapters"] == [{"adapter_model": "3"}]
    assert content["versions"].keys() == {"bonetune", "torch", "transformers", "peft", "safetensors"}
    assert content["versions"]["torch"] == version("torch")
