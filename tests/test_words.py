"""Whatever goes wrong outside of the program is one line; names of any bytes do no harm (assertions 31 to 33)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import FIT, SIZES, TRAINING, pictures
from rich.console import Console
from tiny_run import make_cache, make_config

from mapet.commands import doctor
from mapet.commands.options import Doctor
from mapet.commands.parsing import as_typed
from mapet.commands.probe import as_table
from mapet.data.images import folder_source
from mapet.evaluate.frozen import EvaluationResult, Score
from mapet.machine import Finding
from mapet.report.loss_curve import read_metrics
from mapet.report.markdown import plain, table
from mapet.training.loop import pretrain
from mapet.training.metrics import FILE_NAME, keep_until
from mapet.words import in_line, printable

HOSTILE = ["\x1b[31mred", "[/red]", "caf\udce9", "$\\frac", "a\nb", "<script>", "a|b`c`"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "some/where"), "Permission denied: some/where"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "File name too long: x"),
        (OSError(errno.EROFS, "Read-only file system", "a", None, "b"), "Read-only file system: a -> b"),
        (OSError("odd"), "odd"),
        (MemoryError(), "does not fit into memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "does not fit into memory",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit into memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not encoded as it should be"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
    ],
)
def test_what_disk_memory_and_bytes_refuse_is_a_line(error, said, failing):
    outcome = failing(error)
    assert outcome.code == 1 and said in outcome.err
    assert outcome.err.startswith("mapet: error: ") and outcome.err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bug"), TypeError("bug"), KeyError("bug"), RuntimeError("bug")])
def test_bugs_keep_their_traceback(error, failing):
    with pytest.raises(type(error)):
        failing(error)


def test_a_message_with_escape_codes_and_several_lines_is_one_harmless_line(failing):
    outcome = failing(OSError(errno.ENOENT, "No such file", "a\x1b[2J\nb\udcff"))
    assert outcome.err == "mapet: error: No such file: a\\x1b[2J b\\xff\n"


def mapet_process(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "mapet", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_reader_that_leaves_ends_it_quietly():
    process = mapet_process("pretrain", "--help")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 141)
    process.stderr.close()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_failure(closed):
    done = subprocess.run(
        f"{sys.executable} -m mapet pretrain --help {closed}", shell=True, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"])
def test_variables_of_torchrun_that_are_no_numbers(name, mapet, tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "cache", vocabulary=16)
    monkeypatch.setenv("WORLD_SIZE", "2" if name == "LOCAL_RANK" else "1")
    monkeypatch.setenv(name, "abc")
    options = ("--cache", cache, "--output", tmp_path / "run", *TRAINING, "--workers", 1)
    mapet.fail("pretrain", *options, code=2, names=(f"{name} is 'abc'", "torchrun"))


def test_fields_are_named_as_they_are_typed():
    text = "optim.global_batch 9: lower optim.lr. --optim.clip, (objective.cut) a/train.output/b, train.x, train.keep=3"
    told = "--batch 9: lower --lr. --optim.clip, (--cut) a/train.output/b, train.x, --train.keep=3"
    assert as_typed(text) == told
    assert as_typed("raise data.patience (20 s)") == "raise --data.patience (20 s)"


def test_a_folder_of_another_kind_is_named(mapet, tmp_path):
    cache = make_cache(tmp_path / "cache", vocabulary=16)
    for command in (("probe", "--images", "digits"), ("export", "--output", tmp_path / "model")):
        mapet.fail(*command, "--checkpoint", cache, code=1, names=(f"{cache} is a token cache; give a run folder",))
    mapet.fail("tokenize", "--images", cache, code=1, names=(f"no image in {cache}", "(it is a token cache)"))
    assert "holds no checkpoint (it is a token cache)" in str(doctor.run_findings(cache))


def test_a_second_interrupt_prints_no_traceback(tmp_path):
    code = """
import sys, types, signal, os, atexit
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.argv = ["mapet", "doctor"]
def run(options):
    os.kill(os.getpid(), signal.SIGINT)
sys.modules["mapet.commands.doctor"] = types.SimpleNamespace(run=run)
from mapet.cli import main
code = main()
os.kill(os.getpid(), signal.SIGINT)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr.count("\n") == 1 and done.stderr.startswith("mapet: interrupted")


