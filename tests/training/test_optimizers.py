"""Optimizers, schedules, precisions and compilation, by the names that transformers has for them."""

import json
import math

import pytest
import torch
from conftest import llama
from interrupted import killed_and_resumed
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import SchedulerType

import bonetune
from bonetune.errors import InputError
from bonetune.models import compiled_layers
from bonetune.training import plan
from bonetune.training.signals import Termination
from bonetune.training.trainer import BoneTrainer, training_arguments

WORDS = ["the", "quick", "brown", "fox", "lazy", "dog"]


@pytest.fixture
def settings(tmp_path, model_folder):
    rows = [{"prompt": f"after {a} {b} comes", "completion": f" {b}" * (1 + n % 3)} for n, a in enumerate(WORDS) for b in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "r": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "max_steps": 8,
        "eval_size": 6,
        "eval_steps": 2,
        "sample_prompts": 0,
        "rehearsal": False,
        "cache_tokens": False,
    }


def lines(run, name="loss"):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if name in line]


def losses(run):
    return [line["loss"] for line in lines(run)]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("optim", "more"),
    [
        ("adafactor", {}),
        ("sgd", {"optim_args": "momentum=0.9"}),
        ("rmsprop", {}),
        ("adamw_bnb_8bit", {}),
        ("paged_adamw_8bit", {}),
        ("lion_8bit", {}),
        ("lion_32bit", {}),
    ],
)
def test_another_optimizer_learns_and_resumes(settings, tmp_path, optim, more):
    if "bit" in optim:
        pytest.importorskip("bitsandbytes")
    settings |= {"optim": optim, "save_steps": 3, **more}
    result = bonetune.train(settings)
    assert result.last_loss < result.first_loss
    again = settings | {"output_dir": str(tmp_path / "again")}
    killed_and_resumed(again, 5)
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


KWARGS = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "polynomial": {"power": 2.0},
    "reduce_lr_on_plateau": {"patience": 0, "threshold": 10.0},
}


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_of_transformers(settings, tmp_path, name):
    settings |= {"lr_scheduler_type": name, "lr_scheduler_kwargs": KWARGS.get(name, {}), "warmup_steps": 2}
    bonetune.train(settings)
    rates = [line["learning_rate"] for line in lines(tmp_path / "run")]
    assert all(math.isfinite(rate) and 0 <= rate <= 2e-3 for rate in rates)
    plain = name in ("constant", "reduce_lr_on_plateau", "greedy")  # which do not warm up
    assert (rates[0] == 2e-3) if plain else (rates[0] <= 1e-3)
    assert max(rates) == pytest.approx(2e-3)
    if name in ("cosine", "linear", "polynomial", "warmup_stable_decay", "cosine_with_min_lr", "reduce_lr_on_plateau"):
        assert rates[-1] < rates[4]  # as its evaluations never are better by 10, the last one's rate falls, too


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr cannot be used so: .*min_lr"),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"bend": 1}},
            "lr_scheduler_type linear cannot be used so: .*bend",
        ),
        ({"optim": "grokadamw"}, "optim grokadamw cannot be used so: .*install"),
        (
            {"lr_scheduler_type": "greedy", "eval_size": None, "eval_steps": None},
            "lr_scheduler_type greedy goes by evaluations",
        ),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_written(settings, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        bonetune.train(settings | more)
    assert list(tmp_path.glob("run/*")) == []


def test_bfloat16_products_and_a_float32_adapter(settings, tmp_path):
    seen = []
    bonetune.train(settings)
    bonetune.train(settings | {"bf16": True, "output_dir": str(tmp_path / "narrow")}, on_plan=seen.append)
    adapter = load_file(tmp_path / "narrow" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    wide, narrow = losses(tmp_path / "run"), losses(tmp_path / "narrow")
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.02)
    assert seen[0].model.dtype == torch.float32


def test_recomputed_activations_give_the_same_run(settings, tmp_path):
    bonetune.train(settings)
    bonetune.train(settings | {"gradient_checkpointing": True, "output_dir": str(tmp_path / "again")})
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "run"), rel=1e-6)


