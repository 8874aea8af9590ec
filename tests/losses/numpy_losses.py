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


def mean_of(formula):
    """The mean over pairs of layers."""
    return lambda teacher, student: np.mean([formula(*pair) for pair in zip(teacher, student)], 0)


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


def flsw_soft_targets(t, s, base=4.0, beta=1.0, gamma=2.0, at=None):
    """`at`: the student's logits of which the temperatures are read, which take no gradient."""
    z = s if at is None else at
    cosine = (t * z).sum(-1) / np.linalg.norm(t, axis=-1) / np.linalg.norm(z, axis=-1)
    w = (1 - cosine) ** gamma
    return soft_targets_each(t, s, base + beta * (w.mean() - w))


def cwsm_soft_targets(t, s, base=4.0, beta=1.0, at=None):
    """`at`: the student's logits of which the temperatures are read, which take no gradient."""
    w = 1 / (special.softmax(s if at is None else at, -1).max(-1) + 1e-3)
    return soft_targets_each(t, s, base + beta * (w.mean() - w))


def soft_targets_each(t, s, temperatures):
    values = np.zeros(t.shape[:-1])
    for row in np.ndindex(*values.shape):
        values[row] = soft_targets(t[row], s[row], max(temperatures[row], 0.5))
    return values


def unit(x, axis=-1):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def rows_of(function):
    """The formula of one sample, for every sample; lists give lists of one sample each."""

    def of_all(t, s):
        count = len(t[0] if isinstance(t, list) else t)
        pick = lambda x, i: [part[i] for part in x] if isinstance(x, list) else x[i]  # noqa: E731
        return np.array([function(pick(t, i), pick(s, i)) for i in range(count)])

    return of_all


