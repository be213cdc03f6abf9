"""What is particular to permuted_embed: which calls it takes, its errors, autocast, indices out of range."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from op_checks import default_device
from torch._subclasses.fake_tensor import FakeTensorMode

from mapet_kernels import permuted_embed
from mapet_kernels.permuted_embed import op
from mapet_kernels.registry import REGISTRY

SPEC = REGISTRY["permuted_embed"]


def arguments(name: str = "small", dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
    """Those of a call of the registry: two images, patches of 4, a class token unless the name says otherwise."""
    case = SPEC.make_case(SPEC.shapes[name], dtype, device)
    return case.inputs | case.options


def embed(**changed) -> torch.Tensor:
    """The call with some arguments changed."""
    return permuted_embed(**arguments() | changed)


PERM = arguments()["perm"]


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        ((1, 3), -1, r"once per image, but image 1 has -1 at rank 3"),
        ((0, 2), 2**40, rf"once per image, but image 0 has {2**40} at rank 2"),
        ((0, 4), int(PERM[0, 1]), rf"once per image, but image 0 has {PERM[0, 1]} at ranks"),
        ((1, [0, 1]), PERM[1, [1, 0]], r"perm\[:, 0\] must be 0, the class token, but image 1 begins with \d+"),
    ],
    ids=["negative", "large", "twice", "class token elsewhere"],
)
def test_what_is_no_permutation_is_refused_with_image_and_value(at: tuple, value: object, text: str) -> None:
    perm = PERM.clone()
    perm[at] = value
    with pytest.raises(ValueError, match=text):
        embed(perm=perm)


def test_values_are_not_read_where_there_are_none() -> None:
    """Under torch.compile and on fake tensors the shapes alone are checked."""
    rows = len(embed())
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {key: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for key, x in arguments().items()}
    with mode:
        assert permuted_embed(**fake).shape == (rows, fake["weight"].shape[0])
    compiled = torch.compile(lambda **given: permuted_embed(**given), fullgraph=True, backend="eager")
    assert torch.equal(compiled(**arguments()), embed())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_permutations_of_other_integers(dtype: torch.dtype) -> None:
    assert torch.equal(embed(perm=PERM.to(dtype)), embed())


def test_parameters_as_timm_keeps_them() -> None:
    """(1, N, D) positions and (1, 1, D) tokens give the same buffer, and gradients of their own shapes."""
    given = {name: arguments()[name] for name in ("pos_embed", "mask_token", "class_token")}
    leaves = {name: x.view(1, *((1,) * (x.dim() == 1)), *x.shape).clone().requires_grad_() for name, x in given.items()}
    assert leaves["pos_embed"].dim() == leaves["class_token"].dim() == 3
    out = embed(**leaves)
    assert torch.equal(out, embed())
    out.sum().backward()
    assert all(x.grad.shape == x.shape and x.grad.abs().sum() > 0 for x in leaves.values())


def test_mean_and_std_as_numbers() -> None:
    """Whatever torch's default device."""
    given = {"mean": (0.485, 0.456, 0.406), "std": [0.229, 0.224, 0.225]}
    expected, others = embed(**{name: torch.tensor(x) for name, x in given.items()}), arguments() | given
    with default_device("meta"):
        assert torch.equal(permuted_embed(**others), expected)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"mean": (0.5, 0.5)}, ValueError, r"mean must be \(3,\) for these images and weights, got \(2,\)"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.0, 1.0, 1.0)}, ValueError, r"std must be > 0, got \[0.0, 1.0, 1.0\]"),
        ({"mean": 0.5}, TypeError, r"mean must be a torch.Tensor, got float"),
        ({"std": None}, ValueError, "give both mean and std, or neither"),
        ({"images": np.zeros((2, 3, 8, 8))}, TypeError, r"images must be a torch.Tensor, got numpy.ndarray"),
        ({"perm": [[0, 1]]}, TypeError, r"perm must be a torch.Tensor, got list"),
        ({"images": torch.zeros(2, 3, 16, 16).int()}, TypeError, r"images must be uint8 or floating point"),
        ({"cut": 4.0}, TypeError, r"cut must be an int, got float 4.0"),
        ({"cut": 0}, ValueError, r"cut must be in \[1, N - 1\] = \[1, \d+\], got 0"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \(\d+,\) for these images and weights, got \(3,\)"),
        ({"bias": arguments()["bias"].half()}, TypeError, r"weight, bias must share one floating-point dtype"),
        ({"mask_token": arguments()["mask_token"].half()}, TypeError, r"pos_embed, mask_token, class_token must share"),
        ({"perm": PERM.float()}, TypeError, r"perm must be integers, got torch.float32"),
        ({"perm": PERM.to("meta")}, ValueError, r"perm is on meta and images on cpu; put all on one d"),
        ({"weight": arguments()["weight"].to("meta")}, ValueError, r"weight.* must be on one device"),
        ({"mean": arguments()["mean"].to("meta")}, ValueError, r"mean is on meta and images on cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_calls_that_do_not_fit_are_told_why(changed: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        embed(**changed)


def test_autocast_makes_patches_in_its_dtype_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the bits are those of patches that are made in float32 and cast."""
    given = arguments()
    made, patches_op = [], op.permuted_patches_op
    monkeypatch.setattr(op, "permuted_patches_op", lambda *a: made.append(patches_op(*a)) or made[-1])
    with torch.autocast("cpu", torch.bfloat16):
        out = permuted_embed(**given)
    assert made[0].dtype == torch.bfloat16 and out.dtype == torch.float32
    monkeypatch.setattr(op, "permuted_patches_op", patches_op)
    monkeypatch.setattr(op, "autocast_dtype", lambda weight: weight.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(permuted_embed(**given), out)


def test_sizes_that_change_from_step_to_step_compile_nothing_again() -> None:
    """Another cut or batch is another number to the kernels, not another kernel."""
    pytest.importorskip("triton")
    kernel = importlib.import_module("mapet_kernels.permuted_embed.kernel")
    changing = {"B", "N", "R", "GRID", "RANKS", "CUT", "CONTENT_ROWS"}
    for function in (
        kernel.permuted_patches_kernel, kernel.assemble_kernel, kernel.assemble_position_gradient_kernel
    ):  # fmt: skip
        specialised = {parameter.name for parameter in function.params if not parameter.do_not_specialize}
        assert not specialised & changing
