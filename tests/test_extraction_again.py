"""Extraction into a folder that holds latents: nothing is overwritten, doubled or called complete without a reason."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from switchdit.data.latent_dataset import LatentDataset
from switchdit.errors import UserError
from tests.extraction_inputs import arguments, content, noise, small_disk, write_autoencoder, write_photos
from tests.launching import ROOT, environment, free_port
from tools import extract_latents as tool
from tools import extraction


def options(data, out, *more):
    return arguments(data, out, "pixels", *more)


def failure(capsys, *argv):
    """The one line in which the program says what is wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        tool.main(options(*argv))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "|" not in line)
    return line


@pytest.fixture
def photos(tmp_path):
    """Nine images in three shards."""
    return write_photos(tmp_path / "photos", {"ant": 5, "bee": 4})


@pytest.fixture
def out(photos, tmp_path):
    tool.main(options(photos, tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def grown(photos, out, tmp_path):
    """Four images more in a shard of their own; returns their folder."""
    more = write_photos(tmp_path / "more", {"bee": 1, "cow": 3}, seed=9, first=20)
    tool.main(options(more, out, "--append"))
    return more


# ------------------------------------------------------------------------------------------------ other files


def test_images_of_another_folder_do_not_replace_a_complete_data_set(out, tmp_path, capsys):
    before = content(out)
    other = write_photos(tmp_path / "other", {"ant": 5, "bee": 4}, seed=20)
    line = failure(capsys, other, out)
    assert f"3 of 3 shards in {out} are of files that have changed" in line
    assert f"delete {out}/manifest.json and run this again" in line
    assert content(out) == before
    (out / "manifest.json").unlink()
    tool.main(options(other, out))
    assert "note: 3 shards there are made anew: they are of files that have changed" in capsys.readouterr().out
    tool.main(options(other, tmp_path / "fresh"))
    assert content(out) == content(tmp_path / "fresh")


def test_an_image_replaced_by_one_of_the_same_size_is_noticed(photos, out, capsys):
    os.utime(photos / "bee" / "1.JPEG", (1, 1))
    assert "1 of 3 shards" in failure(capsys, photos, out)


def test_changed_images_of_a_grown_data_set_are_made_anew_in_the_order_of_the_first_time(photos, out, grown, capsys):
    before = content(out)
    os.utime(photos / "bee" / "1.JPEG", (1, 1))
    assert "and run the first extraction and every --append again in their order" in failure(capsys, photos, out)
    (out / "manifest.json").unlink()
    tool.main(options(photos, out))
    said = capsys.readouterr().out
    assert "note: the manifest does not list 1 shards that lie there, such as shard_00003.npy" in said
    tool.main(options(grown, out, "--append"))
    assert "lie there" not in capsys.readouterr().out
    after = content(out)
    assert {name for name in before if before[name] != after[name]} == {"shard_00001.json"}


def test_a_rerun_that_fails_leaves_the_manifest(photos, out, capsys):
    bad, before = photos / "bee" / "1.JPEG", content(out)
    about = bad.stat()
    bad.write_bytes(bytes(about.st_size))
    os.utime(bad, ns=(about.st_mtime_ns, about.st_mtime_ns))
    (out / "shard_00001.npy").unlink()
    assert str(bad) in failure(capsys, photos, out)
    del before["shard_00001.npy"]
    assert content(out) == before


def test_a_shard_made_anew_outdates_the_manifest(photos, out, monkeypatch):
    (out / "shard_00002.npy").unlink()
    seen = []

    def watched(folder, *rest, write=extraction.write_shard):
        seen.append((folder / "manifest.json").exists())
        return write(folder, *rest)

    monkeypatch.setattr(extraction, "write_shard", watched)
    before = json.loads((out / "manifest.json").read_bytes())
    tool.main(options(photos, out))
    assert seen == [False]
    assert json.loads((out / "manifest.json").read_bytes()) == before


# ----------------------------------------------------------------------------------------------------- append


def test_a_folder_that_has_grown_is_not_appended(photos, out, capsys):
    before = content(out)
    Image.fromarray(noise(30, 30)).save(photos / "bee" / "9.png")
    for more in ([], ["--append"]):
        line = failure(capsys, photos, out, *more)
        assert f"9 of the 10 images of {photos} are in {out} already by class and name, such as 'ant/1.JPEG'" in line
        assert "into a folder of their own" in line
    assert content(out) == before


def test_new_classes_are_told(photos, out, tmp_path, capsys):
    for number, classes, told in (("1", {"bee": 1, "cow": 1}, "cow"), ("2", {"bee": 1}, "none")):
        more = write_photos(tmp_path / number, classes, first=10 * int(number))
        tool.main(options(more, out, "--append"))
        assert f"; new classes: {told}\n" in capsys.readouterr().out


def test_images_with_and_without_classes_do_not_mix(photos, out, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    Image.fromarray(noise(30, 30)).save(tmp_path / "flat" / "1.png")
    before = content(out)
    line = failure(capsys, tmp_path / "flat", out, "--append")
    assert f"the images of {tmp_path / 'flat'} have no classes, those of {out} have" in line
    assert content(out) == before
    tool.main(options(tmp_path / "flat", tmp_path / "flat_out"))
    line = failure(capsys, photos, tmp_path / "flat_out", "--append")
    assert f"the images of {tmp_path / 'flat_out'} have no classes, those of {photos} have" in line


# ------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("cut", [0, 2])
def test_a_damaged_shard_of_other_images_is_not_complete(photos, out, grown, capsys, cut):
    shard = out / "shard_00003.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-cut]) if cut else shard.unlink()
    line = failure(capsys, photos, out)
    assert f"{shard} is missing or damaged" in line
    assert "the command that made it, with its --data, repairs it" in line
    tool.main(options(grown, out, "--append"))
    assert shard.read_bytes() == whole
    tool.main(options(photos, out))
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["{", "[]", '{"format_version": 2}'])
def test_advice_for_a_damaged_manifest_loses_no_appended_images(photos, out, grown, capsys, damage):
    before = content(out)
    (out / "manifest.json").write_text(damage)
    line = failure(capsys, photos, out)
    assert "manifest.json is damaged: " in line
    assert "delete it, then run the first extraction and every --append again in their order" in line
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"not complete.*every --append again"):
        LatentDataset(out)
    for argv in (options(photos, out), options(grown, out, "--append")):
        tool.main(argv)
    assert content(out) == before


def test_advice_for_a_damaged_manifest_of_one_extraction(photos, out, capsys):
    (out / "manifest.json").write_text("{")
    line = failure(capsys, photos, out)
    assert "not JSON" in line
    assert line.endswith("delete it, then run the same extraction command again to continue")


def test_a_damaged_sidecar_is_named_with_what_to_do(photos, out, capsys):
    (out / "manifest.json").unlink()
    (out / "shard_00001.json").write_text("{")
    assert "shard_00001.json is damaged: not JSON" in (line := failure(capsys, photos, out))
    assert "delete it, then run" in line


# ----------------------------------------------------------------------------------------- disks, permissions


def test_a_disk_that_is_full_is_told_and_spoils_nothing(photos, tmp_path, capsys):
    big = ["--image-size", "64", "--batch-size", "2"]  # 196 kB a shard
    with small_disk(tmp_path / "disk", "size=512k") as disk:
        line = failure(capsys, photos, disk / "out", *big)
        assert line.startswith("error: no space left on the disk that holds ")
        assert "shard_0000" in line
        assert not (disk / "out" / "manifest.json").exists()
        assert not list((disk / "out").glob(".*"))
        kept = content(disk / "out")
    tool.main(options(photos, tmp_path / "whole", *big))
    assert kept and kept.items() <= content(tmp_path / "whole").items()


def test_a_disk_that_cannot_be_written_is_told_before_the_work(photos, out, tmp_path, capsys, monkeypatch):
    with small_disk(tmp_path / "disk", "ro") as disk:
        monkeypatch.setattr(tool, "list_images", None)
        assert f"--out {disk} cannot be written" in failure(capsys, photos, disk)
        assert f"--out {disk}/new/out cannot be written: {disk} is no folder" in failure(
            capsys, photos, disk / "new" / "out", "--append"
        )
        with pytest.raises(SystemExit, match="2"):
            tool.main(["--data", str(photos), "--vae", "pixels", "--preview", str(disk / "x" / "p.png")])
        assert "--preview" in capsys.readouterr().err


def test_a_folder_below_a_file_is_told_before_the_work(photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tool, "list_images", None)
    assert "file is no folder that you may write to" in failure(capsys, photos, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["manifest.json", "shard_00001.json", "labels_00000.npy"])
def test_a_file_that_may_not_be_read_is_told(photos, out, capsys, monkeypatch, name):
    def refused(path, *rest, opener=io.open):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return opener(path, *rest)

    monkeypatch.setattr(io, "open", refused)
    monkeypatch.setattr("builtins.open", refused)
    assert failure(capsys, photos, out) == f"error: {out}/{name} cannot be read: Permission denied"


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--verify", "--sample", "--shard-size", "3"],
            "--verify extracts nothing; it does not take --shard-size, --s",
        ),
        (["--stats", "--image-size", "8"], "--stats extracts nothing; it does not take --image-size"),
        (["--preview", "x.png", "--no-flip", "--data", "x", "--vae", "x"], "does not take --out, --no-flip"),
    ],
)
def test_options_that_a_mode_would_ignore_are_refused(out, more, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--out", str(out), *more])
    assert message in capsys.readouterr().err


def test_only_rank_0_tells_of_an_unknown_option(capsys, monkeypatch):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            tool.main(["--bogus"])
        assert capsys.readouterr().err.count("error:") == lines


@pytest.mark.parametrize(("reason", "code"), [((), 130), ((signal.SIGTERM,), 143)])
def test_only_an_interrupt_is_called_one(photos, tmp_path, monkeypatch, capsys, reason, code):
    def stopped(*_):
        raise KeyboardInterrupt(*reason)

    monkeypatch.setattr(tool, "encode_shards", stopped)
    with pytest.raises(SystemExit, match=str(code)):
        tool.main(options(photos, tmp_path / "out"))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line and "|" not in line)
    assert ("interrupted" in line) == ("run the same" in line) == (code == 130)
    assert "finished shards are kept in" in line


