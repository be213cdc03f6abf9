"""kmeans.fit at scale: rows from files, resumable, over several processes."""

import importlib
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor

from mapet_kernels import kmeans
from mapet_kernels.kmeans import NpyRows, lloyd, share_of_rows
from mapet_kernels.kmeans.data import Data
from mapet_kernels.kmeans.initial import Distances, draw, plus_plus
from mapet_kernels.kmeans.ranks import Ranks
from mapet_kernels.kmeans.sources import Selection, TensorRows
from mapet_kernels.kmeans.stream import chunks

SCRIPT = Path(__file__).parent / "kmeans_script.py"
CPU = torch.device("cpu")
FAST = {"redos": 2, "iterations": 4}


def mixture(rows: int, features: int = 16, parts: int = 40, spread: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(parts, features, generator=generator)
    drawn = centres[torch.randint(parts, (rows,), generator=generator)]
    return drawn + spread * torch.randn(rows, features, generator=generator)


def shards(folder: Path, x: Tensor, sizes: tuple[int, ...]) -> list[Path]:
    """x as .npy files of so many rows."""
    paths = [folder / f"rows_{i}.npy" for i in range(len(sizes))]
    for path, part in zip(paths, x.split(sizes), strict=True):
        np.save(path, part.numpy())
    return paths


def same_result(one: kmeans.KMeansResult, two: kmeans.KMeansResult) -> None:
    assert torch.equal(one.centroids, two.centroids)
    assert torch.equal(one.counts, two.counts)
    assert (one.objectives, one.objective) == (two.objectives, two.objective)
    assert (one.redo, one.splits, one.rows) == (two.redo, two.splits, two.rows)


def whole(x: Tensor) -> Data:
    return Data(TensorRows(x), Ranks(), CPU, 64)


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_the_fit_of_files_is_that_of_the_tensor(self, tmp_path, dtype):
        x = mixture(1000).to(dtype)
        paths = shards(tmp_path, x, (300, 0, 1, 699))
        for init in ("random", "k-means++"):
            options = {**FAST, "init": init, "chunk_bytes": 70 * 16 * x.element_size()}
            same_result(kmeans.fit(paths, 12, **options), kmeans.fit(x, 12, **options))

    @pytest.mark.parametrize("init", ["random", "k-means++"])
    def test_another_default_device(self, tmp_path, init):
        """Files, tensors and arrays, with a checkpoint, empty clusters and a subset: all is made where it belongs."""
        x = torch.cat([mixture(400), torch.zeros(200, 16)])
        paths = shards(tmp_path, x, (300, 300))
        options = {**FAST, "init": init, "device": "cpu", "chunk_bytes": 4096, "max_points_per_centroid": 20}
        wanted = kmeans.fit(x, 25, **options)
        model = kmeans.KMeans(3, random_state=0, max_iter=2).fit(x.numpy())
        torch.set_default_device("meta")
        try:
            found = kmeans.fit(paths, 25, **options, checkpoint=tmp_path / "state")
            again = kmeans.fit(paths, 25, **options, checkpoint=tmp_path / "state")
            other = kmeans.KMeans(3, random_state=0, max_iter=2).fit(x.numpy())
            labels = other.predict(x.tolist()[:9])
        finally:
            torch.set_default_device(None)
        same_result(found, wanted)
        same_result(again, wanted)
        assert wanted.splits > 0 or init == "k-means++", "no empty cluster was filled"
        assert np.array_equal(other.labels_, model.labels_) and np.array_equal(labels, model.labels_[:9])

    def test_ids_of_its_own_are_not_checked(self, monkeypatch):
        """Which would wait for a GPU twice a chunk."""

        def refuse(*_):
            raise AssertionError("ids of kmeans_assign were read")

        monkeypatch.setattr(importlib.import_module("mapet_kernels.kmeans_update.op"), "_check_ids", refuse)
        kmeans.fit(mixture(300), 5, **FAST)

    def test_a_memory_mapped_array_is_taken_as_it_is(self, tmp_path):
        x = mixture(500)
        (path,) = shards(tmp_path, x, (500,))
        mapped = torch.from_numpy(np.load(path, mmap_mode="c"))
        same_result(kmeans.fit(mapped, 5, **FAST), kmeans.fit(x, 5, **FAST))

    def test_read_and_take_cross_files(self, tmp_path):
        x = torch.arange(600.0).view(200, 3)
        source = NpyRows(shards(tmp_path, x, (50, 1, 0, 99, 50)))
        assert source.shape == (200, 3)
        assert torch.equal(source.read(40, 160), x[40:160])
        numbers = torch.tensor([0, 49, 50, 51, 52, 149, 150, 199])
        assert torch.equal(source.take(numbers), x[numbers])
        assert torch.equal(Selection(source, numbers).read(2, 7), x[numbers[2:7]])
        assert torch.equal(Selection(source, numbers).take(torch.tensor([0, 3, 7])), x[[0, 51, 199]])
        part = share_of_rows(source, 1, 3)
        assert torch.equal(part.read(0, part.shape[0]), x[66:133])
        assert torch.equal(part.take(torch.tensor([1, 60])), x[[67, 126]])

    def test_rows_far_apart_are_read_one_by_one(self, tmp_path, monkeypatch):
        source = NpyRows(shards(tmp_path, torch.zeros(10_000, 64), (10_000,)))
        read = []
        monkeypatch.setattr(NpyRows, "read", lambda self, start, stop: read.append(stop - start) or torch.zeros(1, 64))
        source.take(torch.tensor([5, 4000, 9000]))
        assert read == [1, 1, 1]

    @pytest.mark.parametrize("sizes", [(1000,), (400, 600)])
    def test_the_subset_has_exactly_that_many_rows_and_is_the_same_from_files(self, tmp_path, sizes):
        x = mixture(1000)
        options = {**FAST, "max_points_per_centroid": 30, "chunk_bytes": 20 * 64}
        of_files = kmeans.fit(shards(tmp_path, x, sizes), 12, **options)
        assert of_files.rows == 360 == of_files.counts.sum()
        same_result(of_files, kmeans.fit(x, 12, **options))

    def test_the_subset_follows_the_seed_and_repeats_no_row(self):
        x = torch.arange(1000.0)[:, None]
        drawn = [whole(x).subset(100, seed).source.values.flatten() for seed in (1, 1, 2)]
        assert len(drawn[0].unique()) == 100
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    @pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
    def test_chunks_are_all_rows_in_order_read_one_ahead(self, tmp_path, chunk):
        x = torch.arange(300.0).view(100, 3)
        source = NpyRows(shards(tmp_path, x, (30, 70)))
        reads = []
        read = source.read
        source.read = lambda start, stop, out: (
            reads.append((start, threading.current_thread())) or read(start, stop, out)
        )
        seen = []
        for start, rows in chunks(source, CPU, chunk):
            assert torch.equal(rows, x[start : start + chunk])
            seen.append(start)
            assert len(reads) <= len(seen) + 1
        assert seen == list(range(0, 100, chunk))
        assert all(thread is not threading.main_thread() for _, thread in reads)

    def test_the_next_chunk_is_read_while_one_is_worked_on(self, tmp_path):
        source = NpyRows(shards(tmp_path, torch.zeros(20, 3), (20,)))
        read, second = source.read, threading.Event()

        def reading(start: int, stop: int, out: Tensor) -> Tensor:
            if start == 10:
                second.set()
            return read(start, stop, out)

        source.read = reading
        stream = chunks(source, CPU, 10)
        next(stream)
        assert second.wait(30), "nothing is read until the next chunk is asked for"
        stream.close()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("init", ["random", "k-means++"])
    def test_rows_read_into_a_gpu_give_the_fit_of_rows_on_it(self, tmp_path, init):
        x = mixture(5000)
        options = {**FAST, "init": init, "max_points_per_centroid": 200, "chunk_bytes": 300 * 64}
        resident = kmeans.fit(x.cuda(), 20, **options)
        assert resident.centroids.is_cuda
        same_result(kmeans.fit(x, 20, device="cuda", **options), resident)
        same_result(kmeans.fit(shards(tmp_path, x, (2000, 3000)), 20, device="cuda", **options), resident)
        torch.testing.assert_close(resident.objective, kmeans.fit(x, 20, **options).objective, rtol=1e-3, atol=0)

    def test_an_error_of_the_reader_is_raised(self, tmp_path):
        paths = shards(tmp_path, mixture(1000), (500, 500))
        source = NpyRows(paths)
        os.truncate(paths[1], 4000)
        with pytest.raises(ValueError, match=r"rows_1\.npy has been truncated since it was opened"):
            kmeans.fit(source, 4, **FAST, chunk_bytes=6400)

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (lambda a: a.tobytes(), "is not a .npy file"),
            (lambda a: b"", "is not a .npy file"),
            (lambda a: saved(a)[:-1], r"is truncated: it has 1727 bytes, and 100 rows of 4 need 1728"),
            (lambda a: saved(a) + b"!", "is too long: it has 1729 bytes"),
            (lambda a: saved(a)[:20], "has a damaged .npy header"),
            (lambda a: saved(a.astype(np.int32)), r"holds <i4 \(100, 4\).*needed is \(rows, features\)"),
            (lambda a: saved(a.astype(">f4")), "holds >f4"),
            (lambda a: saved(a[0]), r"holds <f4 \(4,\)"),
            (lambda a: saved(np.asfortranarray(a)), "in Fortran order"),
            (lambda a: saved(a[:, :3]), r"rows_1\.npy holds rows of 3 torch\.float32, but .*rows_0\.npy rows of 4"),
            (lambda a: saved(a.astype(np.float16)), "holds rows of 4 torch.float16"),
        ],
    )
    def test_a_wrong_file_is_refused_by_name(self, tmp_path, content, text):
        good = shards(tmp_path, torch.zeros(10, 4), (10,))[0]
        bad = tmp_path / "rows_1.npy"
        bad.write_bytes(content(np.zeros((100, 4), np.float32)))
        with pytest.raises(ValueError, match=text) as error:
            kmeans.fit([good, bad], 2)
        assert str(bad) in str(error.value)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent\.npy"):
            kmeans.fit(tmp_path / "absent.npy", 2)
        with pytest.raises(ValueError, match=r"no \.npy file was given"):
            kmeans.fit([], 2)
        with pytest.raises(TypeError, match=r"x must be a tensor, a source of rows.* got ndarray"):
            kmeans.fit(np.zeros((4, 2)), 2)

    def test_bad_rows_are_named_by_their_number(self, tmp_path):
        x = mixture(400)
        x[[7, 250, 333], 3] = torch.tensor([math.nan, math.inf, -math.inf])
        with pytest.raises(ValueError, match="3 of its rows hold NaN or infinity; the first are 7, 250, 333;"):
            kmeans.fit(shards(tmp_path, x, (200, 200)), 4, chunk_bytes=6400)


