"""A small world of everything that mapet reads and writes, ways to damage it, and what a command has changed in it.

The world is one folder; it stands in a folder of its own, so that `..` is watched too:

    images/, odd/            pictures; odd ones with names of any bytes, a FIFO, a link to itself, no picture
    cache, odd_cache         token caches of both, and the tokenizers beside them
    run, export, probe, report   a run of two steps and what was made of it
    tokens/, list.csv, classes.npy, codebook.npy, clip.*    of other codes
    memory_tokenizer, files_features    fits that were stopped
    foreign, notes           another project's model; a user's notes, some under names that mapet has as well
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import FIT, SIZES, pictures
from planted import make_everything, rehash, succeed, traps
from safetensors.torch import load_file, save_file

NOTE = b"a note of the user's\n"
ODD_NAMES = (b"\xff\xfe.png", b"[red]b[bold].png", b"\x1b[31mred\x1b[0m\r.png", "\u202egnp.png".encode())
ODD_CLASS = b"d[red]\x1b[31m\xffots["
NAMES = (
    *("note.txt", "step_777", "checkpoints/step_000000009", "manifest.json", "report.md", "config.json", "plan.json"),
    *("sample.json", "fit/note.txt", "features/note.txt", "new", ".x.partial/note.txt", "lock", "metrics.jsonl"),
    *("scores.json", "tokenizer.json", "before_1", "images_00000.npy", "model.bin", "pytorch_model.bin", "[/red]"),
    *("\x1b[31m.png", "\udcff.json", "budget.json", "codebook.safetensors", "features_0.npy", "events.out.tfevents.1"),
)
"""For files that a user drops into any folder."""


def make_world(base: Path) -> Path:
    """Make it, once; `base/world` is it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return _make(base / "world")


def _make(world: Path) -> Path:
    world.mkdir(parents=True)
    make_everything(world)
    odd = pictures(world / "odd", per_class=5)
    os.rename(odd / "dots/00.png", odd / "dots/red].png")  # a closing tag, with the folder's name
    os.rename(odd / "dots", odd / os.fsdecode(ODD_CLASS))
    for i, name in enumerate(ODD_NAMES):
        os.rename(odd / f"bars/0{i}.png", odd / "bars" / os.fsdecode(name))
    (odd / "bars/no_picture.png").write_bytes(b"GIF89a")
    os.mkfifo(odd / "bars/pipe.png")
    os.symlink("loop.png", odd / "bars/loop.png")
    fit = ("--output", world / "odd_cache", *SIZES, *FIT, "--max-skipped", 0.9)
    succeed("tokenize", "--images", odd, *fit)
    succeed("codebook", "--cache", world / "cache", "--output", world / "report", "--rows", 1)
    os.rename(world / "probed", world / "probe")
    (world / "foreign").mkdir()
    (world / "foreign/config.json").write_text('{"architectures": ["BertModel"], "hidden_size": 8}\n')
    save_file({"embeddings.weight": torch.ones(4, 8)}, world / "foreign/model.safetensors")
    (world / "notes/sub").mkdir(parents=True)
    for name in ("notes.txt", "sub/deep.txt", "report.md", "usage.csv"):
        (world / "notes" / name).write_bytes(NOTE)
    for name in ("scores.json", "metrics.jsonl", "budget.json"):
        (world / "notes" / name).write_text('{"note": 1}\n')
    return world


def files_of(world: Path) -> list[str]:
    """Files and folders in it, relative, that can be damaged; names that differ from machine to machine left out."""
    found = sorted(str(path.relative_to(world)) for path in world.rglob("*"))
    return [name for name in found if "tfevents" not in name]


@dataclass(frozen=True)
class Damage:
    """One change to the world.

    Attributes:
        kind: of DAMAGES.
        path: what is changed.
        seed: settles what is random in it.
        rehashed: whether manifests are made to fit again.
    """

    kind: str
    path: str
    seed: int = 0
    rehashed: bool = False


