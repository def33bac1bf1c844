"""docs/settings.md and docs/run.schema.json are what their generator makes of the settings."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from bonetune.training import RunConfig
from bonetune.training.aliases import WORDS
from bonetune.training.presets import PRESETS

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def make_settings():
    description = importlib.util.spec_from_file_location("make_settings", ROOT / "docs" / "make_settings.py")
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schema(make_settings):
    return json.loads(make_settings.schema())


def test_the_page_and_the_schema_are_what_the_settings_say(make_settings):
    assert make_settings.PAGE.read_text(encoding="utf-8") == make_settings.page(), "run `make settings` and commit docs"
    assert make_settings.SCHEMA.read_text(encoding="utf-8") == make_settings.schema(), "run `make settings` and commit docs"


def test_every_setting_has_one_row_with_a_meaning(make_settings):
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| (.*) \|$", make_settings.page().partition("## Presets")[0], re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == sorted(RunConfig.model_fields)
    assert all(meaning.strip() for _, meaning in rows)


def test_every_word_is_on_the_page(make_settings):
    listed = set(re.findall(r"`(\w+)`", make_settings.page().partition("## Words")[2]))
    assert set(WORDS) - set(RunConfig.model_fields) <= listed


def test_the_schema_has_every_setting_with_its_bounds(schema):
    assert set(schema["properties"]) == {*RunConfig.model_fields, "preset"}
    assert all(described["description"] for described in schema["properties"].values())
    assert schema["properties"]["bone_dropout"]["exclusiveMaximum"] == 1
    assert schema["properties"]["bone_dropout"]["minimum"] == 0
    assert "bat-row" in schema["properties"]["variant"]["enum"]
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model_name_or_path", "dataset_name", "output_dir"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_of_the_schema(example, schema):
    text = example.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (example.parent / first.partition("=")[2]).resolve() == ROOT / "docs" / "run.schema.json"
    assert set(yaml.safe_load(text)) <= set(schema["properties"])


def test_presets_name_settings_but_no_data_and_no_model():
    for settings in PRESETS.values():
        assert set(settings) <= set(RunConfig.model_fields) - {"model_name_or_path", "dataset_name", "output_dir"}


def test_check_says_what_to_do(make_settings, monkeypatch, tmp_path):
    monkeypatch.setattr(make_settings, "PAGE", tmp_path / "settings.md")
    monkeypatch.setattr(make_settings, "SCHEMA", tmp_path / "run.schema.json")
    monkeypatch.setattr("sys.argv", ["make_settings.py", "--check"])
    with pytest.raises(SystemExit, match="run `make settings`"):
        make_settings.main()
    monkeypatch.setattr("sys.argv", ["make_settings.py"])
    make_settings.main()
    monkeypatch.setattr("sys.argv", ["make_settings.py", "--check"])
    make_settings.main()
    make_settings.SCHEMA.write_text("{}")
    with pytest.raises(SystemExit, match=r"run\.schema\.json is not what the settings say: run `make settings`"):
        make_settings.main()
