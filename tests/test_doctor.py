"""What the doctor finds, on this machine and on machines described to it."""

from __future__ import annotations

import subprocess

import pytest
import torch
from rich.console import Console

from mapet import doctor as doctor_module
from mapet.config import RunConfig, to_dict
from mapet.data.cache import TokenCache
from mapet.doctor import (
    Finding,
    Gpu,
    as_table,
    auto_finding,
    backend_findings,
    compiler_finding,
    doctor,
    doctor_report,
    gpu_finding,
    installed_version,
    machine_lines,
    memory_limit,
    no_gpu_finding,
    package_finding,
    run_findings,
    torch_finding,
    triton_finding,
)
from mapet.errors import DataError
from mapet.training.checkpoint import FOLDER, CheckpointState, CheckpointStore
from mapet_kernels.backends import available_backends
from mapet_kernels.selfcheck import Agreement

V100, H200 = Gpu("V100", (7, 0), 16 << 30), Gpu("H200", (9, 0), 141 << 30)


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_the_report_covers_every_subject_and_never_raises():
    found = by_subject(doctor_report())
    assert {"Python", "torch", "processor", "memory", "triton", "nvcc"} <= found.keys()
    assert {"xformers", "flash-attn", "faiss", "nvtx", "wandb", "trackio"} <= found.keys()
    assert {f"attention {name} on cpu" for name in (*available_backends("cpu"), "auto")} <= found.keys()
    assert found["torch"].status == "ok" and torch.__version__ in found["torch"].detail
    assert any(subject.startswith("GPU") for subject in found)
    assert all(finding.detail for finding in found.values())


def test_doctor_prints_every_finding_and_exits_1_for_problems(tmp_path):
    console = Console(record=True, width=200)
    assert doctor(cache=tmp_path / "no[bold]cache", run=tmp_path / "none", console=console) == 1
    text = console.export_text()
    assert "no[bold]cache" in text, "a path is text, not markup"
    assert "holds no checkpoint" in text and "attention reference on cpu" in text and "problem" in text


def test_a_gpu_is_described_by_what_it_can_do():
    assert "bf16" in gpu_finding(0, H200).detail and not gpu_finding(0, H200).advice
    assert "fp16" in gpu_finding(1, V100).detail and "bf16" not in gpu_finding(1, V100).detail
    assert gpu_finding(0, H200).detail.endswith("auto takes bf16") and gpu_finding(1, V100).detail.endswith("fp16")
    assert gpu_finding(1, V100).advice == "bf16 is emulated: set train.precision fp16, or auto"
    assert "gain nothing" in gpu_finding(2, Gpu("P40", (6, 1), 24 << 30)).advice
    assert gpu_finding(0, H200).subject == "GPU 0" and "sm_90, 141 GiB" in gpu_finding(0, H200).detail


def test_triton_needs_an_ampere_gpu(monkeypatch):
    monkeypatch.setattr(doctor_module, "installed_version", lambda *names: "3.6.0")
    assert triton_finding([V100, H200]).status == "ok"
    assert triton_finding([V100]).status == "absent" and "sm_80" in triton_finding([V100]).detail
    monkeypatch.setattr(doctor_module, "installed_version", lambda *names: None)
    assert triton_finding([H200]).detail == "not installed"


def test_an_amd_gpu_is_told_that_the_kernels_do_not_run_on_it(monkeypatch):
    monkeypatch.setattr(doctor_module, "installed_version", lambda *names: "3.6.0")
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    found = triton_finding([Gpu("MI300X", (9, 4), 192 << 30)])
    assert found.status == "absent" and found.detail.startswith("3.6.0, but AMD GPUs are not supported yet")
    assert "sm_80" in triton_finding([]).detail
    assert "built for ROCm 6.4.2" in torch_finding().detail


def test_a_backend_that_cannot_run_says_why():
    runs, cannot = backend_findings("cpu", {"sdpa": None, "triton": "needs sm_80, this is sm_70"})
    assert (runs.subject, runs.status) == ("attention sdpa on cpu", "ok") and "agrees with plain torch" in runs.detail
    assert (cannot.status, cannot.detail) == ("absent", "needs sm_80, this is sm_70")


def test_a_backend_that_breaks_or_is_wrong_is_a_problem(monkeypatch):
    (broken,) = backend_findings("meta", {"sdpa": None})
    assert broken.status == "problem" and "does not run: backend 'sdpa' cannot run here" in broken.detail
    monkeypatch.setattr(doctor_module, "two_stream_agreement", lambda *_: Agreement(outputs=0.5, gradients=7.0))
    (wrong,) = backend_findings("cpu", {"sdpa": None})
    assert wrong.status == "problem" and "disagrees" in wrong.detail and "7.00 (gradients)" in wrong.detail
    assert "another than sdpa" in wrong.advice


