"""The Inception of 2015: against TensorFlow on a stand-in graph (golden/ADM.md), and how its files are found."""

import errno
import hashlib
import http.server
import json
import threading
from pathlib import Path

import inception_standin
import numpy as np
import pytest
import safetensors.numpy
import torch
from tensorboard.compat.proto import graph_pb2
from tensorboard.util.tensor_util import make_tensor_proto

import tools.inception_weights as inception_weights
from switchdit.errors import UserError
from tools import eval_fid
from tools.adm_metrics import kernel_distance
from tools.inception import load_inception, resize_tf1
from tools.inception_weights import CONVERTED, CONVERTED_NAMES, GRAPH, find_weights, read_converted, read_graph


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).parent / "golden" / "inception_standin.npz"))


@pytest.fixture(scope="module")
def norms(golden):
    return {name.removeprefix("norm/"): array for name, array in golden.items() if name.startswith("norm/")}


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory, norms):
    path = tmp_path_factory.mktemp("inception") / "standin.pb"
    path.write_bytes(inception_standin.graph_def(norms).SerializeToString(deterministic=True))
    return path


@pytest.fixture(scope="module")
def network(graph_file):
    return load_inception(find_weights(str(graph_file)))


def relative_error(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_features_equal_those_of_the_tensorflow_graph(network, golden):
    features = network(inception_standin.sample()[:8])
    # measured: 3e-6, 4e-6, 2.5e-5; the mildest of the known mistakes is 0.02
    assert relative_error(features.pooled, golden["features/pool"]) < 3e-5
    assert relative_error(features.spatial, golden["features/spatial"]) < 5e-5
    assert relative_error(features.probabilities, golden["features/softmax"]) < 2e-4


def test_stand_in_is_the_file_that_tensorflow_ran(graph_file):
    weights = find_weights(str(graph_file))
    assert weights.sha256 == "7a466d276944847ed2130c3ce614a7b3ece4fda871667a369407b92b13246993"
    assert not weights.published


def test_converted_weights_give_the_same_network(tmp_path, norms, graph_file):
    state, from_graph = {}, inception_standin.all_weights(norms)
    for scope, name in CONVERTED_NAMES.items():
        state[f"{name}.conv.weight"] = from_graph[f"{scope}/conv2d_params"].transpose(3, 2, 0, 1)
        for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
            state[f"{name}.bn.{ours}"] = from_graph[f"{scope}/batchnorm/{theirs}"]
        for ours, theirs in (("running_mean", "moving_mean"), ("running_var", "moving_variance")):
            state[f"{name}.bn.{ours}"] = from_graph[f"{scope}/batchnorm/{theirs}"]
    state["fc.weight"] = from_graph["softmax/weights"].T
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}
    torch.save(state, tmp_path / "converted.pth")
    converted, graph = read_converted(tmp_path / "converted.pth"), read_graph(graph_file)
    assert converted.keys() == graph.keys()
    for name in graph:
        np.testing.assert_allclose(converted[name], graph[name], rtol=1e-6, atol=1e-7)


def test_resize_is_that_of_tensorflow_1():
    images = torch.arange(4.0).reshape(1, 1, 1, 4).expand(1, 3, 2, 4)
    # src = i * 4 / 8, upper neighbour cut off at the end: no half-pixel shift
    row = torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    assert torch.equal(resize_tf1(images, 8), row.expand(1, 3, 8, 8))
    assert torch.equal(resize_tf1(torch.arange(6.0).reshape(1, 1, 1, 6), 3)[0, 0, 0], torch.tensor([0.0, 2, 4]))


