"""`python -m benchmarks`: every measurement, as Markdown tables on standard output; progress goes to standard error."""

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path

from bonetune_cli import allocator

PARTS = ("layers", "step", "saved", "generation", "training", "merging", "rwkv")


def main() -> None:
    arguments = _arguments()
    if not arguments.default_allocator:
        allocator.start_again_with_settings()
    # imported here: before, they would be imported once for nothing
    from transformers.utils import logging

    from benchmarks import generation, layers, machine, merging, rwkv, saved, step, training

    warnings.simplefilter("ignore")  # PEFT and transformers speak of files and settings that do not matter here
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    runs = {"layers": layers.run, "step": step.run, "saved": saved.run, "generation": generation.run, "merging": merging.run}
    runs["rwkv"] = rwkv.run
    runs["training"] = partial(training.run, data=arguments.data)
    facts = machine.record()
    content = {"environment": facts, "rounds": arguments.rounds, "quick": arguments.quick}
    texts = [f"{machine.line(facts)} {arguments.rounds} rounds."]
    print(texts[0], flush=True)
    for name in arguments.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        result = runs[name](arguments.rounds, arguments.quick)
        content[name] = result.rows
        texts.append(result.text)
        print(f"\n{result.text}", flush=True)
        # after each part, so that an interrupted run leaves what it has
        if arguments.json:
            arguments.json.write_text(json.dumps(content, indent=2))
        if arguments.markdown:
            arguments.markdown.write_text("\n\n".join(texts) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", type=_parts, default=PARTS, help=f"some of {','.join(PARTS)}, separated by commas")
    parser.add_argument("--rounds", type=int, help="interleaved rounds, of which medians are taken: 9, with --quick 3")
    parser.add_argument("--quick", action="store_true", help="the smallest layer and a model of two layers")
    parser.add_argument("--json", type=Path, help="also write everything here, with each sample")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--data", type=Path, help="training: rows with question and answer; default: generated problems")
    parser.add_argument("--default-allocator", action="store_true", help="leave glibc's allocator as it is")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 9)
    return arguments


def _parts(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in names)


if __name__ == "__main__":
    main()
