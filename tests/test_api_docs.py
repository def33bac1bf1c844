"""docs/api.md is what its generator makes of the docstrings, and the docstrings say what the signatures say."""

import dataclasses
import importlib.util
import inspect
from pathlib import Path

import pytest

import bonetune

GENERATOR = Path(__file__).parents[1] / "docs" / "make_api.py"


@pytest.fixture(scope="module")
def make_api():
    description = importlib.util.spec_from_file_location("make_api", GENERATOR)
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


@pytest.fixture
def publish(monkeypatch):
    """Makes something public under a name, for the length of a test."""

    def publish(name, thing, module):
        if module is not None:
            thing.__module__ = module
        monkeypatch.setattr(bonetune, name, thing, raising=False)
        monkeypatch.setattr(bonetune, "__all__", [*bonetune.__all__, name])

    return publish


def everything(make_api):
    """The page's entries and their members."""
    entries = make_api.entries()
    classes = {entry.thing: entry for entry in entries if inspect.isclass(entry.thing)}
    return [*entries, *(member for entry in entries for member in make_api.members(entry, classes))]


def test_the_page_is_what_the_docstrings_say(make_api):
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "run `make api` and commit docs/api.md"


def test_every_public_name_has_a_heading(make_api):
    lines = make_api.page().splitlines()
    rooms = {"bonetune": bonetune, "bonetune.ops": bonetune.ops, "bonetune.rwkv": bonetune.rwkv}
    public = [f"{room}.{name}" for room, module in rooms.items() for name in module.__all__]
    assert [name for name in public if lines.count(f"### `{name}`") != 1] == []
    assert "### `bonetune.merging.MergeResult`" in lines  # what `merge` returns
    assert "### `bonetune.certificates.Certificate`" in lines  # and what is in it


def test_every_link_has_its_heading(make_api):
    page = make_api.page()
    headings = {make_api._anchor(line.lstrip("# ")) for line in page.splitlines() if line.startswith("#")}
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links
    assert links <= headings


def test_documented_arguments_are_the_parameters(make_api):
    differing = {}
    for entry in everything(make_api):
        doc = entry.name not in make_api.CONSTANTS and make_api.docstring(entry.thing)
        constructor = getattr(entry.thing, "__init__", None) if inspect.isclass(entry.thing) else None
        is_pefts = getattr(constructor, "__module__", "").startswith("peft.")  # `BoneModel`'s
        if doc and "Args" in doc.under and not is_pefts:
            documented = [name.lstrip("*") for name, _ in doc.items("Args")]
            if documented != list(make_api.signature(entry.thing).parameters):
                differing[entry.name] = documented
    assert differing == {}


def test_a_new_public_name_appears_by_itself(make_api, publish):
    def halve(x: "int", *, kinds={"b", "a"}, say=lambda text: None) -> bonetune.ShardSpec:  # noqa: B006
        """Half of it.

        Args:
            x: what to halve,
                and no more.
            kinds, say: not used.

        Raises:
            InputError: odd x.

        Example:
            >>> halve(4)
            2
        """

    publish("halve", halve, "bonetune.tuner.halves")
    page = make_api.page()
    tuner = page[page.index("## The tuner") : page.index("## Family")]
    assert tuner[tuner.index("### `bonetune.halve`") :].strip().splitlines() == [
        "### `bonetune.halve`",
        "",
        "```python",
        'bonetune.halve(x: int, *, kinds = {"a", "b"}, say = ...) -> ShardSpec',
        "```",
        "",
        "Half of it.",
        "",
        "**Args**",
        "",
        "* `x` (`int`): what to halve, and no more.",
        "* `kinds`: not used.",
        "* `say`: not used.",
        "",
        "**Raises**",
        "",
        "* [`InputError`](#bonetuneinputerror): odd x.",
        "",
        "**Example**",
        "",
        "```python",
        "halve(4)",
        "# 2",
        "```",
    ]


def undocumented():
    pass


@dataclasses.dataclass
class Undocumented:
    field: int


def documented():
    """Documented."""


@pytest.mark.parametrize(
    ("thing", "module", "message"),
    [
        (undocumented, "bonetune.spec", "bonetune.novelty has no docstring"),
        (Undocumented, "bonetune.spec", "bonetune.novelty has no docstring"),
        (documented, "elsewhere", "bonetune.novelty has no section: put elsewhere into SECTIONS"),
        (("bone",), None, "bonetune.novelty is no class or function: describe it in CONSTANTS"),
    ],
)
def test_a_public_name_that_cannot_be_shown_is_refused(make_api, publish, thing, module, message):
    publish("novelty", thing, module)
    with pytest.raises(make_api.PageError, match=message):
        make_api.page()


def test_check_says_what_to_do(make_api, monkeypatch, tmp_path):
    page = tmp_path / "api.md"
    monkeypatch.setattr(make_api, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["make_api.py", "--check"])
    with pytest.raises(SystemExit, match="run `make api`"):
        make_api.main()
    assert not page.exists()
    monkeypatch.setattr("sys.argv", ["make_api.py"])
    make_api.main()
    assert page.read_text(encoding="utf-8") == make_api.page()
    monkeypatch.setattr("sys.argv", ["make_api.py", "--check"])
    make_api.main()
    page.write_text("stale")
    with pytest.raises(SystemExit, match="run `make api`"):
        make_api.main()
