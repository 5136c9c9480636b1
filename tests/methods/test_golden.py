"""Our edits equal those recorded from the reference implementations, and a comparison that can't be made fails."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.golden import making
from tests.golden.__main__ import compare, folders, main, methods

FOLDERS = ["gpt2_common", "llama_common", "llama_ROME", "llama_MEMIT", *(f"gpt2_{m}" for m in sorted(methods()))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_recorded_vectors_are_met(shared, folder):
    lines = list(compare(shared / "golden", shared / "golden" / folder))
    assert lines
    assert not [line for line in lines if not line.passed]


def test_every_recorded_folder_is_compared(shared):
    assert {f.name for f in folders(shared / "golden")} <= set(FOLDERS)


def test_a_folder_that_cannot_be_read_fails_the_comparison(tmp_path, capsys):
    (tmp_path / "gpt2_ROME").mkdir()
    (tmp_path / "gpt2_MAGIC").mkdir()
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "0 passed, 2 failed" and "MAGIC" in out


@pytest.fixture
def root(shared, tmp_path):
    """A copy of a few recorded folders that may be spoiled."""
    copied = tmp_path / "golden"
    copied.mkdir()
    for name in ("models", "gpt2_common", "gpt2_FT-M", "gpt2_KN"):
        shutil.copytree(shared / "golden" / name, copied / name, copy_function=shutil.copyfile)
    return copied


def compared(root, capsys, only=""):
    """Exit code, the lines that failed, and the last line."""
    code = main([str(root), only])
    lines = capsys.readouterr().out.splitlines()
    return code, [line for line in lines if line.startswith("FAIL")], lines[-1]


def change(folder, edit):
    """Rewrite the tensors of `folder`: those that `edit` leaves in the dictionary it is given."""
    tensors = load_file(folder / "vectors.safetensors")
    edit(tensors)
    save_file(tensors, folder / "vectors.safetensors")


def truncated(folder):
    file = folder / "vectors.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def not_even_a_header(folder):
    (folder / "vectors.safetensors").write_bytes(b"\x01")


def meta_that_is_a_list(folder):
    (folder / "meta.json").write_text("[]")


def requests_of_numbers(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"requests": [1, 2]}))


def requests_without_target(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"requests": [{"prompt": "a", "subject": "a"}]}))


def no_hyper_parameters(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"hparams": None}))


def a_layer_that_is_not_there(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["hparams"]["layers"] = [40]
    (folder / "meta.json").write_text(json.dumps(meta))


def a_batch_of_unknown_requests(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"batches": [[9]]}))


def no_model(folder):
    shutil.rmtree(folder.parent / "models" / "tiny-gpt2")


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        not_even_a_header,
        meta_that_is_a_list,
        requests_of_numbers,
        requests_without_target,
        no_hyper_parameters,
        a_layer_that_is_not_there,
        a_batch_of_unknown_requests,
        no_model,
    ],
)
def test_an_odd_folder_is_one_failed_line_that_names_it(root, capsys, spoil):
    spoil(root / "gpt2_FT-M")
    code, failed, last = compared(root, capsys, "FT-M")
    assert code == 1 and len(failed) == 1 and "gpt2_FT-M" in failed[0]
    assert last.endswith(" passed, 1 failed")


def test_an_odd_folder_does_not_keep_others_from_being_compared(root, capsys):
    truncated(root / "gpt2_FT-M")
    truncated(root / "gpt2_common")  # KN needs it too
    shutil.copytree(root / "gpt2_KN", root / "gpt2_ROMEO")
    code, failed, last = compared(root, capsys)
    assert code == 1 and [line.split()[1] for line in failed] == ["gpt2_FT-M", "gpt2_KN", "gpt2_ROMEO", "gpt2_common"]
    assert last == "0 passed, 4 failed"


def test_a_recorded_tensor_that_nothing_is_compared_with_fails(root, capsys):
    def more(tensors):
        tensors["edit0.secret"] = tensors["edit0.losses"].clone()

    change(root / "gpt2_FT-M", more)
    code, failed, _ = compared(root, capsys, "FT-M")
    assert code == 1 and len(failed) == 1 and "edit0.secret" in failed[0]


def test_weights_recorded_under_other_names_fail(root, capsys):
    def renamed(tensors):
        for name in [n for n in tensors if "weight_delta" in n]:
            tensors[name.replace("transformer.h.1", "transformer.block.1")] = tensors.pop(name)

    change(root / "gpt2_FT-M", renamed)
    code, failed, _ = compared(root, capsys, "FT-M")
    missed = [line for line in failed if "not compared" in line]
    assert code == 1 and len(missed) == 4  # weight and bias, after one edit and after all


def test_weights_of_another_layer_fail(root, capsys):
    def moved(tensors):
        for name in [n for n in tensors if "weight_delta" in n]:
            tensors[name.replace("transformer.h.1", "transformer.h.2")] = tensors.pop(name)

    change(root / "gpt2_FT-M", moved)
    code, failed, _ = compared(root, capsys, "FT-M")
    assert code == 1 and len([line for line in failed if "transformer.h.2" in line]) == 4
    assert len([line for line in failed if "not recorded: transformer.h.1" in line]) == 2


def test_a_folder_without_weights_or_logits_fails(root, capsys):
    def fewer(tensors):
        for name in [n for n in tensors if "weight_delta" in n or "logits.after" in n]:
            del tensors[name]

    change(root / "gpt2_FT-M", fewer)
    code, failed, last = compared(root, capsys, "FT-M")
    assert code == 1 and failed and last.endswith("failed")


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("neox", "ROME"),  # parallel residual, biases
        ("llama", "AlphaEdit"),
        ("neox", "PMET-2mod"),
        ("neox", "FT-L"),
        ("llama", "FT-L"),  # a BOS in targets
        ("neox", "GRACE"),
        ("llama", "GRACE"),
        ("neox", "MEND"),
        ("llama", "UltraEdit-batched"),
        ("llama", "KN"),
        ("neox", "WISE"),
    ],
)
def test_folders_of_other_families_are_compared(shared, tmp_path, capsys, family, method):
    """With a random model and what our own code gave on it: names, layouts and order are tested, not numbers."""
    making.make(shared / "golden", tmp_path, family, [method])
    code, failed, last = compared(tmp_path, capsys, method)
    assert code == 0, failed
    assert int(last.split()[0]) > 8
    change(tmp_path / f"{family}_{method}", lambda tensors: tensors["logits.pre"].add_(1))
    assert compared(tmp_path, capsys, method)[0] == 1


def test_side_memories_are_compared_when_they_are_saved_and_merged(shared, tmp_path, capsys):
    source, root = tmp_path / "source", tmp_path / "made"
    for name in ("models", "gpt2_common", "gpt2_WISE"):
        shutil.copytree(shared / "golden" / name, source / name, copy_function=shutil.copyfile)
    folder = source / "gpt2_WISE"
    meta = json.loads((folder / "meta.json").read_text())
    meta["hparams"] |= {"save_freq": 2, "merge_freq": 4, "n_iter": 4}
    (folder / "meta.json").write_text(json.dumps(meta))

    def memories(tensors):
        names = ("memory0", "edit1.memory0", "edit2.memory0", "edit3.memory0", "edit3.memory1")  # the last: unmerged
        tensors |= {f"{name}.weight_delta": tensors["edit0.new_weight_delta"].clone() for name in names}

    change(folder, memories)
    making.make(source, root, "llama", ["WISE"])
    code, failed, last = compared(root, capsys, "WISE")
    assert code == 0, failed
    change(root / "llama_WISE", lambda tensors: tensors["memory0.weight_delta"].mul_(1.01))
    assert compared(root, capsys, "WISE")[2] == f"{int(last.split()[0]) - 1} passed, 1 failed"
