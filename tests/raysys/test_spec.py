"""A study as written is checked whole, and its hash covers what decides the numbers."""

from pathlib import Path

import pytest

from raysys import names, words
from raysys.chat import Chat
from raysys.spec import SpecError, StudySpec

GOOD = """
name = "demo"
snapshots = [5, 1]
[edits]
count = 10
[[methods]]
name = "ft_m"
steps = 3
[[benchmarks]]
name = "mmlu"
data = "world"
"""


def test_a_good_study_is_read_with_the_base_among_its_snapshots() -> None:
    spec = StudySpec.parse(GOOD)
    assert spec.snapshots == (0, 1, 5)
    assert spec.methods[0].settings == {"steps": 3}
    assert spec.grid() == [("world/small", spec.methods[0], 0)]


def test_every_fault_is_listed_at_once_with_its_place() -> None:
    text = GOOD.replace("steps = 3", "stepz = 3").replace('"mmlu"', '"mmlo"').replace("count = 10", "count = -1")
    with pytest.raises(SpecError) as error:
        StudySpec.parse(text + "[cluster]\nevaluators = 0\n", where="study.toml")
    message = str(error.value)
    assert "unknown setting 'stepz'. Did you mean 'steps'?" in message
    assert "unknown benchmark 'mmlo'. Did you mean 'mmlu'?" in message
    assert "edits.count" in message
    assert "cluster.evaluators" in message
    assert all(line.startswith("study.toml") for line in message.splitlines())


def test_a_setting_of_the_wrong_type_is_named() -> None:
    with pytest.raises(SpecError, match=r"methods\[0\] ft_m: setting 'steps'"):
        StudySpec.parse(GOOD.replace("steps = 3", 'steps = "many"'))


def test_a_misspelt_key_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(SpecError, match=r"snapshotz: no such key\. Did you mean 'snapshots'"):
        StudySpec.parse("snapshotz = [1]\n" + GOOD)


def test_a_snapshot_beyond_the_edits_is_refused() -> None:
    with pytest.raises(SpecError, match="50 is beyond the 10 edits"):
        StudySpec.parse(GOOD.replace("[5, 1]", "[5, 50]"))


def test_two_of_the_same_name_want_labels() -> None:
    twice = GOOD + '[[methods]]\nname = "ft_m"\n'
    with pytest.raises(SpecError, match="'ft_m' is there twice"):
        StudySpec.parse(twice)
    assert StudySpec.parse(twice + 'label = "ft_m, longer"\n').methods[1].title == "ft_m, longer"


def test_a_label_that_would_leave_the_run_folder_is_refused() -> None:
    with pytest.raises(SpecError, match="label"):
        StudySpec.parse(GOOD.replace("steps = 3", 'label = "../../elsewhere"'))


def test_overrides_reach_tables_and_lists() -> None:
    spec = StudySpec.parse(GOOD, ["edits.count=20", "methods.0.steps=7", "name=other", "snapshots=[20]"])
    assert (spec.edits.count, spec.methods[0].settings["steps"], spec.name) == (20, 7, "other")
    assert spec.snapshots == (0, 20)


@pytest.mark.parametrize("override", ["edits.count", "=3", "methods.7.steps=1", "methods.x.steps=1", "name.x=1"])
def test_an_override_that_leads_nowhere_is_refused(override: str) -> None:
    with pytest.raises(SpecError, match=r"key=value|wants a number|holds a value"):
        StudySpec.parse(GOOD, [override])


def test_only_what_decides_numbers_is_in_the_hash() -> None:
    spec = StudySpec.parse(GOOD)
    assert StudySpec.parse(GOOD, ["cluster.evaluators=7", "root=elsewhere", "cluster.retries=9"]).hash == spec.hash
    for change in ("seed=1", "methods.0.steps=4", "dtype=bfloat16", "cluster.threads=2", "scoring.batch=3"):
        assert StudySpec.parse(GOOD, [change]).hash != spec.hash, change


def test_a_chat_is_asked_for_and_is_part_of_the_hash() -> None:
    plain = StudySpec.parse(GOOD)
    chat = StudySpec.parse(GOOD + "[scoring]\napply_chat_template = true\n")
    joined = StudySpec.parse(GOOD, ["scoring.apply_chat_template=true", "scoring.fewshot_as_multiturn=false"])
    more = 'system_instruction = "Be brief."\nchat_template_args = {thinks = false}\n'
    told = StudySpec.parse(f"{GOOD}[scoring]\napply_chat_template = true\n{more}")
    assert plain.scoring.chat is None and len({s.hash for s in (plain, chat, joined, told)}) == 4
    assert chat.scoring.chat == Chat() and joined.scoring.chat == Chat(multiturn=False)
    assert told.scoring.chat == Chat(system="Be brief.", arguments={"thinks": False})
    assert StudySpec.parse(words.toml(told.model_dump(mode="json"))) == told


@pytest.mark.parametrize("name", ["probes", "locality", "fluency", "perplexity"])
def test_what_is_about_plain_text_is_never_asked_as_a_chat(name: str) -> None:
    scoring = StudySpec.parse(GOOD, ["scoring.apply_chat_template=true"]).scoring
    assert scoring.chat_of(names.benchmark(name)) is None
    assert scoring.chat_of(names.benchmark("mmlu")) == Chat()


@pytest.mark.parametrize(
    "setting", ['system_instruction = "Be brief."', "fewshot_as_multiturn = false", "chat_template_args = {x = 1}"]
)
def test_settings_of_a_chat_that_is_not_held_are_refused(setting: str) -> None:
    with pytest.raises(SpecError, match=rf"scoring: .*{setting.split()[0]}.* how a chat is held; set apply_chat"):
        StudySpec.parse(f"{GOOD}[scoring]\n{setting}\n")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none.toml: no such file; `raysys new`"):
        StudySpec.load(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[edits\ncount = 1")
    with pytest.raises(SpecError, match=r"broken.toml: not valid TOML"):
        StudySpec.load(tmp_path / "broken.toml")


def test_a_spec_survives_json() -> None:
    spec = StudySpec.parse(GOOD)
    again = StudySpec.check(spec.model_dump(mode="json"))
    assert again.identity == spec.identity
    assert again.hash == spec.hash


def test_a_snapshot_inside_a_batch_is_told_before_anything_runs() -> None:
    study = {
        "name": "s", "snapshots": [0, 2, 4, 7], "edits": {"count": 7}, "methods": [{"name": "memit", "batch": 4}],
        "benchmarks": [{"name": "mmlu"}],
    }  # fmt: skip
    with pytest.raises(SpecError, match=r"methods\[0\] memit makes 4 edits at a time.* after 2; choose multiples of 4"):
        StudySpec.check(study)
    StudySpec.check(study | {"snapshots": [0, 4, 7]})
