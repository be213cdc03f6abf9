"""Export to timm: the same features, no tensor lost or invented, nothing half-written."""

from __future__ import annotations

import argparse
import json
import pickle

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import mapet.model.export as export_module
from mapet.config import ModelConfig
from mapet.errors import CheckpointError, ConfigError, MapetError, WeightsMissingError
from mapet.model.export import TOLERANCE, content_stream, export, from_timm, to_timm
from mapet.model.official_names import (
    backbone_shapes,
    fuse_qkv,
    infer_model_config,
    load_released,
    pretraining_shapes,
    split_qkv,
)

SMALL = ModelConfig(image_size=32, patch_size=8, width=48, depth=3, heads=3, vocabulary=64)


def random_weights(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def classifier_weights(model, classes=7, norm="fc_norm"):
    names = {f"{norm}.weight": None, "head.weight": torch.ones(classes, model.width), "blocks.0.ls1.gamma": None}
    return random_weights(backbone_shapes(model, names))


@pytest.mark.parametrize("size, parameters", [("tiny", 7_110_272), ("small", 24_829_184), ("base", 92_117_504)])
def test_the_shapes_have_the_official_sizes(size, parameters):
    shapes = pretraining_shapes(ModelConfig.preset(size))
    assert len(shapes) == 201
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


@pytest.mark.parametrize("class_token, global_pool", [(True, "avg"), (True, "token"), (False, "avg")])
def test_exported_folder_gives_the_features_of_the_official_forward(tmp_path, class_token, global_pool):
    model = ModelConfig(
        image_size=40, patch_size=8, width=48, depth=3, heads=4, mlp_ratio=2.5, vocabulary=64, class_token=class_token
    )
    weights = random_weights(pretraining_shapes(model))
    report = export(model, weights, tmp_path / "model", name="test", global_pool=global_pool)
    vit = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    pixels = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        wanted = content_stream(model, weights, pixels)
        pooled = wanted[:, 0] if global_pool == "token" else wanted[:, int(class_token) :].mean(1)
        torch.testing.assert_close(vit.forward_features(pixels), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vit(pixels), pooled, rtol=1e-4, atol=1e-4)
    assert 0 <= report.largest_difference <= TOLERANCE
    assert set(report.dropped) == {"mask_positional_token", "decoder.weight", "decoder.bias"}
    assert report.parameters == sum(p.numel() for p in vit.parameters())


def test_config_json_holds_what_timm_needs(tmp_path):
    export(SMALL, random_weights(pretraining_shapes(SMALL)), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert timm.is_model(config["architecture"])
    assert cfg["input_size"] == [3, 32, 32] and cfg["num_classes"] == 0
    assert cfg["interpolation"] == "bicubic" and cfg["crop_pct"] == 0.9
    assert cfg["mean"] == [0.485, 0.456, 0.406] and cfg["std"] == [0.229, 0.224, 0.225]
    vit = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert timm.data.resolve_data_config({}, model=vit)["input_size"] == (3, 32, 32)


def test_exported_folder_takes_a_new_classifier(tmp_path):
    weights = random_weights(pretraining_shapes(SMALL))
    export(SMALL, weights, tmp_path / "model")
    vit = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=10)
    assert vit.head.weight.shape == (10, 48)
    assert torch.equal(vit.state_dict()["blocks.2.mlp.fc1.weight"], weights["blocks.2.mlp.fc1.weight"])


def test_names_survive_both_ways():
    weights = random_weights(pretraining_shapes(SMALL))
    model, back = from_timm(to_timm(SMALL, weights))
    kept = {n: t for n, t in weights.items() if n not in ("mask_positional_token", "decoder.weight", "decoder.bias")}
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[name], kept[name]) for name in kept)
    assert (model.image_size, model.patch_size, model.width, model.depth, model.heads) == (32, 8, 48, 3, 3)
    assert split_qkv(fuse_qkv(kept)).keys() == kept.keys()


def test_fused_rows_are_q_then_k_then_v():
    weights = random_weights(pretraining_shapes(SMALL))
    fused = fuse_qkv(weights)["blocks.1.attn.qkv.weight"]
    assert torch.equal(fused[:48], weights["blocks.1.attn.q.weight"])
    assert torch.equal(fused[48:], weights["blocks.1.attn.kv.weight"])