def test_a_terminal_of_another_encoding(tmp_path):
    (tmp_path / "\N{SNOWMAN}").mkdir()
    with mapet_process(
        "tokenize", "--images", tmp_path / "\N{SNOWMAN}", env={**os.environ, "PYTHONIOENCODING": "ascii"}
    ) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and b"\\u2603" in err and b"Traceback" not in err


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_harmless_in_tables_and_reports(name):
    result = EvaluationResult((Score("kNN, k = 1", "all", 0.5),), 4, 2, 2)
    console = Console(record=True, width=200)
    console.print(as_table({name: result}))
    console.print(Console().render_str(""))
    text = console.export_text()
    assert "\x1b" not in text and (in_line(name) in text or "\n" in name)
    (line,) = table((), [(plain(name), "x")])[2:]
    assert "\n" not in line and "\x1b" not in line and "<script>" not in line.replace("\\<", "")
    line.encode()
    assert printable(name).encode()


def bytes_folder(root: Path, *names: bytes) -> Path:
    """Class folders of these names, three pictures each."""
    made = pictures(root, per_class=3, classes=tuple(map(str, range(len(names)))))
    for i, name in enumerate(names):
        os.rename(os.fsencode(made / str(i)), os.path.join(os.fsencode(made), name))
    return made


def test_codebook_with_class_names_of_any_bytes(mapet, tmp_path):
    images = bytes_folder(tmp_path / "images", b"caf\xe9", b"$\\frac[red]", b"\x1b[31m|<b>")
    mapet.succeed("tokenize", "--images", images, "--output", tmp_path / "c", *SIZES, *FIT)
    outcome = mapet.succeed("codebook", "--cache", tmp_path / "c", "--output", tmp_path / "book", "--floor", 1)
    text = (tmp_path / "book/report.md").read_text("utf-8") + (tmp_path / "book/classes.csv").read_text("utf-8")
    assert "caf" in text and "\\xe9" in text and "\x1b" not in text + outcome.out


def test_commands_whose_folders_have_names_of_any_bytes(mapet, tmp_path):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff\x1b[1m[/red]/x"))
    root.mkdir(parents=True)
    images = pictures(root / "images", per_class=8)
    made = mapet.succeed("tokenize", "--images", images, "--output", root / "c", *SIZES, *FIT)
    run = mapet.succeed("pretrain", "--cache", root / "c", "--output", root / "run", *TRAINING, "--max-steps", 1)
    book = mapet.succeed("codebook", "--cache", root / "c", "--output", root / "book")
    checked = mapet("doctor", "--cache", root / "c", "--run", root / "run")
    for outcome in (made, run, book, checked):
        assert "\x1b" not in outcome.out + outcome.err and "\\xff" in outcome.out


class TestDoctor:
    @pytest.fixture(autouse=True)
    def only_these(self, monkeypatch):
        monkeypatch.setattr("mapet.commands.doctor.backend_findings", lambda *_: [])

    def test_damage_is_exit_code_1_and_health_0(self, tmp_path):
        cache = make_cache(tmp_path / "c")
        assert doctor.run(Doctor(cache), Console(quiet=True)) == 0
        (tokens,) = cache.glob("tokens*.npy")
        tokens.write_bytes(tokens.read_bytes()[:-1] + b"\xff")
        assert doctor.run(Doctor(cache), Console(quiet=True)) == 1

    @pytest.mark.parametrize("kind", ["pipe", "file", "missing", "pipe inside", "file for checkpoints", "long"])
    def test_what_is_no_folder_is_a_finding(self, kind, tmp_path):
        place = tmp_path / ("x" * 300 if kind == "long" else "x")
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "file":
            place.write_text("")
        elif kind == "pipe inside":
            place.mkdir()
            os.mkfifo(place / "manifest.json")
            os.mkfifo(place / "checkpoints")
        elif kind == "file for checkpoints":
            place.mkdir()
            (place / "checkpoints").write_text("")
        console = Console(record=True, width=300)
        assert doctor.run(Doctor(place, place), console) == 1
        assert console.export_text().count("problem") >= 2

    def test_findings_are_printable(self):
        console = Console(record=True, width=100)
        console.print(doctor.as_table([Finding("run [/red]", "ok", "a\x1b[31m\udcff", "[/red]")]))
        text = console.export_text()
        assert "\x1b" not in text and "\\xff" in text and "run [/red]" in text


class TestMetrics:
    """Assertion 31: a damaged line costs that line."""

    DAMAGED = (
        b"\xff\xfe",
        b"{",
        b"[1]",
        b"7",
        b'{"loss": 1.0}',
        b'{"step": "2", "loss": 1.0}',
        b'{"step": true, "loss": 1.0}',
        b'{"step": 2, "loss": "low"}',
        b'{"step": -1, "loss": 1.0}',
        b"[" * 100_000,
    )

    @pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
    def test_a_damaged_line_is_passed_by_and_counted(self, line, tmp_path):
        path = tmp_path / FILE_NAME
        content = b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo'
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=r"metrics\.jsonl: 1 of 3 lines are damaged"):
            assert read_metrics(path).step.tolist() == [1, 3]
        with pytest.warns(UserWarning, match=r"metrics\.jsonl: 1 of 3 lines are damaged"):
            assert [kept["step"] for kept in keep_until(path, 9)] == [1, 3]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [kept["step"] for kept in keep_until(path, 9)] == [1, 3], "they are gone now"

    def test_a_bad_byte_does_not_block_a_healthy_checkpoint(self, tmp_path):
        cache = make_cache(tmp_path / "c")
        pretrain(make_config(cache, tmp_path / "run", **{"train.max_steps": 2}))
        with (tmp_path / "run" / FILE_NAME).open("r+b") as file:
            file.write(b"\xff")
        with pytest.warns(UserWarning, match="1 of 2 lines are damaged"):
            assert pretrain(make_config(cache, tmp_path / "run", **{"train.max_steps": 3})).step == 3


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


