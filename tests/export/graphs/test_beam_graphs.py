"""Beam search in a graph against ``generate``: every token, several widths, families and limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_students import make_student, open_graph, random_rows

from sbs_edge.export.graphs.beams import build_beam_generator
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.quant.precision import Float32


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("family", ["t5", "v1_1", "umt5"])
@pytest.mark.parametrize("seed", [4, 5])
def test_beams_are_those_of_generate(family: str, width: int, seed: int) -> None:
    model = make_student(family, seed=seed, spread=0.5)
    weights = weights_of(model)
    graph = open_graph(build_beam_generator(weights, Float32(), width))
    for limit in (1, 7, 24):
        ids, mask = random_rows(5, 18, seed=limit)
        tokens, log_p = graph.run(
            None, {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(limit, np.int64)}
        )
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=limit,
                do_sample=False, num_beams=width, length_penalty=1.0, early_stopping=False,
                return_dict_in_generate=True, output_scores=True, use_cache=True,
            )  # fmt: skip
        expected = out.sequences[:, 1:].numpy()
        lengths = [(list(row).index(1) + 1) if 1 in row else len(row) for row in expected.tolist()]
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(tokens[row, :length], expected[row, :length])
            assert (tokens[row, length:] == 0).all()  # generate fills with end-of-sequence when padding is 0
        np.testing.assert_allclose(log_p, out.sequences_scores.numpy() * np.array(lengths), rtol=1e-3)
