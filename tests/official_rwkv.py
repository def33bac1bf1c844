"""The official `rwkv` package's logits of a file, in a process of its own: it reads the version from the environment at import.

python official.py FILE.pth TOKENS.json OUTPUT.pt
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch


def logits(path, tokens, tmp_path):
    """(tokens, vocabulary), float32."""
    asked, said = tmp_path / "asked.json", tmp_path / "said.pt"
    asked.write_text(json.dumps(tokens))
    names = torch.load(path, weights_only=True, mmap=True)
    version = {"RWKV_V7_ON": "1" if "blocks.0.att.r_k" in names else "0", "RWKV_CUDA_ON": "0", "RWKV_JIT_ON": "0"}
    command = [sys.executable, __file__, str(path), str(asked), str(said)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | version)
    assert done.returncode == 0, done.stderr
    return torch.load(said, weights_only=True)


def main(path, asked, said):
    from rwkv.model import RWKV

    name = path.removesuffix(".pth") if os.environ["RWKV_V7_ON"] == "1" else path
    found, _ = RWKV(model=name, strategy="cpu fp32").forward(json.loads(Path(asked).read_text()), None, full_output=True)
    torch.save(found, said)


if __name__ == "__main__":
    main(*sys.argv[1:])