def saved(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class TestStart:
    def test_distances_are_those_of_the_differences(self):
        x = mixture(300, features=20) + 1000
        candidates = x[[5, 17, 200]]
        exact = (x.double() - candidates.double()[:, None]).square().sum(2)
        found = Distances(whole(x), origin=x[1]).to(candidates)
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0.05)

    def test_rows_are_drawn_in_proportion_to_their_weight(self):
        weights = torch.tensor([0.0, 1, 0, 3, 0])
        numbers = draw(whole(torch.zeros(5, 2)), weights, 4000, torch.Generator().manual_seed(0))
        counts = torch.bincount(numbers, minlength=5).tolist()
        assert counts[0] == counts[2] == counts[4] == 0
        assert counts[3] / counts[1] == pytest.approx(3, rel=0.15)

    def test_plus_plus_takes_a_row_of_each_far_cloud(self):
        centres = 100 * torch.eye(12)
        x = centres.repeat(20, 1) + mixture(240, features=12, spread=0.1)
        chosen = plus_plus(whole(x), 12, torch.Generator().manual_seed(0))
        assert sorted(torch.cdist(chosen, centres).argmin(1).tolist()) == list(range(12))


class Killed(Exception):
    """Raised where a kill would come."""


def stop_after(iterations: int):
    """A watcher that stops the fit after so many iterations."""
    seen = []

    def watch(done: kmeans.Iteration) -> None:
        seen.append(done)
        if len(seen) == iterations:
            raise Killed

    return watch


