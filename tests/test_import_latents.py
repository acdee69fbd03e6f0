"""Latents of other projects: the values that arrive, and every file that cannot be used refused by name."""

import json
import os
import pickle
import shutil
import signal
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import launched
from tiny_run import read_log, write_config

from switchdit.config import load_config
from switchdit.data.autoencoder import load_autoencoder
from switchdit.data.compatibility import check_latents
from switchdit.data.latent_dataset import UNKNOWN, LatentDataset
from switchdit.data.training_batches import TrainingBatches
from switchdit.errors import UserError
from switchdit.models import model_fields
from tests.extraction_inputs import small_disk, without_sidecars
from tools import import_latents as tool
from tools import latent_sources as sources

VAE = "test/autoencoder"
SHAPE = (4, 8, 8)
NUM = 11  # 10.npy comes after 9.npy
LABELS = [2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 1]


def drawn(num=NUM, seed=0):
    """float32 latents (num, 4, 8, 8), unscaled."""
    return np.random.default_rng(seed).normal(0, 5, (num, *SHAPE)).astype(np.float32)


def moments_of(num=NUM):
    return np.concatenate([drawn(num), np.abs(drawn(num, seed=1)) / 50], axis=1)


def edm2_name(i):
    return f"{i // 4:05d}/img-mean-std-{i:08d}.npy"


def write_fast_dit(root, latents, labels=LABELS, name="imagenet256", scale=0.18215):
    for kind in ("features", "labels"):
        (root / f"{name}_{kind}").mkdir(parents=True)
    for i, (latent, label) in enumerate(zip(latents, labels, strict=True)):
        np.save(root / f"{name}_features" / f"{i}.npy", latent[None] * np.float32(scale))
        np.save(root / f"{name}_labels" / f"{i}.npy", np.array([label]))
    return root


def write_edm2(root, moments, labels=LABELS):
    for i, values in enumerate(moments):
        (root / edm2_name(i)).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / edm2_name(i), values)
    entries = labels and [[edm2_name(i), label] for i, label in reversed(list(enumerate(labels)))]
    (root / "dataset.json").write_text(json.dumps({"labels": entries}))
    return root


def zipped(folder, path, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def run(source, out, *more):
    tool.import_latents(tool.parse_arguments(["--from", str(source), "--out", str(out), "--vae", VAE, *more]))
    return LatentDataset(out)


def everything(data):
    return data.moments(np.arange(len(data)), np.zeros(len(data), bool))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- what arrives


@pytest.mark.parametrize("name", ["imagenet256", "ffhq"])
def test_fast_dit_draws_are_unscaled_and_in_numeric_order(tmp_path, name):
    data = run(write_fast_dit(tmp_path / "in", drawn(), name=name), tmp_path / "out", "--shard-size", "4")
    mean, std = everything(data)
    np.testing.assert_allclose(mean, drawn(), rtol=2**-11 + 1e-6)
    assert not std.any()
    assert data.labels.tolist() == LABELS
    assert data.names == [f"{name}_features/{i}.npy" for i in range(NUM)]
    assert (data.stored, data.has_flip, data.scale_factor, data.image_size) == ("sample", False, 0.18215, 64)
    assert (data.num_classes, data.class_names) == (3, ["0", "1", "2"])
    assert data.manifest["vae"] == {"name": VAE, "sha256": UNKNOWN}
    assert len(data.manifest["shards"]) == 3
    data.verify()


def test_edm2_moments_are_taken_as_they_are_from_folder_or_zip(tmp_path):
    folder = write_edm2(tmp_path / "in", moments_of())
    data = run(folder, tmp_path / "out", "--num-classes", "7")
    assert np.array_equal(np.concatenate(everything(data), axis=1), moments_of().astype(np.float16).astype(np.float32))
    assert data.labels.tolist() == LABELS
    assert data.names == [edm2_name(i) for i in range(NUM)]
    assert (data.stored, data.has_flip, data.num_classes, data.image_size) == ("moments", False, 7, 64)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        archive = zipped(folder, tmp_path / f"{compression}.zip", compression)
        run(archive, tmp_path / f"of_zip_{compression}", "--num-classes", "7")
        of_zip = content(tmp_path / f"of_zip_{compression}")
        assert without_sidecars(of_zip) == without_sidecars(content(tmp_path / "out"))


def test_latents_without_labels_are_of_one_class(tmp_path):
    data = run(write_edm2(tmp_path / "in", moments_of(3), None), tmp_path / "out")
    assert (data.num_classes, data.labels.tolist()) == (1, [0, 0, 0])


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 8],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=0.5,
    ).save_pretrained(path)
    return path


