"""Second moments of the recorded documents against those in `<family>_common`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

from methods.parts.artifacts import second_moment
from raysys.corpora import Corpus
from raysys.model import Model
from tests.golden.common import Line, error


def moments(root: Path, family: str) -> Iterator[Line]:
    """Second moments from the recorded documents, at every module whose moments were recorded."""
    model = Model.load(str(root / "models" / f"tiny-{family}"), attention="eager")
    common = root / f"{family}_common"
    counts = json.loads((common / "meta.json").read_text(encoding="utf-8"))["counts"]
    documents = json.loads((root / "cov_docs.json").read_text(encoding="utf-8"))
    with TemporaryDirectory() as folder:
        text = Path(folder) / "documents.txt"
        text.write_text("\n\n".join(documents) + "\n\n", encoding="utf-8")
        corpus = Corpus(str(text), len(documents))
        for name, wanted in sorted(load_file(common / "vectors.safetensors").items()):
            module = name.removeprefix("cov.")
            moment = second_moment(model, module, corpus, Path(folder))
            yield Line(f"{family}_common", name, error(moment.matrix, wanted))
            yield Line(f"{family}_common", f"tokens at {module}", abs(moment.count - counts[module]))
