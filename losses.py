"""The losses of CLAN, Eq. 2 to 5 of the paper, as four pure functions.

Each takes tensors and floats and returns a tensor. Each needs only `torch` and can be copied by
itself. Each works on any device and for any batch size, and computes in float32 or wider for every
input type.

    loss = segmentation_loss(logits_1 + logits_2, labels)                    # Eq. 3
    weight = 40 * discrepancy_map(p1, p2) + 0.4                # Eq. 5, p1 and p2 of the target
    loss = loss + 0.001 * adversarial_loss(d_logits, is_source=True, weight=weight)

d_logits is D's answer to the target's prediction, resized to the weight's grid.

Shapes: B images, C classes, H W pixels.
"""

import torch


def segmentation_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, gamma: float = 0.0, ignore_index: int = 255
) -> torch.Tensor:
    """Cross-entropy (Eq. 3), averaged over the labelled pixels.

    logits: B C H W, unnormalised. labels: B H W int64, 0 to C-1, or `ignore_index`.
    gamma: 0 for Eq. 3. Above 0 it gives the focal form of the released code, -(1 - p)^gamma log p
        with p clamped to [1e-9, 1 - 1e-9] (the released code has gamma = 2).
    Returns a scalar >= 0 in nats. If no pixel is labelled, it is 0 and its gradient is zero.
    Raises ValueError if logits and labels are not on the same grid.
    """
    if logits.shape[:1] + logits.shape[2:] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} must be B C H W and labels {tuple(labels.shape)} B H W "
            "on the same grid: resize the logits to the labels first"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(dtype).log_softmax(dim=1)  # B C H W
    # Eq. 3: -log p_iy, B H W, and 0 where there is no label
    nll_loss = torch.nn.functional.nll_loss
    loss = nll_loss(log_p, labels, ignore_index=ignore_index, reduction="none")
    if gamma > 0:
        not_p = (-(-loss).expm1()).clamp(min=1e-9)  # 1 - p without cancellation
        loss = not_p**gamma * loss.clamp(max=20.723265836946414)  # -log 1e-9
    return loss.sum() / (labels != ignore_index).sum().clamp(min=1)


def weight_discrepancy(
    weights_1: list[torch.Tensor] | tuple[torch.Tensor, ...],
    weights_2: list[torch.Tensor] | tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Cosine of the angle between the two classifiers' weights (Eq. 4).

    weights_1, weights_2: sequences of tensors of any shape, in the same order and of equal sizes.
        Flattened and joined, they are the vectors w1 and w2.
    Returns a scalar in [-1, 1]. It is 0 if w1 or w2 is zero. Minimising it drives the two apart.
    Raises ValueError if the two vectors differ in length.
    """
    w1 = torch.cat([w.flatten() for w in weights_1])
    w2 = torch.cat([w.flatten() for w in weights_2])
    if w1.shape != w2.shape:
        raise ValueError(f"the classifiers differ in size: {w1.numel()} and {w2.numel()} weights")
    dtype = torch.promote_types(w1.dtype, torch.float32)
    w1, w2 = w1.to(dtype), w2.to(dtype)
    n1, n2 = w1.norm(), w2.norm()
    u1, u2 = w1 / n1.where(n1 > 0, 1), w2 / n2.where(n2 > 0, 1)
    return (u1 * u2).sum().clamp(-1, 1)  # Eq. 4; autocast would round a matmul


def discrepancy_map(p1: torch.Tensor, p2: torch.Tensor) -> torch.Tensor:
    """M(p1, p2), the cosine distance of two predictions at each pixel (Section 3.2, Eq. 5).

    p1, p2: B C H W, probabilities over C (>= 0), e.g. the softmax of each classifier's logits.
    Returns B 1 H W in [0, 1], float32 at least: 0 where they agree, 1 where they are orthogonal.
    Raises ValueError if the shapes differ.
    """
    if p1.shape != p2.shape:
        raise ValueError(f"the predictions differ in shape: {tuple(p1.shape)}, {tuple(p2.shape)}")
    dtype = torch.promote_types(p1.dtype, torch.float32)
    p1, p2 = p1.to(dtype), p2.to(dtype)
    # Squares and one rsqrt per pixel take half the time of norm() and a division.
    n1, n2 = p1.square().sum(dim=1, keepdim=True), p2.square().sum(dim=1, keepdim=True)
    u1, u2 = p1 * n1.where(n1 > 0, 1).rsqrt(), p2 * n2.where(n2 > 0, 1).rsqrt()
    # 1 - cos(p1, p2) = |u1 - u2|^2 / 2. This form is exact where p1 and p2 nearly agree.
    m = (u1 - u2).square().sum(dim=1, keepdim=True) / 2  # B 1 H W
    return m.clamp(max=1)


def adversarial_loss(
    d_logits: torch.Tensor, is_source: bool, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary cross-entropy of D's domain decision: a term of Eq. 2, or of Eq. 5 with `weight`.

    d_logits: B 1 H W; sigmoid(d_logits) is D's probability of *source* (the paper's convention;
        the released code has it the other way round, which is symmetric).
    is_source: the domain that this loss wants D to answer. G's loss passes True for target images.
    weight: B 1 H W, lambda_local * M + eps (Eq. 5); None counts every pixel once (Eq. 2).
    Returns a scalar, the mean over all pixels; finite for logits of any size.
    Raises ValueError if weight and d_logits differ in shape.
    """
    if weight is not None and weight.shape != d_logits.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} and d_logits {tuple(d_logits.shape)} differ in shape: "
            "resize D's answer to the weight map first"
        )
    d = d_logits.to(torch.promote_types(d_logits.dtype, torch.float32))
    # log D for the source is logsigmoid(d). log(1 - D) for the target is logsigmoid(-d).
    # logsigmoid(x) = -log(1 + e^-x) is finite for every x.
    log_d = torch.nn.functional.logsigmoid(d if is_source else -d)
    loss = -log_d if weight is None else -weight * log_d  # Eq. 2 | Eq. 5
    return loss.mean()
