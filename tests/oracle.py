"""MIR written down once more from its definition, in NumPy and SciPy float64."""

import numpy as np
import scipy.linalg


def covariance(tokens):
    centred = tokens - tokens.mean(axis=0)
    return centred.T @ centred / (len(tokens) - 1)


def frechet_distance(mean_x, cov_x, mean_y, cov_y):
    root = scipy.linalg.sqrtm(cov_x @ cov_y)
    return ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * np.trace(root.real)


def token_frechet_distance(x, y):
    """From the tokens themselves: exact at any rank, where sqrtm of a singular product is not."""
    centred_x = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    centred_y = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
    # QR first: the singular values of X Y^T are those of R_x R_y^T, of size d.
    factor_x, factor_y = (np.linalg.qr(c, mode="r") if len(c) > c.shape[1] else c for c in (centred_x, centred_y))
    cross = np.linalg.svd(factor_x @ factor_y.T, compute_uv=False).sum()
    gap = (centred_x**2).sum() + (centred_y**2).sum() - 2 * cross
    return ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + gap


def lower_median(values, axis=0):
    return np.sort(values, axis=axis).take((values.shape[axis] - 1) // 2, axis=axis)


def outliers(tokens, variant="paper"):
    norms = np.linalg.norm(tokens, axis=1)
    offsets = np.abs(norms - lower_median(norms))
    sigma = norms.std(ddof=1)
    if variant == "robust" and (deviation := lower_median(offsets)) > 0:
        sigma = max(1.4826 * deviation, 0.02 * lower_median(norms))
    return offsets > 3 * sigma


def mir_layers(vision, text, variant="paper"):
    distances = []
    for v, t in zip(vision, text, strict=True):
        v, t = (np.asarray(x, dtype=np.float64) for x in (v, t))
        alpha = len(t) / np.linalg.norm(t, axis=1).sum()
        cleaned = []
        for tokens in (v, t):
            tokens = alpha * tokens
            bad = outliers(tokens, variant)
            replaced = np.where(bad[:, None], lower_median(tokens), tokens)
            cleaned.append(replaced if variant.startswith("official") else tokens[~bad])
        distances.append(token_frechet_distance(*cleaned))
    return np.array(distances)


def mir(vision, text, variant="paper"):
    return np.log10(mir_layers(vision, text, variant).sum())