class TestWalk:
    def test_doubled_links_end_at_once(self, tmp_path):
        """2^23 ways lead to the image."""
        picture(tmp_path / "level_23/a.png")
        for i in range(23):
            (tmp_path / f"level_{i:02d}").mkdir()
            for side in ("left", "right"):
                (tmp_path / f"level_{i:02d}" / side).symlink_to(tmp_path / f"level_{i + 1:02d}")
        with pytest.warns(UserWarning, match=r"\d+ links to folders that were entered already"):
            source = folder_source(tmp_path / "level_00")
        assert source.names == ["left/" * 23 + "a.png"], "the first in sorted order"

    @pytest.mark.parametrize("tops", [("train", "val"), ("Training", "validation", "test"), ("train",)])
    def test_the_parts_of_a_set_are_no_classes(self, tops, tmp_path):
        for top in tops:
            for name in ("cat", "dog"):
                picture(tmp_path / top / name / "1.png")
        with pytest.warns(UserWarning, match=rf"parts of a set .*to take one part, give .*/{tops[0]}$"):
            source = folder_source(tmp_path)
        assert source.classes == ["cat", "dog"] and source.parts[0] == tops[0]
        assert source.labels.tolist() == [int("dog" in name) for name in source.names]

    def test_parts_without_class_folders_have_no_labels(self, tmp_path):
        picture(tmp_path / "train/1.png"), picture(tmp_path / "val/2.png")
        with pytest.warns(UserWarning, match="parts of a set"):
            assert folder_source(tmp_path).labels is None

    @pytest.mark.parametrize("tops", [("train", "plane"), ("test",)])
    def test_classes_that_are_called_alike(self, tops, tmp_path):
        for top in tops:
            picture(tmp_path / top / "wide/1.png")
        source = folder_source(tmp_path)
        assert source.classes == sorted(tops) and np.array_equal(np.unique(source.labels), np.arange(len(tops)))

    def test_a_probe_of_a_whole_set_is_refused_with_the_command(self, mapet, tmp_path):
        cache = make_cache(tmp_path / "c")
        pretrain(make_config(cache, tmp_path / "run", **{"train.max_steps": 1}))
        for top in ("train", "val"):
            pictures(tmp_path / "set" / top, per_class=1)
        given = ("--checkpoint", tmp_path / "run", "--images", tmp_path / "set", "--output", tmp_path / "p")
        said = f"--images {tmp_path}/set/train --test-images {tmp_path}/set/val"
        mapet.fail("probe", *given, code=1, names=(said,))