def test_auto_says_what_it_takes_and_why(monkeypatch):
    assert auto_finding("cpu").detail == "takes sdpa in float32: the kernels are for CUDA devices"
    monkeypatch.setattr(doctor_module, "explain_auto", lambda device, dtype: ("cuda", f"{device} in {dtype}"))
    finding = auto_finding("cuda:1")
    assert finding.subject == "attention auto on cuda:1"
    assert finding.detail == "takes cuda in float16: cuda:1 in torch.float16"


def test_no_gpu_says_whose_fault_it_is(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in no_gpu_finding().detail

    def no_driver():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check many things\nat length")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert no_gpu_finding().detail == "Found no NVIDIA driver on your system"


def test_an_old_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert torch_finding().status == "problem" and "2.11" in torch_finding().advice
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    assert torch_finding().status == "ok"


def test_packages_are_found_by_module_without_importing_them():
    assert installed_version("timm", "timm")
    assert installed_version("scikit-learn", "sklearn")
    assert installed_version("no-such-thing", "no_such_thing") is None
    missing = package_finding("no-such-thing", "no_such_thing", "nothing at all")
    assert (missing.status, missing.detail) == ("absent", "not installed; nothing at all")


def test_the_compiler_is_asked_for_its_version(monkeypatch):
    monkeypatch.setattr(doctor_module.shutil, "which", lambda name: None)
    assert compiler_finding().status == "absent"
    monkeypatch.setattr(doctor_module.shutil, "which", lambda name: "/opt/cuda/bin/nvcc")
    answer = subprocess.CompletedProcess([], 0, "nvcc\nCuda compilation tools, release 13.0, V13.0.88\n", "")
    monkeypatch.setattr(doctor_module.subprocess, "run", lambda *args, **options: answer)
    assert compiler_finding().detail == "Cuda compilation tools, release 13.0, V13.0.88 (/opt/cuda/bin/nvcc)"

    def broken(*args, **options):
        raise OSError("Exec format error")

    monkeypatch.setattr(doctor_module.subprocess, "run", broken)
    assert compiler_finding().status == "problem" and "Exec format error" in compiler_finding().detail


def test_memory_is_a_plausible_number():
    assert 2**28 < memory_limit() < 2**45


def test_a_whole_cache_is_ok_and_a_damaged_one_is_a_problem(monkeypatch, tmp_path):
    class Whole:
        image_size, grid, vocabulary, tokenizer = 32, 4, 512, "pixel"

        def __len__(self):
            return 1797

        def verify(self):
            pass

    monkeypatch.setattr(TokenCache, "open", lambda path: Whole())
    found = by_subject(doctor_report(cache=tmp_path))["cache"]
    assert found.status == "ok" and "1797 images of 32 x 32, 16 tokens of 512 by pixel" in found.detail

    def damaged(self):
        raise DataError("images_00000.npy does not match its SHA-256")

    monkeypatch.setattr(Whole, "verify", damaged)
    found = by_subject(doctor_report(cache=tmp_path))["cache"]
    assert (found.status, found.detail) == ("problem", "images_00000.npy does not match its SHA-256")


def test_every_checkpoint_of_a_run_is_checked(tmp_path):
    store = CheckpointStore(tmp_path / FOLDER, keep=3)
    state = CheckpointState(model={"weight": torch.ones(4)}, trainer={"step": 1}, config=to_dict(RunConfig()))
    for step in (9, 10):
        store.save(step, state)
    weights = store.path(9) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    found = by_subject(run_findings(tmp_path))
    assert list(found) == ["run, step 9", "run, step 10"]
    assert found["run, step 9"].status == "problem" and "model.safetensors" in found["run, step 9"].detail
    assert found["run, step 10"].status == "ok"


def test_machine_lines_are_for_a_report():
    findings = [Finding("torch", "ok", "2.14"), Finding("xformers", "absent", "no"), Finding("GPU 0", "ok", "H200")]
    assert machine_lines(findings) == ("torch: 2.14", "GPU 0: H200")


@pytest.mark.parametrize("status", ["ok", "absent", "problem"])
def test_a_status_without_advice_makes_one_line(status):
    assert as_table([Finding("a", status, "b")]).row_count == 1
