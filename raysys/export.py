"""An edited model at any snapshot as an ordinary model folder, which transformers loads without raysys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raysys.files import write_json
from raysys.model import Model
from raysys.patch import wearing

if TYPE_CHECKING:
    from raysys.results import Results


def export(results: Results, cell: str, edits: int, out: Path) -> Path:
    """Write the model of `cell` after `edits` edits to the new folder `out`, read it back and compare every weight.

    Raises ValueError when `out` holds something, there is no such snapshot, the edits are not kept in weights, or the
    base model is no longer the one that was edited; OSError when the folder can't be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; name a new or an empty folder")
    spec = results.spec
    snapshot = results.snapshot(cell, edits)
    about = results.cell_about(cell)
    model = Model.load(about["model"], spec.dtype)
    if snapshot.base != model.digest:
        raise ValueError(f"{about['model']}: its weights are not those that were edited; put the old ones back")
    beside = [p.kind for p in snapshot.patches if not p.in_weights]
    if beside:
        raise ValueError(
            f"{cell}: its method {about['method']} keeps edits beside the weights ({', '.join(beside)}), which a model "
            "folder can't hold; ask it with `raysys ask`"
        )
    with wearing(model, snapshot.patches):
        model.net.save_pretrained(out, safe_serialization=True)
        model.tokenizer.save_pretrained(out)
        again = Model.load(str(out), spec.dtype)
        written = again.net.state_dict()
        for name, tensor in model.net.state_dict().items():
            if not torch.equal(written[name], tensor):
                raise ValueError(f"{out}: {name} was not written as it is worn; the folder is of no use")
    origin = {"study": spec.name, "cell": cell, "edits": edits, "snapshot": snapshot.id, "digest": snapshot.digest}
    write_json(out / "raysys.json", origin | {"model": about["model"], "method": about["method"]})
    return out
