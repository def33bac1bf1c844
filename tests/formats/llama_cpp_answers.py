"""Run by a Python that has llama-cpp-python: what llama.cpp makes of a GGUF file. Arguments: the job (JSON), a .npz file.

The job: model, lora (or null), texts to cut into tokens, prompts (lists of token ids) to be continued by so many new tokens.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama

F32 = 0  # GGML_TYPE_F32, of the cached keys and values


def main(job, result):
    only_tokens = not job["prompts"]
    llama = Llama(
        job["model"],
        lora_path=job["lora"],
        vocab_only=only_tokens,
        logits_all=True,
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    arrays = {f"tokens_{i}": llama.tokenize(text.encode(), add_bos=True, special=True) for i, text in enumerate(job["texts"])}
    for i, prompt in enumerate(job["prompts"]):
        llama.reset()
        llama.eval(prompt)
        arrays[f"logits_{i}"] = np.array(llama.scores[: len(prompt)])
        greedy = []
        for _ in range(job["new_tokens"]):
            greedy.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval(greedy[-1:])
        arrays[f"greedy_{i}"] = greedy
    np.savez(result, **{name: np.asarray(array) for name, array in arrays.items()})


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file), sys.argv[2])