class TestResuming:
    # Many equal rows, so that clusters run empty and are split in every iteration.
    x = torch.cat([torch.zeros(300, 8), mixture(100, features=8)])
    settings = MappingProxyType({"clusters": 20, "redos": 3, "iterations": 5, "init": "random"})

    @pytest.mark.parametrize("done", [1, 3, 5, 8, 14, 15])
    def test_a_stopped_fit_goes_on_to_the_same_bits(self, tmp_path, done):
        uninterrupted = kmeans.fit(self.x, **self.settings)
        assert uninterrupted.splits > 0
        with pytest.raises(Killed):
            kmeans.fit(self.x, **self.settings, checkpoint=tmp_path / "fit", on_iteration=stop_after(done))
        rest = []
        resumed = kmeans.fit(self.x, **self.settings, checkpoint=tmp_path / "fit", on_iteration=rest.append)
        assert len(rest) == 15 - done
        same_result(resumed, uninterrupted)
        assert os.listdir(tmp_path) == ["fit"]

    def test_early_stops_are_the_same_after_a_resume(self, tmp_path):
        settings = {"clusters": 6, "redos": 2, "iterations": 40, "tolerance": 0.01, "init": "k-means++"}
        x = mixture(300)
        uninterrupted = kmeans.fit(x, **settings)
        assert max(map(len, uninterrupted.objectives)) < 40
        for stop in range(1, sum(map(len, uninterrupted.objectives))):
            path = tmp_path / f"fit{stop}"
            with pytest.raises(Killed):
                kmeans.fit(x, **settings, checkpoint=path, on_iteration=stop_after(stop))
            same_result(kmeans.fit(x, **settings, checkpoint=path), uninterrupted)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"clusters": 19}, "clusters was 20, is 19"),
            ({"iterations": 6, "redos": 2}, "iterations was 5, is 6; redos was 3, is 2"),
            ({"seed": 1}, "seed was 1234, is 1"),
            ({"x": x.half()}, r"dtype was torch.float32, is torch.float16; checksum of x was"),
            ({"x": x[1:]}, "rows was 400, is 399"),
            ({"x": x.flip(0)}, "checksum of x was"),
            ({"x": x.flip(1)}, "checksum of x was"),
        ],
    )
    def test_other_data_or_settings_are_refused(self, tmp_path, changes, text):
        path = tmp_path / "fit"
        with pytest.raises(Killed):
            kmeans.fit(self.x, **self.settings, checkpoint=path, on_iteration=stop_after(2))
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"belongs to another fit: .*{re.escape(text)}"):
            kmeans.fit(**{"x": self.x, **self.settings, "checkpoint": path, **changes})
        assert path.read_bytes() == before

    def test_one_changed_bit_is_other_data(self, tmp_path):
        checksums = []
        for bit in (None, 0, 199):
            x = self.x.clone()
            if bit is not None:
                x.view(-1).view(torch.int32)[16 * bit] ^= 1
            checksums.append(Data(TensorRows(x), Ranks(), CPU, 33).check(checksum=True))
        assert len(set(checksums)) == 3
        assert Data(TensorRows(self.x), Ranks(), CPU, 1000).check(checksum=True) == checksums[0]

    @pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:50] + b"?" + b[51:]])
    def test_a_damaged_state_is_refused(self, tmp_path, damage):
        path = tmp_path / "fit"
        kmeans.fit(self.x, **self.settings, checkpoint=path)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match="fit is damaged, or not the state of a k-means; remove it to start"):
            kmeans.fit(self.x, **self.settings, checkpoint=path)

    def test_a_full_disk_leaves_the_earlier_state(self, tmp_path, monkeypatch):
        path = tmp_path / "fit"
        with pytest.raises(Killed):
            kmeans.fit(self.x, **self.settings, checkpoint=path, on_iteration=stop_after(2))
        before = path.read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, "fsync", full)
            kmeans.fit(self.x, **self.settings, checkpoint=path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["fit"]
        same_result(kmeans.fit(self.x, **self.settings, checkpoint=path), kmeans.fit(self.x, **self.settings))

    def test_it_is_written_at_most_so_often_and_at_the_end(self, tmp_path, monkeypatch):
        written = []
        monkeypatch.setattr(lloyd, "write_state", lambda *arguments: written.append(arguments))
        kmeans.fit(self.x, **self.settings, checkpoint=tmp_path / "fit")
        assert len(written) == 15
        kmeans.fit(self.x, **self.settings, checkpoint=tmp_path / "fit", checkpoint_seconds=3600)
        assert len(written) == 16

    def test_a_checkpoint_without_a_folder(self, tmp_path):
        with pytest.raises(ValueError, match="must be a file in a folder that exists"):
            kmeans.fit(self.x, **self.settings, checkpoint=tmp_path / "absent" / "fit")

    def test_the_watcher_is_told_splits_pace_and_time_left(self):
        told = []
        result = kmeans.fit(self.x, **self.settings, on_iteration=told.append)
        assert sum(done.splits for done in told if done.redo == result.redo) == result.splits
        assert all(done.seconds > 0 for done in told)
        assert all(done.eta > 0 for done in told[:-1])
        assert told[-1].eta == 0


def run_ranks(job: dict, paths: list[Path], size: int) -> list[tuple[int, str]]:
    """Exit codes and stderr of kmeans_script.py in `size` processes, started as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, SCRIPT, json.dumps(job), *map(str, paths)]
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory) -> Path:
    """Reports of two ranks for each init, and what they said when one of them held a bad row."""
    folder, several = tmp_path_factory.mktemp("ranks"), TestSeveralProcesses
    fits = [{**several.settings, "init": init, "checkpoint": str(folder / init)} for init in several.inits]
    job = {"fits": [*fits, {"clusters": 3}], "report": str(folder / "result"), "break_rank": 1}
    for rank, (code, stderr) in enumerate(run_ranks(job, shards(folder, several.x, (600, 301)), 2)):
        assert code == 1, stderr
        (folder / f"stderr_{rank}").write_text(stderr)
    return folder


class TestSeveralProcesses:
    x = mixture(901)
    settings = MappingProxyType({"clusters": 15, "redos": 2, "iterations": 5, "max_points_per_centroid": 50})
    inits = ("random", "k-means++")

    @pytest.mark.parametrize("number", [0, 1])
    def test_two_processes_are_one(self, ranks_folder, number):
        settings = {**self.settings, "init": self.inits[number]}
        one = kmeans.fit(self.x, **settings)
        ranks = [kmeans.KMeansResult(**torch.load(ranks_folder / f"result{number}_{rank}")) for rank in range(2)]
        same_result(*ranks)
        torch.testing.assert_close(ranks[0].centroids, one.centroids, rtol=1e-5, atol=1e-6)
        assert torch.equal(ranks[0].counts, one.counts)
        assert ranks[0].rows == one.rows == 750
        for curve, expected in zip(ranks[0].objectives, one.objectives, strict=True):
            assert curve == pytest.approx(expected, rel=1e-6)
        # One process takes over the finished fit of two: the checksum is of the data, not of its shares.
        same_result(kmeans.fit(self.x, **settings, checkpoint=ranks_folder / self.inits[number]), ranks[0])

    def test_bad_rows_of_one_process_stop_all(self, ranks_folder):
        text = "process 1: x must be finite, but 1 of its rows hold NaN or infinity; the first are 453;"
        assert all(text in (ranks_folder / f"stderr_{rank}").read_text() for rank in range(2))

    def test_an_iteration_costs_one_all_reduce(self, monkeypatch):
        sums = []
        monkeypatch.setattr(Ranks, "sum", lambda self, values: sums.append(values.numel()) or values)
        lloyd.one_pass(whole(self.x), self.x[:15], exact=True, backend="auto")
        assert sums == [15 * 16 + 15 + 1]

    def test_a_group_needs_a_process_group(self):
        with pytest.raises(ValueError, match=r"a group was given, but torch\.distributed is not initialised"):
            kmeans.fit(mixture(50), 3, group=object())

    def test_shares_are_all_rows_once(self):
        source = TensorRows(torch.arange(17.0)[:, None])
        shares = [share_of_rows(source, rank, 5) for rank in range(5)]
        assert torch.equal(torch.cat([share.read(0, share.shape[0]) for share in shares]), source.values)
        assert {share.shape[0] for share in shares} == {3, 4}
        with pytest.raises(ValueError, match=r"rank must be in \[0, 5\), got 5"):
            share_of_rows(source, 5, 5)
