"""The runs of a comparison on a tiny model: all methods, resumption, the chosen rates."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import bonetune
from bonetune.errors import InputError, RunError
from bonetune.experiments.compare import _Sweep, compare, make_runs, plan_comparison
from bonetune.experiments.folder import claimed
from bonetune.experiments.matching import sized
from bonetune.experiments.outcome import Outcome, Trial, read_outcome
from bonetune.experiments.scaling import Update
from bonetune.experiments.settings import METHODS, Examination, load_comparison
from bonetune.experiments.trial import _first_task, folder_of, known_outcome, run_trial
from bonetune.models import load_model
from bonetune.training import train

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def here(jobs):
    """An engine that makes the runs in this process."""
    for number, (function, arguments, keywords) in enumerate(jobs):
        yield number, function(*arguments, **keywords)


@pytest.fixture
def rows(tmp_path):
    """Files of rows that ask for the word after another, and of plain text."""
    pairs = [{"prompt": f"{a} {b}", "completion": f" {WORDS[(n + 1) % 8]}"} for n, a in enumerate(WORDS) for b in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"the {w} fox jumps over"}) + "\n" for w in WORDS))
    return tmp_path


@pytest.fixture
def settings(rows, model_folder):
    data = str(rows / "rows.jsonl")
    return {
        "output_dir": str(rows / "out"),
        "train": {"model_name_or_path": str(model_folder), "dataset_name": data, "dataset_split": "train[:40]", "max_steps": 4},
        "methods": {"bone": {"r": 8, "learning_rates": [1e-3, 2e-3, 4e-3]}, "lora": {"learning_rates": [4e-3]}},
        "seeds": [1, 2],
        "validation": {"tasks": ["loss"], "data": data, "split": "train[40:48]"},
        "tests": {"tasks": ["loss", "exact-match"], "data": data, "split": "train[48:]", "max_new_tokens": 3},
        "text": str(rows / "text.jsonl"),
        "scales": [0, 0.5, 1],
        "most_rates": 4,
    }


def test_rates_are_chosen_and_the_runs_that_count_made(settings):
    comparison, told = load_comparison(settings), []
    runs = make_runs(comparison, on_run=told.append, make=here)
    swept = runs.sweeps["bone"]
    assert {1e-3, 2e-3, 4e-3} <= set(swept)
    assert runs.rates["bone"] == min(swept, key=lambda rate: swept[rate].validation)
    assert runs.rates["lora"] == 4e-3
    assert not runs.sweeps["lora"]
    for name, counting in runs.counting.items():
        assert list(counting) == [1, 2]
        for outcome in counting.values():
            assert outcome.trial.learning_rate == runs.rates[name]
            assert set(outcome.results) == {"loss", "exact-match"}
            assert len(outcome.results["exact-match"].records) == 16
            at = {point.scale: point for point in outcome.scaled}
            assert at[1].score == pytest.approx(outcome.results["loss"].score, rel=1e-5)
            assert at[1].text_loss == pytest.approx(outcome.text_loss, rel=1e-5)
            assert at[0].text_loss == pytest.approx(outcome.base_text_loss, rel=1e-5)
            assert at[0].score > at[0.5].score > at[1].score
            assert outcome.forgetting == outcome.text_loss - outcome.base_text_loss
            assert outcome.saved_bytes > 4 * outcome.trainable_parameters
            assert min(outcome.init_seconds, outcome.step_seconds, outcome.train_seconds, outcome.peak_memory_bytes) > 0
            assert not list(folder_of(comparison, outcome.trial).glob("*.safetensors"))
    assert [p.done for p in told] == list(range(1, len(swept) + 5))
    assert told[-1].known == told[-1].done


def test_a_grid_grows_until_its_best_rate_lies_inside(settings):
    settings["methods"] = {"bone": {"r": 8, "learning_rates": [1e-6, 2e-6]}}
    runs = make_runs(load_comparison(settings | {"most_rates": 5, "seeds": [1]}), make=here)
    assert sorted(runs.sweeps["bone"]) == pytest.approx([1e-6, 2e-6, 4e-6, 8e-6, 1.6e-5])


@pytest.mark.parametrize(("best", "next_rate"), [(1e-5, 1e-6), (2e-4, 4e-4)])
def test_a_grid_grows_by_the_factor_at_its_edge(best, next_rate):
    rates = [1e-5, 1e-4, 2e-4]
    outcomes = {rate: Outcome(Trial("bone", rate, 0), validation=0.0 if rate == best else 1.0) for rate in rates}
    assert _Sweep(rates, outcomes, 6, fixed=False).grow() == [next_rate]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("alive", [0, 2, 4, 6])
def test_killed_between_any_runs_it_goes_on_to_the_same_outcomes(settings, alive, tmp_path):
    def dying(jobs):
        for made in here(jobs):
            if len(seen) == alive:
                raise Killed
            seen.append(made)
            yield made

    whole = make_runs(load_comparison(settings | {"output_dir": str(tmp_path / "whole")}), make=here)
    seen, made = [], []
    comparison = load_comparison(settings)
    with pytest.raises(Killed):
        make_runs(comparison, make=dying)
    again = make_runs(
        comparison, make=lambda jobs: (made.append(job) or one for job, one in zip(jobs, here(jobs), strict=True))
    )
    assert again.rates == whole.rates
    for name, of_method in whole.counting.items():
        for seed, outcome in of_method.items():
            assert again.counting[name][seed].results == outcome.results
            assert again.counting[name][seed].scaled == outcome.scaled
    # the run that was killed after its end is there; only what is missing was made
    assert len(made) == len(whole.sweeps["bone"]) + 4 - (alive + 1)


def test_a_run_killed_inside_is_made_to_the_same_outcome(settings, monkeypatch):
    comparison, trial = load_comparison(settings), Trial("bone", 2e-3, 1)
    expected = run_trial(comparison, trial, 8, counts=True)
    (folder_of(comparison, trial) / "outcome.json").unlink()

    def killed(*args, **kwargs):
        raise Killed

    # while it is examined: its weights are there still
    with monkeypatch.context() as patched:
        patched.setattr("bonetune.experiments.trial._examined", killed)
        with pytest.raises(Killed):
            run_trial(comparison, trial, 8, counts=True)
    with monkeypatch.context() as patched:
        patched.setattr("bonetune.experiments.trial.train", killed)
        again = run_trial(comparison, trial, 8, counts=True)
    assert again.results == expected.results
    assert read_outcome(folder_of(comparison, trial)) == again


def test_the_curve_is_of_the_first_task_and_leaves_out_what_the_others_heed():
    asked = Examination(tasks=("gsm8k:arena", "gsm8k:strict"), prompt_template="{instruction}", limit=3)
    assert _first_task(asked) == Examination(tasks=("gsm8k:arena",), limit=3)
    assert _first_task(asked.model_copy(update={"tasks": ("gsm8k:strict",)})).prompt_template == "{instruction}"


def test_a_run_that_falls_apart_is_an_outcome(settings):
    comparison = load_comparison(settings)
    trial = Trial("lora", 1e30, 1)
    outcome = run_trial(comparison, trial, 2, counts=False)
    assert "nan" in outcome.failure or "inf" in outcome.failure or "finite" in outcome.failure
    assert read_outcome(folder_of(comparison, trial)) == outcome
    runs = make_runs(load_comparison(settings | {"methods": {"lora": {"r": 2, "learning_rates": [4e-3, 1e30]}}}), make=here)
    assert runs.rates == {"lora": 4e-3}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_made_and_its_update_scaled(method, settings):
    sizes = {"mini": {"mini_r": 4}, "bat-free": {"r": 16}}.get(method, {})
    settings["methods"] = {method: sizes | {"learning_rates": [1e-3]}}
    settings["train"]["r"] = 8
    if method == "full":
        del settings["train"]["r"]
    (outcome,) = make_runs(load_comparison(settings | {"seeds": [1]}), make=here).counting[method].values()
    assert outcome.failure is None
    at = {point.scale: point.score for point in outcome.scaled}
    assert at[1] == pytest.approx(outcome.results["loss"].score, rel=1e-4)
    assert at[1] < at[0.5] < at[0]
    assert outcome.base_text_loss == pytest.approx(outcome.scaled[0].text_loss, rel=1e-5)


def test_sizes_are_the_nearest_to_the_reference(settings, model_folder):
    names = [name for name in METHODS if name not in ("mini", "full")]  # miss-bat among them, whose r has to fit
    settings["methods"] = {name: {} for name in names} | {"bone": {"r": 8}, "full": {}}
    found = sized(load_comparison(settings))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    target = sum(8 * linear.out_features for linear in linears)
    assert found["bone"].trainable_parameters == target
    a_rank = sum(linear.in_features + linear.out_features for linear in linears)
    assert found["lora"].r == round(target / a_rank)
    assert found["lora"].trainable_parameters == found["lora"].r * a_rank
    magnitudes = sum(linear.out_features for linear in linears)
    assert found["dora"].trainable_parameters == found["dora"].r * a_rank + magnitudes
    assert found["miss"].r == found["bat"].r == 8
    free = {r: r * r * len(linears) for r in (1, 2, 4, 8, 16)}  # what divides every side
    assert found["bat-free"].r == min(free, key=lambda r: abs(free[r] - target))
    assert found["full"].trainable_parameters == sum(p.numel() for p in model.parameters())
    assert [name for name, size in found.items() if not size.matched] == ["bone", "full"]


@pytest.mark.parametrize("variant", ["bone", "bat", "lora"])
def test_half_an_update_is_half_of_the_weights_difference(variant, settings, rows, model_folder):
    comparison = load_comparison(settings | {"methods": {variant: {"r": 8}}})
    train(comparison.run(variant, 8, 1e-3 if variant == "bone" else 5e-4, 1, rows / "run"))
    loaded = load_model(str(rows / "run"))
    update = Update.of(loaded)
    assert all(before is None for _, _, before in update.changed)
    base = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), rows / "run").merge_and_unload()
    with update.scaled(0.5) as model:
        half = model.model.merge_and_unload(safe_merge=False).state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(half[name] - base[name], (tensor - base[name]) / 2, rtol=1e-4, atol=1e-6)


def test_a_dry_run_checks_everything_and_writes_nothing(settings, rows):
    plans = plan_comparison(load_comparison(settings)).methods
    assert [(plan.sized.name, plan.rates) for plan in plans] == [("bone", (1e-3, 2e-3, 4e-3)), ("lora", (4e-3,))]
    assert plans[0].described == "bone, r=8"
    assert not Path(settings["output_dir"]).exists()
    with pytest.raises(InputError, match="Unknown task 'lose'"):
        plan_comparison(load_comparison(settings, {"tests": {"tasks": ["lose"]}}))
    with pytest.raises(InputError, match=r"nothing\.jsonl does not exist"):
        plan_comparison(load_comparison(settings, ["text=nothing.jsonl"]))


def entered(comparison, data=None, *, resume=False, overwrite=False):
    with claimed(comparison, data or {}, resume=resume, overwrite=overwrite):
        pass


def test_a_folder_is_one_comparisons(settings):
    comparison = load_comparison(settings)
    again = claimed(comparison, {}, resume=True, overwrite=False)
    with claimed(comparison, {}, resume=False, overwrite=False), pytest.raises(RunError, match="Another process is making"):
        again.__enter__()
    with pytest.raises(InputError, match="already holds a comparison: pass --resume or --overwrite"):
        entered(comparison)
    entered(load_comparison(settings, {"seeds": [1, 2, 3], "methods.dora": {}}), resume=True)
    with pytest.raises(InputError, match=r"methods\.bone"):
        entered(load_comparison(settings, {"methods.bone.r": 4}), resume=True)
    # what is measured in the end may be put right until it was
    entered(load_comparison(settings, {"scales": [0, 1]}), resume=True)
    # and a rate chosen otherwise
    entered(load_comparison(settings, {"scales": [0, 1], "methods.lora.learning_rates": [2e-3], "most_rates": 5}), resume=True)
    entered(load_comparison(settings, {"scales": [0, 1]}), resume=True)
    Outcome(Trial("bone", 1e-3, 1)).write(folder_of(comparison, Trial("bone", 1e-3, 1)))
    with pytest.raises(InputError, match=r"methods\.lora .*learning_rates.*0\.002"):
        entered(load_comparison(settings, {"scales": [0, 1], "methods.lora.learning_rates": [2e-3]}), resume=True)
    with pytest.raises(InputError, match="most_rates"):
        entered(load_comparison(settings, {"scales": [0, 1], "most_rates": 5}), resume=True)
    with pytest.raises(InputError, match=r"started with other settings: scales \(\(0.0, 1.0\), now \(0.0, 0.5, 1.0\)\)"):
        entered(comparison, resume=True)


def test_overwriting_takes_the_old_report_away_at_once(settings):
    comparison = load_comparison(settings)
    entered(comparison)
    names = ("report.html", "results.json", "results.md", "runs.csv", "curves.csv", "items.csv")
    for name in names:
        (Path(comparison.output_dir) / name).write_text("of the old one")
    entered(comparison, overwrite=True)
    assert not any((Path(comparison.output_dir) / name).exists() for name in names)


@pytest.mark.parametrize("file", ["runs/bone-lr0.001-seed1/outcome.json", "data.json"])
def test_a_damaged_file_is_named(settings, file):
    comparison = load_comparison(settings)
    entered(comparison)
    Outcome(Trial("bone", 1e-3, 1)).write(folder_of(comparison, Trial("bone", 1e-3, 1)))
    (Path(comparison.output_dir) / file).write_text("")
    with pytest.raises(InputError, match=f"{Path(file).name} .*delete"):
        entered(comparison, resume=True)


def test_weights_that_a_killed_run_left_are_discarded(settings):
    comparison, trial = load_comparison(settings), Trial("bone", 1e-3, 1)
    run_trial(comparison, trial, 8, counts=True)
    left = folder_of(comparison, trial) / "adapter_model.safetensors"
    left.write_bytes(b"weights")
    assert known_outcome(comparison, trial, 8, counts=True) is not None
    assert not left.exists()


def test_rows_that_are_trained_on_and_examined_are_remarked(settings):
    planned = plan_comparison(load_comparison(settings))
    assert planned.notes == []
    validated = settings["validation"] | {"split": "train[30:48]"}
    tested = settings["tests"] | {"split": "train[47:]"}
    notes = plan_comparison(load_comparison(settings | {"validation": validated, "tests": tested})).notes
    assert notes == [
        "10 of the 18 rows of the validation are rows of the training data, too.",
        "1 of the 17 rows of the test loss are rows of the validation, too.",
    ]


def test_settings_of_one_method_alone_are_remarked_and_its_data_are_watched(settings, rows):
    (rows / "other.jsonl").write_text("".join((rows / "rows.jsonl").read_text().splitlines(keepends=True)[:9]))
    own = {"methods.lora.dataset_name": str(rows / "other.jsonl"), "methods.lora.dataset_split": "train"}
    planned = plan_comparison(load_comparison(settings, own))
    assert any(note.startswith("`lora` is trained with settings of its own (dataset_name: ") for note in planned.notes)
    assert planned.data["train of lora"] != planned.data["train"]
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        plan_comparison(load_comparison(settings, {"methods.lora.dataset_name": "nowhere.jsonl"}))


@pytest.mark.parametrize("method", ["lora", "bone"])
def test_where_every_layer_has_a_rank_of_its_own_none_is_looked_for(method, settings):
    settings["methods"] = {"dora": {"r": 2}, method: {"rank_pattern": {".*": 4}}}
    found = sized(load_comparison(settings))[method]
    assert found.trainable_parameters > 0


def test_other_rows_or_weights_are_another_comparison(settings, rows):
    comparison = load_comparison(settings)
    planned = plan_comparison(comparison)
    assert set(planned.data) == {"model", "train", "validation", "loss", "exact-match", "forgetting"}
    assert plan_comparison(comparison).data == planned.data
    entered(comparison, planned.data)
    file = rows / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:47], lines[47].replace("completion", "completion").replace(" ", "  "), *lines[48:]]))
    changed = plan_comparison(comparison).data
    assert {name for name in changed if changed[name] != planned.data[name]} == {"validation"}
    with pytest.raises(InputError, match=r"has changed: validation\. Put the old files back"):
        entered(comparison, changed, resume=True)
    assert json.loads((rows / "out" / "data.json").read_text()) == planned.data


def test_what_is_wrong_is_told_of_before_the_first_run(settings):
    with pytest.raises(InputError, match="Unknown task 'gsm8k:strct'"):
        compare(settings, {"tests": {"tasks": ["gsm8k:strct"]}})
    assert not Path(settings["output_dir"]).exists()


def test_an_outcome_is_read_back(tmp_path):
    outcome = Outcome(Trial("bone", 1e-3, 1), r=8, environment={"torch": "2"}, identity="x")
    outcome.write(tmp_path)
    assert read_outcome(tmp_path) == outcome
    (tmp_path / "outcome.json").write_text('{"trial": 1}')
    with pytest.raises(InputError, match="is no record of a run"):
        read_outcome(tmp_path)


@pytest.mark.parametrize("method", ["bone", "lora", "dora", "full"])
def test_a_classifiers_head_stays_while_its_update_is_scaled(method, settings, rows):
    labelled = [{"text": f"{a} {b}", "label": ("even", "odd")[n % 2]} for n, a in enumerate(WORDS) for b in WORDS]
    (rows / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    settings["train"] |= {"task_type": "SEQ_CLS"}
    settings["tests"] |= {"tasks": ["classification"], "max_new_tokens": None}
    settings["validation"] |= {"tasks": ["classification"]}
    settings["methods"] = {method: {"learning_rates": [1e-3]} | ({"r": 8} if method != "full" else {})}
    comparison = load_comparison(settings | {"seeds": [1], "text": None, "keep_weights": True})
    (outcome,) = make_runs(comparison, make=here).counting[method].values()
    at = {point.scale: point.score for point in outcome.scaled}
    assert at[1] == outcome.results["classification"].score
    loaded = load_model(str(folder_of(comparison, outcome.trial)))
    config = comparison.run(method, None, 1e-3, 1, rows)
    update = Update.between(loaded, config.model_name_or_path) if method == "full" else Update.of(loaded)
    heads = {name: p.clone() for name, p in update.loaded.model.named_parameters() if "score" in name}
    with update.scaled(0) as scaled:
        for name, before in heads.items():
            assert torch.equal(dict(scaled.model.named_parameters())[name], before)
    assert update.changed


def test_a_rank_that_pefts_bat_cannot_have_is_not_taken(settings):
    settings["methods"] = {"lora": {"r": 3}, "miss-bat": {}}
    found = sized(load_comparison(settings))["miss-bat"]
    assert found.r in (1, 2, 4, 8, 16)


@pytest.fixture
def half(rows, model_folder):
    """The same model, stored in bfloat16."""
    half = rows / "half"
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(half)
    for file in model_folder.glob("tokenizer*"):
        (half / file.name).write_bytes(file.read_bytes())
    return half


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_run_is_examined_in_the_dtype_it_was_trained_in(settings, half, dtype):
    settings["train"] |= {"model_name_or_path": str(half), "dtype": dtype}
    settings["methods"] = {"bone": {"r": 8, "learning_rates": [1e-3]}}
    comparison = load_comparison(settings | {"seeds": [1], "keep_weights": True})
    (outcome,) = make_runs(comparison, make=here).counting["bone"].values()
    (task, result), *_ = outcome.results.items()
    stored = {"auto": "bfloat16"}.get(dtype, dtype)
    scores = {
        name: bonetune.evaluate(
            str(folder_of(comparison, outcome.trial)), [task], dtype=name, **comparison.tests[0].arguments()
        )
        for name in ("float32", "bfloat16")
    }
    assert scores["float32"][0].score != scores["bfloat16"][0].score
    assert result.score == scores[stored][0].score


def test_nothing_learned_is_nothing_forgotten_in_half_precision(settings, half):
    """What all weights are trained in is wider than the base: rounding is not forgetting."""
    settings["train"] |= {"model_name_or_path": str(half)}
    settings["methods"] = {"full": {"learning_rates": [1e-30]}}
    (outcome,) = make_runs(load_comparison(settings | {"seeds": [1]}), make=here).counting["full"].values()
    assert outcome.forgetting == 0
    assert outcome.scaled[0].text_loss == outcome.text_loss
