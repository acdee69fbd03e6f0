"""Tables, Markdown rows and comparisons of a metrics.json."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchdit.errors import UserError
from tools.metrics_report import comparison, incomparable, markdown, read_results, table


def results(**changes):
    return {
        **{"fid": 12.5, "sfid": 40.25, "inception_score": 24.9, "precision": 0.82, "recall": None, "kid": 0.00123},
        "options": {"distances": "float16", "nearest_neighbours": 3, "kid": {"subsets": 100, "subset_size": 512}},
        "reference": {"sha256": "aa", "count": 600, "statistics": "computed"},
        "samples": {"sha256": "bb", "count": 512},
        "network": {"sha256": "cc"},
        **changes,
    }


def test_table_sets_apart_what_is_not_adms():
    assert table(results()) == [
        "  FID                   12.5000",
        "  sFID                  40.2500",
        "  Inception Score       24.9000",
        "  precision              0.8200",
        "  recall           not available",
        "besides ADM's five:",
        "  KID                  0.001230  (100 subsets of 512 images)",
    ]


def test_markdown_row():
    assert markdown("a | b", 512, results()) == [
        "| Name | Images | FID | sFID | IS | Precision | Recall |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| a \\| b | 512 | 12.5000 | 40.2500 | 24.9000 | 0.8200 |  |",
    ]


def test_comparison_shows_old_new_and_difference():
    lines = [line.split() for line in comparison(results(), results(fid=10.25, recall=0.5))]
    assert lines[0] == ["old", "new", "difference"]
    assert lines[1] == ["FID", "12.5000", "10.2500", "-2.2500"]
    assert lines[5] == ["recall", "not", "available", "0.5000"]
    assert lines[6] == ["KID", "0.001230", "0.001230", "+0.000000"]


def test_each_reason_not_to_compare_is_a_line():
    other = results(
        network={"sha256": "xx"},
        reference={"sha256": "yy", "statistics": "stored"},
        samples={"count": 50},
        options={"distances": "float64", "nearest_neighbours": 3, "kid": {"subsets": 100, "subset_size": 50}},
    )
    assert incomparable(results(), results(samples={"sha256": "other", "count": 512})) == []
    assert incomparable(results(), other) == [
        "not comparable: network: cc before, xx now",
        "not comparable: reference: aa before, yy now",
        "not comparable: statistics of the reference: computed before, stored now",
        "not comparable: number of samples: 512 before, 50 now",
        "not comparable: distances of precision and recall: float16 before, float64 now",
        'not comparable: protocol of KID: {"subsets": 100, "subset_size": 512} before, '
        '{"subsets": 100, "subset_size": 50} now',
    ]
    assert "not comparable: network: unknown before, cc now" in incomparable({"fid": 1.0, "network": 5}, results())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not readable as JSON"),
        (b"\xff\xfe\x00", "is not readable as JSON"),
        (b"[" * 100_000, "is not readable as JSON"),
        (b"[1, 2]", "it is no metrics.json"),
        (b'{"loss": 3}', "it is no metrics.json"),
        (b'{"fid": "12"}', "it is no metrics.json"),
        (b'{"fid": 12, "recall": [1]}', "recall is [1], not a number"),
        (b" " * (1 << 20) + b"{}", "it is no metrics.json"),
    ],
)
def test_a_foreign_file_is_one_line(content, message, tmp_path):
    (tmp_path / "old.json").write_bytes(content)
    with pytest.raises(UserError) as mistake:
        read_results(tmp_path / "old.json")
    assert message in str(mistake.value)
    assert "\n" not in str(mistake.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["sha256", "count", "kid"]), inner),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(old=st.dictionaries(st.sampled_from([*results()]), VALUES))
def test_any_json_is_compared_or_refused_in_one_line(old, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(old))
    try:
        lines = [*comparison(read_results(path), results()), *incomparable(old, results())]
    except UserError as mistake:
        lines = [str(mistake)]
    assert all(len(line.splitlines()) == 1 for line in lines)