def test_compiled_layers_are_called_compiled_and_keep_their_names(settings, monkeypatch):
    calls = []

    def compiled(function, **options):
        assert options == {"dynamic": True}
        return lambda *args, **kwargs: calls.append(function.__self__) or function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiled)
    model, ids = plan(settings).model, torch.arange(2, 20)[None]
    names, expected = list(model.state_dict()), model(ids).logits
    with compiled_layers(model):
        assert list(model.state_dict()) == names
        assert torch.equal(model(ids).logits, expected)
        assert calls == list(model.get_base_model().model.layers)
        assert get_peft_model_state_dict(model).keys() <= {name.replace(".default", "") for name in names}
    model(ids)
    with compiled_layers(llama(), enabled=False):
        model(ids)
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "more", [{}, {"packing": False}, {"gradient_checkpointing": True, "variant": "bat-row", "learning_rate": 8e-4}]
)
def test_a_compiled_run_is_the_run(settings, tmp_path, more):
    settings |= {"save_steps": 3, **more}
    bonetune.train(settings)
    compiled = settings | {"torch_compile": True, "output_dir": str(tmp_path / "compiled")}
    killed_and_resumed(compiled, 5)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "compiled"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert (two[key] - tensor).norm() < 0.05 * tensor.norm(), key


@pytest.fixture
def labelled(settings, tmp_path):
    """A classifier's settings."""
    rows = [{"text": f"the {a} {b}", "label": ("odd", "even")[n % 2]} for n, a in enumerate(WORDS) for b in WORDS]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings | {"task_type": "SEQ_CLS", "dataset_name": str(tmp_path / "labelled.jsonl"), "head_learning_rate": 0.125}


def trained_rates(settings):
    """Peak rates by what has them, as the optimizer of a trainer holds them."""
    planned = plan(settings)
    optimizer = BoneTrainer(planned, training_arguments(planned), None, Termination()).create_optimizer()
    names = {id(p): name for name, p in planned.model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}, planned


@pytest.mark.parametrize(
    "method", [{}, {"baseline": "lora"}, {"baseline": "lora+", "baseline_kwargs": {"loraplus_lr_ratio": 2.0}}]
)
def test_a_head_has_a_rate_of_its_own(labelled, method):
    rates, planned = trained_rates(labelled | method)
    assert set(rates) == {name for name, p in planned.model.named_parameters() if p.requires_grad}
    heads = {name for name in rates if "score" in name}
    assert heads
    assert {rates[name] for name in heads} == {0.125}
    others = {rate for name, rate in rates.items() if name not in heads}
    assert others == ({2e-3, 4e-3} if method.get("baseline") == "lora+" else {2e-3})


def test_a_head_moves_at_its_rate_and_a_killed_run_goes_on(labelled, tmp_path):
    """Adam's first step is the rate, whatever the gradient."""
    one = labelled | {"max_steps": 1, "eval_size": None, "eval_steps": None, "lr_scheduler_type": "constant", "warmup_steps": 0}
    before = {name: p.detach().clone() for name, p in plan(one).model.named_parameters() if "score.modules_to_save" in name}
    bonetune.train(one)
    after = load_file(tmp_path / "run" / "adapter_model.safetensors")
    ((name, start),) = before.items()
    moved = (after[name.replace(".modules_to_save.default", "")] - start).abs()
    assert moved.max().item() == pytest.approx(0.125, rel=1e-3)
    assert all(line["learning_rate"] == 2e-3 for line in lines(tmp_path / "run"))
    bonetune.train(labelled, overwrite=True)
    again = labelled | {"output_dir": str(tmp_path / "again")}
    killed_and_resumed(again | {"save_steps": 3}, 5)
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_type": "CAUSAL_LM"}, "head_learning_rate is of modules trained whole"),
        ({"baseline": "full"}, "head_learning_rate is of modules trained whole"),
        ({"deepspeed": "ds.json"}, "leave fsdp and deepspeed out"),
    ],
)
def test_a_rate_for_no_head_is_refused(labelled, changes, message):
    with pytest.raises(InputError, match=message):
        plan(labelled | changes)
