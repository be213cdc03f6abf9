"""What the doctor finds, on this machine and on machines described to it."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from rich.console import Console

from mapet import machine
from mapet.commands import doctor
from mapet.commands.options import Doctor
from mapet.config import RunConfig, to_dict
from mapet.data.cache import TokenCache
from mapet.errors import DataError
from mapet.machine import Finding
from mapet.training.checkpoint import FOLDER, CheckpointState, CheckpointStore
from mapet_kernels.backends import available_backends
from mapet_kernels.selfcheck import Agreement


def gpu(name, capability, gib):
    major, minor = capability
    return SimpleNamespace(name=name, major=major, minor=minor, total_memory=gib << 30)


V100, H200 = gpu("V100", (7, 0), 16), gpu("H200", (9, 0), 141)


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_the_report_covers_every_subject_and_never_raises(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL_PACKAGES, "no_such_thing", "nothing at all")
    found = by_subject(doctor.doctor_report())
    assert {"Python", "torch", "processor", "memory", "triton", "nvcc"} <= found.keys()
    assert {"xformers", "flash-attn", "faiss", "nvtx", "wandb", "trackio"} <= found.keys()
    assert {f"attention {name} on cpu" for name in (*available_backends("cpu"), "auto")} <= found.keys()
    assert found["no-such-thing"] == Finding("no-such-thing", "absent", "not installed; nothing at all")
    assert doctor.installed_version("sklearn"), "found by its module, which is not imported"
    assert found["torch"].status == "ok" and torch.__version__ in found["torch"].detail
    assert any(subject.startswith("GPU") for subject in found)
    assert all(finding.detail for finding in found.values()) and 2**28 < machine.main_memory() < 2**45


def test_it_prints_every_finding_and_exits_1_for_problems(tmp_path):
    console = Console(record=True, width=200)
    assert doctor.run(Doctor(tmp_path / "no[bold]cache", tmp_path / "none"), console) == 1
    text = console.export_text()
    assert "no[bold]cache" in text, "a path is text, not markup"
    assert "holds no checkpoint" in text and "attention reference on cpu" in text and "problem" in text


@pytest.mark.parametrize(
    ("device", "detail", "advice"),
    [
        (H200, "H200, sm_90, 141 GiB; fp32, bf16 and fp16; train.precision auto takes bf16", ""),
        (V100, "V100, sm_70, 16 GiB; fp32 and fp16; train.precision auto takes fp16", "bf16 is emulated"),
        (gpu("P40", (6, 1), 24), "P40, sm_61, 24 GiB; fp32; train.precision auto takes fp16", "gain nothing"),
    ],
)
def test_a_gpu_is_described_by_what_it_can_do(device, detail, advice):
    found = machine.gpu_finding(2, device)
    assert (found.subject, found.detail) == ("GPU 2", detail)
    assert advice in found.advice and bool(advice) == bool(found.advice)


def test_triton_needs_an_ampere_gpu_and_no_amd(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda module: "3.6.0")
    assert doctor.triton_finding([V100, H200]).status == "ok"
    assert doctor.triton_finding([V100]).status == "absent" and "sm_80" in doctor.triton_finding([V100]).detail
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    found = doctor.triton_finding([gpu("MI300X", (9, 4), 192)])
    assert found.status == "absent" and found.detail.startswith("3.6.0, but AMD GPUs are not supported yet")
    assert "sm_80" in doctor.triton_finding([]).detail
    assert "built for ROCm 6.4.2" in machine.torch_finding().detail
    monkeypatch.setattr(doctor, "installed_version", lambda module: None)
    assert doctor.triton_finding([H200]).detail == "not installed"


def test_a_backend_that_cannot_run_says_why():
    runs, cannot = doctor.backend_findings("cpu", {"sdpa": None, "triton": "needs sm_80, this is sm_70"})
    assert (runs.subject, runs.status) == ("attention sdpa on cpu", "ok") and "agrees with plain torch" in runs.detail
    assert (cannot.status, cannot.detail) == ("absent", "needs sm_80, this is sm_70")


def test_a_backend_that_breaks_or_is_wrong_is_a_problem(monkeypatch):
    (broken,) = doctor.backend_findings("meta", {"sdpa": None})
    assert broken.status == "problem" and "does not run: backend 'sdpa' cannot run here" in broken.detail
    monkeypatch.setattr(doctor, "two_stream_agreement", lambda *_: Agreement(outputs=0.5, gradients=7.0))
    (wrong,) = doctor.backend_findings("cpu", {"sdpa": None})
    assert wrong.status == "problem" and "disagrees" in wrong.detail and "7.00 (gradients)" in wrong.detail
    assert "another than sdpa" in wrong.advice


def test_auto_says_what_it_takes_and_why(monkeypatch):
    assert doctor.auto_finding("cpu").detail == "takes sdpa in float32: the kernels are for CUDA devices"
    monkeypatch.setattr(doctor, "explain_auto", lambda device, dtype: ("cuda", f"{device} in {dtype}"))
    finding = doctor.auto_finding("cuda:1")
    assert finding.subject == "attention auto on cuda:1"
    assert finding.detail == "takes cuda in float16: cuda:1 in torch.float16"


def test_no_gpu_says_whose_fault_it_is(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in machine.no_gpu_finding().detail

    said = "Found no NVIDIA driver on your system. Please check many things\nat length"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=RuntimeError(said)))
    assert machine.no_gpu_finding().detail == "Found no NVIDIA driver on your system"


def test_an_old_torch_is_a_problem(monkeypatch):
    assert machine.torch_finding().status == "ok"
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert machine.torch_finding().status == "problem" and "2.11" in machine.torch_finding().advice


def test_the_compiler_is_asked_for_its_version(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.compiler_finding().status == "absent"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/opt/cuda/bin/nvcc")
    answer = subprocess.CompletedProcess([], 0, "nvcc\nCuda compilation tools, release 13.0, V13.0.88\n", "")
    monkeypatch.setattr(doctor.subprocess, "run", mock.Mock(side_effect=[answer, *[OSError("Exec format error")] * 2]))
    assert doctor.compiler_finding().detail == "Cuda compilation tools, release 13.0, V13.0.88 (/opt/cuda/bin/nvcc)"
    assert doctor.compiler_finding().status == "problem" and "Exec format error" in doctor.compiler_finding().detail


def test_a_whole_cache_is_ok_and_a_damaged_one_is_a_problem(monkeypatch, tmp_path):
    class Cache(list):
        image_size, grid, vocabulary, tokenizer = 32, 4, 512, "pixel"
        verify = mock.Mock(side_effect=[None, DataError("images_00000.npy does not match its SHA-256")])

    monkeypatch.setattr(TokenCache, "open", lambda path: Cache(range(1797)))
    found = doctor.cache_finding(tmp_path)
    assert found.status == "ok" and "1797 images of 32 x 32, 16 tokens of 512 by pixel" in found.detail
    assert doctor.cache_finding(tmp_path) == Finding("cache", "problem", "images_00000.npy does not match its SHA-256")


def test_every_checkpoint_of_a_run_is_checked(tmp_path):
    store = CheckpointStore(tmp_path / FOLDER, keep=3)
    state = CheckpointState(task={"weight": torch.ones(4)}, trainer={"step": 1}, config=to_dict(RunConfig()))
    for step in (9, 10):
        store.save(step, state)
    weights = store.path(9) / "task.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    found = by_subject(doctor.run_findings(tmp_path))
    assert list(found) == ["run, step 9", "run, step 10"]
    assert found["run, step 9"].status == "problem" and "task.safetensors" in found["run, step 9"].detail
    assert found["run, step 10"].status == "ok"
