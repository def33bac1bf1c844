"""`python -m benchmarks [--rounds N] [--quick] [--json FILE]`."""

import argparse
import json
import platform
import subprocess
from pathlib import Path

import torch

from benchmarks.layers import SHAPES, measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, of which medians are taken")
    parser.add_argument("--quick", action="store_true", help="only the smallest shape")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}, commit {commit or 'unknown'}\n")
    print("One Linear layer, forward + backward, CPU seconds over those of the frozen layer in the same round;")
    print("median [lowest, highest]. float32 adapters; trainable parameters of lora match those of bone.\n")
    figures = []
    for dtype in (torch.bfloat16, torch.float32):
        for out, inp, tokens in SHAPES[:1] if arguments.quick else SHAPES:
            print(f"W {out} x {inp}, {tokens} tokens, {str(dtype).removeprefix('torch.')} base")
            for row in measure(out, inp, tokens, dtype, arguments.rounds):
                low, high = row["range"]
                print(f"  {row['method']:16} {row['ratio']:6.2f}  [{low:.2f}, {high:.2f}]   saved {row['saved_mib']:6.2f} MiB")
                figures.append(row)
            print(flush=True)
    if arguments.json:
        content = {"torch": torch.__version__, "machine": machine, "commit": commit, "rows": figures}
        arguments.json.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
