"""What travels with a study: what it names and nothing else; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import parcel
from raysys.spec import StudySpec
from tests.cluster import studies


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with the user in it."""
    folder = tmp_path / "user"
    folder.mkdir()
    studies.folder(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def pack(here: Path, *changes: str, more: tuple[str, ...] = ()) -> set[str]:
    """The files that travel, without those of raysys itself."""
    target = here.parent / f"parcel{len(list(here.parent.iterdir()))}"
    target.mkdir()
    spec = StudySpec.load("study.toml", changes)
    made = parcel.pack(Path("study.toml"), spec, target, [Path(m) for m in more])
    files = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert made.size >= sum((target / f).stat().st_size for f in files) - (target / "study.toml").stat().st_size
    assert {"raysys/job.py", "methods/rome.py", "benchmarks/world/model/config.json"} <= files
    return {f for f in files if f.split("/")[0] not in parcel.PACKAGES}


def test_what_a_study_names_travels_and_nothing_else_of_its_folder(here: Path) -> None:
    for name in (".venv/pyvenv.cfg", "runs/small-12345678/spec.json", "model/.git/HEAD", "model/__pycache__/a.pyc"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    model = {f"model/{p.name}" for p in (here / "model").iterdir() if p.is_file()}
    found = pack(here, 'methods=[{name="rome", layer=1, corpus="corpus.txt"}]')
    assert found == {"study.toml", "edits.json", "corpus.txt", "cities.py"} | model


def test_more_travels_when_asked_without_runs_and_environments_in_it(here: Path) -> None:
    for name in ("data/a.txt", "data/out/small-1/units.parquet", "data/env/pyvenv.cfg", "data/.env", "data/.gitignore"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    assert {f for f in pack(here, "root=data/out", more=("data",)) if f.startswith("data")} == {"data/a.txt"}


def test_what_leads_out_of_the_folder_is_refused(here: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "edits.json").write_text((here / "edits.json").read_text())
    with pytest.raises(ValueError, match=r"'../elsewhere/edits.json' leads out of .* absolute path"):
        pack(here, "edits.path=../elsewhere/edits.json")
    (here / "link.json").symlink_to(tmp_path / "elsewhere" / "edits.json")
    with pytest.raises(ValueError, match=r"'link.json' leads out of"):
        pack(here, "edits.path=link.json")
    (here / "model" / "extra.txt").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"extra.txt is a link that leads out of .*put the file itself there"):
        pack(here)
    (here / "model" / "extra.txt").unlink()
    with pytest.raises(ValueError, match=r"nowhere: no such file"):
        pack(here, more=("nowhere",))
    with pytest.raises(ValueError, match=r"is the whole folder"):
        pack(here, more=(".",))


def test_an_absolute_path_stays_where_it_is(here: Path, tmp_path: Path) -> None:
    there = tmp_path / "shared.json"
    there.write_text((here / "edits.json").read_text())
    assert "edits.json" not in pack(here, f"edits.path={there}")


def test_too_much_is_told_in_words(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "LIMIT", 20 * 2**20)
    with (here / "more.txt").open("wb") as file:
        file.truncate(12 * 2**20)
    with pytest.raises(ValueError, match=r"benchmarks \d+\.\d MiB.* is more than the 20.0 MiB that can travel"):
        pack(here, more=("more.txt",))
    with (here / "model" / "model.safetensors").open("ab") as file:
        file.truncate(30 * 2**20)
    with pytest.raises(ValueError, match=r"model alone is more than .* name a model by its hub id"):
        pack(here)