def inflict(world: Path, damage: Damage, canary: Path) -> None:
    """Do it, where it can be done."""
    path = world / damage.path
    if os.path.lexists(path):
        with suppress(Exception), at_most(2):  # an earlier damage may have made this one impossible
            DAMAGES[damage.kind](path, random.Random(damage.seed), world, canary)
            if damage.rehashed:
                rehash(world, path)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in a block that takes longer."""

    def interrupt(*_: object) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def copy(source: str | Path, target: str | Path) -> None:
    """A copy of a file or folder; FIFOs and links are made again."""
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
    elif os.path.isdir(source):
        os.mkdir(target)
        for name in os.listdir(source):
            copy(os.path.join(source, name), os.path.join(target, name))
    elif os.path.isfile(source):
        shutil.copyfile(source, target)
    else:
        os.mkfifo(target)


def _content(change: Callable[[bytearray, random.Random], bytes]) -> Callable:
    """A damage of the bytes of a file."""

    def damage(path: Path, rng: random.Random, world: Path, canary: Path) -> None:
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            path.write_bytes(change(bytearray(path.read_bytes()), rng))

    return damage


def _flip(content: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _zero(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    return bytes(content)


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _instead(make: Callable[[Path, random.Random, Path, Path], Any]) -> Callable:
    """Something else in the place of a file or folder."""

    def damage(path: Path, rng: random.Random, world: Path, canary: Path) -> None:
        _clear(path)
        make(path, rng, world, canary)

    return damage


def _folder_with_note(path: Path, *_: Any) -> None:
    path.mkdir()
    (path / "note.txt").write_bytes(NOTE)


def _drop(path: Path, rng: random.Random, *_: Any) -> None:
    place = (path if path.is_dir() else path.parent) / rng.choice(NAMES)
    if not os.path.lexists(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(NOTE)


def _link(path: Path, rng: random.Random, world: Path, *_: Any) -> None:
    os.symlink(world / rng.choice(["notes/notes.txt", "notes", "nowhere", path.name, "run", "/dev/zero", ".."]), path)


def _move(path: Path, rng: random.Random, world: Path, *_: Any) -> None:
    target = world / rng.choice(OUTPUTS) / path.name
    if target.parent.is_dir() and not os.path.lexists(target):
        os.rename(path, target)


def _copy(path: Path, rng: random.Random, world: Path, *_: Any) -> None:
    target = world / rng.choice(OUTPUTS) / path.name
    if target.parent.is_dir() and not os.path.lexists(target) and not target.is_relative_to(path):
        copy(path, target)


def _exchange(path: Path, rng: random.Random, world: Path, *_: Any) -> None:
    other = rng.choice([other for other in path.parent.iterdir() if other != path])
    path.rename(path.with_name("exchanged"))
    other.rename(path)
    path.with_name("exchanged").rename(other)


def _edit_json(path: Path, rng: random.Random, *_: Any) -> None:
    """One value, or one entry, of a JSON file is made another."""
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(len(lines))
    values = json.loads(lines[number])
    place = values
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    if isinstance(place, dict | list) and place:
        if rng.random() < 0.2:
            del place[key]
        elif isinstance(place, dict) and rng.random() < 0.2:
            place[rng.choice(("", "x", "\x1b[31m", "../x"))] = place.pop(key)
        else:
            place[key] = rng.choice(VALUES)
    lines[number] = json.dumps(values) if rng.random() < 0.9 else json.dumps(rng.choice(VALUES))
    path.write_text("\n".join(lines) + "\n")


VALUES = (
    *(None, True, -1, 0, 1, 7, 2**31, 2**64, 10**400, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", "x", "0"),
    *(
        "nan",
        "../notes/notes.txt",
        "/dev/zero",
        "\x1b[31mred",
        "\udcff",
        "[/red]",
        "x" * 5000,
        [],
        [1],
        {},
        {"x": 1},
        [[[]]],
    ),
)


def _edit_tensors(path: Path, rng: random.Random, *_: Any) -> None:
    """One tensor of a safetensors file is made another, or goes."""
    if path.suffix != ".safetensors":
        return
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changed = _other_tensor(tensor, rng)
    if changed is not None:
        tensors[rng.choice((name, name, name, "x", "\x1b[31m"))] = changed
    with open(path, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)


def _other_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor | None:
    return rng.choice(
        [
            lambda: None,
            lambda: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor - 1,
            lambda: tensor.half() if tensor.is_floating_point() else tensor.float(),
            lambda: tensor.flatten()[:0],
            lambda: tensor.flatten()[:1],
            lambda: tensor.to(torch.int64),
            lambda: tensor[None],
            lambda: tensor.flatten().repeat(2),
            lambda: tensor * 1e30,
        ]
    )()


def _edit_pickle(path: Path, rng: random.Random, *_: Any) -> None:
    """One value of what torch.save wrote is made another, or goes."""
    if path.suffix not in (".pt", ".pth"):
        return
    values = torch.load(path, weights_only=True)
    place = values
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    if isinstance(place, torch.Tensor):
        values = _other_tensor(place, rng)
    elif place:
        old = place.pop(key)
        if rng.random() < 0.9:
            new = _other_tensor(old, rng) if isinstance(old, torch.Tensor) else rng.choice(VALUES)
            place.insert(key, new) if isinstance(place, list) else place.update({key: new})
    torch.save(values, path)


def _edit_array(path: Path, rng: random.Random, *_: Any) -> None:
    """A .npy file of another dtype, shape or content."""
    if path.suffix != ".npy":
        return
    array = np.load(path)
    changes = [
        *(lambda: array[:0], lambda: array[:1], lambda: array[..., None], lambda: array.astype(np.float64)),
        *(lambda: array.astype("U9"), lambda: np.zeros(array.shape, [("x", "u1")]), lambda: np.asfortranarray(array)),
        *(lambda: array.astype(array.dtype.newbyteorder(">")), lambda: np.full_like(array, 0) - 1),
        *(lambda: np.array(3), lambda: np.concatenate([array, array])),
    ]
    np.save(path, rng.choice(changes)(), allow_pickle=False)


def _edit_header(path: Path, rng: random.Random, *_: Any) -> None:
    """A .npy file whose header claims something else than its content is."""
    if path.suffix != ".npy":
        return
    shape = rng.choice(["(10**99,)", "(-1,)", "(4611686018427387904, 4)", "(1.5,)", "1", "[" * 500, "()", "('x',)"])
    descr = rng.choice(["|O", "<f4", "|u1", "<U9", "|V0", "nonsense", "<M8[s]"])
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + path.read_bytes()[128:])


def _text(path: Path, rng: random.Random, *_: Any) -> None:
    path.write_bytes(rng.choice([b"\0" * 99, b"\xff\xfe", b"x", b"{", b'{"format": 1}', b"\n" * 50, b"\xff\xfe\xe4\0"]))


def _code(path: Path, rng: random.Random, world: Path, canary: Path) -> None:
    path.write_bytes(rng.choice(sorted(traps(canary).values())))


def _objects(path: Path, *_: Any) -> None:
    content = io.BytesIO()
    np.save(content, np.array([{}, None], dtype=object), allow_pickle=True)
    path.write_bytes(content.getvalue())


DAMAGES: dict[str, Callable] = {
    "truncate": _content(lambda content, rng: bytes(content[: rng.randrange(len(content))])),
    "lengthen": _content(lambda content, rng: bytes(content) + bytes(rng.randrange(1, 99))),
    "flip": _content(_flip),
    "zero": _content(_zero),
    "empty": _content(lambda content, rng: b""),
    "delete": _instead(lambda *_: None),
    "folder": _instead(_folder_with_note),
    "FIFO": _instead(lambda path, *_: os.mkfifo(path)),
    "link": _instead(_link),
    "text": _instead(_text),
    "code": _instead(_code),
    "objects": _instead(_objects),
    "deep JSON": _instead(lambda path, *_: path.write_text("[" * 100_000 + "]" * 100_000) and None),
    "JSON": _edit_json,
    "tensors": _edit_tensors,
    "pickle": _edit_pickle,
    "array": _edit_array,
    "header": _edit_header,
    "drop": _drop,
    "move": _move,
    "copy": _copy,
    "exchange": _exchange,
}
OUTPUTS = (
    *("cache", "cache_tokenizer", "odd_cache", "run", "run/checkpoints", "run/checkpoints/step_000000002", "export"),
    *("probe", "probe/features", "report", "memory_tokenizer", "files_features", "notes", "notes/sub", "foreign"),
    *("images", "images/bars", "tokens", ".", "new", "new/deep"),
)
"""Folders where things are moved to, and that commands are told to write."""


def users(world: Path) -> frozenset[str]:
    """Hashes of the files that are a user's, in a world that is not damaged."""
    theirs = [world / name for name in ("images", "odd", "notes", "foreign", "tokens")]
    files = [path for folder in theirs for path in folder.rglob("*") if path.is_file() and not path.is_fifo()]
    files += [world / name for name in ("list.csv", "classes.npy", "codebook.npy", "clip.pt", "clip.safetensors")]
    return frozenset(hashlib.blake2b(path.read_bytes()).hexdigest() for path in files)


def snapshot(base: Path) -> dict[str, str]:
    """What stands where: every path below, with its kind, and the hash of a file's bytes or the target of a link."""
    found = {}
    for folder, folders, files in os.walk(base):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                what = f"link to {os.readlink(path)}"
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    what = hashlib.blake2b(file.read()).hexdigest()
            else:
                what = f"kind {stat.S_IFMT(status.st_mode):o}"
            found[os.path.relpath(path, base)] = what
    return found