def test_the_autoencoders_folder_tells_hash_scale_and_size(tmp_path, vae):
    source = write_fast_dit(tmp_path / "in", drawn(), scale=0.5)
    data = run(source, tmp_path / "out", "--vae", str(vae), "--image-size", "32")
    assert data.manifest["vae"] == load_autoencoder(vae).identity
    assert (data.scale_factor, data.image_size) == (0.5, 32)
    np.testing.assert_allclose(everything(data)[0], drawn(), rtol=2**-11 + 1e-6)
    with pytest.raises(UserError, match=r"--scale-factor is 0\.18215, but that of --vae .* is 0\.5"):
        run(source, tmp_path / "other", "--vae", str(vae), "--scale-factor", "0.18215")
    with pytest.raises(UserError, match=r"holds latents of 2 channels, --vae .* makes 4"):
        run(write_edm2(tmp_path / "two", moments_of()[:, :4]), tmp_path / "other", "--vae", str(vae))


def test_interrupted_import_continues_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    source = write_edm2(tmp_path / "in", moments_of())
    run(source, tmp_path / "whole", "--shard-size", "4")
    write = tool.write_shard

    def interrupted(out, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return write(out, index, *rest)

    argv = ["--from", str(source), "--out", str(tmp_path / "out"), "--vae", VAE, "--shard-size", "4"]
    monkeypatch.setattr(tool, "write_shard", interrupted)
    with pytest.raises(SystemExit) as left:
        tool.main(argv)
    assert left.value.code == 128 + signal.SIGINT
    assert "finished shards are kept" in capsys.readouterr().err
    assert set(content(tmp_path / "out")) == {"shard_00000.npy", "shard_00000.json"}
    written = (tmp_path / "out" / "shard_00000.npy").stat().st_mtime_ns
    monkeypatch.setattr(tool, "write_shard", write)
    tool.main(argv)
    assert "3 shards, 1 of them already there" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    tool.main(argv)
    assert "0 of them imported now" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert (tmp_path / "out" / "shard_00000.npy").stat().st_mtime_ns == written


def test_changed_labels_are_another_data_set(tmp_path):
    source = write_fast_dit(tmp_path / "in", drawn())
    run(source, tmp_path / "out")
    np.save(source / "imagenet256_labels" / "3.npy", np.array([2]))
    with pytest.raises(UserError, match="holds latents of another extraction"):
        run(source, tmp_path / "out")
    assert LatentDataset(tmp_path / "out").labels.tolist() == LABELS


def refusal(capsys, source, out, *more):
    """The one line in which the program says what is wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--from", str(source), "--out", str(out), "--vae", VAE, *more])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "|" not in line)
    return line


def test_other_latents_of_the_same_names_and_sizes_are_noticed(tmp_path, capsys):
    source = write_edm2(tmp_path / "in", moments_of())
    archive = zipped(source, tmp_path / "in.zip")
    for one in (source, archive):
        out = tmp_path / f"of_{one.name}"
        run(one, out, "--shard-size", "4")
        before = content(out)
        np.save(source / edm2_name(5), moments_of()[5] + 1)
        os.utime(source / edm2_name(5), (1e9, 1e9))
        if one == archive:
            zipped(source, archive)
        assert f"1 of 3 shards in {out} are of files that have changed" in refusal(
            capsys, one, out, "--shard-size", "4"
        )
        assert content(out) == before
        np.save(source / edm2_name(5), moments_of()[5])
        zipped(source, archive)


def test_latents_of_another_autoencoder_known_by_name_are_refused(tmp_path, capsys):
    source = write_edm2(tmp_path / "in", moments_of())
    run(source, tmp_path / "out")
    line = refusal(capsys, source, tmp_path / "out", "--vae", "test/other")
    assert f"vae_name {VAE} there, test/other now" in line
    assert LatentDataset(tmp_path / "out").manifest["vae"] == {"name": VAE, "sha256": UNKNOWN}


def test_a_disk_that_is_full_is_told(tmp_path, capsys):
    source = write_edm2(tmp_path / "in", moments_of())
    with small_disk(tmp_path / "disk", "size=16k") as disk:  # a shard of four has 4 kB
        line = refusal(capsys, source, disk / "out", "--shard-size", "4")
        assert line.startswith("error: no space left on the disk that holds ")
        assert not list((disk / "out").glob(".*"))


def test_what_cannot_be_written_is_told_before_reading(tmp_path, capsys):
    with small_disk(tmp_path / "disk", "ro") as disk:
        assert f"--out {disk} cannot be written" in refusal(capsys, tmp_path / "nowhere", disk)


def test_several_processes_are_refused_by_the_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(capsys, tmp_path, tmp_path / "out", "--local_rank=0")
    assert line == "error: tools/import_latents.py runs in one process; start it without a launcher"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--from", "x", "--out", "y", "--vae", VAE, "--local_rank=1"])
    assert capsys.readouterr().err == ""


@pytest.fixture
def config(tmp_path):
    """Of a run on 40 imported latents."""
    run(write_fast_dit(tmp_path / "in", drawn(40), LABELS * 3 + LABELS[:7]), tmp_path / "latents")
    sections = {
        "data": {"image_size": 64, "horizontal_flip": False},
        "train": {"steps": 2, "global_batch": 8},
        "model": {"ep_size": 1},
    }
    return write_config(tmp_path / "c.yaml", tmp_path / "latents", tmp_path / "run", **sections)


def test_batches_of_imported_latents(config):
    loaded = load_config(config, [])
    dataset = LatentDataset(loaded.data.latents)
    check_latents(dataset, loaded.data, model_fields(loaded.model_name, **loaded.model_overrides))
    batches = TrainingBatches(
        dataset,
        seed=0,
        rank=0,
        world_size=1,
        micro_batch=40,
        accumulation=1,
        num_timesteps=1000,
        label_dropout=0.0,
        horizontal_flip=loaded.data.horizontal_flip,
    )
    batch = batches.batch(0, 0)
    expected = drawn(40)[batch.index.numpy()] * np.float32(0.18215)
    np.testing.assert_allclose(batch.x0.numpy(), expected, rtol=2**-11 + 1e-6)
    assert sorted(batch.index.tolist()) == list(range(40))


@pytest.mark.slow
@pytest.mark.world_size(1)
def test_a_model_trains_on_imported_latents(config, tmp_path):
    arguments = ("--config", config, "--deepspeed_config", "ds_configs/zero2_fp32.json")
    assert "40 images" in launched(1, "switchdit/train.py", *arguments).stdout
    assert np.isfinite(list(read_log(tmp_path / "run")[2].values())).all()


# ---------------------------------------------------------------------------------------------- what is refused


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def replace_json(root, entries):
    (root / "dataset.json").write_text(json.dumps({"labels": entries}))


def save_first(root, values, **options):
    np.save(root / edm2_name(0), values, **options)


good = moments_of(3)
ENTRIES = [[edm2_name(i), i] for i in range(3)]
EDM2_FAULTS = {
    "a pickle": (lambda r: save_first(r, np.array([Trap(r.parent / "sprung")]), allow_pickle=True), "pickled Python"),
    "cut": (lambda r: (r / edm2_name(0)).write_bytes((r / edm2_name(0)).read_bytes()[:-4]), "has 2172 bytes, 2176 by"),
    "empty": (lambda r: (r / edm2_name(1)).write_bytes(b""), "00001.npy cannot be read"),
    "float64": (lambda r: save_first(r, good[0].astype(float)), r"holds float64 .*; expected is float32 \(2C, h, w\)"),
    "odd": (lambda r: save_first(r, good[0][:7]), r"holds float32 \(7, 8, 8\)"),
    "nothing": (lambda r: save_first(r, good[0][:0]), r"holds float32 \(0, 8, 8\), which is nothing"),
    "other shape": (
        lambda r: np.save(r / edm2_name(2), good[0][:6]),
        r"\(6, 8, 8\); expected is float32 \(8, 8, 8\), as",
    ),
    "NaN": (lambda r: save_first(r, np.where(good[0] > 3, np.nan, good[0])), "00000.npy holds values that are no num"),
    "infinity": (lambda r: save_first(r, good[0] * np.float32(np.inf)), "no numbers or exceed float16"),
    "too large": (lambda r: save_first(r, np.maximum(good[0], 65520)), r"exceed float16 \(65504\)"),
    "negative std": (lambda r: save_first(r, -np.abs(good[0])), "negative standard deviations in its second half"),
    "not square": (lambda r: write_edm2(shutil.rmtree(r) or r, good[:, :, :4], [0, 1, 2]), "4 x 8; only square"),
    "twice": (lambda r: replace_json(r, [*ENTRIES, ENTRIES[0]]), "names '00000/img-mean-std-00000000.npy' more than"),
    "outside": (
        lambda r: replace_json(r, [*ENTRIES, ["../../secret.npy", 0]]),
        "has '../../secret.npy', .*in does not",
    ),
    "absolute": (lambda r: replace_json(r, [*ENTRIES, ["/etc/passwd", 0]]), "has '/etc/passwd', .*in does not"),
    "unlisted": (lambda r: replace_json(r, ENTRIES[:2]), "in has '00000/img-mean-std-00000002.npy', .*json does not"),
    "negative": (lambda r: replace_json(r, [*ENTRIES[:2], [ENTRIES[2][0], -1]]), "the label -1 is not a class"),
    "text": (lambda r: replace_json(r, [*ENTRIES[:2], [ENTRIES[2][0], "1"]]), "the label '1' is not a class"),
    "vast": (lambda r: replace_json(r, [*ENTRIES[:2], [ENTRIES[2][0], 10**30]]), "is not a class number"),
    "sparse": (lambda r: replace_json(r, [*ENTRIES[:2], [ENTRIES[2][0], 900]]), "3 images have labels up to 900"),
    "flat list": (lambda r: replace_json(r, [1, 2]), "is not \\[NAME, CLASS\\] but 1"),
    "an object": (lambda r: replace_json(r, {}), "neither a list"),
    "no JSON": (lambda r: (r / "dataset.json").write_text("{"), "damaged: not a JSON object"),
    "deep JSON": (lambda r: (r / "dataset.json").write_text("[" * 10**5), "damaged: not a JSON object"),
    "no files": (lambda r: [path.unlink() for path in r.rglob("*.npy")], "holds no .npy files"),
}


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("fault", EDM2_FAULTS)
def test_edm2_faults_are_named_and_leave_nothing(tmp_path, fault, form):
    source = write_edm2(tmp_path / "in", good, [0, 1, 2])
    damage, message = EDM2_FAULTS[fault]
    damage(source)
    if form == "zip":
        source = zipped(source, tmp_path / "in.zip").rename(tmp_path / "zipped_in")
    with pytest.raises(UserError, match=message) as caught:
        run(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "zipped_in", "out"}


FEATURE, LABEL = "imagenet256_features/1.npy", "imagenet256_labels/1.npy"
FAST_DIT_FAULTS = {
    "no label": (lambda r: (r / LABEL).unlink(), "_features has '1.npy', .*_labels does not"),
    "no latent": (lambda r: (r / FEATURE).unlink(), "_labels has '1.npy', .*_features does not"),
    "no labels": (lambda r: shutil.rmtree(r / "imagenet256_labels"), "no folder imagenet256_labels"),
    "a name": (
        lambda r: (r / FEATURE).rename(r / "imagenet256_features/x.npy"),
        "holds 'x.npy'; expected are files na",
    ),
    "label shape": (
        lambda r: np.save(r / LABEL, np.array([1, 2])),
        r"1.npy holds int64 \(2,\); expected is int64 \(1,\)",
    ),
    "label type": (lambda r: np.save(r / LABEL, np.array([1.0])), r"1.npy holds float64 \(1,\)"),
    "label": (lambda r: np.save(r / LABEL, np.array([-5])), "_labels/1.npy: the label -5 is not a class"),
    "label pickle": (lambda r: np.save(r / LABEL, np.array([Trap(r.parent / "sprung")]), allow_pickle=True), "pickled"),
    "moments": (lambda r: np.save(r / FEATURE, good[0]), r"\(8, 8, 8\); expected is float32 \(1, 4, 8, 8\), as in"),
    "overflow": (lambda r: np.save(r / FEATURE, good[:1, :4] * 0 + 20000), "1.npy holds values .* exceed float16"),
    "two sets": (lambda r: (r / "b_features").mkdir(), "2 folders"),
    "neither": (shutil.rmtree, "does not exist"),
    "empty": (lambda r: shutil.rmtree(r) or r.mkdir(), r"neither dataset.json .* nor, as fast-DiT.*no folder \*_feat"),
    "a pipe": (lambda r: (r / LABEL).unlink() or os.mkfifo(r / LABEL), "1.npy is no file"),
    "a dead link": (lambda r: (r / LABEL).unlink() or (r / LABEL).symlink_to("nowhere"), "1.npy is no file"),
}


@pytest.mark.parametrize("fault", FAST_DIT_FAULTS)
def test_fast_dit_faults_are_named_and_leave_nothing(tmp_path, fault):
    source = write_fast_dit(tmp_path / "in", drawn(3), [0, 1, 2])
    damage, message = FAST_DIT_FAULTS[fault]
    damage(source)
    with pytest.raises(UserError, match=message) as caught:
        run(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"in"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-classes", "2"], "--num-classes is 2, but the labels go up to 2"),
        (["--image-size", "32"], "--image-size is 32, but .* latents of 8 x 8, which --vae .* makes of 64 pixels"),
        (["--shard-size", "0"], "--shard-size is 0; it must be above 0"),
        (["--scale-factor", "nan"], "--scale-factor is nan"),
        (["--vae", "nowhere"], "--vae nowhere is neither a folder nor a hub name"),
        (["--vae", "a/b/c"], "--vae a/b/c is neither"),
        (["--format", "fast-dit"], "no folder"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    source = write_edm2(tmp_path / "in", good, [0, 1, 2])
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "out", *options)
    with pytest.raises(UserError, match="lies in --from"):
        run(source, source / "deeper")
    assert not (tmp_path / "out").exists()


def test_zip_files_that_lie(tmp_path):
    folder = write_edm2(tmp_path / "in", good, [0, 1, 2])
    honest = zipped(folder, tmp_path / "a.zip").read_bytes()
    size = (folder / edm2_name(0)).stat().st_size.to_bytes(4, "little")
    for lie in ((1).to_bytes(4, "little"), (1 << 31).to_bytes(4, "little")):
        (tmp_path / "b.zip").write_bytes(honest.replace(size, lie))
        with pytest.raises(UserError, match=r"img-mean-std-00000000.npy|not a sound zip file"):
            run(tmp_path / "b.zip", tmp_path / "out")
    (folder / edm2_name(0)).write_bytes(b"\0\0\5\0" + b"\xff" * 60)  # of lzma's decoder a length and wrong settings
    wrong = zipped(folder, tmp_path / "a.zip").read_bytes()
    for method in (8, 12, 14, 97):  # deflated, bzip2, lzma, unknown; it is stored
        told = bytearray(wrong)
        told[wrong.index(b"PK\x01\x02") + 10] = method
        (tmp_path / "b.zip").write_bytes(told)
        with pytest.raises(UserError, match=r"img-mean-std-00000000\.npy' is damaged"):
            run(tmp_path / "b.zip", tmp_path / "out")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("dataset.json", "{}")
    with pytest.raises(UserError, match="files of the same name"):
        run(tmp_path / "a.zip", tmp_path / "out")
    (tmp_path / "c.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="not a sound zip file"):
        run(tmp_path / "c.zip", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        run(tmp_path / "d.zip", tmp_path / "out")


def test_a_file_that_unpacks_to_more_than_a_latent_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_FILE", 10_000)
    folder = write_edm2(tmp_path / "in", np.zeros((3, 8, 20, 20), np.float32), [0, 1, 2])
    for source in (folder, zipped(folder, tmp_path / "a.zip", zipfile.ZIP_DEFLATED)):
        with pytest.raises(UserError, match="is larger than 10000 bytes"):
            run(source, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- anything at all


def outcome(source):
    """What an import comes to: the imported values, or None after one line."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        try:
            data = run(source, out)
        except UserError as mistake:
            message = str(mistake)
        else:
            return np.concatenate([data.labels, np.concatenate(everything(data)).ravel()])
    assert "\n" not in message and len(message) < 500
    return None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders of both formats and a zip file, of two tiny latents."""
    root = tmp_path_factory.mktemp("small")
    tiny = moments_of(2)[:, :, :2, :2]
    edm2, fast_dit = write_edm2(root / "edm2", tiny, [1, 0]), write_fast_dit(root / "fd", tiny[:, :4], [1, 0])
    return {"edm2": edm2, "fast-dit": fast_dit, "zip": zipped(edm2, root / "edm2.zip")}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_damaged_files(small, data):
    form = data.draw(st.sampled_from(sorted(small)))
    files = [small[form]] if form == "zip" else sorted(p for p in small[form].rglob("*") if p.is_file())
    file = data.draw(st.sampled_from(files))
    sound = file.read_bytes()
    damaged = bytearray(sound)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(sound)))]
    else:
        at = data.draw(st.integers(0, min(len(sound) - 1, 400 if form != "zip" else 1 << 20)))
        damaged[at : at + 4] = data.draw(st.binary(min_size=1, max_size=4))
    file.write_bytes(damaged)
    try:
        values = outcome(small[form])
    finally:
        file.write_bytes(sound)
    assert values is None or np.isfinite(values).all()


labels = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers()))
names = st.one_of(st.sampled_from([edm2_name(0), edm2_name(1), "../edm2/" + edm2_name(0)]), st.text(max_size=5))
anything = st.recursive(labels, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3))


@settings(deadline=None, max_examples=40)
@given(st.one_of(st.lists(st.tuples(names, labels), max_size=4), anything))
def test_any_dataset_json(small, entries):
    file = small["edm2"] / "dataset.json"
    sound = file.read_bytes()
    replace_json(small["edm2"], entries)
    try:
        values = outcome(small["edm2"])
    finally:
        file.write_bytes(sound)
    if values is not None and entries is not None:
        assert sorted(name for name, _ in entries) == [edm2_name(0), edm2_name(1)]
        assert values[:2].tolist() == [label for _, label in sorted(entries)]


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()
