"""The benchmark of reading latents prints figures that add up."""

import re

import numpy as np
import pytest
from test_compatibility import write

from tools import bench_latents as tool


def test_samples_are_counted_against_the_clock():
    seen = []
    wall, processor = tool.samples_per_second(lambda positions: seen.append(positions), 7, 0.02)
    assert np.array_equal(np.concatenate(seen), np.arange(7 * len(seen)))
    assert 0 < wall <= 7 * len(seen) / 0.02
    assert processor > 0


@pytest.mark.parametrize("flip", [True, False])
def test_every_pass_is_printed(tmp_path, capsys, flip):
    write(tmp_path, "v" * 64, flip)
    tool.main(["--latents", str(tmp_path), "--batch-size", "4", "--seconds", "0.01"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}: 2 images in 1 shards opened in" in first
    assert [re.match(r"(\w+.*), pass (\d): [1-9]\d* samples/s", line).groups() for line in lines] == [
        (name, str(i)) for name in ("moments", "training batches") for i in (1, 2, 3)
    ]
    with pytest.raises(SystemExit):
        tool.main(["--latents", str(tmp_path), "--seconds", "0"])
    assert "must be above 0" in capsys.readouterr().err
