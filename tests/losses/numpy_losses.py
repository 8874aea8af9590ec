"""The formulas of the losses, written out in NumPy and SciPy, float64, one value per sample."""

import numpy as np
from scipy import special, stats


def standardized(z):
    return (z - z.mean(-1, keepdims=True)) / (1e-7 + z.std(-1, ddof=1, keepdims=True))


def soft_targets(t, s, temperature=1.0):
    p = special.softmax(t / temperature, -1)
    log_q = special.log_softmax(s / temperature, -1)
    return temperature**2 * (special.xlogy(p, p) - p * log_q).sum(-1)


def binary_soft_targets(t, s, temperature=1.0):
    p, q = special.expit(t / temperature), special.expit(s / temperature)
    return temperature**2 * (special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)).sum(-1)


def logit_mse(t, s, temperature=1.0):
    return (((t - s) / temperature) ** 2).mean(-1)


def logit_huber(t, s, temperature=1.0, delta=1.0):
    return special.huber(delta, (t - s) / temperature).mean(-1)


def hint(t, s):
    squared = (t - s) ** 2
    return squared.mean(-1) if t.ndim == 3 else squared.reshape(len(t), -1).mean(-1)


def reverse_kl(t, s, temperature=1.0):
    return soft_targets(s, t, temperature) / temperature**2


def jensen_shannon(t, s, temperature=1.0, beta=0.5):
    p, q = special.softmax(t / temperature, -1), special.softmax(s / temperature, -1)
    m = beta * p + (1 - beta) * q
    return (beta * special.rel_entr(p, m) + (1 - beta) * special.rel_entr(q, m)).sum(-1)


def total_variation(t, s, temperature=1.0):
    p, q = special.softmax(t / temperature, -1), special.softmax(s / temperature, -1)
    return temperature**2 * abs(p - q).sum(-1) / 2


def decoupled_kd(t, s, labels, temperature=1.0, alpha=1.0, beta=8.0):
    labels = labels.argmax(-1) if labels.ndim == t.ndim else labels
    values = np.zeros(t.shape[:-1])
    for row in np.ndindex(*values.shape):
        y, z_t, z_s = labels[row], t[row] / temperature, s[row] / temperature
        p, q = special.softmax(z_t), special.softmax(z_s)
        target = special.rel_entr([p[y], 1 - p[y]], [q[y], 1 - q[y]]).sum()
        p_hat = special.softmax(np.delete(z_t, y))
        q_hat = special.softmax(np.delete(z_s, y))
        values[row] = alpha * target + beta * special.rel_entr(p_hat, q_hat).sum()
    return temperature**2 * values


def dist(t, s, temperature=1.0, beta=1.0, gamma=1.0):
    p, q = special.softmax(t / temperature, -1), special.softmax(s / temperature, -1)
    rows = np.zeros(t.shape[:-1])
    for row in np.ndindex(*rows.shape):
        rows[row] = stats.pearsonr(p[row], q[row])[0]
    flat_p, flat_q = p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1])
    columns = [stats.pearsonr(a, b)[0] for a, b in zip(flat_p.T, flat_q.T)]
    return temperature**2 * (beta * (1 - rows) + gamma * (1 - np.mean(columns)))


def flsw_soft_targets(t, s, base=4.0, beta=1.0, gamma=2.0):
    cosine = (t * s).sum(-1) / np.linalg.norm(t, axis=-1) / np.linalg.norm(s, axis=-1)
    w = (1 - cosine) ** gamma
    return soft_targets_each(t, s, base + beta * (w.mean() - w))


def cwsm_soft_targets(t, s, base=4.0, beta=1.0):
    w = 1 / (special.softmax(s, -1).max(-1) + 1e-3)
    return soft_targets_each(t, s, base + beta * (w.mean() - w))


def soft_targets_each(t, s, temperatures):
    values = np.zeros(t.shape[:-1])
    for row in np.ndindex(*values.shape):
        values[row] = soft_targets(t[row], s[row], max(temperatures[row], 0.5))
    return values