# ----------------------------------------------------------------------------------------------- several processes


def launch(*argv, processes=2):
    return subprocess.run(
        [ROOT / "launchers" / "single_node.sh", "tools/extract_latents.py", *map(str, argv)],
        cwd=ROOT,
        env=environment(NPROC=str(processes), MASTER_PORT=str(free_port())),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_bad_image_of_one_process_is_told_alone(photos, tmp_path):
    bad = photos / "ant" / "deeper" / "3.JPEG"  # in the second shard
    bad.write_bytes(b"no image")
    done = launch(*options(photos, tmp_path / "out"))
    assert done.returncode != 0
    assert done.stderr.count("error:") == 1
    assert str(bad) in done.stderr
    assert "again to continue" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_bytes_whatever_the_number_of_processes_and_threads(photos, tmp_path, monkeypatch):
    vae = write_autoencoder(tmp_path / "vae")
    more = ["--image-size", "64", "--batch-size", "4"]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tool.main(arguments(photos, tmp_path / "one", vae, *more))
    finally:
        torch.set_num_threads(threads)
    argv = arguments(photos, tmp_path / "two", vae, *more)
    other = subprocess.Popen(
        [sys.executable, tool.__file__, *argv],
        env=environment(RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"),
        stdout=subprocess.PIPE,
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    tool.main(argv)
    assert other.wait(60) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
