"""The bench runs, and its three arms write the same bytes. Its times are judged by people."""

from __future__ import annotations

import pytest

from sbs_edge.bench.scale.bench import measure

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Ray leaves sockets to the end


def test_all_arms_give_the_same_bytes(scale_bundle, local_ray):
    result = measure(2000, bundle=scale_bundle, shard_rows=300)
    assert result["outputs_equal"]
    assert set(result["rows_per_second"]) == {"loop", "ray-1", "ray-2"}
    assert all(rate > 0 for rate in result["rows_per_second"].values())
