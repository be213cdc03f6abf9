"""Command lines and damages for the fuzz, drawn at random: values that work mixed with absurd ones."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from command_line import FIT as FITTING
from command_line import SIZES
from fuzz_world import DAMAGES, OUTPUTS, Damage

from mapet.commands.parsing import option_names


@dataclass(frozen=True)
class Case:
    """What is done to the world, and the command that then runs in it."""

    damages: tuple[Damage, ...]
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        return self.arguments[0]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        return cls(tuple(Damage(**damage) for damage in values["damages"]), tuple(values["arguments"]))


NUMBERS = ("-1", "0", "1", "2", "5", "13", "9223372036854775807")
ABSURD = (
    *NUMBERS * 4,
    *("2.5", "1e30", "-1e30", "1e-320", "nan", "inf", "-inf", "9223372036854775808", "9" * 400),
    *("١", "", " ", "x", "None", "true", "-", "--", "--help", "a b", "/dev/null", "[/red]"),
    *("\x1b[31mx", "\udcff", "\0", "{}"),
)
BIG = ("1000000000", "2147483648", "65536")
"""Allowed in some places, and too much for memory."""
PLACES = (
    *(
        "",
        "/",
        ".",
        "..",
        "./",
        "../world",
        "new",
        "new/deep",
        "notes/../cache",
        "cache/",
        "x" * 255,
        "x" * 300,
        "x\0y",
    ),
    *("cache/deep", "run/deep/er", "export/x", "/dev/null", "/dev/full/x", "/proc/x", "list.csv", "list.csv/x"),
    *(
        "[/red]",
        "\x1b[31mred",
        "new\udcff",
        ".new.partial",
        ".cache.partial",
        "~",
        "-x",
        "notes/notes.txt",
        "odd/bars/pipe.png",
    ),
)
IMAGES = ("images", "odd", "images/bars", "digits", "cache", "photos:0", "photos:x:y", "digits:", "odd/bars/loop.png")
CHECKPOINTS = ("run", "run/checkpoints/step_000000001", "run/checkpoints", "export", "foreign", "cache")
TOKENIZERS = ("cache_tokenizer", "odd_cache_tokenizer", "codebook.npy", "memory_tokenizer", "new_tokenizer", "export")
CACHES = ("cache", "odd_cache")
KEPT = {"data.cache", "data.workers", "train.output", "speed.compile", "train.budget"}
FIELDS = sorted(options[-1] for name, options in option_names().items() if name not in KEPT)
NO_FIELDS = ("--model.x=1", "--x", "--=", "--model.width", "--set=optim.lr=1", "--data.cache=", "--train.output=run")
FIELD = "any field of a run"
LASTING = ("--epochs", "--views", "--fit-iterations", "--fit-redos", "--max-steps", "--workers", "--seeds", "--budget")
LASTING_FIELDS = ("--optim.epochs", "--train.max-steps", "--model.depth", "--data.patience")
"""A large value here is allowed, and takes as long as it says."""

FIT = dict(zip(*[map(str, (*SIZES, *FITTING))] * 2, strict=True))
DECODE = {"--workers": "0", "--device": "cpu", "--max-skipped": "0.9"}
MODEL = ("image-size=16", "patch-size=4", "vocabulary=16", "width=32", "depth=2", "heads=2")
RUN = {"--cut": "5", "--epochs": "4", "--warmup-epochs": "1", "--batch": "8", "--workers": "0", "--device": "cpu"}

BASES: dict[str, list[tuple[dict[str, str], tuple[str, ...]]]] = {
    "tokenize": [
        ({"--images": "images", "--output": "cache", **FIT, **DECODE}, ()),
        ({"--images": "images", "--output": "cache", **FIT, **DECODE}, ("--overwrite",)),
        ({"--images": "odd", "--output": "new", **FIT, **DECODE}, ()),
        ({"--images": "images", "--output": "new", "--codebook": "cache_tokenizer", **DECODE}, ()),
        ({"--images": "images", "--output": "new", "--codebook": "codebook.npy", **FIT, **DECODE}, ()),
        ({"--images": "images", "--output": "memory", **FIT, **DECODE}, ("--fit",)),
        ({"--images": "images", "--output": "files", "--features-dir": "files_features", **FIT, **DECODE}, ()),
        (
            {
                **{"--import-tokens": "tokens", "--csv": "list.csv", "--root": "images", "--output": "new"},
                **{"--class-names": "classes.npy", "--image-size": "16", **DECODE},
            },
            (),
        ),
        ({"--images": "images", "--output": "k", "--tokenizer": "kclip", "--weights": "clip.pt", **FIT, **DECODE}, ()),
    ],
    "pretrain": [
        ({"--cache": "cache", "--output": "run", "--max-steps": "3", **RUN}, ("--train.ema-decay=0.9",)),
        ({"--cache": "cache", "--output": "run", "--max-steps": "1", **RUN}, ("--fresh",)),
        ({"--cache": "odd_cache", "--output": "new", "--max-steps": "2", "--save-every": "1", **RUN}, ()),
        ({"--cache": "cache", "--output": "new", **RUN}, ("--help",)),
    ],
    "plan": [
        ({"--model": "tiny", "--batch": "64"}, ()),
        ({"--model": "tiny", "--gpu-memory": "16GB", "--gpus": "2", "--interconnect": "400Gb"}, ()),
        ({"--gpu": "V100", "--precision": "fp16", "--images": "1000"}, ()),
    ],
    "probe": [
        (
            {
                **{"--checkpoint": checkpoint, "--images": images, "--output": output, "--methods": "knn"},
                **{"--neighbours": "3", "--labels-per-class": "0", "--epochs": "1", "--batch": "8", "--device": "cpu"},
            },
            flags,
        )
        for checkpoint, images, output, flags in (
            ("export", "cache", "probe", ()),
            ("run", "images", "new", ("--ema",)),
            ("run", "cache", "probe", ("--baselines",)),
            ("export", "odd_cache", "new", ()),
        )
    ],
    "codebook": [
        ({"--cache": "cache", "--output": "report", "--rows": "1"}, ()),
        ({"--cache": "odd_cache", "--output": "new", "--rows": "2", "--floor": "1"}, ()),
    ],
    "export": [
        ({"--checkpoint": "run", "--output": "export"}, ()),
        ({"--checkpoint": "run", "--output": "new"}, ("--ema",)),
    ],
    "demo": [({"--output": "cache"}, ()), ({"--seeds": "1"}, ("--quick",))],
    "doctor": [({"--cache": "cache"}, ()), ({"--run": "run", "--cache": "odd_cache"}, ())],
}
"""Options and flags that work, but for `demo`, which would take minutes: it is always refused."""

MORE: dict[str, tuple[str, ...]] = {
    "tokenize": (
        *("--tokenizer", "--codebook", "--weights", "--precision", "--fit-images", "--features-dir", "--fit-init"),
        *("--fit-tolerance", "--fit-patches", "--fit-save-every", "--csv", "--root", "--class-names", "--batch-size"),
        *("--shard-images", "--seed", "--import-tokens", "--patience"),
    ),
    "pretrain": (
        *("--recipe", "--model", "--objective", "--lr", "--precision", "--parallel", "--micro-batch", "--seed"),
        *(FIELD, FIELD, FIELD, FIELD, "--masked", "--save-every", "--gpu-memory", "--gpus", "--budget"),
    ),
    "plan": (
        *("--recipe", "--objective", "--cut", "--parallel", "--micro-batch", "--batch", "--gpus"),
        *(
            "--gpu-memory",
            "--gpu",
            "--interconnect",
            "--images",
            "--images-per-second",
            FIELD,
            FIELD,
            "--precision",
        ),
    ),
    "probe": ("--test-images", "--test-fraction", "--views", "--lr", "--batch-size", "--seed"),
    "codebook": ("--codebook", "--entries", "--seed"),
    "export": ("--pool", "--name"),
    "demo": (),
    "doctor": (),
}
FLAGS = {
    "tokenize": ("--overwrite", "--fit"),
    "pretrain": ("--fresh", "--auto-batch", "--speed.no-skip-dropped"),
    "probe": ("--baselines", "--ema"),
    "export": ("--ema",),
}
USUAL = {
    "--images": (*IMAGES, *PLACES),
    "--test-images": (*IMAGES, *PLACES),
    "--checkpoint": (*CHECKPOINTS, *PLACES),
    "--codebook": (*TOKENIZERS, *PLACES),
    "--weights": ("clip.pt", "clip.safetensors", "codebook.npy", *PLACES),
    "--cache": (*CACHES, "run", "images", *PLACES),
    "--run": ("run", "cache", *PLACES),
    "--output": (*OUTPUTS, *PLACES),
    "--features-dir": (*OUTPUTS, *PLACES),
    "--csv": ("list.csv", *PLACES),
    "--root": ("images", "odd", *PLACES),
    "--class-names": ("classes.npy", *PLACES),
    "--import-tokens": ("tokens", "tokens/index_0.pth", *PLACES),
    "--tokenizer": ("pixel", "kclip"),
    "--precision": ("fp32", "bf16", "fp16", "auto"),
    "--fit-init": ("random", "k-means++"),
    "--recipe": ("vit_tiny_kclip", "vit_base_kclip"),
    "--model": ("tiny", "base"),
    "--objective": ("mapet", "pim", "mim"),
    "--parallel": ("ddp", "fsdp"),
    "--gpu-memory": ("16GB", "1GiB", "-1GB", "0GB", "nanGB", "1e400GB", "1" + "0" * 400 + "GB"),
    "--interconnect": ("400Gb", "1GB", "0Gb", "-1Gb", "nanGb", "1e-320Gb"),
    "--budget": ("-1h", "0h", "nanh", "1e400h"),
    "--gpu": ("V100",),
    "--methods": ("knn", "linear", "logistic"),
    "--pool": ("avg", "token"),
    "--device": ("auto", "cuda", "cuda:0", "cuda:-1", "mps", "meta", "cpu:1"),
}
REFUSED = ("cache", "run/x", "", "/", "x" * 300, "x\0y")
"""Places where a demo begins nothing, which would take minutes."""
PLACED = {"--output", "--features-dir", "--images", "--root", "--test-images"}
"""Options whose absurd values are places; others would be walked, or written, outside of the world."""


def value_for(command: str, option: str, rng: random.Random) -> str:
    """What is typed after an option."""
    if option == FIELD:
        name = rng.choice(FIELDS)
        usual = ("true", "false", "2", "16", *(() if name in LASTING_FIELDS else BIG))
        return rng.choice((*(f"{name}={value}" for value in (*usual, *ABSURD)), *NO_FIELDS, name))
    if option == "--images" and command == "plan":
        return rng.choice(("1.28M", "1e400M", "-1M", *ABSURD, *BIG))
    if option in PLACED:
        return rng.choice([name for name in USUAL[option] if option == "--output" or name not in ("/", "..")])
    return rng.choice((*USUAL.get(option, ()) * 2, *ABSURD, *(() if option in LASTING else (*BIG, "3"))))


def command_line(command: str, rng: random.Random) -> tuple[str, ...]:
    """The arguments of `mapet`: those that work, most often with changes."""
    options, flags = rng.choice(BASES[command])
    options, extra = dict(options), list(flags)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        change = rng.randrange(30)
        if change == 0:
            extra.append(rng.choice(("--bogus", "bogus", "--bogus=1", "-h", "--", "\x1b[31m", "--output")))
        elif change == 1:
            options.pop(rng.choice(sorted(options)), None)
        elif change == 2:
            extra.append(rng.choice([f"{name}={value}" for name, value in sorted(options.items())] or ["x"]))
        elif change < 9 and command in FLAGS:
            extra.append(rng.choice(FLAGS[command]))
        elif change < 16 and "--output" in options:
            options["--output"] = value_for(command, "--output", rng)
        elif names := sorted({*options, *MORE[command]}):
            name = rng.choice(names)
            value = value_for(command, name, rng)
            if name == FIELD:
                extra.append(value)
            else:
                options[name] = value
    if command == "pretrain":
        extra = [f"--model.{assignment}" for assignment in MODEL] * ("--model" not in options) + extra
        options.setdefault("--max-steps", "1")
        if options["--max-steps"] == "0":
            options["--epochs"] = "1"
    if options.get("--tokenizer") == "kclip":
        options.setdefault("--image-size", "16")  # its own size takes minutes
    if command == "demo" and options.get("--output") not in REFUSED:
        options["--device"] = rng.choice(("nonsense", "cuda:99", "", "1", "meta"))
    typed = [(f"{name}={value}",) if value.startswith("-") else (name, value) for name, value in options.items()]
    return (command, *chain.from_iterable(typed), *extra)


READ = {
    "tokenize": ("images", "odd", "cache", "memory", "files", "tokens", "list", "classes", "codebook", "clip", "notes"),
    "pretrain": ("cache", "odd_cache", "run", "notes"),
    "plan": ("notes",),
    "probe": ("export", "run", "cache", "odd_cache", "images", "probe", "foreign"),
    "codebook": ("cache", "odd_cache", "report"),
    "export": ("run", "export", "foreign"),
    "demo": ("cache",),
    "doctor": ("cache", "run", "odd_cache"),
}
"""What names begin with that a command reads or writes."""
OFTEN = ("tokenize",) * 6 + ("pretrain",) * 5 + ("probe",) * 4 + ("export",) * 3 + ("codebook", "doctor") * 2
COMMANDS = (*OFTEN, "plan", "demo")


def draw_case(files: list[str], rng: random.Random) -> Case:
    """A case for a world with these files."""
    command = rng.choice(COMMANDS)
    near = [name for name in files if name.startswith(READ[command])]
    damages = []
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3))):
        path = rng.choice(near if rng.random() < 0.8 else files)
        damages.append(Damage(rng.choice(kinds_for(path)), path, rng.randrange(1000), rng.random() < 0.5))
    return Case(tuple(damages), command_line(command, rng))


def kinds_for(path: str) -> list[str]:
    """Damages that make sense for a path, those of its format more often."""
    formats = {
        ".json": "JSON",
        ".jsonl": "JSON",
        ".safetensors": "tensors",
        ".pt": "pickle",
        ".pth": "pickle",
        ".npy": "array",
    }
    own = formats.get(Path(path).suffix)
    general = [kind for kind in DAMAGES if kind not in formats.values() and kind != "header"]
    return [*general, *([own] * 6 if own else []), *(["header"] * 3 if own == "array" else [])]
