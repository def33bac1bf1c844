"""Two processes train one adapted model, replicated (DDP) or sharded (FSDP2), as one process does on the whole batch.

The processes are started once, train every case and leave what came out in a file; the tests compare it with one process.
"""

import contextlib
import datetime
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapted_models import IDS, adapted, base_model, logits
from conftest import llama
from filelock import FileLock
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bonetune import VARIANTS, BoneLayer

PROCESSES, STEPS, LEARNING_RATE = 2, 3, 0.1
# lm_head is no decoder layer's: its adapter is sharded with the root
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
LAUNCH_SECONDS, COLLECTIVE_SECONDS = 240, 60
RESULTS = "results.pt"

KINDS = {
    "ddp": VARIANTS,
    "fsdp": VARIANTS,
    "fsdp, checkpointing": ("bone", "bat"),
    "fsdp, reentrant checkpointing": ("bone", "bat"),
    "fsdp, base layers apart": VARIANTS,
    "fsdp, base layers apart, biases trained": ("bone", "bat", "bat-row", "bat-left"),
    "fsdp, bfloat16": VARIANTS,
    "fsdp, base layers apart, bfloat16": ("bone", "bat", "bat-left"),
}
CASES = [(kind, variant) for kind, variants in KINDS.items() for variant in variants]
NARROW = [case for case in CASES if "bfloat16" in case[0]]
EXACT = [case for case in CASES if case not in NARROW]
SAVED = [case for case in CASES if case[0] == "fsdp"]


def model_of(kind, variant):
    """The same in every process. Its biases are there for the variants that need the product without them."""
    settings = {"attention_bias": True, "mlp_bias": True}
    base = llama(**settings) if "bfloat16" in kind else base_model(**settings)
    # 5 rows are not the same number for each of two processes
    ragged = {"down_proj": 5} if variant in ("bone", "mini") else {}
    bias = "bone_only" if "biases" in kind else "none"
    model = adapted(variant, base, target_modules=TARGETS, rank_pattern=ragged, bias=bias).train()
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            parameter.data.mul_(0.1)  # updates that are small beside the weights, as in training
    return model


def trained_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, ids):
    """Losses of some steps of gradient descent. Plain, so that the steps agree as far as the gradients do."""
    parameters = list(trained_parameters(model).values())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # the variants' gradients are of very different sizes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses)


# What the two processes run.


def distribute(kind, model):
    if kind == "ddp":
        return DistributedDataParallel(model)
    if "checkpointing" in kind:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": "reentrant" in kind})
        model.enable_input_require_grads()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if "bfloat16" in kind else MixedPrecisionPolicy()
    if "apart" in kind:
        units = [module.base_layer for module in model.modules() if isinstance(module, BoneLayer)]
    else:
        units = list(model.base_model.model.model.layers)
    for unit in (*units, model):
        fully_shard(unit, reshard_after_forward=True, mp_policy=policy)
    return model


def run_case(kind, variant, rank, folder):
    model = distribute(kind, model_of(kind, variant))
    half = IDS.chunk(PROCESSES)[rank]
    losses = train(model, half)
    dist.all_reduce(losses)
    parameters = dict(model.named_parameters())
    result = {
        "losses": losses / PROCESSES,
        "trained": {
            name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in trained_parameters(model).items()
        },
        "sharded": all(isinstance(p, DTensor) for p in parameters.values()),
        "elements_here": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters.values()),
        "elements": sum(p.numel() for p in parameters.values()),
    }
    if (kind, variant) in SAVED:
        result["logits"] = logits(model.eval())
        everything = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            # lm_head's frozen weight need not be saved, which PEFT would do in case its vocabulary had grown
            result["adapter"] = get_peft_model_state_dict(model, state_dict=everything, save_embedding_layers=False)
            model.save_pretrained(folder / variant, state_dict=everything, save_embedding_layers=False)
        dist.barrier()
    return result


