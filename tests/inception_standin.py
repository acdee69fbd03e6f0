"""Writes a stand-in for `classify_image_graph_def.pb`, and the generated images of `golden/inception_standin.npz`.

Node names, op types, attributes and wiring follow the real graph; the weights are seeded, and the bytes depend on
nothing but this file and on the statistics in the golden file (integers only).
"""

import hashlib

import numpy as np

SEED = 20151205
BN_EPS = 1e-3

# ----------------------------------------------------------------------------------------------- structure
# A layer is ("conv", scope, input, kh, kw, cin, cout, stride, padding), ("max"/"avg", scope, input, k, stride, padding)
# or ("join", scope, [inputs]).


def layers():
    out = []

    def conv(scope, src, kh, kw, cin, cout, stride=1, padding="SAME"):
        out.append(("conv", scope, src, kh, kw, cin, cout, stride, padding))
        return scope

    def pool(kind, scope, src, k, stride, padding):
        out.append((kind, scope, src, k, stride, padding))
        return scope

    def join(scope, srcs):
        out.append(("join", scope, srcs))
        return scope

    x = conv("conv", "Mul", 3, 3, 3, 32, 2, "VALID")
    x = conv("conv_1", x, 3, 3, 32, 32, 1, "VALID")
    x = conv("conv_2", x, 3, 3, 32, 64, 1, "SAME")
    x = pool("max", "pool", x, 3, 2, "VALID")
    x = conv("conv_3", x, 1, 1, 64, 80, 1, "VALID")
    x = conv("conv_4", x, 3, 3, 80, 192, 1, "VALID")
    x = pool("max", "pool_1", x, 3, 2, "VALID")

    cin = 192
    for name, cpool in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
        a = conv(f"{name}/conv", x, 1, 1, cin, 64)
        b = conv(f"{name}/tower/conv", x, 1, 1, cin, 48)
        b = conv(f"{name}/tower/conv_1", b, 5, 5, 48, 64)
        c = conv(f"{name}/tower_1/conv", x, 1, 1, cin, 64)
        c = conv(f"{name}/tower_1/conv_1", c, 3, 3, 64, 96)
        c = conv(f"{name}/tower_1/conv_2", c, 3, 3, 96, 96)
        d = pool("avg", f"{name}/tower_2/pool", x, 3, 1, "SAME")
        d = conv(f"{name}/tower_2/conv", d, 1, 1, cin, cpool)
        x = join(f"{name}/join", [a, b, c, d])
        cin = 64 + 64 + 96 + cpool

    a = conv("mixed_3/conv", x, 3, 3, cin, 384, 2, "VALID")
    b = conv("mixed_3/tower/conv", x, 1, 1, cin, 64)
    b = conv("mixed_3/tower/conv_1", b, 3, 3, 64, 96)
    b = conv("mixed_3/tower/conv_2", b, 3, 3, 96, 96, 2, "VALID")
    c = pool("max", "mixed_3/pool", x, 3, 2, "VALID")
    x = join("mixed_3/join", [a, b, c])
    cin = 384 + 96 + 288

    for name, c7 in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        a = conv(f"{name}/conv", x, 1, 1, cin, 192)
        b = conv(f"{name}/tower/conv", x, 1, 1, cin, c7)
        b = conv(f"{name}/tower/conv_1", b, 1, 7, c7, c7)
        b = conv(f"{name}/tower/conv_2", b, 7, 1, c7, 192)
        c = conv(f"{name}/tower_1/conv", x, 1, 1, cin, c7)
        c = conv(f"{name}/tower_1/conv_1", c, 7, 1, c7, c7)
        c = conv(f"{name}/tower_1/conv_2", c, 1, 7, c7, c7)
        c = conv(f"{name}/tower_1/conv_3", c, 7, 1, c7, c7)
        c = conv(f"{name}/tower_1/conv_4", c, 1, 7, c7, 192)
        d = pool("avg", f"{name}/tower_2/pool", x, 3, 1, "SAME")
        d = conv(f"{name}/tower_2/conv", d, 1, 1, cin, 192)
        x = join(f"{name}/join", [a, b, c, d])

    a = conv("mixed_8/tower/conv", x, 1, 1, 768, 192)
    a = conv("mixed_8/tower/conv_1", a, 3, 3, 192, 320, 2, "VALID")
    b = conv("mixed_8/tower_1/conv", x, 1, 1, 768, 192)
    b = conv("mixed_8/tower_1/conv_1", b, 1, 7, 192, 192)
    b = conv("mixed_8/tower_1/conv_2", b, 7, 1, 192, 192)
    b = conv("mixed_8/tower_1/conv_3", b, 3, 3, 192, 192, 2, "VALID")
    c = pool("max", "mixed_8/pool", x, 3, 2, "VALID")
    x = join("mixed_8/join", [a, b, c])

    cin = 1280
    for name, kind in (("mixed_9", "avg"), ("mixed_10", "max")):  # mixed_10 pools with MAX: true of the real graph
        a = conv(f"{name}/conv", x, 1, 1, cin, 320)
        b = conv(f"{name}/tower/conv", x, 1, 1, cin, 384)
        b1 = conv(f"{name}/tower/mixed/conv", b, 1, 3, 384, 384)
        b2 = conv(f"{name}/tower/mixed/conv_1", b, 3, 1, 384, 384)
        c = conv(f"{name}/tower_1/conv", x, 1, 1, cin, 448)
        c = conv(f"{name}/tower_1/conv_1", c, 3, 3, 448, 384)
        c1 = conv(f"{name}/tower_1/mixed/conv", c, 1, 3, 384, 384)
        c2 = conv(f"{name}/tower_1/mixed/conv_1", c, 3, 1, 384, 384)
        d = pool(kind, f"{name}/tower_2/pool", x, 3, 1, "SAME")
        d = conv(f"{name}/tower_2/conv", d, 1, 1, cin, 192)
        x = join(f"{name}/join", [a, b1, b2, c1, c2, d])  # six inputs, no nested join
        cin = 2048
    pool("avg", "pool_3", x, 8, 1, "VALID")
    return out