def pooled(x, size):
    """Adaptive average of a `(height, width, channels)` map to `(size, size, channels)`."""
    height, width, channels = x.shape
    out = np.zeros((size, size, channels))
    for i in range(size):
        for j in range(size):
            rows = slice(i * height // size, -(-(i + 1) * height // size))
            columns = slice(j * width // size, -(-(j + 1) * width // size))
            out[i, j] = x[rows, columns].mean((0, 1))
    return out


def smaller(t, s):
    size = min(len(t), len(s))
    return pooled(t, size), pooled(s, size)


def attention_transfer(t, s):
    t, s = smaller(t, s)
    a, b = (unit((x**2).mean(-1).ravel()) for x in (t, s))
    return ((a - b) ** 2).mean()


def fsp(t, s):
    def flow(layers):
        first, second = smaller(*layers)
        return np.einsum("hwm,hwn->mn", first, second) / first[..., 0].size

    return ((flow(t) - flow(s)) ** 2).mean()


def nst(t, s):
    t, s = smaller(t, s)
    t, s = (unit(x.reshape(-1, x.shape[-1]), 0).T for x in (t, s))
    kernel = lambda a, b: ((a @ b.T) ** 2).mean()  # noqa: E731
    return kernel(t, t) + kernel(s, s) - 2 * kernel(t, s)


def ickd(t, s):
    def correlation(x):
        maps = x.reshape(-1, x.shape[-1])
        return unit(maps.T @ maps)

    return ((correlation(t) - correlation(s)) ** 2).sum() / t.shape[-1]


def factor_transfer(t, s):
    return abs(unit(t.ravel()) - unit(s.ravel())).mean()


def convolution(x, kernel, bias=0.0):
    """`(batch, height, width, channels)` with zeros around it, stride 1."""
    size = kernel.shape[0]
    around = size // 2
    wide = np.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
    out = 0.0
    for i in range(size):
        for j in range(size):
            out = out + wide[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j]
    return out + bias


def normalization(x, gamma, beta, mean, variance):
    return gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta


def factor_transfer_learned(loss, t, s):
    def network(layer, x):
        weights = layer.get_weights()
        for kernel, bias in zip(weights[::2], weights[1::2]):
            x = convolution(x, kernel, bias)
            x = np.where(x > 0, x, 0.1 * x)
        return x

    encoder, decoder, translator = loss.layers
    factor = network(encoder, t)
    error = ((network(decoder, factor) - t) ** 2).mean((1, 2, 3))
    return (
        rows_of(lambda a, b: factor_transfer(*smaller(a, b)))(factor, network(translator, s))
        + error
    )


def vid(loss, t, s):
    mean, variance = loss.layers
    t, s = (np.array(x) for x in zip(*(smaller(a, b) for a, b in zip(t, s))))
    first, second, third = mean.get_weights()
    mu = np.maximum(np.maximum(s @ first, 0) @ second, 0) @ third
    v = np.log1p(np.exp(variance.get_weights()[0])) + 1e-5
    np.testing.assert_allclose(v, 5.0)
    return -(stats.norm.logpdf(t, mu, np.sqrt(v)) + np.log(2 * np.pi) / 2).mean((1, 2, 3))


def simkd(loss, t, s):
    t, s = (np.array(x) for x in zip(*(smaller(a, b) for a, b in zip(t, s))))
    (projector,) = loss.layers
    weights = projector.get_weights()
    for k in range(0, len(weights), 5):
        s = np.maximum(normalization(convolution(s, weights[k]), *weights[k + 1 : k + 5]), 0)
    return ((s - t) ** 2).mean((1, 2, 3))


def reviewkd(loss, t, s):
    def grown(x, size):
        index = np.arange(size) * x.shape[1] // size
        return x[:, index][:, :, index]

    def pyramid(a, b):
        total, share, value = 1.0, 1.0, ((a - b) ** 2).mean()
        for level in (4, 2, 1):
            if level < len(a):
                share /= 2
                total += share
                value += share * ((pooled(a, level) - pooled(b, level)) ** 2).mean()
        return value / total

    t = [x if x.ndim == 4 else x[:, None, None] for x in t]
    s = [x if x.ndim == 4 else x[:, None, None] for x in s]
    value, deeper = 0.0, None
    for fusion, teacher, student in zip(loss.layers, t[::-1], s[::-1]):
        x = convolution(student, fusion.reduce.get_weights()[0])
        x = normalization(x, *fusion.reduce_norm.get_weights())
        if deeper is not None:
            deeper = grown(deeper, x.shape[1])
            z = convolution(np.concatenate([x, deeper], -1), *fusion.attend.get_weights())
            z = special.expit(z)
            x = x * z[..., :1] + deeper * z[..., 1:]
        deeper = grown(x, teacher.shape[1])
        out = convolution(deeper, fusion.expand.get_weights()[0])
        out = normalization(out, *fusion.expand_norm.get_weights())
        value = value + rows_of(pyramid)(teacher, out)
    return value


def flat(x):
    return x.reshape(len(x), -1)


def similarity_preserving(t, s):
    similarities = [unit(flat(x) @ flat(x).T) for x in (t, s)]
    return ((similarities[0] - similarities[1]) ** 2).mean(1)


def rkd(t, s, distance_weight=25.0, angle_weight=50.0):
    def distances(x):
        d = np.linalg.norm(x[:, None] - x[None], axis=-1)
        return d / d[d > 0].mean() if (d > 0).any() else d

    def angles(x):
        e = x[None] - x[:, None]
        length = np.linalg.norm(e, axis=-1, keepdims=True)
        e = np.divide(e, length, out=np.zeros_like(e), where=length > 0)
        return np.einsum("ijd,ikd->ijk", e, e)

    t, s = flat(t), flat(s)
    return distance_weight * special.huber(1, distances(s) - distances(t)).mean(1) + (
        angle_weight * special.huber(1, angles(s) - angles(t)).mean((1, 2))
    )


def correlation_congruence(t, s, gamma=0.4):
    def kernel(x):
        c = 2 * gamma * (unit(flat(x)) @ unit(flat(x)).T)
        return np.exp(-2 * gamma) * (1 + c + c**2 / 2)

    return ((kernel(t) - kernel(s)) ** 2).mean(1)


def pkt(t, s):
    def neighbors(x):
        likeness = (unit(flat(x)) @ unit(flat(x)).T + 1) / 2
        return likeness / likeness.sum(1, keepdims=True)

    p, q = neighbors(t), neighbors(s)
    return (p * np.log((p + 1e-7) / (q + 1e-7))).mean(1)


def crd_in_batch(loss, t, s):
    (w_t, b_t), (w_s, b_s) = (layer.get_weights() for layer in loss.layers)
    scores = unit(flat(s) @ w_s + b_s) @ unit(flat(t) @ w_t + b_t).T / 0.07
    return -np.diag(special.log_softmax(scores, 1)) - np.diag(special.log_softmax(scores, 0))


def hidden_cosine(t, s):
    return 1 - (unit(t) * unit(s)).sum(-1)


def attention_scores(t, s):
    t, s = (np.where(x <= -100, 0, x) for x in (t, s))
    return ((t - s) ** 2).mean((1, 3))


def minilm(t, s, heads):
    total = 0.0
    for x, y in zip(t, s):
        kl = 0.0
        for head in range(heads):
            relations = []
            for side in (x, y):
                side = side.reshape(*side.shape[:2], -1)
                width = side.shape[-1] // heads
                part = side[..., head * width : (head + 1) * width]
                products = part @ part.transpose(0, 2, 1) / np.sqrt(width)
                relations.append(special.softmax(products, -1))
            kl = kl + special.rel_entr(*relations).sum(-1)
        total = total + kl / heads
    return total


def pkd(t, s):
    t, s = (x[:, 0] if x.ndim == 3 else x for x in (t, s))
    return ((unit(t) - unit(s)) ** 2).sum(-1)
