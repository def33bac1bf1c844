"""Two processes compute the loss and its gradients, replicated or sharded, as one process does on the whole batch."""

import datetime
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import rwkv_models
import torch
import torch.distributed as dist
from adapted_models import adapted
from conftest import llama
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bonetune.losses.chunks
from bonetune.data.examples import IGNORED
from bonetune.losses import completion_loss, segmented_loss

PROCESSES, SECONDS = 2, 120
HEADS = ("adapted", "frozen", "trained whole")
KINDS = ("ddp", "ddp, one without labels", "fsdp", "fsdp, head apart", "fsdp, norm and head apart")
SEGMENTS = ("ddp, in segments", "of RWKV")
CASES = [*((kind, head) for kind in KINDS for head in HEADS), SEGMENTS]


def model_of(head):
    if head == "of RWKV":
        return adapted(base=rwkv_models.model("x070", vocab_size=96).double(), target_modules=["key", "value"]).train()
    targets = ["q_proj", "down_proj", "lm_head"] if head == "adapted" else ["q_proj", "down_proj"]
    saved = ["lm_head"] if head == "trained whole" else None
    return adapted(base=llama(vocab_size=96).double(), target_modules=targets, modules_to_save=saved).train()


def loss_of(kind, model, **inputs):
    return segmented_loss(model, bptt_length=5, **inputs) if "segments" in kind else completion_loss(model, **inputs)


def batch(kind):
    ids = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = IGNORED
    if "without" in kind:
        labels[1] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def distribute(kind, model):
    if kind.startswith("ddp"):
        return DistributedDataParallel(model)
    inner = model.base_model.model
    for layer in inner.model.layers:
        fully_shard(layer)
    if kind == "fsdp, head apart":
        fully_shard(inner.lm_head)
    elif kind == "fsdp, norm and head apart":  # as accelerate does
        fully_shard([inner.model.norm, inner.lm_head], reshard_after_forward=False)
    return fully_shard(model)


def gradients(model):
    named = ((name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad)
    whole = ((name, p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad) for name, p in named)
    return {name: gradient.clone() for name, gradient in whole}


def run(rank, folder):
    bonetune.losses.chunks._positions_at_once = lambda model: 4
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES, timeout=limit)
    results = []
    for kind, head in CASES:
        try:
            inputs = batch(kind)
            model = distribute(kind, model_of(head))
            supervised = (inputs["labels"][:, 1:] != IGNORED).sum() / PROCESSES  # gradients are averaged
            mine = {name: tensor[rank : rank + 1] for name, tensor in inputs.items()}
            for _ in range(2):  # what the first step leaves must not hinder the second
                model.zero_grad()
                loss = loss_of(kind, model, **mine, supervised=supervised)
                loss.backward()
            result = {"gradients": gradients(model)}
            with torch.no_grad():
                again = loss_of(kind, model, **mine, supervised=supervised)
            torch.testing.assert_close(again, loss.detach())
            total = loss.detach().clone()
            dist.all_reduce(total)
            results.append(result | {"loss": total / PROCESSES})
        except Exception:  # the same in both processes, which go on with the next case
            results.append({"error": traceback.format_exc(limit=-6)})
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log-{rank}.txt" for rank in range(PROCESSES)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(Path(__file__).resolve()), str(rank), str(folder)]
            with log.open("w") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * PROCESSES, "\n".join(log.read_text()[-3000:] for log in logs)
    return dict(zip(CASES, torch.load(folder / "results.pt"), strict=True))


@pytest.mark.parametrize("case", CASES, ids=": ".join)
def test_loss_and_gradients_are_those_of_one_process(results, case, monkeypatch):
    monkeypatch.setattr(bonetune.losses.chunks, "_positions_at_once", lambda model: 4)
    assert "error" not in results[case], results[case]["error"]
    kind, head = case
    model = model_of(head)
    loss = loss_of(kind, model, **batch(kind))
    loss.backward()
    torch.testing.assert_close(results[case]["loss"], loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(results[case]["gradients"], gradients(model), rtol=1e-6, atol=1e-9)


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