def run_all(rank, folder):
    timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES, timeout=timeout)
    results = []
    for kind, variant in CASES:
        try:
            results.append(run_case(kind, variant, rank, folder))
        except Exception:  # the same in both processes, which go on with the next case
            results.append({"error": traceback.format_exc(limit=-4)})
    if rank == 0:
        torch.save(results, folder / RESULTS)
    dist.barrier()
    dist.destroy_process_group()


# How they are started, once for all tests, also where several workers of pytest-xdist run these.


def launch(folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:  # the machine's own name may lead nowhere
        environment["GLOO_SOCKET_IFNAME"] = loopback[0]
    logs = [folder / f"log-{rank}.txt" for rank in range(PROCESSES)]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, log in enumerate(logs):
            output = stack.enter_context(log.open("w"))
            command = [sys.executable, str(Path(__file__).resolve()), str(rank), str(folder)]
            process = stack.enter_context(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            )
            stack.callback(process.kill)
            processes.append(process)
        codes = []
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                codes.append(process.wait(LAUNCH_SECONDS))
    said = "\n".join(log.read_text()[-4000:] for log in logs)
    assert codes == [0] * PROCESSES, f"exit statuses {codes} within {LAUNCH_SECONDS} s\n{said}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "distributed"
    with FileLock(shared / "distributed.lock"):
        if not folder.exists():
            folder.mkdir()
            launch(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    assert (folder / RESULTS).exists(), "the processes did not get through; the test that started them says why"
    return dict(zip(CASES, torch.load(folder / RESULTS), strict=True))


def result_of(results, case):
    assert "error" not in results[case], results[case]["error"]
    return results[case]


@pytest.mark.parametrize("case", EXACT, ids=": ".join)
def test_two_processes_train_as_one_does(results, case):
    result = result_of(results, case)
    model = model_of(*case)
    start = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    losses = train(model, IDS)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(result["losses"], losses, rtol=1e-6, atol=0)
    assert result["trained"].keys() == start.keys()
    for name, p in trained_parameters(model).items():
        step = (p - start[name]).norm()
        assert step > 0, name
        # what is compared is the way gone, of which float32 inside transformers' norms keeps this much
        assert (result["trained"][name] - p).norm() < 1e-5 * step, name


@pytest.mark.parametrize("case", NARROW, ids=": ".join)
def test_bfloat16_products_with_sharded_float32_adapters(results, case):
    result = result_of(results, case)
    model = model_of(*case)
    start = torch.cat([p.detach().flatten() for p in trained_parameters(model).values()])
    losses = train(model, IDS)
    torch.testing.assert_close(result["losses"], losses, rtol=2e-3, atol=0)
    assert {p.dtype for p in result["trained"].values()} == {torch.float32}
    way = torch.cat([p.detach().flatten() for p in trained_parameters(model).values()]) - start
    gone = torch.cat([result["trained"][name].flatten() for name in trained_parameters(model)]) - start
    assert (gone - way).norm() < 0.1 * way.norm()


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "ddp"], ids=": ".join)
def test_each_process_holds_a_part_of_every_parameter(results, case):
    result = result_of(results, case)
    assert result["sharded"]
    assert result["elements_here"] < 0.55 * result["elements"]


@pytest.mark.parametrize("case", SAVED, ids=": ".join)
def test_what_was_trained_in_shards_is_saved_whole(results, folder, case):
    result = result_of(results, case)
    saved = load_file(folder / case[1] / "adapter_model.safetensors")
    assert saved.keys() == result["adapter"].keys()
    for name, tensor in saved.items():
        whole = name.replace("bone_block", "bone_block.default")
        assert torch.equal(tensor, result["trained"][whole]), name
        assert torch.equal(tensor, result["adapter"][name]), name
    base = base_model(attention_bias=True, mlp_bias=True)
    loaded = PeftModel.from_pretrained(base, folder / case[1])
    torch.testing.assert_close(logits(loaded), result["logits"], rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    run_all(int(sys.argv[1]), Path(sys.argv[2]))
