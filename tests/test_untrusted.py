"""Files that others may have written: no code in them is run, and what is wrong with one is an error of one line.

Assertions 19, 21, 30 and 33.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Mapet
from planted import CHECKPOINT, COMMANDS, edit, make_everything, no_hang, rehash, traps
from safetensors.torch import load_file, save_file

from mapet.data.cache import TokenCache
from mapet.errors import DataError
from mapet.files import MOST_TENSORS, UnreadableFile, read_tensors, unreadable, write_whole
from mapet.tokenizers import load_tokenizer, make_tokenizer

ROOT = Path(__file__).parent.parent
OLDEST_TIMM = Path(sys.prefix, "timm_oldest")
SAFE = "model.safetensors"

FEATURES = ("plan.json", "part_00000.json", "features_00000.npy", "kmeans")
READ = {
    "resume": [f"{CHECKPOINT}/{name}" for name in ("task.safetensors", "ema.safetensors", "trainer.pt", "config.json")]
    + [f"{CHECKPOINT}/manifest.json"],
    "export": [f"{CHECKPOINT}/{name}" for name in ("ema.safetensors", "config.json")],
    "probe": ["export/config.json", "export/model.safetensors", "probed/features/*.npy", "probed/features/*.json"],
    "train": [f"cache/{name}" for name in ("manifest.json", "tokens.npy", "labels.npy", "names.json")]
    + ["cache/images_00000.npy"],
    "codebook": ["cache_tokenizer/tokenizer.json", "cache_tokenizer/codebook.safetensors"],
    "tokenize": ["cache_tokenizer/tokenizer.json", "cache_tokenizer/codebook.safetensors"],
    "centroids": ["codebook.npy"],
    "fit": [f"memory_tokenizer/fit/{name}" for name in FEATURES],
    "fit from files": [f"files_features/{name}" for name in FEATURES],
    "import": ["tokens/index_1.pth", "list.csv", "classes.npy"],
    "weights": ["clip.pt"],
    "safe weights": ["clip.safetensors"],
}
"""By command, the files that it reads."""
FILES = [(command, name) for command, names in READ.items() for name in names]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "all"
    make_everything(folder)
    return folder


@pytest.fixture
def fresh(made, tmp_path):
    """Makes a copy of everything at the place where it was made, as absolute paths are part of what is kept."""
    aside = made.with_name("aside")

    def copy() -> Path:
        shutil.rmtree(made)
        shutil.copytree(aside, made)
        return made

    if not aside.exists():
        shutil.copytree(made, aside)
    copy()
    return copy


def run(mapet: Mapet, command: str, folder: Path) -> None:
    """Run it: it may succeed, where it has no need of a file, but must not break."""
    with no_hang():
        outcome = mapet(*COMMANDS[command](folder))
    assert outcome.code in (0, 1, 2), outcome.err
    errors = outcome.err.split("mapet: error: ")[1:]
    assert len(errors) == (outcome.code != 0), outcome.err
    assert all(len(error.splitlines()) == 1 for error in errors), outcome.err
    assert "Traceback" not in outcome.err


def refused(mapet: Mapet, command: str, folder: Path, *names: object) -> None:
    """Run it and require an error of one line that has the names in it."""
    with no_hang():
        outcome = mapet.fail(*COMMANDS[command](folder), code=1, names=names)
    assert len(outcome.err.split("mapet: error: ")[1].splitlines()) == 1


def test_everything_works_as_long_as_nothing_is_planted(mapet, fresh):
    for command in COMMANDS:
        mapet.succeed(*COMMANDS[command](fresh()))


def first_of_many(values, count):
    """All of them as parameters, those after the first few marked as long: they are of one kind."""
    return [pytest.param(value, marks=pytest.mark.long if i >= count else ()) for i, value in enumerate(values)]


@pytest.mark.parametrize(("command", "name"), FILES)
def test_code_in_place_of_a_file_is_not_run(command, name, mapet, fresh, tmp_path):
    for kind, content in traps(tmp_path / "canary").items():
        folder = fresh()
        path = next(folder.glob(name))
        path.write_bytes(b"\0" * 32 + content if path.name == "kmeans" else content)
        rehash(folder, path)
        run(mapet, command, folder)
        assert not (tmp_path / "canary").exists(), kind


@pytest.mark.parametrize("command", COMMANDS)
def test_code_beside_a_file_is_not_run(command, mapet, fresh, tmp_path):
    folder, content = fresh(), traps(tmp_path / "canary")
    for place in {path.parent for name in READ[command] for path in folder.glob(name)}:
        for name in ("pytorch_model.bin", "zz.bin", "index_9.pt", "index_8.pth", "model.pkl", "data.pkl"):
            (place / name).write_bytes(content["pickle" if name.endswith("pkl") else "zip"])
        (place / "images_00001.npy").write_bytes(content["npy"])
    run(mapet, command, folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_instead_of_an_exports_weights_is_refused_by_name(kind, mapet, fresh, tmp_path):
    folder = fresh()
    (folder / "export/model.safetensors").unlink()
    (folder / "export/pytorch_model.bin").write_bytes(traps(tmp_path / "canary")[kind])
    refused(mapet, "probe", folder, "pytorch_model.bin is a pickle", "save the weights as model.safetensors")
    assert not (tmp_path / "canary").exists()


PROBE_WITH_OLDEST = """
import json, sys, timm
assert timm.__version__ == "1.0.26", timm.__version__
from mapet.cli import main
print("codes", [main(arguments) for arguments in json.loads(sys.argv[1])])
"""


@pytest.mark.slow
@pytest.mark.skipif(not OLDEST_TIMM.exists(), reason=f"no {OLDEST_TIMM}, which make test installs")
def test_the_oldest_timm_runs_no_code_either(fresh, tmp_path):
    folder, content = fresh(), traps(tmp_path / "canary")["zip"]
    commands = []
    for kind, names in {"whole": (), "beside": ("zz.bin",), "bin": ("pytorch_model.bin",), "safe": (SAFE,)}.items():
        export = shutil.copytree(folder / "export", tmp_path / kind)
        if kind == "bin":
            (export / SAFE).unlink()
        for name in names:
            (export / name).write_bytes(content)
        commands.append([str(export if part == folder / "export" else part) for part in COMMANDS["probe"](folder)])
    script = [sys.executable, "-c", PROBE_WITH_OLDEST, json.dumps(commands)]
    path = os.pathsep.join([str(OLDEST_TIMM), *filter(None, sys.path)])
    done = subprocess.run(script, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "codes [0, 0, 1, 1]" in done.stdout and "Traceback" not in done.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(("command", "name"), FILES)
def test_a_named_pipe_in_place_of_a_file_is_no_hang(command, name, mapet, fresh):
    folder = fresh()
    path = next(folder.glob(name))
    path.unlink()
    os.mkfifo(path)
    run(mapet, command, folder)


def test_special_files_among_images_are_passed_by(mapet, fresh):
    folder = fresh()
    os.mkfifo(folder / "images/bars/pipe.png")
    (folder / "images/dots/device.png").symlink_to("/dev/zero")
    here = os.getcwd()
    os.chdir(folder / "images/dots")  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket.png")
        os.chdir(here)
        with no_hang():
            outcome = mapet.succeed(*COMMANDS["tokenize"](folder))
    assert "20 images" in outcome.out and "skipped" not in outcome.out.replace("skipped 0", "")


def resaved(folder: Path, change) -> None:
    """Change what is in trainer.pt, and the manifest with it."""
    path = folder / CHECKPOINT / "trainer.pt"
    trainer = torch.load(path, weights_only=True)
    changed = change(trainer)
    trainer = changed if isinstance(changed, tuple) else trainer
    torch.save(trainer, path)
    rehash(folder, path)


def moments(trainer: dict, parameter: int = 0) -> dict:
    return trainer["optimizer"]["state"][parameter]


def group(trainer: dict) -> dict:
    return trainer["optimizer"]["param_groups"][0]


TRAINER = {
    "another shape": (lambda t: moments(t).update(exp_avg=torch.zeros(3)), "exp_avg is torch.float32 (3,), must be"),
    "a larger shape": (lambda t: moments(t).update(exp_avg_sq=torch.zeros(10**6)), "exp_avg_sq is"),
    "another type": (lambda t: moments(t).update(exp_avg=moments(t)["exp_avg"].double()), "exp_avg is torch.float64"),
    "no tensor": (lambda t: moments(t).update(exp_avg=[1.0]), "exp_avg must be a tensor"),
    "not finite": (lambda t: moments(t)["exp_avg"].fill_(torch.inf), "exp_avg has NaN or infinity"),
    "a negative step": (lambda t: moments(t)["step"].fill_(-5), "step has negative numbers"),
    "a negative square": (lambda t: moments(t)["exp_avg_sq"].fill_(-1), "exp_avg_sq has negative numbers"),
    "a missing moment": (lambda t: moments(t).pop("exp_avg"), "lacks 'exp_avg'"),
    "a moment more": (lambda t: moments(t).update(max_exp_avg_sq=torch.zeros(3)), "no place for 'max_exp_avg_sq'"),
    "a missing parameter": (lambda t: t["optimizer"]["state"].pop(3), "optimizer.state lacks 3"),
    "a parameter more": (lambda t: t["optimizer"]["state"].update({99: moments(t)}), "has no place for 99"),
    "other groups": (lambda t: t["optimizer"]["param_groups"].pop(), "optimizer.param_groups are not"),
    "other members": (
        lambda t: t["optimizer"]["param_groups"][0]["params"].reverse(),
        "optimizer.param_groups are not",
    ),
    "no groups": (lambda t: t["optimizer"].pop("param_groups"), "optimizer.param_groups must be a list"),
    "no optimizer": (lambda t: t.pop("optimizer"), "trainer lacks optimizer"),
    "no data": (lambda t: t.pop("data"), "learned from other images"),
    "no scaler": (lambda t: t.pop("scaler"), "trainer lacks scaler"),
    "a scaler": (lambda t: t.update(scaler={"scale": 1.0}), "scaler has no place for 'scale'"),
    "no words": (lambda t: t["random"]["python"][1].clear(), "not the state of a Mersenne twister"),
    "a large word": (lambda t: t["random"]["python"][1].__setitem__(0, 2**32), "random.python[1][0] must be in"),
    "far position": (lambda t: t["random"]["numpy"].__setitem__(2, 10**9), "not the state of a Mersenne twister"),
    "negative keys": (lambda t: t["random"]["numpy"][1].fill_(-1), "not the state of a Mersenne twister"),
    "short torch state": (lambda t: t["random"].update(torch=torch.zeros(3, dtype=torch.uint8)), "random.torch is"),
    "random text": (lambda t: t.update(random="x"), "random must be a mapping"),
    "a tuple": (lambda t: (t,), "trainer.pt: it holds a tuple"),
    "a tensor that claims more": (lambda t: t.update(x=torch.zeros(1).expand(10**12)), "does not hold as many numbers"),
}


@pytest.mark.parametrize("tampering", TRAINER)
def test_a_tampered_trainer_is_refused_under_a_manifest_that_fits(tampering, mapet, fresh):
    change, message = TRAINER[tampering]
    folder = fresh()
    resaved(folder, change)
    refused(mapet, "resume", folder, "step_000000002", message)


def tensors(folder: Path, name: str, change) -> None:
    path = folder / CHECKPOINT / name
    values = load_file(path)
    change(values)
    save_file(values, path)
    rehash(folder, path)


@pytest.mark.parametrize("name", ["task.safetensors", "ema.safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("model.norm.bias"), "lacks 'model.norm.bias'"),
        (lambda v: v.update(more=torch.zeros(1)), "no place for 'more'"),
        (lambda v: v.update({"model.norm.bias": torch.zeros(5)}), "norm.bias is torch.float32 (5,)"),
        (lambda v: v.update({"model.norm.bias": v["model.norm.bias"].half()}), "norm.bias is torch.float16"),
        (lambda v: v["model.norm.bias"].fill_(torch.nan), "norm.bias has NaN"),
    ],
)
def test_tampered_weights_are_refused_under_a_manifest_that_fits(name, change, message, mapet, fresh):
    folder = fresh()
    tensors(folder, name, change)
    refused(mapet, "resume", folder, "step_000000002", message)


DEEP = "[" * 100_000
CONFIGS = {
    "deep": DEEP,
    "a list": "[1]",
    "a section that is text": '{"model": "x"}',
    "text for a number": ("model", "width", "32"),
    "a number of many digits": ("model", "width", 10**400),
    "an infinite number": ("model", "mlp_ratio", float("inf")),
    "an unknown field": ("model", "wdith", 3),
    "a text of several lines": ("objective", "name", "a\nb"),
    "a mapping": ("optim", "lr", {"a": 1}),
}


@pytest.mark.parametrize("command", ["resume", "export"])
@pytest.mark.parametrize("tampering", CONFIGS)
def test_a_tampered_configuration_is_refused(tampering, command, mapet, fresh):
    folder, content = fresh(), CONFIGS[tampering]
    path = folder / CHECKPOINT / "config.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        section, field, value = content
        edit(path, lambda values: values[section].update({field: value}))
    rehash(folder, path)
    if command == "export" and tampering == "a mapping":
        return  # nothing of it is read
    refused(mapet, command, folder, "step_000000002")


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, name in FILES if name.endswith(".json")])
@pytest.mark.parametrize(
    "content", first_of_many([DEEP, '{"format": 1}', "{" * 3, "null", '{"a": ' * 5000, "1" * 10_000, "\0"], 2)
)
def test_json_that_is_something_else(content, command, name, mapet, fresh):
    folder = fresh()
    path = next(folder.glob(name))
    path.write_text(content)
    rehash(folder, path)
    run(mapet, command, folder)


def test_labels_outside_the_classes_are_refused(mapet, fresh):
    for labels in ([2, 0], [-1, 0]):
        folder = fresh()
        np.save(folder / "cache/labels.npy", np.resize(np.array(labels), 20))
        rehash(folder, folder / "cache/labels.npy")
        refused(mapet, "codebook", folder, "labels.npy holds labels")


def test_names_that_are_no_text_are_refused(fresh):
    folder = fresh()
    edit(folder / "cache/names.json", lambda names: names.__setitem__(0, {"a": 1}))
    rehash(folder, folder / "cache/names.json")
    with pytest.raises(DataError, match="is not a list of 20 names"):
        _ = TokenCache.open(folder / "cache").names


HEADERS = [
    "{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000000, 16), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (-1, 16), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999999999, 16), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (20, 16), }",
    "{'descr': '|V9999999999', 'fortran_order': False, 'shape': (20, 16), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': 7, }",
    "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (20,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (20L, 16L), 'x': (",
    "(" * 3000,
    "'",
]


@pytest.mark.parametrize("header", first_of_many(HEADERS, 3))
@pytest.mark.parametrize(("command", "name"), [(command, name) for command, name in FILES if name.endswith(".npy")])
def test_arrays_with_absurd_headers(header, command, name, mapet, fresh):
    folder = fresh()
    path = next(folder.glob(name))
    text = header.encode().ljust(118) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(640))
    rehash(folder, path)
    run(mapet, command, folder)


def fit_state(path: Path, change) -> None:
    import io

    saved = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    change(saved["state"])
    content = io.BytesIO()
    torch.save(saved, content)
    path.write_bytes(bytes(32) + content.getvalue())
    rehash(path.parent, path)


STATES = {
    "redo": lambda s: s.update(redo=5),
    "redo text": lambda s: s.update(redo="1"),
    "curve": lambda s: s.update(curve=[float("nan")]),
    "long curve": lambda s: s.update(curve=[1.0] * 99),
    "centroids shape": lambda s: s.update(centroids=torch.zeros(2, 3)),
    "centroids type": lambda s: s.update(centroids=s["centroids"].long()),
    "centroids nan": lambda s: s["centroids"].fill_(torch.nan),
    "no centroids": lambda s: s.update(centroids=None),
    "list of centroids": lambda s: s.update(centroids=[1.0]),
    "best": lambda s: s.update(best={"redo": 0}),
    "more": lambda s: s.update(more=1),
    "less": lambda s: s.update(objectives=7),
}


@pytest.mark.parametrize("tampering", first_of_many(STATES, 4))
@pytest.mark.parametrize(
    ("command", "name"), [("fit", "memory_tokenizer/fit/kmeans"), ("fit from files", "files_features/kmeans")]
)
def test_a_tampered_state_of_a_k_means_is_refused(command, name, tampering, mapet, fresh):
    folder = fresh()
    fit_state(folder / name, STATES[tampering])
    outcome = mapet.fail(*COMMANDS[command](folder), code=2, names=("kmeans is not a state of this k-means",))
    assert len(outcome.err.split("mapet: error: ")[1].splitlines()) == 1


TAMPERED = {
    f"{CHECKPOINT}/manifest.json": (
        "resume",
        (lambda v: v.update(step=-1), "manifest.json"),
        (lambda v: v.update(step=True), "manifest.json"),
        (lambda v: v.update(files=[]), "manifest.json"),
        (lambda v: v["files"].update({"../x": {"bytes": 0, "sha256": ""}}), "manifest.json"),
        (lambda v: v["files"]["trainer.pt"].update(bytes="1"), "manifest.json"),
        (lambda v: v.update(format="2"), "manifest.json"),
        (lambda v: v.update(more=1), "manifest.json"),
    ),
    "cache/manifest.json": (
        "train",
        (lambda v: v.update(images=-1), "images must be at least 1"),
        (lambda v: v.update(images=10**30, shards=[10**30]), "images_00000.npy"),
        (lambda v: v.update(shards=[-1, 21]), "shards[0] must be not negative"),
        (lambda v: v.update(classes=[1, 2]), "classes"),
        (lambda v: v.update(classes="ab"), "classes"),
        (lambda v: v["description"].update(image_size=10**9), "image_size must be"),
        (lambda v: v["description"].update(vocabulary=1e3), "vocabulary must be a whole number"),
        (lambda v: v.update(labelled="yes"), "labelled must be true or false"),
        (lambda v: v["files"]["tokens.npy"].update(bytes=-1), "bytes must be not negative"),
    ),
    "export/config.json": (
        "probe",
        (lambda v: v.update(architecture="hf-hub:someone/something"), "hf-hub:someone/something"),
        (lambda v: v.update(architecture="local-dir:/tmp"), "local-dir:/tmp"),
        (lambda v: v.update(architecture=["vit_base_patch16_224"]), "architecture"),
        (lambda v: v.update(architecture="resnet18", model_args={}), "ResNet"),
        (lambda v: v["model_args"].update(depth=10**9), "depth must be"),
        (lambda v: v["model_args"].update(depth="2"), "depth must be a whole number"),
        (lambda v: v["model_args"].update(embed_dim=65535), "num_heads"),
        (lambda v: v["model_args"].update(embed_dim=65536), "must be (65536,"),
        (lambda v: v["model_args"].update(mlp_ratio=float("nan")), "mlp_ratio must be a finite number"),
        (lambda v: v["model_args"].update(pretrained=True), "unknown entry 'pretrained'"),
        (lambda v: v["model_args"].update(checkpoint_path="/etc/passwd"), "unknown entry 'checkpoint_path'"),
        (lambda v: v["model_args"].update(act_layer="os.system"), "unknown entry 'act_layer'"),
        (lambda v: v.update(model_args=[]), "model_args must be a mapping"),
    ),
}
"""By file, the command that reads it, and changes with what is said of them."""


@pytest.mark.parametrize(
    ("name", "command", "change", "message"),
    [(name, command, *change) for name, (command, *changes) in TAMPERED.items() for change in changes],
)
def test_tampered_json_is_refused(name, command, change, message, mapet, fresh):
    folder = fresh()
    edit(folder / name, change)
    refused(mapet, command, folder, {"resume": "step_000000002", "probe": "export"}.get(command, ""), message)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(files={}),
        lambda v: v.pop("rows"),
        lambda v: v.update(rows="3"),
        lambda v: v.update(rows=-3),
        lambda v: v.update(skipped=[1]),
        lambda v: v.update(provenance=7),
        lambda v: v["files"].update({"../../list.csv": {"bytes": 1, "sha256": ""}}),
    ],
)
def test_a_damaged_record_of_a_journal_is_a_part_that_is_made_again(change, mapet, fresh):
    folder = fresh()
    edit(folder / "files_features/part_00000.json", change)
    shutil.copy(folder / "files_features/part_00000.json", folder / "files_features/part_00099.json")
    mapet.succeed(*COMMANDS["fit from files"](folder))
    assert json.loads((folder / "files_features/part_00000.json").read_text())["rows"] == 320


def test_files_are_read_in_one_place():
    """Nothing but mapet/files.py, and kernels/regular.py under it, opens what others may have written."""
    readers = {"torch.load", "np.load", "numpy.load", "np.fromfile", "np.memmap", "json.load", "pickle.load"}
    readers |= {"pickle.loads", "open_memmap", "load_file", "safe_open", "safetensors.torch.load"}
    methods = {"read_text", "read_bytes"}
    known = {
        "mapet/files.py",
        "kernels/regular.py",
        "mapet/training/metrics.py",
        "mapet/report/loss_curve.py",
        "mapet/machine.py",  # this and the next: files of the system
        "mapet/distributed.py",
    }
    found = []
    for path in [*ROOT.glob("mapet/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            text = ast.unparse(call.func)
            unsafe = any(word.arg == "weights_only" and ast.unparse(word.value) != "True" for word in call.keywords)
            reads = any(text == reader or text.endswith(f".{reader}") for reader in readers)
            method = text.split(".")[-1] in methods and "." in text
            opens = text in ("open", "io.open") and not any(
                isinstance(part, ast.Constant) and isinstance(part.value, str) and set(part.value) & set("wax")
                for part in [*call.args[1:], *(word.value for word in call.keywords if word.arg == "mode")]
            )
            parses = text == "json.loads" and "json.dumps" not in ast.unparse(call)
            if unsafe or ((reads or method or opens or parses) and name not in known):
                found.append(f"{name}:{call.lineno}: {ast.unparse(call)}")
    assert not found, "\n".join(found)


def test_nothing_is_written_through_a_link_in_a_folder_of_others(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (tmp_path / ".metrics.jsonl.partial").symlink_to(precious)
    write_whole(tmp_path / "metrics.jsonl", "{}")
    assert precious.read_text() == "years of work" and not (tmp_path / "metrics.jsonl").is_symlink()


def test_more_tensors_than_any_model_has_are_refused(tmp_path):
    save_file({str(i): torch.zeros(0) for i in range(MOST_TENSORS + 1)}, tmp_path / "many.safetensors")
    with pytest.raises(UnreadableFile, match=f"holds {MOST_TENSORS + 1} tensors"):
        read_tensors(tmp_path / "many.safetensors")


def test_an_endless_codebook_is_not_hashed(tmp_path):
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=16)
    tokenizer.set_codebook(torch.rand(16, 48), "test")
    tokenizer.save(tmp_path)
    os.truncate(tmp_path / "codebook.safetensors", 2**43)
    with pytest.raises(DataError, match="it has 8796093022208 bytes"):
        load_tokenizer(tmp_path)


def test_what_the_machine_lacks_is_no_damage(tmp_path):
    error = unreadable(tmp_path, OSError(errno.EMFILE, "Too many open files"), "make it anew")
    assert "anew" not in str(error) and "Too many open files" in str(error)
