"""The kernel benchmark, on a shape small enough for a test."""

from sbs_edge.bench.kernel_bench import PEERS, measure


def test_each_peer_has_a_row_with_its_error():
    result = measure(n=256, d=16, v=512, repeats=1)
    assert [row["peer"] for row in result["rows"]] == list(PEERS)
    for row in result["rows"]:
        assert "absent" in row or (row["gradient_error"] < 1e-5 and row["seconds"] > 0)