def test_missing_weights_end_in_one_line_with_file_hash_and_place(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHDIT_CACHE", str(tmp_path))
    for argument in ("auto", str(tmp_path / "absent.pb")):
        with pytest.raises(UserError) as mistake:
            find_weights(argument)
        message = str(mistake.value)
        assert "\n" not in message
        for part in (CONVERTED, inception_weights.CONVERTED_SHA256, GRAPH, inception_weights.GRAPH_MD5, str(tmp_path)):
            assert part in message


def test_default_cache_is_below_home(monkeypatch):
    monkeypatch.delenv("SWITCHDIT_CACHE", raising=False)
    assert inception_weights.cache_directory() == Path.home() / ".cache" / "switchdit"


@pytest.mark.parametrize("name", [CONVERTED, GRAPH])
def test_a_wrong_hash_in_the_cache_is_refused_with_both_hashes(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SWITCHDIT_CACHE", str(tmp_path))
    (tmp_path / name).write_bytes(b"not it")
    expected = inception_weights.CONVERTED_SHA256 if name == CONVERTED else inception_weights.GRAPH_MD5
    with pytest.raises(UserError, match=rf"is not the published .* is [0-9a-f]+, expected {expected}$"):
        find_weights("auto")


def test_a_named_pth_with_a_wrong_hash_is_refused_unread(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(UserError, match="expected 6726825d"):
        find_weights(str(tmp_path / "weights.pth"))


def test_the_published_file_is_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHDIT_CACHE", str(tmp_path))
    (tmp_path / CONVERTED).write_bytes(b"it")
    monkeypatch.setattr(inception_weights, "CONVERTED_SHA256", inception_weights.sha256_of(tmp_path / CONVERTED))
    assert find_weights("auto") == inception_weights.WeightFile(
        tmp_path / CONVERTED, inception_weights.CONVERTED_SHA256, published=True
    )


class Served(http.server.BaseHTTPRequestHandler):
    """What the network answers: the content of ``files`` by path, cut short where ``cut`` says so."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    cut = 0

    def do_GET(self):
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write((content or b"")[: -self.cut or None])

    def log_message(self, *_):
        pass


@pytest.fixture
def served(monkeypatch):
    """A handler to fill; both published addresses lead to it."""
    handler = type("Handler", (Served,), {"files": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(inception_weights, "GRAPH_URL", f"{address}/graph")
    monkeypatch.setattr(inception_weights, "CONVERTED_URL", f"{address}/converted")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


CONTENT = b"weights" * 100_000


@pytest.mark.parametrize("name", [GRAPH, CONVERTED])
def test_download_puts_the_published_file_into_the_cache(name, served, monkeypatch, tmp_path, capsys):
    served.files["/graph" if name == GRAPH else "/converted"] = CONTENT  # the other one is not there
    monkeypatch.setattr(inception_weights, "GRAPH_MD5", hashlib.md5(CONTENT).hexdigest())
    monkeypatch.setattr(inception_weights, "CONVERTED_SHA256", hashlib.sha256(CONTENT).hexdigest())
    weights = find_weights("auto", download=True)
    assert weights.path == tmp_path / "cache" / name
    assert weights.published
    assert weights.path.read_bytes() == CONTENT
    assert f"downloading {name}: 100%" in capsys.readouterr().err
    served.files.clear()
    assert find_weights("auto", download=True) == weights  # it is there now
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [name]


@pytest.mark.parametrize("case", ["wrong hash", "cut short", "not there", "refused", "too long"])
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(case, served, monkeypatch, tmp_path):
    monkeypatch.setattr(inception_weights, "GRAPH_MD5", hashlib.md5(CONTENT).hexdigest())
    reason = {
        "wrong hash": f"its MD5 is {hashlib.md5(CONTENT + b'!').hexdigest()}, expected .*: refused",
        "cut short": "the connection ended after 699995 of 700000 bytes",
        "not there": "HTTP Error 404: Not Found",
        "refused": "Connection refused",
        "too long": "more than 1000 bytes",
    }[case]
    if case != "not there":
        served.files["/graph"] = served.files["/converted"] = CONTENT + b"!" * (case == "wrong hash")
    served.cut = 5 if case == "cut short" else 0
    if case == "too long":
        monkeypatch.setattr(inception_weights, "LARGEST_BYTES", 1000)
    if case == "refused":
        for name in ("GRAPH_URL", "CONVERTED_URL"):
            monkeypatch.setattr(inception_weights, name, "http://127.0.0.1:9/")
    with pytest.raises(UserError, match=reason) as mistake:
        find_weights("auto", download=True)
    message = str(mistake.value)
    assert len(message.splitlines()) == 1
    for part in (CONVERTED, GRAPH, inception_weights.CONVERTED_URL, "or add --download"):
        assert part in message
    assert not list((tmp_path / "cache").iterdir())


def test_nothing_is_downloaded_unasked(served, tmp_path):
    served.files["/graph"] = CONTENT
    with pytest.raises(UserError, match=r"or add --download$"):
        find_weights("auto")
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_while_downloading_is_no_matter_of_the_network(served, monkeypatch, tmp_path):
    served.files["/graph"] = CONTENT
    monkeypatch.setattr(inception_weights, "GRAPH_MD5", hashlib.md5(CONTENT).hexdigest())

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        find_weights("auto", download=True)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("damage", ["short", "other"])
def test_a_damaged_graph_is_one_line(tmp_path, graph_file, damage):
    content = graph_file.read_bytes()[:50_000] if damage == "short" else b""
    (tmp_path / "damaged.pb").write_bytes(content)
    with pytest.raises(UserError, match=r"is not a TensorFlow graph|is not the Inception graph of 2015"):
        load_inception(find_weights(str(tmp_path / "damaged.pb")))


def test_eval_fid_writes_the_five_numbers(tmp_path, graph_file, network, monkeypatch, capsys):
    # four eigendecompositions of 2,048 are too slow here; the slow test below has them
    monkeypatch.setattr("tools.inception.load_inception", lambda weights: network)
    monkeypatch.setattr("tools.adm_metrics.frechet_distance", lambda mu, sigma, *reference: float(len(sigma)))
    np.savez(tmp_path / "ref.npz", arr_0=inception_standin.ref()[:6])
    np.savez_compressed(tmp_path / "samples.npz", arr_0=inception_standin.sample()[:5])
    arguments = ["--ref", tmp_path / "ref.npz", "--samples", tmp_path / "samples.npz"]
    eval_fid.main(
        [
            *map(str, arguments),
            "--inception",
            str(graph_file),
            "--out",
            str(tmp_path / "metrics.json"),
            "--cache-samples",
        ]
    )
    printed = capsys.readouterr()
    assert "not the published graph file" in printed.err
    assert "sFID 2023.0000" in " ".join(printed.out.split())
    scores = json.loads((tmp_path / "metrics.json").read_text())
    assert list(scores)[:5] == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert (scores["fid"], scores["sfid"]) == (2048, 2023)
    kept = [safetensors.numpy.load_file(path) for path in (tmp_path / "cache" / "features").iterdir()]
    of_samples, of_ref = sorted((arrays["pooled"] for arrays in kept if "pooled" in arrays), key=len)
    assert scores["options"]["kid"] == {"subsets": 100, "subset_size": 5, "seed": 0}
    assert scores["kid"] == kernel_distance(of_ref, of_samples, 100, 5, 0)
    assert "besides ADM's five: KID" in " ".join(printed.out.split())
    assert all(np.isfinite(scores[key]) for key in ("inception_score", "precision", "recall"))
    assert scores["network"]["published"] is False


def test_eval_fid_takes_stored_statistics_without_images(tmp_path, graph_file, network, monkeypatch):
    monkeypatch.setattr("tools.inception.load_inception", lambda weights: network)
    monkeypatch.setattr("tools.adm_metrics.frechet_distance", lambda mu, sigma, *reference: float(reference[0][0]))
    stored = {"mu": np.full(2048, 7.0), "sigma": np.eye(2048), "mu_s": np.full(2023, 9.0), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "stats.npz", **stored)
    np.savez(tmp_path / "samples.npz", arr_0=inception_standin.sample()[:4])
    arguments = ["--ref", tmp_path / "stats.npz", "--samples", tmp_path / "samples.npz", "--inception", graph_file]
    eval_fid.main([*map(str, arguments), "--out", str(tmp_path / "metrics.json")])
    scores = json.loads((tmp_path / "metrics.json").read_text())
    assert (scores["fid"], scores["sfid"]) == (7, 9)
    assert scores["precision"] is None
    assert scores["kid"] is None
    assert scores["reference"]["statistics"] == "stored"


def test_eval_fid_refuses_statistics_of_another_size(tmp_path, graph_file, network, monkeypatch, capsys):
    monkeypatch.setattr("tools.inception.load_inception", lambda weights: network)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "samples.npz", arr_0=inception_standin.sample()[:4])
    arguments = ["--ref", tmp_path / "stats.npz", "--samples", tmp_path / "samples.npz", "--inception", graph_file]
    with pytest.raises(SystemExit) as ended:
        eval_fid.main([*map(str, arguments)])
    assert ended.value.code == 2
    assert "mu is of 64 features; the Inception network has 2048" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_protocol_equals_the_evaluators(tmp_path, graph_file):
    np.savez(tmp_path / "ref.npz", arr_0=inception_standin.ref())
    np.savez_compressed(tmp_path / "samples.npz", arr_0=inception_standin.sample())
    np.savez(tmp_path / "stats.npz", **inception_standin.stats())
    golden = {  # printed by the evaluator; precision and recall in float64
        "ref": (19.793488700553404, 491.95789748733364, 5.433536529541016, 0.8263888888888888, 0.5729166666666666),
        "stats": (204.21218959535645, 1362.7815181957862, 5.433536529541016, 0.8263888888888888, 0.625),
    }
    for name, numbers in golden.items():
        arguments = ["--ref", str(tmp_path / f"{name}.npz"), "--samples", str(tmp_path / "samples.npz")]
        arguments += ["--inception", str(graph_file), "--out", str(tmp_path / "metrics.json"), "--distances", "float64"]
        eval_fid.main(arguments)
        scores = json.loads((tmp_path / "metrics.json").read_text())
        assert [scores[key] for key in ("fid", "sfid", "inception_score")] == pytest.approx(numbers[:3], rel=1e-5)
        assert [scores[key] for key in ("precision", "recall")] == pytest.approx(numbers[3:], abs=0.008)


@pytest.mark.parametrize("damage", ["shape", "size"])
def test_a_graph_with_damaged_constants_is_one_line(damage, graph_file, tmp_path):
    graph = graph_pb2.GraphDef.FromString(graph_file.read_bytes())
    name = "conv/batchnorm/gamma" if damage == "shape" else "conv/conv2d_params"
    tensor = next(node for node in graph.node if node.name == name).attr["value"].tensor
    if damage == "shape":
        tensor.CopyFrom(make_tensor_proto(np.ones(5, np.float32)))
    else:  # one number stands for all, which would take two petabytes
        del tensor.float_val[:]
        tensor.tensor_content = b""
        tensor.float_val.append(1)
        tensor.tensor_shape.dim[3].size = 1 << 44
    (tmp_path / "damaged.pb").write_bytes(graph.SerializeToString())
    with pytest.raises(UserError, match=r"conv is no convolution with batch norm|conv2d_params is damaged, it says"):
        read_graph(tmp_path / "damaged.pb")
