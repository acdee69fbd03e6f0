"""Every system and every setting of the design space: it trains, its checkpoint comes back, its weights are sampled."""

import json

import pytest

from tests.launching import ROOT, WORKERS, launched

SYSTEMS = [f"imagenet256_{system}_s2.yaml" for system in ("dit", "dtr", "switch_dit", "diff_moe")]
PRESETS = [*SYSTEMS, *(f"design_space/{p.name}" for p in sorted((ROOT / "switchdit/configs/design_space").iterdir()))]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """All presets, tiny, one after the other in one process."""
    out = tmp_path_factory.mktemp("presets")
    launched(1, WORKERS / "presets.py", out, *(f"switchdit/configs/{name}" for name in PRESETS))
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_and_comes_back(results, name):
    result = results[f"switchdit/configs/{name}"]
    first, last = result["losses"][0], result["losses"][-1]
    assert last["total"] < first["total"]
    assert last["mse"] < 0.9 * first["mse"]
    assert result["averaged_differs_by"] == 0
    assert result["resumed"] == result["uninterrupted"]