# ----------------------------------------------------------------------------------------------- weights
def _splitmix64(start, n):
    with np.errstate(over="ignore"):
        z = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _words(name, n):
    start = int.from_bytes(hashlib.sha256(f"{SEED}/{name}".encode()).digest()[:8], "little")
    return _splitmix64(start, n)


def _binomial(name, n):
    """n integers in {-2..2}, binomial(4, 1/2) - 2: variance 1."""
    nib = _words(name, -(-n // 16)).view(np.uint8)
    nib = np.stack([nib & 15, nib >> 4], axis=1).ravel()[:n]
    pop = np.array([bin(i).count("1") for i in range(16)], np.int8)
    return pop[nib] - 2


def _choice(name, n, values):
    """n draws from `values` (length a power of two)."""
    return np.asarray(values, np.float32)[(_words(name, n) >> np.uint64(40)).astype(np.int64) % len(values)]


def pow2(x):
    return float(2.0 ** np.round(np.log2(x)))


def conv_weight(scope, kh, kw, cin, cout):
    k = _binomial(f"{scope}/conv2d_params", kh * kw * cin * cout).reshape(kh, kw, cin, cout)
    return k.astype(np.float32) * np.float32(pow2(np.sqrt(2.0 / (kh * kw * cin))))


def bn_affine(scope, cout):
    gamma = _choice(f"{scope}/batchnorm/gamma", cout, [0.5, 0.625, 0.75, 0.875])
    beta = _choice(f"{scope}/batchnorm/beta", cout, [-0.125, 0.25, 0.375, 0.625])
    return gamma, beta


def bn_encode(mean, var, wscale):
    """Real moving statistics -> small integers (stored in bn_stats.npz)."""
    m = np.clip(np.round(np.asarray(mean, np.float64) / (wscale * 2.0**-3)), -32768, 32767).astype(np.int16)
    v = np.clip(np.round(4.0 * np.log2(np.maximum(np.asarray(var, np.float64), 1e-6))), -80, 80).astype(np.int8)
    return m, v


def bn_decode(m, v, wscale):
    mean = m.astype(np.float32) * np.float32(wscale * 2.0**-3)
    table = np.array([np.float32(round(2.0 ** (i / 4.0) * 64) / 64) for i in range(4)], np.float32)  # exact quarters
    e, f = np.divmod(v.astype(np.int64), 4)
    return mean, np.ldexp(table[f], e).astype(np.float32)


SOFTMAX_SCALE = 2.0**-1


def softmax_params():
    # Features whose last batch norm has the same (gamma, beta) have about the same mean: give them weights in pairs
    # (+k, -k), so that the class logits follow what differs between images and not the common mean.
    last = [layer for layer in layers() if layer[0] == "conv" and layer[1].startswith("mixed_10/")]
    join = [layer for layer in layers() if layer[0] == "join"][-1][2]
    cout = {layer[1]: layer[6] for layer in last}
    gamma, beta = (np.concatenate(x) for x in zip(*(bn_affine(s, cout[s]) for s in join), strict=False))
    order = np.lexsort((beta, gamma))
    k = _binomial("softmax/weights", 1024 * 1008).reshape(1024, 1008)
    w = np.empty((2048, 1008), np.float32)
    w[order[0::2]], w[order[1::2]] = k, -k
    b = _choice("softmax/biases", 1008, [-1.0, -0.5, 0.5, 1.0])
    return w * np.float32(SOFTMAX_SCALE), b


def all_weights(bn):
    """{TF const name: array} -- what the GraphDef holds; `bn` is the mapping loaded from bn_stats.npz."""
    w = {}
    for layer in layers():
        if layer[0] != "conv":
            continue
        _, scope, _, kh, kw, cin, cout, _, _ = layer
        w[f"{scope}/conv2d_params"] = conv_weight(scope, kh, kw, cin, cout)
        gamma, beta = bn_affine(scope, cout)
        mean, var = bn_decode(bn[f"{scope}/m"], bn[f"{scope}/v"], pow2(np.sqrt(2.0 / (kh * kw * cin))))
        w[f"{scope}/batchnorm/beta"] = beta
        w[f"{scope}/batchnorm/gamma"] = gamma
        w[f"{scope}/batchnorm/moving_mean"] = mean
        w[f"{scope}/batchnorm/moving_variance"] = var
    w["softmax/weights"], w["softmax/biases"] = softmax_params()
    return w


# ----------------------------------------------------------------------------------------------- GraphDef
def _protos():
    try:
        from tensorboard.compat.proto import graph_pb2, types_pb2
    except ImportError:
        from tensorflow.core.framework import graph_pb2, types_pb2
    return graph_pb2, types_pb2


def graph_def(bn):
    graph_pb2, types = _protos()
    g = graph_pb2.GraphDef()
    g.versions.producer = 8  # < 9: BatchNormWithGlobalNormalization is refused by TF from GraphDef version 9 on
    T = types.DT_FLOAT

    def node(name, op, inputs=(), **attr):
        n = g.node.add()
        n.name, n.op = name, op
        n.input.extend(inputs)
        for k, v in attr.items():
            if v is None:
                continue
            a = n.attr[k]
            if isinstance(v, bool):
                a.b = v
            elif isinstance(v, int):
                a.type = v if k in ("T", "dtype", "DstT", "SrcT", "Tdim") else a.type
                if k not in ("T", "dtype", "DstT", "SrcT", "Tdim"):
                    a.i = v
            elif isinstance(v, float):
                a.f = v
            elif isinstance(v, (bytes, str)):
                a.s = v.encode() if isinstance(v, str) else v
            elif isinstance(v, list):
                a.list.i.extend(v)
        return n

    def const(name, arr, style="content"):
        arr = np.asarray(arr)
        dt = {"float32": types.DT_FLOAT, "int32": types.DT_INT32}[arr.dtype.name]
        n = node(name, "Const", dtype=dt)
        t = n.attr["value"].tensor
        t.dtype = dt
        t.tensor_shape.SetInParent()
        for d in arr.shape:
            t.tensor_shape.dim.add().size = d
        if style == "content":
            t.tensor_content = np.ascontiguousarray(arr).tobytes()
        elif style == "splat":  # one value for the whole shape: legal, and readers often forget it
            (t.float_val if dt == types.DT_FLOAT else t.int_val).append(arr.flat[0].item())
        else:
            (t.float_val if dt == types.DT_FLOAT else t.int_val).extend(arr.ravel().tolist())

    n = node("DecodeJpeg/contents", "Const", dtype=types.DT_STRING)
    t = n.attr["value"].tensor
    t.dtype = types.DT_STRING
    t.tensor_shape.SetInParent()
    t.string_val.append(b"")
    node("DecodeJpeg", "DecodeJpeg", ["DecodeJpeg/contents"], channels=3, ratio=1)
    node("Cast", "Cast", ["DecodeJpeg"], SrcT=types.DT_UINT8, DstT=T)
    const("ExpandDims/dim", np.int32(0), "val")
    node("ExpandDims", "ExpandDims", ["Cast", "ExpandDims/dim"], T=T)
    const("ResizeBilinear/size", np.array([299, 299], np.int32))
    node(
        "ResizeBilinear", "ResizeBilinear", ["ExpandDims", "ResizeBilinear/size"], T=T
    )  # align_corners, half_pixel: defaults False
    const("Sub/y", np.float32(128), "val")
    node("Sub", "Sub", ["ResizeBilinear", "Sub/y"], T=T)
    const("Mul/y", np.float32(0.0078125), "val")
    node("Mul", "Mul", ["Sub", "Mul/y"], T=T)

    w = all_weights(bn)
    produced = {"Mul": "Mul"}

    def guarded(scope, src):
        node(f"{scope}/CheckNumerics", "CheckNumerics", [src], T=T, message="Activations")
        node(f"{scope}/control_dependency", "Identity", [src, f"^{scope}/CheckNumerics"], T=T)
        return f"{scope}/control_dependency"

    for i, layer in enumerate(layers()):
        kind, scope = layer[0], layer[1]
        if kind == "conv":
            _, _, src, _kh, _kw, _cin, _cout, stride, padding = layer
            const(f"{scope}/conv2d_params", w[f"{scope}/conv2d_params"])
            node(
                f"{scope}/Conv2D",
                "Conv2D",
                [produced[src], f"{scope}/conv2d_params"],
                T=T,
                strides=[1, stride, stride, 1],
                padding=padding,
                use_cudnn_on_gpu=True,
            )
            for p in ("beta", "gamma", "moving_mean", "moving_variance"):
                const(f"{scope}/batchnorm/{p}", w[f"{scope}/batchnorm/{p}"], "val" if i % 2 else "content")
            node(
                f"{scope}/batchnorm",
                "BatchNormWithGlobalNormalization",
                [f"{scope}/Conv2D"]
                + [f"{scope}/batchnorm/{p}" for p in ("moving_mean", "moving_variance", "beta", "gamma")],
                T=T,
                variance_epsilon=float(BN_EPS),
                scale_after_normalization=True,
            )
            node(scope, "Relu", [guarded(scope, f"{scope}/batchnorm")], T=T)
            produced[scope] = scope
        elif kind in ("max", "avg"):
            _, _, src, k, stride, padding = layer
            node(
                scope,
                "MaxPool" if kind == "max" else "AvgPool",
                [guarded(scope, produced[src])],
                T=T if kind == "avg" else None,  # the 2015 MaxPool nodes carry no T
                ksize=[1, k, k, 1],
                strides=[1, stride, stride, 1],
                padding=padding,
            )
            produced[scope] = scope
        else:
            srcs = layer[2]
            const(f"{scope}/concat_dim", np.int32(3), "val")
            n = node(scope, "Concat", [f"{scope}/concat_dim"] + [produced[s] for s in srcs], T=T)  # axis comes FIRST
            n.attr["N"].i = len(srcs)
            produced[scope] = scope

    const("softmax/weights", w["softmax/weights"])
    const("softmax/biases", w["softmax/biases"])
    const("pool_3/_reshape/shape", np.array([1, 2048], np.int32))
    node("pool_3/_reshape", "Reshape", ["pool_3", "pool_3/_reshape/shape"], T=T)
    node(
        "softmax/logits/MatMul",
        "MatMul",
        ["pool_3/_reshape", "softmax/weights"],
        T=T,
        transpose_a=False,
        transpose_b=False,
    )
    node("softmax/logits", "BiasAdd", ["softmax/logits/MatMul", "softmax/biases"], T=T)
    node("softmax", "Softmax", ["softmax/logits"], T=T)
    return g


def _ints(name, shape, hi):
    n = int(np.prod(shape))
    return ((_words("image/" + name, n) >> np.uint64(20)) % np.uint64(hi)).astype(np.int64).reshape(shape)


def images(name, n, size=32, grid=5, noise=24, rects=3):
    """Smooth colour fields, a few flat rectangles, and noise."""
    g = _ints(f"{name}/grid", (n, grid, grid, 3), 256)
    pos = np.arange(size) * (grid - 1) * 64 // (size - 1)  # fixed point, 6 bits
    lo = np.minimum(pos >> 6, grid - 2)
    f = (pos - (lo << 6))[:, None, None]
    rows = g[:, lo] * (64 - f[None]) + g[:, lo + 1] * f[None]  # n, size, grid, 3
    fx = f[None].reshape(1, 1, size, 1)
    x = (rows[:, :, lo] * (64 - fx) + rows[:, :, lo + 1] * fx) >> 12
    box, col = _ints(f"{name}/box", (n, rects, 4), size), _ints(f"{name}/col", (n, rects, 3), 256)
    for i in range(n):
        for (a, b, c, d), k in zip(box[i], col[i], strict=False):
            x[i, min(a, b) : max(a, b) // 2 + min(a, b) // 2 + 1, min(c, d) : max(c, d) // 2 + min(c, d) // 2 + 1] = k
    x = x + _ints(f"{name}/noise", x.shape, 2 * noise + 1) - noise
    return np.clip(x, 0, 255).astype(np.uint8)


def ref():
    return images("ref", 192)


def sample():
    return images("sample", 144, noise=32, rects=4)


def stats():
    """What a VIRTUAL_*.npz holds besides images: full-rank statistics that nothing in arr_0 would give."""
    out = {"arr_0": ref()[:96]}
    for key, n, mean, var, step in (("", 2048, 0.4375, 1 / 64, 1 / 8), ("_s", 2023, 0.375, 3 / 16, 1 / 2)):
        out["mu" + key] = (mean + (_ints(f"stats/mu{key}", (n,), 65) - 32) / 256).astype(np.float32)
        v = (_ints(f"stats/v{key}", (n,), 16) == 0) * step
        out["sigma" + key] = np.diag(var * (1 + _ints(f"stats/d{key}", (n,), 4) / 2)) + np.outer(v, v)
    return out