def test_a_timm_model_without_layer_scale_comes_back():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    model, weights = from_timm(vit)
    assert model.layer_scale == 0.0 and "blocks.0.ls1.gamma" not in weights
    pixels = torch.randn(1, 3, 32, 32)
    again = to_timm(model, weights, global_pool="token")
    assert torch.equal(again(pixels), vit.eval()(pixels))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda w: w.pop("blocks.1.attn.kv.bias"), "1 missing: blocks.1.attn.kv.bias"),
        (lambda w: w.update({"blocks.9.norm1.weight": torch.ones(48)}), "not used by this model: blocks.9.norm1"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 10, 48)}), r"pos_embed is \(1, 10, 48\), must be \(1, 17"),
        (lambda w: w["norm.bias"].fill_(float("nan")), "NaN or infinity: norm.bias"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(tmp_path, change, named):
    weights = random_weights(pretraining_shapes(SMALL))
    change(weights)
    with pytest.raises(CheckpointError, match=named):
        export(SMALL, weights, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_mapping_is_caught_by_the_numbers(tmp_path, monkeypatch):
    # k and v swapped: every name and shape is right, and tensors are compared in the same wrong order.
    def swapped(state):
        out = fuse_qkv(state)
        for name in [n for n in out if ".qkv." in n]:
            q, k, v = out[name].chunk(3)
            out[name] = torch.cat([q, v, k])
        return out

    def unswapped(state):
        out = split_qkv(state)
        for name in [n for n in out if ".kv." in n]:
            v, k = out[name].chunk(2)
            out[name] = torch.cat([k, v])
        return out

    monkeypatch.setattr(export_module, "fuse_qkv", swapped)
    monkeypatch.setattr(export_module, "split_qkv", unswapped)
    with pytest.raises(CheckpointError, match="features differ"):
        export(SMALL, random_weights(pretraining_shapes(SMALL)), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_timm_does_not_take_is_named(tmp_path, monkeypatch):
    create = timm.create_model

    def forgetful(*args, **kwargs):
        vit = create(*args, **kwargs)
        with torch.no_grad():
            vit.blocks[1].ls2.gamma.fill_(0.1)
        return vit

    monkeypatch.setattr(export_module.timm, "create_model", forgetful)
    with pytest.raises(CheckpointError, match=r"did not load these tensors .*: blocks\.1\.ls2\.gamma$"):
        export(SMALL, random_weights(pretraining_shapes(SMALL)), tmp_path / "model")


def test_an_earlier_export_is_replaced_and_other_things_are_not(tmp_path):
    folder = tmp_path / "model"
    export(SMALL, random_weights(pretraining_shapes(SMALL), seed=0), folder)
    second = random_weights(pretraining_shapes(SMALL), seed=1)
    export(SMALL, second, folder)
    assert torch.equal(load_file(folder / "model.safetensors")["norm.weight"], second["norm.weight"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        export(SMALL, second, folder)
    assert (folder / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_the_earlier_export(tmp_path, monkeypatch, error):
    folder = tmp_path / "model"
    export(SMALL, random_weights(pretraining_shapes(SMALL), seed=0), folder)
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(export_module, "save_file", full)
    with pytest.raises(MapetError, match="No space left"):
        export(SMALL, random_weights(pretraining_shapes(SMALL), seed=1), folder)
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_half_precision_weights_are_exported_in_float32(tmp_path):
    weights = {name: t.to(torch.bfloat16) for name, t in random_weights(pretraining_shapes(SMALL)).items()}
    export(SMALL, weights, tmp_path / "model")
    assert {t.dtype for t in load_file(tmp_path / "model/model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    "changes, pool, words",
    [
        ({"class_token": False}, "token", "needs a class token"),
        ({"norm_eps": 1e-5}, "avg", "norm eps"),
        ({}, "max", "global_pool is"),
    ],
)
def test_what_timm_cannot_say_is_refused(changes, pool, words):
    model = ModelConfig(**{**{"image_size": 32, "patch_size": 8, "width": 48, "depth": 1, "heads": 3}, **changes})
    with pytest.raises(ConfigError, match=words):
        to_timm(model, random_weights(pretraining_shapes(model)), global_pool=pool)


@pytest.mark.parametrize("norm, pool", [("fc_norm", "avg"), ("norm", "token")])
def test_a_released_classifier_is_read_and_exported(tmp_path, norm, pool):
    model = ModelConfig(image_size=32, patch_size=8, width=128, depth=2, heads=2)
    weights = classifier_weights(model, norm=norm)
    saved = {
        "epoch": 99,
        "arch": "vit_standard_tiny_patch16_224",
        "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "version": 2,
        "args": argparse.Namespace(model="vit_standard_tiny_patch16_224", lr=1e-3, gp="avg"),
        "amp_scaler": {"scale": 65536.0},
        "metric": 75.5,
    }
    torch.save(saved, tmp_path / "vit.tar")
    inferred, loaded = load_released(tmp_path / "vit.tar")
    assert inferred == model
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    report = export(inferred, loaded, tmp_path / "model", global_pool=pool)
    vit = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert vit.num_classes == 7 and torch.equal(vit.head.weight, weights["head.weight"])
    assert report.dropped == ()


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_a_checkpoint_with_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"state_dict": {}, "args": Hostile()}, tmp_path / "bad.tar")
    with pytest.raises(CheckpointError, match=r"bad\.tar is damaged, or holds more than weights"):
        load_released(tmp_path / "bad.tar")
    (tmp_path / "plain.tar").write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(CheckpointError, match=r"plain\.tar"):
        load_released(tmp_path / "plain.tar")


def test_files_that_are_no_checkpoint_are_named(tmp_path):
    with pytest.raises(WeightsMissingError, match=r"no file .*none\.tar"):
        load_released(tmp_path / "none.tar")
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.tar")
    with pytest.raises(CheckpointError, match="no 'state_dict'"):
        load_released(tmp_path / "other.tar")
    with pytest.raises(CheckpointError, match="pos_embed"):
        infer_model_config({"cls_token": torch.ones(1, 1, 8)})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "other.tar").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cut\.tar"):
        load_released(tmp_path / "cut.tar")
