"""The fuzz of the command line (fuzz.py), a part of it every time; and that it sees what it looks for. Assertion 35."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fuzz import Fuzz, Tally, Written, lost_files, new_files
from fuzz_cases import Case, words
from fuzz_world import DAMAGES, NOTE, Damage, copy, inflict, snapshot

from mapet import cli
from mapet.data import cache_writer
from mapet.errors import DataError

CASES, PARTS = 100, 4
SEED = 35


@pytest.fixture(scope="session")
def fuzz(tmp_path_factory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_is_damaged_and_typed(part, fuzz):
    tally = Tally()
    for number in range(part + 1, CASES + 1, PARTS):
        fuzz.check(fuzz.case(SEED, number), tally=tally)
    assert not tally.failing
    assert tally.codes.keys() >= {"0", "1", "2"} and len(tally.cases) >= 6  # of every kind some


def test_in_a_process_of_its_own(fuzz):
    damage = Damage("code", "run/checkpoints/step_000000002/trainer.pt", rehashed=True)
    command = words("pretrain --cache cache --output run --device cpu --workers 0 --max-steps 3")
    assert not fuzz.check(Case((damage,), tuple(command)), process=True)


def test_a_case_goes_through_json_and_is_the_same_again(fuzz):
    for number in range(50):
        case = fuzz.case(1, number)
        assert Case.from_json(case.to_json()) == case == fuzz.case(1, number)


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_changes_something(kind, fuzz, tmp_path):
    before = {}
    for path in ("cache/manifest.json", "export/model.safetensors", "tokens/index_0.pth", "cache/tokens.npy"):
        for seed in range(5):
            shutil.rmtree(tmp_path / "world", ignore_errors=True)
            copy(fuzz.pristine, tmp_path / "world")
            before = before or snapshot(tmp_path)
            inflict(tmp_path / "world", Damage(kind, path, seed), tmp_path / "canary")
            if snapshot(tmp_path) != before:
                return
    pytest.fail(f"{kind} changes nothing")


class TestWhatIsSeen:
    def problems(self, fuzz: Fuzz, *arguments: str) -> str:
        return "\n".join(fuzz.check(Case((), arguments)))

    def test_a_traceback(self, fuzz, monkeypatch):
        monkeypatch.setattr("mapet.commands.plan.run", lambda options: 1 / 0)
        assert "traceback: " in self.problems(fuzz, "plan")

    def test_a_hang(self, fuzz, monkeypatch):
        def wait(options):
            while True:
                pass

        monkeypatch.setattr("fuzz.LIMIT", 1)
        monkeypatch.setattr("mapet.commands.plan.run", wait)
        assert "hang: " in self.problems(fuzz, "plan")

    @pytest.mark.parametrize("text", ["one\x1b[31m", "\udcff"])
    def test_what_a_terminal_obeys(self, text, fuzz, monkeypatch):
        monkeypatch.setattr("mapet.commands.plan.run", lambda options: print(text) or 0)
        assert "message: stdout has" in self.problems(fuzz, "plan")

    def test_an_error_of_two_lines(self, fuzz, monkeypatch):
        def fail(options):
            raise DataError("one")

        monkeypatch.setattr("mapet.commands.plan.run", fail)
        monkeypatch.setattr(cli, "complain", lambda what, text: print("mapet: error: one\ntwo", file=cli.sys.stderr))
        assert "message: exit code 1 without an error of one line" in self.problems(fuzz, "plan")

    def test_code_that_ran(self, fuzz, monkeypatch):
        monkeypatch.setattr("mapet.commands.plan.run", lambda options: fuzz.canary.touch() or 0)
        assert "code: " in self.problems(fuzz, "plan")

    def test_a_users_file_that_goes_with_a_cache(self, fuzz, monkeypatch):
        def careless(staging, overwrite):
            shutil.rmtree(staging.path)

        monkeypatch.setattr(cache_writer, "check_replaceable", careless)
        places = words("--images images --codebook cache_tokenizer --output cache")
        command = ("tokenize", *places, *words("--overwrite --workers 0 --device cpu"))
        problems = fuzz.check(Case((Damage("folder", "cache/names.json"),), command))
        assert any(problem.startswith("lost: world/cache/names.json/note.txt") for problem in problems)

    @pytest.mark.parametrize("code", [0, 1])
    def test_files_that_change_or_go(self, code):
        outcome, before = type("Outcome", (), {"code": code}), {"world/new/config.json": "a", "world/notes/x": "b"}
        ours = Written("world/new", ours=True, command="export")
        found = list(lost_files(outcome, before, {"world/new/config.json": "c"}, ours, frozenset()))
        assert [line.split()[1] for line in found] == [*before][code == 0 :]
        assert list(lost_files(outcome, before, {"world/notes/x": "b"}, ours, frozenset("a")))
        assert not list(lost_files(outcome, before, before, ours, frozenset("ab")))

    def test_what_is_set_aside_is_not_lost(self):
        outcome, fresh = type("Outcome", (), {"code": 1}), Written("world/run", fresh=True, command="pretrain")
        before = {"world/run/x": "a", "world/run/y": "a"}
        after = {"world/run/before_1/x": "a", "world/run/before_1/y": "a"}
        assert not list(lost_files(outcome, before, after, fresh, frozenset("a")))
        del after["world/run/before_1/y"]
        assert len(list(lost_files(outcome, before, after, fresh, frozenset("a")))) == 1

    def test_what_a_refused_command_left(self):
        outcome = type("Outcome", (), {"code": 2})
        after = {"world/new": "kind 40000", "world/.mapet.lock": "a", "world/.new.partial/x": "a"}
        left = list(new_files("export", outcome, {}, after, Written("world/new", command="export")))
        assert left == ["left: world/new is new (exit code 2)"]


def test_a_note_is_a_users_file(fuzz):
    assert snapshot(Path(fuzz.pristine))["notes/notes.txt"] in fuzz.users
    assert (fuzz.pristine / "notes/notes.txt").read_bytes() == NOTE
