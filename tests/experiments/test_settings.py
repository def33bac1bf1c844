import pytest
import yaml

from bonetune.errors import InputError
from bonetune.experiments.settings import BASELINE_RATES, METHODS, Comparison, load_comparison
from bonetune.training.learning_rate import default_learning_rate

SETTINGS = {
    "output_dir": "out",
    "train": {"model_name_or_path": "model", "dataset_name": "rows.jsonl", "max_steps": 4},
    "methods": {"bone": {"r": 8}, "lora": {"learning_rates": [1e-3]}},
    "validation": {"tasks": ["loss"], "data": "held-out.jsonl"},
    "tests": [{"tasks": ["loss"], "data": "test.jsonl"}],
}


def changed(**changes):
    return load_comparison(SETTINGS | changes)


def test_short_forms():
    comparison = changed(
        methods=["bone", "lora", "full"], tests={"tasks": "loss", "data": "x"} | {"tasks": ["loss"]}, text="text.jsonl"
    )
    assert [method.settings for method in comparison.methods.values()] == [
        {"variant": "bone"}, {"baseline": "lora"}, {"baseline": "full"},
    ]  # fmt: skip
    assert comparison.tests[0].data == "x"
    assert comparison.text.tasks == ("forgetting",)


def test_a_run_is_a_run_of_train():
    comparison = changed(
        methods={"wide": {"variant": "bat-row", "bone_dropout": 0.1}, "lora": {"baseline_kwargs": {"lora_alpha": 4}}}
    )
    run = comparison.run("wide", 16, 3e-4, 7, "folder")
    assert (run.variant, run.r, run.bone_dropout, run.learning_rate, run.seed) == ("bat-row", 16, 0.1, 3e-4, 7)
    assert (run.output_dir, run.max_steps, run.rehearsal, run.sample_prompts) == ("folder", 4, False, 0)
    run = comparison.run("lora", 2, 1e-3, 0, "folder")
    assert (run.baseline, run.r, run.baseline_kwargs) == ("lora", 2, {"lora_alpha": 4})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_grid_around_its_own_rates(name):
    comparison = changed(methods=[name])
    config = comparison.run(name, None, 1e-4, 0, "x")
    grid = comparison.grid(name, config)
    assert list(grid) == sorted(grid)
    assert len(grid) == 3
    middle = BASELINE_RATES[name][1] if name in BASELINE_RATES else default_learning_rate(config.spec)
    assert grid[1] == middle


def test_it_is_read_back_from_what_it_writes(tmp_path):
    file = tmp_path / "comparison.yaml"
    comparison = changed(scales=[0, 0.5], text="text.jsonl", against=["lora"], resources={"num_gpus": 1})
    file.write_text(comparison.to_yaml())
    assert load_comparison(file) == comparison
    assert load_comparison(comparison) == comparison


def test_overrides_reach_inside():
    told = [
        "train.max_steps=9",
        "methods.lora.r=3",
        "methods.dora={}",
        "seeds=[5]",
        "validation.limit=2",
        "methods.bone.learning_rates=[1e-4, 2e-4]",
    ]
    comparison = load_comparison(SETTINGS, told)
    assert comparison.run("lora", None, 1e-3, 0, "x").max_steps == 9
    assert comparison.methods["lora"].settings == {"r": 3, "baseline": "lora"}
    assert list(comparison.methods) == ["bone", "lora", "dora"]
    assert (comparison.seeds, comparison.validation.limit) == ((5,), 2)
    assert comparison.methods["bone"].learning_rates == (1e-4, 2e-4)
    assert load_comparison(SETTINGS, ["tests.0.limit=3"]).tests[0].limit == 3
    with pytest.raises(InputError, match=r"tests\.1\.limit: tests is .*, which has no such entry"):
        load_comparison(SETTINGS, ["tests.1.limit=3"])
    assert "limit" not in SETTINGS["tests"][0]
    assert SETTINGS["train"]["max_steps"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "Unknown key 'seed'"),
        ({"train": {}, "tests": []}, "tests: tuple should have at least 1 item"),
        (
            {"methods": ["loraa"]},
            r"methods\.loraa is no method: choose from bone, mini, .*, or give it a variant or a baseline",
        ),
        ({"methods": {"bone": {"learning_rates": [2e-4, 1e-4]}}}, r"methods\.bone\.learning_rates should ascend"),
        ({"methods": {"bone": {"rate_of": "lora"}}}, r"methods\.bone\.rate_of: name another method"),
        ({"methods": {"a/b": {"variant": "bone"}}}, r"methods\.a/b: a name is of letters, digits"),
        ({"methods": {"bone": {"learning_rates": []}}}, r"methods\.bone\.learning_rates: tuple should have at least 1 item"),
        (
            {"tests": [{"tasks": ["loss"], "name": "a/b"}, {"tasks": ["loss"], "name": "a-b"}]},
            r"tests has 'loss \(a/b\)' and 'loss \(a-b\)', whose records would share a file",
        ),
        ({"tests": [{"tasks": ["loss"], "name": "a" * 300}]}, "too long for a file's name"),
        ({"seeds": [0, 1]}, "sweep_seed 0 is among the seeds"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"against": ["full"]}, "against names 'full', which is not among the methods bone, lora"),
        ({"train": SETTINGS["train"] | {"learning_rate": 1e-3}}, r"train\.learning_rate: a comparison decides it itself"),
        ({"tests": [{"tasks": ["loss"]}, {"tasks": ["loss"]}]}, "tests has 'loss' twice: give each its name"),
        ({"tests": [{"tasks": ["loss"], "dta": "x"}]}, r"Unknown key 'tests\.0\.dta'"),
        ({"most_rates": 0}, "most_rates: input should be greater than 0, got 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        changed(**changes)


def test_a_wrong_setting_of_a_run_names_the_method():
    comparison = changed(methods={"lora": {"variant": "bone", "baseline": "lora", "mini_r": 4}})
    with pytest.raises(InputError, match=r"methods\.lora: .*mini_r"):
        comparison.run("lora", 2, 1e-3, 0, "x")


def test_files_are_read_or_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SETTINGS))
    assert isinstance(load_comparison(tmp_path / "c.yaml"), Comparison)
    with pytest.raises(InputError, match="cannot be read"):
        load_comparison(tmp_path / "nothing.yaml")
